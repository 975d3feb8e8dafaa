"""GRPO's group-relative advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Z_SCORE_EPS = 1e-6
AdvantageKind = Literal["group", "success"]


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Z-scores of one group's rewards (paper section 3.3); zeros where all rewards are equal.

    The standard deviation is the population's. Raises ValueError on an empty group or a reward that is not finite.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"rewards of a group must be finite and at least one: {list(rewards)}")
    if np.ptp(values) == 0:
        return [0.0] * len(values)
    return [float(v) for v in (values - values.mean()) / (values.std() + Z_SCORE_EPS)]


def success_advantages(rewards: Sequence[float]) -> list[float]:
    """The rewards themselves. With rewards of 0 and 1 and one inner step, the gradient is that of supervised training
    on the solved trees alone (rejection sampling): a control for what comparing within a group adds."""
    values = np.asarray(rewards, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"rewards of a group must be finite and at least one: {list(rewards)}")
    return [float(v) for v in values]


ADVANTAGES: dict[AdvantageKind, Callable[[Sequence[float]], list[float]]] = {
    "group": group_advantages,
    "success": success_advantages,
}
"""By `grpo.advantage`."""
