"""GRPO's group-relative advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

Z_SCORE_EPS = 1e-6
AdvantageKind = Literal["group", "leave_one_out", "success"]
"""See `config.GrpoConfig.advantage`. `success` is no function of rewards: it takes the solved trees, each with 1."""


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Z-scores of one group's rewards (paper section 3.3); zeros where all rewards are equal.

    The standard deviation is the population's. Raises ValueError on an empty group or a reward that is not finite.
    """
    values = _checked(rewards)
    if np.ptp(values) == 0:
        return [0.0] * len(values)
    return [float(v) for v in (values - values.mean()) / (values.std() + Z_SCORE_EPS)]


def leave_one_out_advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward less the mean of the others in its group: an unbiased baseline, and no deviation to divide by
    (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free"). Zeros where all are equal, and for a group
    of one.

    Raises ValueError on an empty group or a reward that is not finite.
    """
    values = _checked(rewards)
    count = len(values)
    if np.ptp(values) == 0:
        return [0.0] * count
    return [float(v) for v in (values - values.mean()) * (count / (count - 1))]


def _checked(rewards: Sequence[float]) -> np.ndarray[Any, Any]:
    values = np.asarray(rewards, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"rewards of a group must be finite and at least one: {list(rewards)}")
    return values


ADVANTAGES: dict[AdvantageKind, Callable[[Sequence[float]], list[float]]] = {
    "group": group_advantages,
    "leave_one_out": leave_one_out_advantages,
}
"""By `grpo.advantage`."""
