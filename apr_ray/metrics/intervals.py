"""95 % intervals: of a proportion, and of a mean.

Two questions, two intervals, never both in one number. Of *these policies*: `t_interval` over problems, of the paired
differences per problem. Of *the recipe*: `t_interval` over seeds, of one mean per seed on one set of problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval, from `count` independent values. Of one value the ends are not known: NaN."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """As percentage points: `+5.3 [+2.1, +8.5]`."""
        ends = f" [{100 * self.low:+.1f}, {100 * self.high:+.1f}]" if self.count > 1 else ""
        return f"{100 * self.mean:+.1f}{ends}"


def t_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent values. Raises ValueError without values."""
    from scipy.stats import t

    if not len(values):
        raise ValueError("an interval of no values")
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half, count)


def wilson(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion; (0, 1) without trials.

    `successes` may be a sum of per-problem means, where a problem has several samples: the interval is then over
    problems, not over samples, which are not independent.
    """
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    denominator = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / denominator
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / denominator
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # by rounding it may miss p, at 0 of n, say
