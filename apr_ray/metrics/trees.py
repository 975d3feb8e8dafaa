"""What a set of trees comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from apr_ray.core.ledger import Outcome, ThreadTree
from apr_ray.core.task import SOLVED
from apr_ray.core.weights import WeightVersion

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
    replaced = sum(len(call.replaced) for t in trees for call in t.calls)
    return {
        "total_tokens": sum(t.total_tokens for t in trees) / count,
        "sequential_tokens": sum(t.sequential_tokens for t in trees) / count,
        "children": sum(t.children for t in trees) / count,
        "depth": sum(t.depth for t in trees) / count,
        "truncated": 100 * sum(t.outcome in CUT_OFF for t in trees) / count,
        "invalid_spawns": 100 * invalid / max(1, spawns + invalid),
        "false_claims": 100 * sum(t.outcome is Outcome.ANSWERED and t.verdict != SOLVED for t in trees) / count,
        "replaced_spawns": 100 * replaced / max(1, spawns + invalid),
    }


def failure_reasons(trees: Sequence[ThreadTree]) -> dict[str, float]:
    """Percent of trees per verdict, solved ones left out. By the verdict, since a reward may be a coin's."""
    counts = Counter(t.verdict for t in trees if t.verdict != SOLVED)
    return {reason: 100 * n / len(trees) for reason, n in sorted(counts.items())}


def ages(tree: ThreadTree, now: WeightVersion) -> tuple[int, int]:
    """Of the newest and the oldest weights that drew any of its tokens, in versions. Weights that a resume lost are one
    version older for each resume since."""
    found = [now.counter - v.counter + now.incarnation - v.incarnation for v in tree.versions()]
    return min(found, default=0), max(found, default=0)


def staleness(trees: Sequence[ThreadTree], now: WeightVersion) -> float:
    """Mean over trees of the age of their oldest weights."""
    return sum(ages(tree, now)[1] for tree in trees) / max(1, len(trees))


def samples(trees: Sequence[ThreadTree], now: WeightVersion) -> list[dict[str, Any]]:
    """A row per tree for `samples.jsonl`: what it was, what it came to, and how old the weights were that drew it."""
    rows = []
    for tree in trees:
        newest, oldest = ages(tree, now)
        rows.append(
            {
                "problem": tree.problem_key,
                "sample": tree.sample,
                "reward": tree.reward,
                "verdict": tree.verdict,
                "tokens": tree.total_tokens,
                "sequential_tokens": tree.sequential_tokens,
                "children": tree.children,
                "age_newest": newest,
                "age_oldest": oldest,
            }
        )
    return rows
