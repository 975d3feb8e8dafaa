"""`TorchEngine`: continuous batching over KV slots, in one asyncio loop, one step at a time.

Invariants (tested):
- rows [0, active) are the running requests and hold their KV contiguously, so that a step reads it in place;
- every step adds one token to every running request; those that came in since the last step are prefilled in it
  (not in deterministic mode, where a prompt is computed token by token);
- rows stand in descending order of cohort: rows of one cohort differ in length by less than `cohort_tokens`, now and
  later, because all grow alike. Each cohort attends as far as its own longest row (see `decoder.Span`);
- a row's KV covers its first `kv_lengths[row]` tokens, under the current weights; what is beyond is prefilled next;
- rows [max_sequences, slots) keep the KV of ended requests for whoever begins with the same tokens;
- weights change between steps only; KV is reused only by requests that began under the weights it was computed with.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from apr_ray.core.engine import Capabilities, Chunk, EngineStats, FinishReason, GenerateRequest, SamplingParams
from apr_ray.core.errors import AprError, EngineAsleep
from apr_ray.core.weights import WeightUpdate, WeightVersion
from apr_ray.engines.requests import context_limit, token_limit
from apr_ray.engines.torch_engine.decoder import Decoder, DecoderShape, Span
from apr_ray.engines.torch_engine.sampler import sample, uniforms
from apr_ray.model.llama import load_weights, read_config
from apr_ray.model.state import check_update

FIRST_VERSION = WeightVersion(0, 0)
COHORT_TOKENS = {"cpu": 64, "cuda": 1024}
"""Narrower cohorts mask less KV that is read in vain; wider ones take fewer attention calls, and
so fewer launches on a GPU (where the width was not measured)."""
MIN_REUSED_TOKENS = 4
"""A shorter common prefix is cheaper to compute again than to copy."""
PROBED_TOKENS = 16
IDLE = SamplingParams()
"""Of rows that do not sample in a step: their draw is thrown away."""


@dataclass(eq=False)
class Running:
    """A request and what it has produced; `row` is -1 while it waits."""

    request: GenerateRequest
    max_new: int
    row: int = -1
    sampled: int = 0
    cached: int = 0
    kv_version: WeightVersion = FIRST_VERSION
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
        device, dtype: where it computes, and in what: see `Decoder`.
        deterministic: a request's tokens and logprobs do not depend, to the last bit, on what else is in the batch, on
            its row, or on what was cached. Every step computes `max_sequences` rows by one token, prompts included, and
            attends row by row (see `Decoder.forward_fixed`).

    Raises:
        AprError: the context does not fit the model; `device` is not there; or `deterministic` is asked for where this
            machine's matrix products treat rows differently.
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
        dtype: str = "float32",
        deterministic: bool = False,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise AprError(
                f"engine.device is cuda, torch {torch.__version__} finds no GPU here",
                "Give its actor one (rollout.gpus_per_worker), install a CUDA build of torch, or set engine.device=cpu",
            )
        self.context_tokens = context_limit(context_tokens, shape.context)
        self.max_sequences = max_sequences
        self.stream_interval = stream_interval
        slots = max_sequences + cache_slots
        self.decoder = Decoder(shape, slots, self.context_tokens, device, getattr(torch, dtype))
        self.cohort_tokens = COHORT_TOKENS[device]
        self.decoder.load(state)
        self.version = version
        self.expected = shape.parameter_shapes()
        self.tokens = np.zeros((slots, self.context_tokens), dtype=np.int64)
        self.lengths = np.zeros(slots, dtype=np.int64)  # tokens a slot holds
        self.kv_lengths = np.zeros(slots, dtype=np.int64)  # of which the KV is computed
        self.kv_epochs = np.zeros(slots, dtype=np.int64)  # under which weights, counted by updates
        self.epoch = 0
        self.asleep = False
        self.cohorts = np.zeros(max_sequences, dtype=np.int64)
        self.last_used = np.zeros(slots, dtype=np.int64)
        self.active: list[Running] = []  # active[i] runs in row i
        self.waiting: list[tuple[int, int, Running]] = []
        self.by_id: dict[str, Running] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._updating = asyncio.Lock()
        self._clock = 0
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "sampled_tokens", "steps"), 0)
        self.capabilities = Capabilities(
            seeds=True,
            deterministic=deterministic,
            in_flight_update=True,
            keeps_kv=True,
            priorities=True,
            sleeps=True,
        )
        if deterministic:
            self._require_equal_rows()

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path, **options: Any) -> Self:
        """An engine over a Hugging Face Llama checkpoint folder; options as in the constructor."""
        shape = DecoderShape.from_config(read_config(checkpoint))
        state, expected = load_weights(checkpoint), shape.parameter_shapes()
        for name in sorted(state.keys() | expected.keys()):
            found = state[name].shape if name in state else "missing"
            if found != expected.get(name):
                raise AprError(
                    f"{checkpoint}: {name} is {found}, its config.json says {expected.get(name, 'nothing of it')}",
                    "Give a whole checkpoint of a Llama",
                )
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

    def _submit(self, request: GenerateRequest) -> Running:
        if self.asleep:
            raise EngineAsleep
        running = Running(request, token_limit(request, self.context_tokens, self.decoder.shape.vocab, self.by_id))
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

    async def update_weights(self, update: WeightUpdate, *, keep_kv: bool = False) -> None:
        """See `core.engine.Engine.update_weights`. Decoding goes on during the check, which takes most of the time."""
        async with self._updating:
            if self.asleep:
                raise EngineAsleep
            await asyncio.to_thread(check_update, update, self.expected, self.version)
            for running in self.active:
                self._flush(running)  # a chunk never spans two versions
            self.decoder.load(update.state_dict())
            self.version = update.version
            self.epoch += 1
            if not keep_kv:
                rows = len(self.active)
                self.kv_lengths[:rows] = 0
                self.kv_epochs[:rows] = self.epoch
                for running in self.active:
                    running.kv_version = self.version

    async def sleep(self) -> None:
        """See `core.engine.Engine.sleep`. Its weights stay: the KV slots are most of the memory."""
        async with self._updating:
            if going_on := [name for name, running in self.by_id.items() if not running.abort]:
                raise AprError(f"{len(going_on)} requests run, {going_on[0]} first", "Let them end, or abort them")
            self.asleep = True
            if self._loop_task is not None:
                await asyncio.wait([self._loop_task])  # what was aborted still holds rows
            self.kv_lengths[:] = 0
            self.decoder.free()

    async def wake(self) -> None:
        """See `core.engine.Engine.wake`."""
        if self.asleep:
            self.decoder.allocate()
            self.asleep = False

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
        rows, token_ids, logprobs = self._decode_fixed() if self.capabilities.deterministic else self._decode()
        batch = [self.active[row] for row in rows]
        self.tokens[rows, self.lengths[rows]] = token_ids
        self.lengths[rows] += 1
        self._counts["steps"] += 1
        self._counts["sampled_tokens"] += len(batch)
        for running, token_id, logprob in zip(batch, token_ids, logprobs, strict=True):
            self._take(running, token_id, logprob)

    def _decode(self) -> tuple[np.ndarray[Any, Any], list[int], list[float]]:
        """A token and its logprob for every row."""
        token_ids, logprobs = self._draw(list(self.active), self._forward())
        return np.arange(len(token_ids)), token_ids, logprobs

    def _draw(self, batch: Sequence[Running], logits: torch.Tensor) -> tuple[list[int], list[float]]:
        """A token and its logprob for each of the first rows, from their logits [n, vocab]."""
        return sample(logits, [r.request.sampling for r in batch], self._uniforms(np.arange(len(batch))))

    def _decode_fixed(self) -> tuple[np.ndarray[Any, Any], list[int], list[float]]:
        """One token of KV for every row, idle ones included; a token and its logprob for rows whose KV is complete."""
        missing = self.lengths[: len(self.active)] - self.kv_lengths[: len(self.active)]
        start = np.minimum(self.kv_lengths[: self.max_sequences], self.context_tokens - 1)
        tokens = self.tokens[np.arange(self.max_sequences), start]
        logits = self.decoder.forward_fixed(torch.from_numpy(tokens), torch.from_numpy(start))
        self.kv_lengths[: len(missing)] += 1
        rows = np.flatnonzero(missing == 1)
        params = [IDLE] * self.max_sequences  # logprobs too are computed in one shape
        draws = np.zeros(self.max_sequences)
        draws[rows] = self._uniforms(rows)
        for row in rows.tolist():
            params[row] = self.active[row].request.sampling
        token_ids, logprobs = sample(logits, params, draws)
        return rows, [token_ids[row] for row in rows], [logprobs[row] for row in rows]

    def _uniforms(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """One draw per row, from its request's seed and how far it is."""
        seeds = np.array([self.active[r].request.sampling.seed & 0xFFFFFFFFFFFFFFFF for r in rows], dtype=np.uint64)
        return uniforms(seeds, self.lengths[rows].astype(np.uint64))

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

    def _forward(self) -> torch.Tensor:
        """Compute the missing KV of all rows; returns the logits after each row's last token, [active, vocab]."""
        n = len(self.active)
        lengths, present = self.lengths[:n], self.kv_lengths[:n]
        count = lengths - present
        ends = np.cumsum(count)
        rows = np.repeat(np.arange(n), count)
        positions = np.arange(ends[-1]) - (ends - lengths)[rows]
        device = self.decoder.device
        logits = self.decoder.forward(
            torch.from_numpy(self.tokens[rows, positions]).to(device),
            torch.from_numpy(rows).to(device),
            torch.from_numpy(positions).to(device),
            self._spans(count),
            torch.from_numpy(ends - 1).to(device),
        )
        present[:] = lengths
        return logits

    def _spans(self, count: np.ndarray[Any, Any]) -> list[Span]:
        """Cut the rows where the cohort changes, and around every row with more than one token to compute."""
        n = len(count)
        wide = count > 1
        cuts = np.flatnonzero((self.cohorts[1:n] != self.cohorts[: n - 1]) | wide[1:] | wide[:-1]) + 1
        edges = [0, *cuts.tolist(), n]
        longest = np.maximum.reduceat(self.lengths[:n], edges[:-1]).tolist()
        shortest = np.minimum.reduceat(self.lengths[:n], edges[:-1]).tolist()
        return [
            Span(first, after - first, int(count[first]), end, end == low)
            for (first, after), end, low in zip(itertools.pairwise(edges), longest, shortest, strict=True)
        ]

    def _take(self, running: Running, token_id: int, logprob: float) -> None:
        """Hand a sampled token to its request, which may end with it."""
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
            row = self._open_row(running, (len(prompt) - self._counts["steps"]) // self.cohort_tokens)
            running.cached = self._reuse_prefix(row, prompt)
            self.tokens[row, : len(prompt)] = prompt
            self.lengths[row] = len(prompt)
            self.kv_lengths[row] = running.cached
            running.kv_version = self.version
            self._counts["prompt_tokens"] += len(prompt)
            self._counts["cached_tokens"] += running.cached

    def _open_row(self, running: Running, cohort: int) -> int:
        """Make room at the end of a cohort: the first row of every later cohort moves to that cohort's end."""
        row = len(self.active)
        self.active.append(running)
        firsts = np.flatnonzero(np.diff(self.cohorts[:row], prepend=np.iinfo(np.int64).max))
        for first in firsts[::-1].tolist():
            if self.cohorts[first] >= cohort:
                break
            self._move_row(first, row)
            row = first
        self.active[row] = running
        running.row = row
        self.cohorts[row] = cohort
        self.lengths[row] = self.kv_lengths[row] = 0
        self.kv_epochs[row] = self.epoch
        return row

    def _close_row(self, row: int) -> None:
        """Close a gap: the last row of its cohort moves into it, and so on to the last cohort."""
        n = len(self.active)
        lasts = np.flatnonzero(np.diff(self.cohorts[:n], append=np.iinfo(np.int64).min))
        for last in lasts[lasts >= row].tolist():
            if last != row:
                self._move_row(last, row)
                row = last
        self.active.pop()
        self.lengths[row] = self.kv_lengths[row] = 0

    def _move_row(self, source: int, target: int) -> None:
        self._copy(source, target)
        self.cohorts[target] = self.cohorts[source]
        self.active[target] = self.active[source]
        self.active[target].row = target

    def _reuse_prefix(self, row: int, prompt: np.ndarray[Any, Any]) -> int:
        """Copy the longest computed prefix of the prompt into the row; returns its length.

        At least the last token is always computed: its logits are needed.
        """
        held = self.tokens[:, : len(prompt) - 1]
        same = (held == prompt[:-1]) & (np.arange(len(prompt) - 1) < self.kv_lengths[:, None])
        shared = np.where(same.all(axis=1), same.shape[1], same.argmin(axis=1) if same.shape[1] else 0)
        shared[row : self.max_sequences] = 0  # rows that hold nothing
        shared[self.kv_epochs != self.epoch] = 0  # of other weights
        source = int(shared.argmax())
        common = int(shared[source])
        if common < MIN_REUSED_TOKENS:
            return 0
        self.decoder.copy_slot(source, row, common)
        self._clock += 1
        self.last_used[source] = self._clock
        return common

    def _release(self, running: Running, reason: FinishReason) -> None:
        """Take a request out of its row; its KV goes to a cache slot where it may be of use again."""
        if running.request.resumes:
            self._retire(running.row)
        self._close_row(running.row)
        self._finish(running, reason)

    def _retire(self, row: int) -> None:
        """Keep a row's KV in the cache slot that was unused for longest."""
        first = self.max_sequences
        of_use = self.kv_lengths[row] >= MIN_REUSED_TOKENS and self.kv_epochs[row] == self.epoch
        if first < len(self.lengths) and of_use:
            slot = first + int(self.last_used[first:].argmin())
            self._copy(row, slot)
            self._clock += 1
            self.last_used[slot] = self._clock

    def _copy(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        self.decoder.copy_slot(source, target, int(self.kv_lengths[source]))
        self.tokens[target, :length] = self.tokens[source, :length]
        self.lengths[target] = length
        self.kv_lengths[target] = self.kv_lengths[source]
        self.kv_epochs[target] = self.kv_epochs[source]

    def _flush(self, running: Running, finish: FinishReason | None = None, error: str = "") -> None:
        if running.pending_ids or finish is not None:
            running.chunks.append(
                Chunk(
                    tuple(running.pending_ids),
                    tuple(running.pending_logprobs),
                    self.version,
                    running.cached,
                    finish,
                    error,
                    None if running.kv_version == self.version else running.kv_version,
                )
            )
            running.pending_ids.clear()
            running.pending_logprobs.clear()
            running.ready.set()

    def _finish(self, running: Running, reason: FinishReason, error: str = "") -> None:
        running.finished = True
        self.by_id.pop(running.request.request_id, None)
        self._flush(running, reason, error)
