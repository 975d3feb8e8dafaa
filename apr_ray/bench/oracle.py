"""`reachable_table` against `reachable_targets`: which targets 10..100 can four numbers 1..99 make."""

from __future__ import annotations

import numpy as np

from apr_ray.bench.timing import REPEATS, Result, in_turn
from apr_ray.tasks.countdown.oracle import reachable_table, reachable_targets

LOW, HIGH = 10, 100


def run(quadruples: int = 20_000, repeats: int = REPEATS) -> Result:
    """Baseline: one multiset after the other, always new ones, because `reachable_targets` remembers."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(1, 100, (quadruples, 4))
    few = max(1, quadruples // 40)

    def one_by_one() -> None:
        for row in rng.integers(1, 100, (few, 4)).tolist():
            reachable_targets(row)

    times = in_turn({"table": lambda: reachable_table(numbers, LOW, HIGH), "sets": one_by_one}, repeats)
    table = reachable_table(numbers[:few], LOW, HIGH)
    differing = sum(
        {t for t in reachable_targets(row) if LOW <= t <= HIGH} != set((np.flatnonzero(flags) + LOW).tolist())
        for row, flags in zip(numbers[:few].tolist(), table, strict=True)
    )
    ours, theirs = quadruples / times["table"], few / times["sets"]
    return {
        "ratio": ours / theirs,
        "quadruples_per_s": ours,
        "one_by_one_quadruples_per_s": theirs,
        "compared_quadruples": float(few),
        "differing_quadruples": float(differing),
    }
