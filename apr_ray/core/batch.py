"""Input of the learners: ragged token sequences with per-token weights that already hold every denominator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
COLUMNS = {
    "targets": np.int64,
    "loss_weights": np.float32,
    "advantages": np.float32,
    "behaviour_logprobs": np.float32,
    "versions": np.int32,
}
"""Per-token columns of a sequence, besides its ids."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Sequences laid end to end; sequence i is `[offsets[i], offsets[i + 1])` of every flat array.

    `loss_weights` carry the global denominators: the loss of a batch is the plain sum over tokens of weight times
    per-token loss, so that neither the split into micro-batches nor the number of ranks can change it (contract 3).

    Attributes:
        tokens: int64 [N]; what the policy is shown.
        targets: int64 [N]; the token whose logprob is trained at each place, given the tokens before it. It is not the
            token itself where the environment put another in place of the one that was chosen.
        loss_weights: float32 [N]; weight of predicting token t from those before it; 0 at a sequence's first token.
        advantages: float32 [N].
        behaviour_logprobs: float32 [N]; what the engine reported when it drew the token.
        versions: int32 [N]; counter of the weight version that drew the token, of the learner's own incarnation.
        trees: int32 [S]; which tree a sequence is a call of.
        offsets: int64 [S + 1].
        trained_tokens: how many tokens have a weight other than 0.
    """

    tokens: Array
    targets: Array
    loss_weights: Array
    advantages: Array
    behaviour_logprobs: Array
    versions: Array
    trees: Array
    offsets: Array
    trained_tokens: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Array:
        """int64 [S]: tokens per sequence."""
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """One sequence before it is laid into a batch; all fields but `tree` have one entry per token. Without `targets`
    they are the tokens themselves."""

    tokens: Sequence[int]
    loss_weights: Sequence[float]
    advantages: Sequence[float] | None = None
    behaviour_logprobs: Sequence[float] | None = None
    versions: Sequence[int] | None = None
    tree: int = 0
    targets: Sequence[int] | None = None


def lay_out(sequences: Sequence[TrainSequence]) -> TrainBatch:
    """Lay sequences end to end. Raises ValueError on an empty sequence or unequal lengths."""
    lengths = [len(s.tokens) for s in sequences]
    for sequence in sequences:
        for name in COLUMNS:
            column = getattr(sequence, name)
            if column is not None and len(column) != len(sequence.tokens):
                raise ValueError(f"{name} has {len(column)} entries for {len(sequence.tokens)} tokens")
    if any(length == 0 for length in lengths):
        raise ValueError("an empty sequence cannot be trained on")
    offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    size = int(offsets[-1])
    tokens = np.empty(size, dtype=np.int64)
    columns: dict[str, Array] = {name: np.zeros(size, dtype=kind) for name, kind in COLUMNS.items()}
    for sequence, start, end in zip(sequences, offsets[:-1], offsets[1:], strict=True):
        tokens[start:end] = columns["targets"][start:end] = sequence.tokens
        for name, column in columns.items():
            values = getattr(sequence, name)
            if values is not None:
                column[start:end] = values
        columns["loss_weights"][start] = 0.0  # nothing precedes the first token
    return TrainBatch(
        tokens=tokens,
        trees=np.array([s.tree for s in sequences], dtype=np.int32),
        offsets=offsets,
        trained_tokens=int(np.count_nonzero(columns["loss_weights"])),
        **columns,
    )
