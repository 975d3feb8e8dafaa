"""A Llama forward pass over KV slots.

Written by hand, where `transformers` has a model: its caches are made for batches that begin and end together, and its
own continuous batching is slow on a CPU (`apr-ray bench engine` compares with `generate`). Here a step is a flat list
of tokens of any rows, q/k/v and gate/up are one matrix each, and KV stays in place between steps. Only attention sees
rows: it runs span by span, each span as far as its own longest row, because reading KV is most of a step's cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from apr_ray.core.errors import AprError
from apr_ray.core.weights import TensorSpec


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a Llama, from its Hugging Face `config.json`."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    context: int
    rope_theta: float
    norm_eps: float
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderShape:
        """From the parsed `config.json` of a Llama checkpoint."""
        heads = config["num_attention_heads"]
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        return cls(
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            ffn=config["intermediate_size"],
            context=config["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            norm_eps=config["rms_norm_eps"],
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    def stacks(self) -> list[dict[str, tuple[int, ...]]]:
        """The matrices and vectors that a forward pass needs, in its order. Each is one or more parameters, one below
        the other: Hugging Face names to shapes."""
        q, kv, d = self.heads * self.head_size, self.kv_heads * self.head_size, self.hidden
        stacks: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (self.vocab, d)}]
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            stacks += [
                {layer + "input_layernorm.weight": (d,)},
                {layer + f"self_attn.{part}_proj.weight": (rows, d) for part, rows in (("q", q), ("k", kv), ("v", kv))},
                {layer + "self_attn.o_proj.weight": (d, q)},
                {layer + "post_attention_layernorm.weight": (d,)},
                {layer + f"mlp.{part}_proj.weight": (self.ffn, d) for part in ("gate", "up")},
                {layer + "mlp.down_proj.weight": (d, self.ffn)},
            ]
        stacks.append({"model.norm.weight": (d,)})
        if not self.tied:
            stacks.append({"lm_head.weight": (self.vocab, d)})
        return stacks

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face parameter names to shapes: what a weight update must hold, no more and no less."""
        return {name: shape for stack in self.stacks() for name, shape in stack.items()}


def require_plain_llama(config: Mapping[str, Any], checkpoint: str) -> None:
    """Raise AprError for a checkpoint that `Decoder` would compute otherwise than it was trained."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    for key, found, known in (
        ("rope_type", kind, "default"),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", config.get("attention_bias", False), False),
        ("mlp_bias", config.get("mlp_bias", False), False),
    ):
        if found != known:
            raise AprError(
                f"{checkpoint}: {key} is {found!r}, the torch engine knows {known!r}", "Use engine.name=sglang"
            )


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring slots that attend in one call.

    Attributes:
        first, rows: slots [first, first + rows).
        width: new tokens of each.
        end: tokens of the longest one, new ones included.
        even: all are as long, so that a single new token may look at everything.
    """

    first: int
    rows: int
    width: int
    end: int
    even: bool


def _stacked(whole: torch.Tensor, specs: Sequence[TensorSpec]) -> torch.Tensor:
    """Parameters one below the other: a view where they lie so, which is how `transformers` orders them."""
    if all(after.offset == before.offset + before.size for before, after in itertools.pairwise(specs)):
        return whole[specs[0].offset : specs[-1].offset + specs[-1].size].view(-1, *specs[0].shape[1:])
    return torch.cat([whole[spec.offset : spec.offset + spec.size].view(spec.shape) for spec in specs])


