"""Which request runs in which KV slot, what every slot holds, and what of it is reused.

Invariants (tested):
- rows [0, active) are the running requests and hold their KV contiguously, so that a step reads it in place;
- rows stand in descending order of cohort: rows of one cohort differ in length by less than `cohort_tokens`, now and
  later, because all grow alike. Each cohort attends as far as its own longest row (see `decoder.Span`);
- a row's KV covers its first `kv_lengths[row]` tokens, under the current weights; what is beyond is prefilled next;
- tokens [handed_out, lengths) of a running row, and their logprobs, wait for the request's next chunk;
- rows [max_sequences, slots) keep the KV of ended requests for whoever begins with the same tokens;
- KV is reused only by requests that began under the weights it was computed with.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apr_ray.core.engine import Chunk, GenerateRequest, SamplingParams
from apr_ray.core.weights import WeightVersion
from apr_ray.engines.torch_engine.decoder import Decoder, Span
from apr_ray.engines.torch_engine.sampler import Sampling, uniforms

COHORT_TOKENS = {"cpu": 64, "cuda": 1024}
"""Narrower cohorts mask less KV that is read in vain; wider ones take fewer attention calls, and
so fewer launches on a GPU (where the width was not measured)."""
IDLE = SamplingParams()
Ints = np.ndarray[Any, np.dtype[np.int64]]
MIN_REUSED_TOKENS = 4
"""A shorter common prefix is cheaper to compute again than to copy."""


@dataclass(eq=False)
class Running:
    """A request and what it has produced; `row` is -1 while it waits."""

    request: GenerateRequest
    max_new: int
    kv_version: WeightVersion
    row: int = -1
    cached: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    chunks: list[Chunk] = field(default_factory=list)
    abort: bool = False


def passes(spans: Sequence[Span], tokens: int) -> list[list[Span]]:
    """Spans in the same order, cut where more than so many tokens would go together; a whole row at least."""
    out: list[list[Span]] = [[]]
    size = 0
    for span in spans:
        done = 0
        while done < span.rows:
            rows = min(span.rows - done, max((tokens - size) // span.width, 0 if out[-1] else 1))
            if rows:
                whole = rows == span.rows
                out[-1].append(span if whole else Span(span.first + done, rows, span.width, span.end, span.even))
            else:
                out.append([])
            size = size + rows * span.width if rows else 0
            done += rows
    return out


class Rows:
    """The slots of a decoder.

    Args:
        decoder: whose KV moves with the rows.
        max_sequences: rows for running requests; the other slots are the cache.
        context_tokens: that a row can hold.
    """

    def __init__(self, decoder: Decoder, max_sequences: int, context_tokens: int) -> None:
        self.decoder = decoder
        self.max_sequences = max_sequences
        self.cohort_tokens = COHORT_TOKENS[decoder.device.type]
        slots = decoder.kv_size[1]
        self.active: list[Running] = []  # active[i] runs in row i
        self.tokens = np.zeros((slots, context_tokens), dtype=np.int64)
        self.lengths = np.zeros(slots, dtype=np.int64)  # tokens a slot holds
        self.kv_lengths = np.zeros(slots, dtype=np.int64)  # of which the KV is computed
        self.kv_epochs = np.zeros(slots, dtype=np.int64)  # under which weights, counted by updates
        self.epoch = 0
        # of running rows alone, and moved with them:
        self.cohorts = np.zeros(max_sequences, dtype=np.int64)
        self.handed_out = np.zeros(max_sequences, dtype=np.int64)
        self.ends = np.zeros(max_sequences, dtype=np.int64)  # the length at which a request ends
        self.stop_ids = np.full((max_sequences, 1), -1, dtype=np.int64)
        self.draws = np.zeros((max_sequences, context_tokens))  # in [0, 1), one for each token to come
        self.logprobs = np.zeros((max_sequences, context_tokens), dtype=np.float32)
        # of the running rows as they stand; None when they changed:
        self._sampling: Sampling | None = None
        self._decoding: list[Span] | None = None  # of the last step, if each row computed one token in it
        self.last_used = np.zeros(slots, dtype=np.int64)
        self.clock = 0

    def open(self, running: Running, step: int) -> None:
        """Give a request a row, with what is there already of its prompt's KV."""
        prompt = np.asarray(running.request.prompt_ids, dtype=np.int64)
        self.active.append(running)
        row = self._make_room((len(prompt) - step) // self.cohort_tokens)
        self.active[row] = running
        running.row = row
        running.cached = self._reuse_prefix(row, prompt)
        self.tokens[row, : len(prompt)] = prompt
        self.lengths[row] = self.handed_out[row] = len(prompt)
        self.kv_lengths[row] = running.cached
        self._set_sampling(row, running)
        self._changed()

    def close(self, running: Running) -> None:
        """Take a request's row; its KV goes to a cache slot where it may be of use again."""
        if running.request.resumes:
            self._retire(running.row)
        self._fill_gap(running.row)

    def clear(self) -> None:
        """No request runs, whatever a step that failed has left."""
        self.active.clear()
        self.lengths[: self.max_sequences] = self.kv_lengths[: self.max_sequences] = 0
        self._changed()

    def weights_changed(self, keep_kv: bool) -> None:
        """What runs computes its KV again, unless it keeps the old; no later request reuses any of it."""
        self.epoch += 1
        if not keep_kv:
            rows = len(self.active)
            self.kv_lengths[:rows] = 0
            self.kv_epochs[:rows] = self.epoch

    def forget(self) -> None:
        """All KV is gone."""
        self.kv_lengths[:] = 0

    def sampling(self, rows: int) -> Sampling:
        """How the first rows draw: those that run as they were asked to, and others after them, if there are."""
        if self._sampling is None:
            params = [running.request.sampling for running in self.active]
            params += [IDLE] * (rows - len(params))
            self._sampling = Sampling.of(params, self.decoder.device)
        return self._sampling

    def add(self, rows: Ints, token_ids: Ints, logprobs: np.ndarray[Any, Any], interval: int) -> list[int]:
        """Append a token to each of these rows; returns those that end with it or have `interval` for a chunk."""
        at = self.lengths[rows]
        self.tokens[rows, at] = token_ids
        self.logprobs[rows, at] = logprobs
        at += 1
        self.lengths[rows] = at
        stops = (self.stop_ids[rows] == token_ids[:, None]).any(axis=1)
        due: list[int] = rows[stops | (at >= self.ends[rows]) | (at >= self.handed_out[rows] + interval)].tolist()
        return due

    def hand_out(self, row: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The tokens that wait for a row's next chunk, and their logprobs."""
        new = slice(self.handed_out[row], self.lengths[row])
        self.handed_out[row] = self.lengths[row]
        return tuple(self.tokens[row, new].tolist()), tuple(self.logprobs[row, new].tolist())

    def spans(self, count: np.ndarray[Any, Any]) -> list[Span]:
        """Of the running rows, `count` tokens to compute in each: cut where the cohort or the count changes.

        Between two steps that compute one token of each row, and no change of rows, only the ends move.
        """
        n = len(count)
        if count.sum() > n:
            self._decoding = None
            return self._cut(count)
        if self._decoding is None:
            self._decoding = self._cut(count)
        else:
            self._decoding = [Span(s.first, s.rows, 1, s.end + 1, s.even) for s in self._decoding]
        return self._decoding

    def _cut(self, count: np.ndarray[Any, Any]) -> list[Span]:
        n = len(count)
        cuts = np.flatnonzero((self.cohorts[1:n] != self.cohorts[: n - 1]) | (count[1:] != count[:-1])) + 1
        edges = [0, *cuts.tolist(), n]
        longest = np.maximum.reduceat(self.lengths[:n], edges[:-1]).tolist()
        shortest = np.minimum.reduceat(self.lengths[:n], edges[:-1]).tolist()
        return [
            Span(first, after - first, int(count[first]), end, end == low)
            for (first, after), end, low in zip(itertools.pairwise(edges), longest, shortest, strict=True)
        ]

    def _make_room(self, cohort: int) -> int:
        """Empty a row at the end of a cohort: the last row is free, and the first row of every later cohort moves to
        that cohort's end."""
        row = len(self.active) - 1
        firsts = np.flatnonzero(np.diff(self.cohorts[:row], prepend=np.iinfo(np.int64).max))
        for first in firsts[::-1].tolist():
            if self.cohorts[first] >= cohort:
                break
            self._move(first, row)
            row = first
        self.cohorts[row] = cohort
        self.lengths[row] = self.kv_lengths[row] = 0
        self.kv_epochs[row] = self.epoch
        return row

    def _fill_gap(self, row: int) -> None:
        """The last row of its cohort moves into it, and so on to the last cohort."""
        n = len(self.active)
        lasts = np.flatnonzero(np.diff(self.cohorts[:n], append=np.iinfo(np.int64).min))
        for last in lasts[lasts >= row].tolist():
            if last != row:
                self._move(last, row)
                row = last
        self.active.pop()
        self._changed()
        self.lengths[row] = self.kv_lengths[row] = 0

    def _set_sampling(self, row: int, running: Running) -> None:
        """What a request asks of its tokens. All of its draws at once: step by step they cost as much as the rest of
        sampling."""
        params, first = running.request.sampling, int(self.lengths[row])
        self.ends[row] = end = first + running.max_new
        missing = len(params.stop_ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=-1)
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(params.stop_ids)] = sorted(params.stop_ids)
        seed = np.array([params.seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
        self.draws[row, first:end] = uniforms(seed, np.arange(first, end, dtype=np.uint64))

    def _move(self, source: int, target: int) -> None:
        self._copy(source, target)
        for column in (self.cohorts, self.handed_out, self.ends, self.stop_ids, self.draws, self.logprobs):
            column[target] = column[source]
        self.active[target] = self.active[source]
        self.active[target].row = target
        self._changed()

    def _changed(self) -> None:
        self._sampling = self._decoding = None

    def _reuse_prefix(self, row: int, prompt: np.ndarray[Any, Any]) -> int:
        """Copy the longest computed prefix of the prompt into the row; returns its length.

        At least the last token is always computed: its logits are needed.
        """
        held = self.tokens[:, : len(prompt) - 1]
        same = (held == prompt[:-1]) & (np.arange(len(prompt) - 1) < self.kv_lengths[:, None])
        shared = np.where(same.all(axis=1), same.shape[1], same.argmin(axis=1) if same.shape[1] else 0)
        shared[row] = 0
        shared[len(self.active) : self.max_sequences] = 0  # rows that hold nothing
        shared[self.kv_epochs != self.epoch] = 0  # of other weights
        source = int(shared.argmax())
        common = int(shared[source])
        if common < MIN_REUSED_TOKENS:
            return 0
        self.decoder.copy_slot(source, row, common)
        self.clock += 1
        self.last_used[source] = self.clock
        return common

    def _retire(self, row: int) -> None:
        """Keep a row's KV in the cache slot that was unused for longest."""
        first = self.max_sequences
        of_use = self.kv_lengths[row] >= MIN_REUSED_TOKENS and self.kv_epochs[row] == self.epoch
        if first < len(self.lengths) and of_use:
            slot = first + int(self.last_used[first:].argmin())
            self._copy(row, slot)
            self.clock += 1
            self.last_used[slot] = self.clock

    def _copy(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        self.decoder.copy_slot(source, target, int(self.kv_lengths[source]))
        self.tokens[target, :length] = self.tokens[source, :length]
        self.lengths[target] = length
        self.kv_lengths[target] = self.kv_lengths[source]
        self.kv_epochs[target] = self.kv_epochs[source]
