"""Engine and learner apart: how far, and the importance weights that correct for it.

Three policies: *behaviour* drew the tokens (the engine's logprobs, in the ledger), *proximal* is the learner's at the
start of a batch, *current* the one under training. Δ is the proximal logprob of a token less its behaviour logprob, 0
where the token carries no loss. Over a call or tree the weight is the product of exp Δ: it corrects for the choice of
all its tokens, where the geometric mean would correct for none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from apr_ray.core.batch import Array, TrainBatch


@dataclass(frozen=True, slots=True)
class Correction:
    """How importance weights proximal / behaviour enter the loss; see `config.GrpoConfig`."""

    kind: Literal["truncate", "mask"]
    level: Literal["token", "call", "tree"]
    cap: float
    from_delta: float = 0.0

    @property
    def needs_whole_batch(self) -> bool:
        """Whether no weight is known before every proximal logprob is."""
        return self.level == "tree" or self.from_delta > 0

    def applies(self, delta_mean: float) -> bool:
        """Whether a batch with this mean |Δ| is corrected; else all its weights are 1."""
        return delta_mean > self.from_delta


@dataclass(frozen=True, slots=True)
class ImportanceWeights:
    """`values`: [b, t] or [b, 1]; `cut`: which of them were truncated or masked."""

    values: torch.Tensor
    cut: torch.Tensor


def importance_weights(
    delta: torch.Tensor, how: Correction, tree_sums: torch.Tensor | None = None
) -> ImportanceWeights:
    """Weights of sequences from their Δ [b, t].

    Args:
        tree_sums: [b]; Σ Δ over the tree of each sequence (see `tree_sums`), needed at level "tree".
    """
    if how.level == "token":
        logs = delta
    elif how.level == "call":
        logs = delta.sum(dim=1, keepdim=True, dtype=torch.float64)
    else:
        if tree_sums is None:
            raise ValueError("level tree needs the sums over trees")
        logs = tree_sums[:, None]
    weigh = truncated if how.kind == "truncate" else masked
    weights = weigh(logs, math.log(how.cap))
    return ImportanceWeights(weights.values.to(delta.dtype), weights.cut)


def truncated(logs: torch.Tensor, log_cap: float) -> ImportanceWeights:
    """min(weight, cap)."""
    return ImportanceWeights(logs.clamp(max=log_cap).exp(), logs > log_cap)


def masked(logs: torch.Tensor, log_cap: float) -> ImportanceWeights:
    """The weight inside [1 / cap, cap], 0 outside."""
    cut = logs.abs() > log_cap
    return ImportanceWeights(torch.where(cut, 0.0, logs.exp()), cut)


# --- over a whole batch -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Apart:
    """How far the learner is from what drew some trained tokens.

    Attributes:
        tokens: how many.
        delta_mean, delta_max: of |Δ|, in nats.
        ratio_outside: share of tokens whose ratio exp Δ is outside [1/2, 2].
        ratio_p999: 99.9th percentile of the ratio.
    """

    tokens: int
    delta_mean: float
    delta_max: float
    ratio_outside: float
    ratio_p999: float

    @classmethod
    def of(cls, delta: Array) -> Apart:
        """From the tokens' Δ; at least one."""
        size = np.abs(delta)
        return cls(
            tokens=len(delta),
            delta_mean=float(size.mean()),
            delta_max=float(size.max()),
            ratio_outside=float((size > math.log(2)).mean()),
            ratio_p999=float(np.exp(np.quantile(delta, 0.999))),
        )


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Of a batch.

    Attributes:
        whole: over all its trained tokens.
        tree_max: largest |Σ Δ| of a tree, in nats.
        versions: by the counter of the weight version that drew the tokens.
    """

    whole: Apart
    tree_max: float
    versions: Mapping[int, Apart]


def tree_sums(delta: Array, batch: TrainBatch) -> Array:
    """float64: Σ Δ over each tree, by its number in `batch.trees`, from Δ [N]."""
    sums: Array = np.bincount(np.repeat(batch.trees, batch.lengths), weights=delta)
    return sums


def measure_mismatch(delta: Array, batch: TrainBatch) -> Mismatch:
    """The mismatch of a batch from its Δ [N]; at least one token must carry loss."""
    trained = batch.loss_weights != 0
    signed = delta[trained].astype(np.float64)
    drawn_by = batch.versions[trained]
    return Mismatch(
        whole=Apart.of(signed),
        tree_max=float(np.abs(tree_sums(delta, batch)).max()),
        versions={int(v): Apart.of(signed[drawn_by == v]) for v in np.unique(drawn_by)},
    )