class Decoder:
    """Weights and KV slots of one model; `forward` appends tokens to slots, between `allocate` and `free`.

    Args:
        shape: sizes.
        slots: rows of KV memory.
        context: positions per slot.
        device, dtype: of weights, KV and matrix products. Angles are float32, as are the last norm and the head.

    Raises:
        AprError: there is no room for the KV slots.
    """

    def __init__(
        self, shape: DecoderShape, slots: int, context: int, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.shape = shape
        self.device = torch.device(device)
        self.dtype = dtype
        self.by_numpy = device == "cpu" and dtype == torch.float32
        """Whether memory is numpy's: it takes huge pages where the system has them, and writes KV thrice as fast."""
        self.flat: np.ndarray[Any, Any] | None = None
        self.spare: np.ndarray[Any, Any] | None = None
        self.kv_size = (shape.layers, slots, 2 * shape.kv_heads, context, shape.head_size)
        self.allocate()
        half = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
        angles = torch.outer(torch.arange(context, dtype=torch.float32), shape.rope_theta**-half)
        self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(self.device)[:, None]
        self.sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(self.device)[:, None]
        self.columns = torch.arange(context, device=self.device)

    def allocate(self) -> None:
        """Make the KV slots, which hold nothing: keys and values of a token side by side, to be written at once."""
        try:
            if self.by_numpy:  # zeros that take memory as it is touched
                self.kv = torch.from_numpy(np.zeros(self.kv_size, dtype=np.float32))
            else:
                self.kv = torch.zeros(self.kv_size, dtype=self.dtype, device=self.device)
        except (MemoryError, RuntimeError) as error:  # numpy's and torch's
            gigabytes = math.prod(self.kv_size) * self.dtype.itemsize / 1e9
            raise AprError(
                f"{self.kv_size[1]} slots of {self.kv_size[3]} tokens take {gigabytes:.1f} GB, which the"
                f" {'machine' if self.device.type == 'cpu' else 'GPU'} lacks",
                "Lower engine.max_sequences, engine.cache_slots or engine.context_tokens",
            ) from error
        self.keys, self.values = self.kv.chunk(2, dim=2)

    def free(self) -> None:
        """Give the memory of the KV slots back to the system."""
        self.kv = self.keys = self.values = torch.empty(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def room(self) -> np.ndarray[Any, Any] | None:
        """Memory to put the next weights into, where they are computed with where they lie: float32 [n], that of the
        weights before the present ones. None where `load` copies them."""
        if self.by_numpy and self.spare is None:
            self.spare = np.empty(sum(map(math.prod, self.shape.parameter_shapes().values())), dtype=np.float32)
        return self.spare

    def load(self, flat: Any, layout: Sequence[TensorSpec]) -> None:
        """Take over weights, all or, where memory does not suffice, none; the caller has checked them.

        Args:
            flat: float32 [n], an array or a tensor; where `room` gives memory it is computed with where it lies, so it
                must stay as it is.
            layout: what is where in it.
        """
        whole = torch.as_tensor(flat)
        if not self.by_numpy:
            whole = whole.to(self.device, self.dtype, copy=True)
        spec_of = {spec.name: spec for spec in layout}
        matrices = [_stacked(whole, [spec_of[name] for name in stack]) for stack in self.shape.stacks()]
        if self.by_numpy:
            self.flat, self.spare = flat, self.flat
        self.embed, *rest = matrices
        if not self.shape.tied:
            rest.pop()
        rest.pop()
        self.final_norm = self._precise(flat, spec_of["model.norm.weight"])
        self.head = self._precise(flat, spec_of["model.embed_tokens.weight" if self.shape.tied else "lm_head.weight"])
        self.layers = [tuple(rest[i : i + 6]) for i in range(0, len(rest), 6)]

    def _precise(self, flat: Any, spec: TensorSpec) -> torch.Tensor:
        """A parameter in float32, on the device; where it lies, if that is where the decoder computes."""
        part = torch.as_tensor(flat)[spec.offset : spec.offset + spec.size].view(spec.shape)
        return part if self.by_numpy else part.to(self.device, torch.float32, copy=True)

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` positions of one slot's KV to another."""
        self.kv[:, target, :, :tokens] = self.kv[:, source, :, :tokens]

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        spans: Sequence[Span],
        last: torch.Tensor,
    ) -> torch.Tensor:
        """Append tokens to slots and return the logits after some of them.

        Args:
            tokens, slots, positions: int64 [t]; slot by slot in the order of `spans`, positions ascending; all earlier
                positions of a slot are there already.
            spans: cover all t tokens.
            last: int64 [n]; indices into the t tokens.

        Returns:
            float32 [n, vocab].
        """
        shape = self.shape
        heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_size
        cuts = itertools.accumulate((span.rows * span.width for span in spans), initial=0)
        parts = [(span, slice(a, b)) for span, (a, b) in zip(spans, itertools.pairwise(cuts), strict=True)]
        masks = [self._mask(span, positions[part]) for span, part in parts]
        by_numpy = self.by_numpy
        kv: Any = self.kv.numpy() if by_numpy else self.kv
        place: Any = (slots.numpy(), slice(None), positions.numpy()) if by_numpy else (slots, slice(None), positions)
        at: Any = positions
        if len(spans) == 1 and masks[0] is None:  # one token of each row, at one place: no list of them is needed
            [span] = spans
            at = slice(span.end - 1, span.end)
            place = (slice(span.first, span.first + span.rows), slice(None), span.end - 1)
        cos, sin = self.cos[at], self.sin[at]
        x = self.embed[tokens]
        for layer, (norm1, qkv, out, norm2, gate_up, down) in enumerate(self.layers):
            projected = F.linear(F.rms_norm(x, (shape.hidden,), norm1, shape.norm_eps), qkv)
            by_head = projected.view(-1, heads + 2 * kv_heads, size)
            rotate_(by_head[:, : heads + kv_heads], cos, sin)
            q, new = by_head.tensor_split((heads,), dim=1)
            kv[layer][place] = new.numpy() if by_numpy else new
            keys, values = self.keys[layer], self.values[layer]
            attended = []
            for (span, part), mask in zip(parts, masks, strict=True):
                rows = slice(span.first, span.first + span.rows)
                one = F.scaled_dot_product_attention(
                    q[part].view(span.rows, span.width, heads, size).transpose(1, 2),
                    keys[rows, :, : span.end],
                    values[rows, :, : span.end],
                    attn_mask=mask,
                    enable_gqa=heads != kv_heads,
                )
                attended.append(one.transpose(1, 2).reshape(-1, heads * size))
            x = x + F.linear(attended[0] if len(parts) == 1 else torch.cat(attended), out)
            gate, up = F.linear(F.rms_norm(x, (shape.hidden,), norm2, shape.norm_eps), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        if len(last) < len(x):
            x = x[last]
        return self._logits(x)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [n, vocab] from the last layer's [n, hidden]: rounded logits would round every logprob."""
        return F.linear(F.rms_norm(x.float(), (self.shape.hidden,), self.final_norm, self.shape.norm_eps), self.head)

    def _mask(self, span: Span, positions: torch.Tensor) -> torch.Tensor | None:
        """[rows, 1, width, end]: 0 where a token may look, minus infinity where not; None for no limit."""
        if span.even and span.width == 1:
            return None
        hidden = self.columns[: span.end] > positions.view(span.rows, 1, span.width, 1)
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -torch.inf)

    @torch.inference_mode()
    def forward_fixed(self, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Append one token to each of the first rows, so that a row's bits do not depend on the other rows'.

        Every matrix product has the shape that the number of rows gives it, which the caller keeps the same; attention
        goes row by row over the row's own positions. A token's KV is then a function of the tokens before it alone,
        whether it was part of a prompt, sampled, or copied from another slot.

        Args:
            tokens: int64 [n], on the CPU; the next token of rows 0..n-1.
            start: int64 [n], on the CPU; tokens already in each.

        Returns:
            float32 [n, vocab].
        """
        shape = self.shape
        n = tokens.shape[0]
        heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_size
        ends = [at + 1 for at in start.tolist()]
        tokens, start = tokens.to(self.device), start.to(self.device)
        cos, sin = self.cos[start], self.sin[start]
        rows = torch.arange(n, device=self.device)
        x = self.embed[tokens]
        for layer, (norm1, qkv, out, norm2, gate_up, down) in enumerate(self.layers):
            projected = F.linear(F.rms_norm(x, (shape.hidden,), norm1, shape.norm_eps), qkv)
            by_head = projected.view(n, heads + 2 * kv_heads, size)
            rotate_(by_head[:, : heads + kv_heads], cos, sin)
            q, new = by_head.tensor_split((heads,), dim=1)
            self.kv[layer][rows, :, start] = new
            keys, values = self.keys[layer], self.values[layer]
            attended = torch.cat(
                [
                    F.scaled_dot_product_attention(
                        q[i : i + 1, :, None],
                        keys[i : i + 1, :, :end],
                        values[i : i + 1, :, :end],
                        enable_gqa=heads != kv_heads,
                    )
                    for i, end in enumerate(ends)
                ]
            )
            x = x + F.linear(attended.reshape(n, heads * size), out)
            gate, up = F.linear(F.rms_norm(x, (shape.hidden,), norm2, shape.norm_eps), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        return self._logits(x)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding, in place; x is [t, heads, size], cos and sin float32 [t, 1, size], the sine negative in its
    first half."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    if x.dtype == cos.dtype:
        x.mul_(cos).addcmul_(swapped, sin)
    else:
        x.copy_(x * cos + swapped * sin)
