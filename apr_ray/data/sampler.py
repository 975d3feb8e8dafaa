"""Demonstrations as batches: mixed in length and kind, with little padding, in an order that a resumed run repeats.

sequences of one kind ─▶ shuffled ─▶ windows, sorted by length ─▶ bins of like length ─▶ shuffled ─┐
                                                                                                  ├─▶ batches
sequences of the other kind ─▶ the same ──────────────────────────────────────────────────────────┘

Invariants (tested):
- the batches of an epoch hold every sequence of a kind exactly once;
- a bin's rows times its longest row come as near to `bin_tokens` as whole rows allow: within a third of it, or the
  bin is one sequence;
- a batch is several bins taken at random, so one optimiser step sees short and long sequences, children's and parents'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from apr_ray.core.batch import TrainBatch
from apr_ray.core.errors import ConfigError
from apr_ray.data.demonstrations import Demonstrations
from apr_ray.rl.batches import SftRow, sft_batch

Kind = Literal["child", "parent"]
Ids = np.ndarray[Any, np.dtype[np.int64]]

WINDOW_BINS = 64
"""Bins cut from one window. Larger windows pad less and mix less: a window's bins come one after another."""
START: Mapping[str, int] = {"child": 0, "parent": 0, "owed": 0}
SHARE_UNIT = 1 << 20
"""Children's share of a bin is counted in whole units, so that a position is made of integers."""


class SftSampler:
    """Batches in an order that its arguments alone decide.

    Args:
        mask: what carries no loss; see `config.SftConfig`.
        targets: what is trained where a sequence holds one of these ids; every other id is its own target. See
            `SpawnJoinProtocol.supervised_targets`.
        batch_bins, bin_tokens: bins per batch, and padded tokens per bin, about.
        child_share: how often a child's sequence is shown for each time that a parent's is.
        position: where another sampler with the same arguments stood.

    Raises:
        ConfigError: for a `position` of another kind of sampler.
    """

    def __init__(
        self,
        data: Demonstrations,
        *,
        mask: str,
        targets: Mapping[int, int],
        batch_bins: int,
        bin_tokens: int,
        seed: int,
        child_share: float = 1.0,
        position: Mapping[str, int] | None = None,
    ) -> None:
        if position and position.keys() != START.keys():
            raise ConfigError(
                f"the run's place in its demonstrations is {dict(position)}: an older version took them otherwise",
                "Begin a new run, or go on with the version that began this one",
            )
        self.data = data
        self.skipped = {"none": np.zeros_like(data.given), "given": data.given, "prompt": data.prompts}[mask]
        self.target_of = np.arange(max(int(data.ids.max()), *targets, 0) + 1)
        for token, target in targets.items():
            self.target_of[token] = target
        self.batch_bins = batch_bins
        self.bin_tokens = bin_tokens
        self.seed = seed

        self.members = {"child": np.flatnonzero(data.child), "parent": np.flatnonzero(~data.child)}
        tokens = {kind: int(data.lengths[of_kind].sum()) for kind, of_kind in self.members.items()}
        tokens["child"] = int(tokens["child"] * child_share)
        self.usual_share = tokens["child"] / max(1, sum(tokens.values()))
        """Of the tokens shown, those in children's sequences."""

        self.position = dict(position or START)
        self._streams = {kind: self._stream(kind, self.position[kind]) for kind in self.members}

    def next(self, progress: float, child_first_fraction: float) -> TrainBatch:
        """The next batch. Children's share of it falls from all, linearly, to the usual one.

        Args:
            progress: share of training that is done.
            child_first_fraction: progress at which the usual share is reached.
        """
        share = self.child_share_at(progress, child_first_fraction)
        chosen = np.concatenate([self._next_bin(share) for _ in range(self.batch_bins)])
        return sft_batch([self._row(int(i)) for i in chosen])

    def child_share_at(self, progress: float, child_first_fraction: float) -> float:
        """Share of bins that hold children's sequences."""
        left = max(0.0, 1 - progress / child_first_fraction) if child_first_fraction else 0.0
        return self.usual_share + (1 - self.usual_share) * left

    def _next_bin(self, share: float) -> Ids:
        owed = self.position["owed"] + round(share * SHARE_UNIT)
        kind: Kind = "child" if owed >= SHARE_UNIT or not len(self.members["parent"]) else "parent"
        self.position["owed"] = min(owed, 2 * SHARE_UNIT) - (SHARE_UNIT if kind == "child" else 0)
        self.position[kind] += 1
        return next(self._streams[kind])

    def _row(self, index: int) -> SftRow:
        ids = self.data.ids[self.data.offsets[index] : self.data.offsets[index + 1]]
        return SftRow(ids, self.target_of[ids], int(self.skipped[index]))

    def _stream(self, kind: str, taken: int) -> Iterator[Ids]:
        """All bins of a kind, epoch after epoch without end, but for those `taken` already."""
        bins = self._bins(kind)
        for _ in range(taken):
            next(bins)
        yield from bins

    def _bins(self, kind: str) -> Iterator[Ids]:
        members, lengths = self.members[kind], self.data.lengths
        epoch = 0
        while True:
            rng = np.random.default_rng([self.seed, epoch, kind == "child"])
            order = rng.permutation(members)
            windows = max(1, round(int(lengths[order].sum()) / (WINDOW_BINS * self.bin_tokens)))

            for window in np.array_split(order, windows):
                window = window[np.argsort(-lengths[window], kind="stable")]
                bins = cut_into_bins(window, lengths, self.bin_tokens)
                for index in rng.permutation(len(bins)):
                    yield bins[index]
            epoch += 1


def cut_into_bins(sequences: Ids, lengths: Ids, bin_tokens: int) -> list[Ids]:
    """Neighbours together, longest first, as many rows as bring the padded tokens nearest to `bin_tokens`."""
    bins = []
    start = 0
    while start < len(sequences):
        rows = max(1, round(bin_tokens / int(lengths[sequences[start]])))
        bins.append(sequences[start : start + rows])
        start += rows
    return bins
