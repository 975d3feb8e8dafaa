"""`TorchEngine`: continuous batching over KV slots, in one asyncio loop, one step at a time.

Invariants (tested):
- rows [0, active) are the running requests and hold their KV contiguously, so that a decode step reads it in place;
- a row's KV covers its first `kv_lengths[row]` tokens, under the current weights; what is beyond is prefilled next;
- rows [max_sequences, slots) keep the KV of ended requests for whoever begins with the same tokens;
- weights change between steps only. All KV is recomputed after a change, so every token's `kv_version` is its version.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apr_ray.core.engine import Capabilities, Chunk, EngineStats, FinishReason, GenerateRequest, SamplingParams
from apr_ray.core.errors import AprError
from apr_ray.core.weights import WeightUpdate, WeightVersion
from apr_ray.engines.torch_engine.decoder import Decoder, DecoderShape
from apr_ray.engines.torch_engine.sampler import sample, uniforms
from apr_ray.model.llama import load_policy, read_config
from apr_ray.model.state import check_update, trainable_parameters

FIRST_VERSION = WeightVersion(0, 0)
MIN_REUSED_TOKENS = 4
"""A shorter common prefix is cheaper to compute again than to copy."""
PROBED_TOKENS = 16
IDLE = SamplingParams()
"""Of rows that do not sample in a step: their draw is thrown away."""


@dataclass(eq=False)
class _Running:
    """A request and what it has produced; `row` is -1 while it waits."""

    request: GenerateRequest
    max_new: int
    row: int = -1
    sampled: int = 0
    cached: int = 0
    pending_ids: list[int] = field(default_factory=list)
    pending_logprobs: list[float] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    chunks: list[Chunk] = field(default_factory=list)
    finished: bool = False
    abort: bool = False


class TorchEngine:
    """The embedded engine.

    Args:
        shape: sizes of the model.
        state: its weights, by Hugging Face names.
        version: which weights they are.
        max_sequences: requests that run at the same time; the rest wait.
        cache_slots: ended requests whose KV is kept for reuse.
        context_tokens: prompt and sampled tokens of one request together; the model's own limit by default.
        stream_interval: tokens per chunk; the end of a request always comes at once.
        deterministic: a request's tokens and logprobs do not depend, to the last bit, on what else is in the batch, on
            its row, or on what was cached. Every step computes `max_sequences` rows by one token, prompts included, and
            attends row by row (see `Decoder.forward_fixed`).

    Raises:
        AprError: the context does not fit the model; or `deterministic` is asked for where this machine's matrix
            products treat rows differently.
    """

    def __init__(
        self,
        shape: DecoderShape,
        state: Mapping[str, np.ndarray[Any, Any]],
        version: WeightVersion = FIRST_VERSION,
        *,
        max_sequences: int = 64,
        cache_slots: int = 64,
        context_tokens: int | None = None,
        stream_interval: int = 16,
        device: str = "cpu",
        deterministic: bool = False,
    ) -> None:
        if context_tokens is not None and context_tokens > shape.context:
            raise AprError(
                f"engine.context_tokens is {context_tokens}, the model was built for {shape.context}",
                "Lower it, or use a model with a longer context",
            )
        self.context_tokens = context_tokens or shape.context
        self.max_sequences = max_sequences
        self.stream_interval = stream_interval
        slots = max_sequences + cache_slots
        self.decoder = Decoder(shape, slots, self.context_tokens, device)
        self.decoder.load(state)
        self.version = version
        self.expected = shape.parameter_shapes()
        self.tokens = np.zeros((slots, self.context_tokens + 1), dtype=np.int64)
        self.lengths = np.zeros(slots, dtype=np.int64)  # tokens a slot holds
        self.kv_lengths = np.zeros(slots, dtype=np.int64)  # of which the KV is computed
        self.last_used = np.zeros(slots, dtype=np.int64)
        self.active: list[_Running] = []  # active[i] runs in row i
        self.waiting: list[tuple[int, int, _Running]] = []
        self.by_id: dict[str, _Running] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._clock = 0
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "sampled_tokens", "steps"), 0)
        self.capabilities = Capabilities(
            seeds=True, deterministic=deterministic, in_flight_update=True, priorities=True
        )
        if deterministic:
            self._require_equal_rows()

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path, **options: Any) -> TorchEngine:
        """An engine over a Hugging Face Llama checkpoint folder; options as in the constructor."""
        shape = DecoderShape.from_config(read_config(checkpoint))
        policy = load_policy(checkpoint)
        state = {name: tensor.detach().numpy() for name, tensor in trainable_parameters(policy)}
        return cls(shape, state, **options)

    # --- requests ---------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """See `core.engine.Engine.generate`."""
        running = self._submit(request)
        try:
            while True:
                await running.ready.wait()
                running.ready.clear()
                chunks, running.chunks = running.chunks, []
                for chunk in chunks:
                    yield chunk
                    if chunk.finish is not None:
                        return
        finally:
            running.abort = True  # a no-op for a finished request

    def _submit(self, request: GenerateRequest) -> _Running:
        prompt = np.asarray(request.prompt_ids, dtype=np.int64)
        if len(prompt) == 0:
            raise AprError(f"request {request.request_id} has an empty prompt", "Give at least one token")
        if len(prompt) >= self.context_tokens:
            raise AprError(
                f"prompt of {len(prompt)} tokens leaves no room in a context of {self.context_tokens}",
                "Shorten it, or raise engine.context_tokens",
            )
        if prompt.min() < 0 or prompt.max() >= self.decoder.shape.vocab:
            raise AprError(
                f"prompt holds token ids outside 0..{self.decoder.shape.vocab - 1}", "Use the checkpoint's tokenizer"
            )
        if request.request_id in self.by_id:
            raise AprError(f"request id {request.request_id!r} is already running", "Give each request its own id")
        max_new = min(request.sampling.max_new_tokens, self.context_tokens - len(prompt))
        running = _Running(request, max_new)
        self.by_id[request.request_id] = running
        self._clock += 1
        heapq.heappush(self.waiting, (-request.priority, self._clock, running))
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.get_running_loop().create_task(self._run())
        return running

    async def abort(self, request_id_prefix: str) -> None:
        """End every request whose id starts with the prefix; slots are free at the next step."""
        for request_id, running in self.by_id.items():
            if request_id.startswith(request_id_prefix):
                running.abort = True

    async def update_weights(self, update: WeightUpdate) -> None:
        """Check the whole update, then apply it between two steps; running requests go on under the new weights."""
        check_update(update, self.expected, self.version)
        for running in self.active:
            self._flush(running)  # a chunk never spans two versions
        self.decoder.load(update.state_dict())
        self.version = update.version
        self.kv_lengths[:] = 0
        self.lengths[self.max_sequences :] = 0

    def stats(self) -> EngineStats:
        """Counters since start."""
        return EngineStats(active_requests=len(self.active), waiting_requests=len(self.waiting), **self._counts)

    async def close(self) -> None:
        """Abort everything and wait until it is gone."""
        await self.abort("")
        if self._loop_task is not None:
            await self._loop_task

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while self.active or self.waiting:
                self._step()
                await asyncio.sleep(0)
        except Exception as error:
            for running in list(self.by_id.values()):
                self._finish(running, FinishReason.ERROR, f"{type(error).__name__}: {error}")
            self.active.clear()
            self.waiting.clear()
            raise

    def _step(self) -> None:
        for running in [r for r in self.active if r.abort]:
            self._release(running, FinishReason.ABORTED)
        self._admit()
        if not self.active:
            return
        self._counts["steps"] += 1
        n = len(self.active)
        missing = self.lengths[:n] - self.kv_lengths[:n]
        if self.capabilities.deterministic:
            self._advance_fixed(missing)
        elif (missing > 1).any():
            rows = np.flatnonzero(missing > 1)
            self._advance(rows, torch.from_numpy(rows), missing[rows])
        else:
            self._advance(np.arange(n), slice(0, n), missing)

    def _advance(self, rows: np.ndarray[Any, Any], index: slice | torch.Tensor, count: np.ndarray[Any, Any]) -> None:
        """Compute the missing KV of rows and sample one token for each."""
        start = self.kv_lengths[rows]
        width = int(count.max())
        columns = np.minimum(start[:, None] + np.arange(width), self.context_tokens)
        tokens = self.tokens[rows[:, None], columns]
        logits = self.decoder.forward(
            index, torch.from_numpy(tokens), torch.from_numpy(start), torch.from_numpy(np.asarray(count))
        )
        self.kv_lengths[rows] = self.lengths[rows]
        self._draw(rows, logits)

    def _advance_fixed(self, missing: np.ndarray[Any, Any]) -> None:
        """One token of KV for every row, idle ones included; rows whose KV is complete then sample."""
        start = np.minimum(self.kv_lengths[: self.max_sequences], self.context_tokens - 1)
        tokens = self.tokens[np.arange(self.max_sequences), start]
        logits = self.decoder.forward_fixed(torch.from_numpy(tokens), torch.from_numpy(start))
        self.kv_lengths[: len(missing)] += 1
        self._draw(np.flatnonzero(missing == 1), logits)

    def _require_equal_rows(self) -> None:
        """The same tokens in every row must give the same bits in every row: then a row's place does not matter."""
        rng = np.random.default_rng(0)
        size = self.max_sequences
        last = self.context_tokens - 1
        for position in sorted({*range(min(PROBED_TOKENS, last)), last // 7, last // 2, last}):
            token = int(rng.integers(self.decoder.shape.vocab))
            logits = self.decoder.forward_fixed(torch.full((size,), token), torch.full((size,), position))
            logprobs = torch.log_softmax(logits, dim=-1)
            if not torch.equal(logprobs, logprobs[:1].expand_as(logprobs)):
                raise AprError(
                    f"rows of a batch of {size} are not computed alike on this machine",
                    "Choose an engine.max_sequences that is a multiple of 16, or leave engine.deterministic off",
                )

    def _draw(self, rows: np.ndarray[Any, Any], logits: torch.Tensor) -> None:
        """Sample one token for each of some rows.

        Args:
            rows: int64 [n].
            logits: float32 [n, vocab], one per row; or, in deterministic mode, [max_sequences, vocab], one per place.
        """
        if not len(rows):
            return
        batch = [self.active[row] for row in rows]
        seeds = np.array([r.request.sampling.seed & 0xFFFFFFFFFFFFFFFF for r in batch], dtype=np.uint64)
        counters = self.lengths[rows].astype(np.uint64)
        params = [r.request.sampling for r in batch]
        draws = uniforms(seeds, counters)
        if self.capabilities.deterministic:  # logprobs too are computed in one shape
            every = [IDLE] * self.max_sequences
            places = np.zeros(self.max_sequences)
            places[rows] = draws
            for row, one in zip(rows, params, strict=True):
                every[row] = one
            all_ids, all_logprobs = sample(logits, every, places)
            token_ids, logprobs = [all_ids[row] for row in rows], [all_logprobs[row] for row in rows]
        else:
            token_ids, logprobs = sample(logits, params, draws)
        self.tokens[rows, self.lengths[rows]] = token_ids
        self.lengths[rows] += 1
        self._counts["sampled_tokens"] += len(batch)
        for running, token_id, logprob in zip(batch, token_ids, logprobs, strict=True):
            running.pending_ids.append(token_id)
            running.pending_logprobs.append(logprob)
            running.sampled += 1
            if token_id in running.request.sampling.stop_ids:
                self._release(running, FinishReason.STOP)
            elif running.sampled >= running.max_new:
                self._release(running, FinishReason.LENGTH)
            elif len(running.pending_ids) >= self.stream_interval:
                self._flush(running)

    def _admit(self) -> None:
        while self.waiting and len(self.active) < self.max_sequences:
            running = heapq.heappop(self.waiting)[2]
            if running.abort:
                self._finish(running, FinishReason.ABORTED)
                continue
            prompt = np.asarray(running.request.prompt_ids, dtype=np.int64)
            row = running.row = len(self.active)
            self.active.append(running)
            running.cached = self._reuse_prefix(row, prompt)
            self.tokens[row, : len(prompt)] = prompt
            self.lengths[row] = len(prompt)
            self.kv_lengths[row] = running.cached
            self._counts["prompt_tokens"] += len(prompt)
            self._counts["cached_tokens"] += running.cached

    def _reuse_prefix(self, row: int, prompt: np.ndarray[Any, Any]) -> int:
        """Copy the longest computed prefix of the prompt into the row; returns its length.

        At least the last token is always computed: its logits are needed.
        """
        held = self.tokens[:, : len(prompt) - 1]
        same = (held == prompt[:-1]) & (np.arange(len(prompt) - 1) < self.kv_lengths[:, None])
        shared = np.where(same.all(axis=1), same.shape[1], same.argmin(axis=1) if same.shape[1] else 0)
        shared[row : self.max_sequences] = 0  # rows that hold nothing
        source = int(shared.argmax())
        common = int(shared[source])
        if common < MIN_REUSED_TOKENS:
            return 0
        self.decoder.copy_slot(source, row, common)
        self._clock += 1
        self.last_used[source] = self._clock
        return common

    def _release(self, running: _Running, reason: FinishReason) -> None:
        """Take a request out of its row; its KV moves to a cache slot, the last active row moves into the gap."""
        row, last = running.row, len(self.active) - 1
        self._retire(row)
        if row != last:
            self._move(last, row)
            self.active[row] = self.active[last]
            self.active[row].row = row
        self.active.pop()
        self.lengths[last] = self.kv_lengths[last] = 0
        self._finish(running, reason)

    def _retire(self, row: int) -> None:
        """Keep a row's KV in the cache slot that was unused for longest."""
        first = self.max_sequences
        if first < len(self.lengths) and self.kv_lengths[row] >= MIN_REUSED_TOKENS:
            slot = first + int(self.last_used[first:].argmin())
            self._move(row, slot)
            self._clock += 1
            self.last_used[slot] = self._clock

    def _move(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        self.decoder.copy_slot(source, target, int(self.kv_lengths[source]))
        self.tokens[target, :length] = self.tokens[source, :length]
        self.lengths[target] = length
        self.kv_lengths[target] = self.kv_lengths[source]

    def _flush(self, running: _Running, finish: FinishReason | None = None, error: str = "") -> None:
        if running.pending_ids or finish is not None:
            running.chunks.append(
                Chunk(
                    tuple(running.pending_ids),
                    tuple(running.pending_logprobs),
                    self.version,
                    running.cached,
                    finish,
                    error,
                )
            )
            running.pending_ids.clear()
            running.pending_logprobs.clear()
            running.ready.set()

    def _finish(self, running: _Running, reason: FinishReason, error: str = "") -> None:
        running.finished = True
        self.by_id.pop(running.request.request_id, None)
        self._flush(running, reason, error)
