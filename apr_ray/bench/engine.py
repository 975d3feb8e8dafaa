"""TorchEngine against a bare decoding loop, and on thread trees against `transformers.generate` in static batches."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from apr_ray.bench.recording import (
    Recording,
    bench_config,
    fresh_policy,
    fresh_weights,
    largest_difference,
    new_engine,
    record,
    replay_trees,
)
from apr_ray.bench.timing import REPEATS, Result, all_in_turn, in_turn
from apr_ray.config import Config
from apr_ray.core.engine import GenerateRequest, SamplingParams
from apr_ray.core.ledger import Call, Path, ThreadTree
from apr_ray.core.weights import layout_of
from apr_ray.engines.torch_engine.decoder import Decoder
from apr_ray.engines.torch_engine.engine import TorchEngine
from apr_ray.model.state import flatten


def run(
    sequences: int = 64, prompt_tokens: int = 32, new_tokens: int = 200, trees: int = 192, repeats: int = REPEATS
) -> Result:
    """`ratio`: to the bare loop, `sequences` at once, the median over neighbouring turns; `generate_ratio`: to
    `generate` on trees. One thread. Engine and loop have KV for as many tokens: reading it is most of a step, and takes
    longer the farther apart it lies."""
    torch.set_num_threads(1)
    config = bench_config()
    bare = _against_the_bare_loop(config, sequences, prompt_tokens, new_tokens, 3 * repeats)  # they take seconds each
    return bare | _against_generate(record(trees, config), sequences, max(1, repeats // 2))


def _against_the_bare_loop(config: Config, n: int, prompt_tokens: int, new_tokens: int, repeats: int) -> Result:
    shape, state = fresh_weights(config)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, shape.vocab, (n, prompt_tokens), generator=generator)
    context = prompt_tokens + new_tokens
    engine = TorchEngine(shape, state, max_sequences=n, cache_slots=0, context_tokens=context)
    loop = BareLoop(Decoder(shape, n, context))
    layout = layout_of(shape.parameter_shapes().items())
    loop.decoder.load(flatten(state, layout), layout)
    made: dict[str, torch.Tensor] = {}

    async def one(i: int) -> tuple[list[int], list[float]]:
        sampling = SamplingParams(max_new_tokens=new_tokens, seed=i)
        asked = GenerateRequest(f"r{i:04d}", tuple(prompts[i].tolist()), sampling)
        chunks = [chunk async for chunk in engine.generate(asked)]
        return [t for c in chunks for t in c.token_ids], [lp for c in chunks for lp in c.logprobs]

    async def all_of_them() -> list[tuple[list[int], list[float]]]:
        return list(await asyncio.gather(*(one(i) for i in range(n))))

    def ours() -> None:
        tokens, logprobs = zip(*asyncio.run(all_of_them()), strict=True)
        made["tokens"] = torch.tensor(tokens)  # the same in every turn
        made["engine"] = torch.tensor(logprobs)

    def bare() -> None:
        made["loop"] = loop(prompts, made["tokens"])

    taken = all_in_turn({"engine": ours, "loop": bare}, repeats)
    tokens = n * new_tokens
    return {
        "ratio": statistics.median(bare / own for own, bare in zip(taken["engine"], taken["loop"], strict=True)),
        "engine_tokens_per_s": tokens / statistics.median(taken["engine"]),
        "bare_loop_tokens_per_s": tokens / statistics.median(taken["loop"]),
        "sequences": float(n),
        "max_delta_logprob": float((made["engine"] - made["loop"]).abs().max()),
    }


class BareLoop:
    """Decoding at its barest: stacked KV, all rows at one position, no scheduling, no sampling options, no ends."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    @torch.inference_mode()
    def __call__(self, prompts: torch.Tensor, replies: torch.Tensor) -> torch.Tensor:
        """Draw a token per step, go on with the given one: logprobs [n, new] of `replies` after `prompts`."""
        logprobs = []
        fed, start = prompts, 0
        for step in range(replies.shape[1]):
            distribution = torch.log_softmax(self._forward(fed, start), dim=-1)
            torch.multinomial(distribution.exp(), 1)
            start += fed.shape[1]
            fed = replies[:, step : step + 1]
            logprobs.append(distribution.gather(1, fed))
        return torch.cat(logprobs, dim=1)

    def _forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        shape = self.decoder.shape
        heads, kv_heads, size, eps = shape.heads, shape.kv_heads, shape.head_size, shape.norm_eps
        n, width = tokens.shape
        end = start + width
        cos, sin = self.decoder.cos[start:end, :, : size // 2], self.decoder.sin[start:end, :, size // 2 :]
        x = self.decoder.embed[tokens]
        for layer, (norm1, qkv, out, norm2, gate_up, down) in enumerate(self.decoder.layers):
            projected = F.linear(F.rms_norm(x, (shape.hidden,), norm1, eps), qkv)
            qk, v = projected.view(n, width, heads + 2 * kv_heads, size).tensor_split((heads + kv_heads,), dim=2)
            q, k = rotate(qk, cos, sin).tensor_split((heads,), dim=2)
            keys, values = self.decoder.keys[layer], self.decoder.values[layer]
            keys[:, :, start:end] = k.transpose(1, 2)
            values[:, :, start:end] = v.transpose(1, 2)
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                keys[:, :, :end],
                values[:, :, :end],
                is_causal=width > 1,
                enable_gqa=heads != kv_heads,
            )
            x = x + F.linear(attended.transpose(1, 2).reshape(n, width, heads * size), out)
            gate, up = F.linear(F.rms_norm(x, (shape.hidden,), norm2, eps), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x[:, -1], (shape.hidden,), self.decoder.final_norm, eps), self.decoder.head)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding; x is [n, t, heads, size], cos and sin [t, 1, size / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _against_generate(recording: Recording, batch: int, repeats: int) -> Result:
    config = recording.config
    policy = fresh_policy(config).eval()
    made: dict[str, dict[tuple[str, Path], float]] = {}

    def ours() -> None:
        engine = new_engine(config, recording.replies, max_sequences=batch, cache_slots=config.engine.cache_slots)
        made["engine"] = asyncio.run(replay_trees(engine, recording.trees, config.rollout.concurrent_trees))

    def generate() -> None:
        made["generate"] = generate_in_static_batches(policy, recording, batch)

    times = in_turn({"engine": ours, "generate": generate}, repeats)
    tokens = recording.sampled_tokens
    return {
        "generate_ratio": times["generate"] / times["engine"],
        "trees": float(len(recording.trees)),
        "trees_engine_tokens_per_s": tokens / times["engine"],
        "trees_generate_tokens_per_s": tokens / times["generate"],
        "trees_max_delta_logprob_per_thread": largest_difference(made["engine"], made["generate"]),
    }


def generate_in_static_batches(policy: Any, recording: Recording, batch: int) -> dict[tuple[str, Path], float]:
    """All calls by `transformers.generate`, `batch` at a time, in waves: a call follows those it waits for.

    A batch ends with its longest call; prompts are padded on the left. Returns each thread's sum of logprobs.
    """
    sums: dict[tuple[str, Path], float] = {}
    for wave in waves(recording):
        for start in range(0, len(wave), batch):
            part = wave[start : start + batch]
            for (key, call), total in zip(part, _generate([call for _, call in part], policy), strict=True):
                sums[key, call.path] = sums.get((key, call.path), 0.0) + total
    return sums


def waves(recording: Recording) -> list[list[tuple[str, Call]]]:
    """Calls, by how many others in a chain each must wait for."""
    out: dict[int, list[tuple[str, Call]]] = {}
    for tree in recording.trees:
        for wave, call in _waves_of(tree, (), 0)[0]:
            out.setdefault(wave, []).append((tree.problem_key, call))
    return [out[wave] for wave in sorted(out)]


def _waves_of(tree: ThreadTree, path: Path, wave: int) -> tuple[list[tuple[int, Call]], int]:
    """A thread's calls and its descendants', each with its wave, from `wave` on; and the first wave after them."""
    placed: list[tuple[int, Call]] = []
    spawns = {spawn.segment: spawn.children for spawn in tree.spawns if spawn.path == path}
    for call in [c for c in tree.calls if c.path == path]:
        placed.append((wave, call))
        wave += 1
        below = [_waves_of(tree, child, wave) for child in spawns.get(call.segment, ())]
        placed += [one for calls, _ in below for one in calls]
        wave = max((after for _, after in below), default=wave)
    return placed, wave


@torch.inference_mode()
def _generate(calls: Sequence[Call], policy: Any) -> list[float]:
    from transformers import LogitsProcessorList

    width = max(len(call.prompt_ids) for call in calls)
    longest = max(len(call.sampled_ids) for call in calls)
    prompts = torch.zeros((len(calls), width), dtype=torch.int64)
    present = torch.zeros((len(calls), width), dtype=torch.int64)
    recorded = torch.zeros((len(calls), longest), dtype=torch.int64)
    for i, call in enumerate(calls):
        prompts[i, width - len(call.prompt_ids) :] = torch.tensor(call.prompt_ids)
        present[i, width - len(call.prompt_ids) :] = 1
        recorded[i, : len(call.sampled_ids)] = torch.tensor(call.sampled_ids)
    logprobs: list[torch.Tensor] = []
    steps = itertools.count()

    def take_recorded(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        chosen = recorded[:, next(steps)][:, None]
        logprobs.append(torch.log_softmax(logits.float(), dim=-1).gather(1, chosen))
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen, 0.0)

    policy.generate(
        prompts,
        attention_mask=present,
        do_sample=True,
        use_cache=True,
        max_new_tokens=longest,
        eos_token_id=None,
        logits_processor=LogitsProcessorList([take_recorded]),
    )
    whole = torch.cat(logprobs, dim=1)
    return [float(row[: len(call.sampled_ids)].sum()) for row, call in zip(whole, calls, strict=True)]
