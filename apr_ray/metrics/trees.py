"""What a set of trees comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from apr_ray.core.ledger import Outcome, ThreadTree
from apr_ray.core.task import SOLVED

CUT_OFF = frozenset(
    {
        Outcome.TRUNCATED,
        Outcome.CONTEXT_FULL,
        Outcome.BOUND_ROUNDS,
        Outcome.BOUND_CHILDREN,
        Outcome.BOUND_DEPTH,
        Outcome.BOUND_TOKENS,
        Outcome.BOUND_TIME,
    }
)


def tree_metrics(trees: Sequence[ThreadTree]) -> dict[str, float]:
    """Means over trees, by the last part of their names in `metrics.names`. Raises ValueError on no trees."""
    if not trees:
        raise ValueError("metrics of no trees")
    count = len(trees)
    spawns = sum(len(t.spawns) for t in trees)
    invalid = sum(t.invalid_spawns for t in trees)
    return {
        "total_tokens": sum(t.total_tokens for t in trees) / count,
        "sequential_tokens": sum(t.sequential_tokens for t in trees) / count,
        "children": sum(t.children for t in trees) / count,
        "depth": sum(t.depth for t in trees) / count,
        "truncated": 100 * sum(t.outcome in CUT_OFF for t in trees) / count,
        "invalid_spawns": 100 * invalid / max(1, spawns + invalid),
    }


def failure_reasons(trees: Sequence[ThreadTree]) -> dict[str, float]:
    """Percent of trees per verdict, solved ones left out. By the verdict, since a reward may be a coin's."""
    counts = Counter(t.verdict for t in trees if t.verdict != SOLVED)
    return {reason: 100 * n / len(trees) for reason, n in sorted(counts.items())}


def staleness(trees: Sequence[ThreadTree], counter: int) -> float:
    """Mean over trees of the age, in versions, of the oldest weights a tree was drawn under."""
    ages = [max((counter - v.counter for v in t.versions()), default=0) for t in trees]
    return sum(ages) / max(1, len(ages))
