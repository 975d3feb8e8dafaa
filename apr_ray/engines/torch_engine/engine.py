"""`TorchEngine`: continuous batching over KV slots, in one asyncio loop, one step at a time.

Invariants (tested), beside those of `rows`:
- every step adds one token to every running request; those that came in since the last step are prefilled in it
  (not in deterministic mode, where a prompt is computed token by token);
- weights change between steps only.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from apr_ray.core.engine import Capabilities, Chunk, EngineStats, FinishReason, GenerateRequest
from apr_ray.core.errors import AprError, EngineAsleep
from apr_ray.core.weights import FIRST_VERSION, WeightUpdate, WeightVersion, layout_of
from apr_ray.engines.requests import context_limit, token_limit
from apr_ray.engines.torch_engine.decoder import Decoder, DecoderShape, require_plain_llama
from apr_ray.engines.torch_engine.rows import Rows, Running, passes
from apr_ray.engines.torch_engine.sampler import sample
from apr_ray.model.llama import load_weights, read_config
from apr_ray.model.state import check_update, flatten

PROBED_TOKENS = 16
PASS_TOKENS = 4096
"""Tokens of a forward pass, about: what came in at once, or all that runs after an update, is prefilled in several."""
GATHER_S = 0.003
"""For how long an idle engine waits for one more request before its first step."""


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
        on_death: called with the reason when a step fails. Without it, its requests end with ERROR and later ones are
            tried again.

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
        on_death: Callable[[str], None] | None = None,
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
        self.rows = Rows(self.decoder, max_sequences, self.context_tokens)
        self.expected = shape.parameter_shapes()
        layout = layout_of(self.expected.items())
        self.decoder.load(flatten(state, layout), layout)
        self.version = version
        self.on_death = on_death
        self.asleep = False
        self.waiting: list[tuple[int, int, Running]] = []
        self.by_id: dict[str, Running] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._updating = asyncio.Lock()
        self._submitted = 0
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "sampled_tokens", "steps"), 0)
        self.capabilities = Capabilities(
            seeds=True,
            deterministic=deterministic,
            keeps_kv=True,
            sleeps=True,
        )
        if deterministic:
            self._require_equal_rows()

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path, **options: Any) -> Self:
        """An engine over a Hugging Face Llama checkpoint folder; options as in the constructor."""
        config = read_config(checkpoint)
        require_plain_llama(config, str(checkpoint))
        shape = DecoderShape.from_config(config)
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
        limit = token_limit(request, self.context_tokens, self.decoder.shape.vocab, self.by_id)
        running = Running(request, limit, self.version)
        self.by_id[request.request_id] = running
        self._submitted += 1
        heapq.heappush(self.waiting, (-request.priority, self._submitted, running))
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.get_running_loop().create_task(self._run())
        return running

    async def abort(self, request_id_prefix: str) -> None:
        """End every request whose id starts with the prefix; slots are free at the next step."""
        for request_id, running in self.by_id.items():
            if request_id.startswith(request_id_prefix):
                running.abort = True

    async def update_weights(self, update: WeightUpdate, *, keep_kv: bool = False) -> None:
        """See `core.engine.Engine.update_weights`. Decoding goes on during all but an exchange of pointers (on a GPU,
        the copy to it): the update is checked and copied beside the weights that run, whose memory the next one gets.
        """
        async with self._updating:
            if self.asleep:
                raise EngineAsleep
            room = self.decoder.room()
            await asyncio.to_thread(check_update, update, self.expected, self.version, room)
            for running in self.rows.active:
                self._flush(running)  # a chunk never spans two versions
            self.decoder.load(update.flat if room is None else room, update.specs)
            self.version = update.version
            self.rows.weights_changed(keep_kv)
            if not keep_kv:
                for running in self.rows.active:
                    running.kv_version = self.version

    async def sleep(self) -> None:
        """See `core.engine.Engine.sleep`. Its weights stay: the KV slots are most of the memory."""
        async with self._updating:
            if going_on := [name for name, running in self.by_id.items() if not running.abort]:
                raise AprError(f"{len(going_on)} requests run, {going_on[0]} first", "Let them end, or abort them")
            self.asleep = True
            if self._loop_task is not None:
                await asyncio.wait([self._loop_task])  # what was aborted still holds rows
            self.rows.forget()
            self.decoder.free()

    async def wake(self) -> None:
        """See `core.engine.Engine.wake`."""
        if self.asleep:
            self.decoder.allocate()
            self.asleep = False

    def stats(self) -> EngineStats:
        """Counters since start."""
        return EngineStats(active_requests=len(self.rows.active), waiting_requests=len(self.waiting), **self._counts)

    async def close(self) -> None:
        """Abort everything and wait until it is gone."""
        await self.abort("")
        if self._loop_task is not None:
            await asyncio.wait([self._loop_task])

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._gather()
            while self.rows.active or self.waiting:
                self._step()
                await asyncio.sleep(0)
        except Exception as error:
            for running in list(self.by_id.values()):
                self._finish(running, FinishReason.ERROR, f"{type(error).__name__}: {error}")
            self.rows.clear()
            self.waiting.clear()
            if self.on_death is not None:
                self.on_death(f"a step failed: {type(error).__name__}: {error}")
            raise

    async def _gather(self) -> None:
        """Wait for the others of a first batch, as long as they keep coming: they come slowly once steps take the
        processor (through Ray 64 trees in 32 to 51 steps, by a script)."""
        come = 0
        while come < len(self.waiting) < self.max_sequences:
            come = len(self.waiting)
            await asyncio.sleep(GATHER_S)

    def _step(self) -> None:
        for running in [r for r in self.rows.active if r.abort]:
            self._release(running, FinishReason.ABORTED)
        self._end_aborted()
        self._admit()
        if not self.rows.active:
            return
        rows, logits = self._forward_fixed() if self.capabilities.deterministic else self._forward()
        token_ids, logprobs = self._draw(rows, logits)
        due = self.rows.add(rows, token_ids, logprobs, self.stream_interval)
        self._counts["steps"] += 1
        self._counts["sampled_tokens"] += len(rows)
        for running in [self.rows.active[row] for row in due]:
            self._hand_out(running)

    def _forward(self) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
        """Compute the missing KV of all rows; returns the rows and the logits after each one's last token."""
        rows, n = self.rows, len(self.rows.active)
        lengths, present = rows.lengths[:n], rows.kv_lengths[:n]
        count = lengths - present
        if count.sum() == n:  # one of each, as nearly always
            row_of = last = np.arange(n)
            positions = present.copy()
        else:
            ends = np.cumsum(count)
            row_of, last = np.repeat(np.arange(n), count), ends - 1
            positions = np.arange(ends[-1]) - (ends - lengths)[row_of]
        device = self.decoder.device
        tokens = rows.tokens[row_of, positions]
        logits, done, first = [], 0, 0
        for spans in passes(rows.spans(count), PASS_TOKENS):
            part = slice(done, done + sum(span.rows * span.width for span in spans))
            those = slice(first, first + sum(span.rows for span in spans))
            logits.append(
                self.decoder.forward(
                    torch.from_numpy(tokens[part]).to(device),
                    torch.from_numpy(row_of[part]).to(device),
                    torch.from_numpy(positions[part]).to(device),
                    spans,
                    torch.from_numpy(last[those] - done).to(device),
                )
            )
            done, first = part.stop, those.stop
        present[:] = lengths
        return np.arange(n), logits[0] if len(logits) == 1 else torch.cat(logits)

    def _forward_fixed(self) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
        """Compute one token of KV for every row, idle ones included; returns the rows whose KV is then complete, and
        the logits of all."""
        rows, n, all_rows = self.rows, len(self.rows.active), slice(self.max_sequences)
        missing = rows.lengths[:n] - rows.kv_lengths[:n]
        start = np.minimum(rows.kv_lengths[all_rows], self.context_tokens - 1)
        tokens = rows.tokens[np.arange(self.max_sequences), start]
        logits = self.decoder.forward_fixed(torch.from_numpy(tokens), torch.from_numpy(start))
        rows.kv_lengths[:n] += 1
        return np.flatnonzero(missing == 1), logits

    def _draw(self, rows: np.ndarray[Any, Any], logits: torch.Tensor) -> tuple[np.ndarray[Any, Any], ...]:
        """A token and its logprob for some rows, from the logits of the first n. All n are drawn, in one shape."""
        n = len(logits)
        draws = self.rows.draws[np.arange(n), self.rows.lengths[:n]]
        tokens, logprobs = sample(logits, self.rows.sampling(n), draws)
        tokens = self._drawn(tokens)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        return tokens.cpu().numpy()[rows], chosen.cpu().numpy()[rows]

    def _drawn(self, tokens: torch.Tensor) -> torch.Tensor:
        """Here a bench puts recorded tokens in the place of those drawn."""
        return tokens

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

    def _hand_out(self, running: Running) -> None:
        """Hand its tokens to a request, which may end with the last of them."""
        rows, row = self.rows, running.row
        last = rows.lengths[row] - 1
        if rows.tokens[row, last] in running.request.sampling.stop_ids:
            self._release(running, FinishReason.STOP)
        elif last + 1 >= rows.ends[row]:
            self._release(running, FinishReason.LENGTH)
        else:
            self._flush(running)

    def _end_aborted(self) -> None:
        """Whatever waits and was aborted ends now, and not only when a row is free."""
        if any(running.abort for _, _, running in self.waiting):
            for _, _, running in self.waiting:
                if running.abort:
                    self._finish(running, FinishReason.ABORTED)
            self.waiting = [entry for entry in self.waiting if not entry[2].abort]
            heapq.heapify(self.waiting)

    def _admit(self) -> None:
        while self.waiting and len(self.rows.active) < self.max_sequences:
            running = heapq.heappop(self.waiting)[2]
            running.kv_version = self.version
            self.rows.open(running, self._counts["steps"])
            self._counts["prompt_tokens"] += len(running.request.prompt_ids)
            self._counts["cached_tokens"] += running.cached

    def _release(self, running: Running, reason: FinishReason) -> None:
        self._finish(running, reason)
        self.rows.close(running)

    def _flush(self, running: Running, finish: FinishReason | None = None, error: str = "") -> None:
        token_ids, logprobs = self.rows.hand_out(running.row) if running.row >= 0 else ((), ())
        if token_ids or finish is not None:
            running.chunks.append(
                Chunk(
                    token_ids,
                    logprobs,
                    self.version,
                    running.cached,
                    finish,
                    error,
                    None if running.kv_version == self.version else running.kv_version,
                )
            )
            running.ready.set()

    def _finish(self, running: Running, reason: FinishReason, error: str = "") -> None:
        self.by_id.pop(running.request.request_id, None)
        self._flush(running, reason, error)
