"""Aggregate metrics of a set of trees. All read verdicts: a reward may be a price or a coin's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from apr_ray.core.ledger import Ending, ThreadTree
from apr_ray.core.weights import WeightVersion


def tree_metrics(trees: Sequence[ThreadTree]) -> dict[str, float]:
    """Means over judged trees, by the last part of their names in `metrics.names`. Raises ValueError on no trees.

    What is given a spawn is left out where no tree spawned.
    """
    if not trees:
        raise ValueError("metrics of no trees")
    count = len(trees)
    spawns = sum(len(t.spawns) for t in trees)
    invalid = sum(t.invalid_spawns for t in trees)
    replaced = sum(len(call.replaced) for t in trees for call in t.calls)
    endings = Counter(t.ending for t in trees)
    spawning = [t for t in trees if t.spawns]
    given_spawn = {}
    if spawning:
        given_spawn = {
            "children_given_spawn": sum(t.children for t in spawning) / len(spawning),
            "accuracy_given_spawn": sum(t.solved for t in spawning) / len(spawning),
        }
    return {
        "total_tokens": sum(t.total_tokens for t in trees) / count,
        "sequential_tokens": sum(t.sequential_tokens for t in trees) / count,
        "children": sum(t.children for t in trees) / count,
        "spawned": 100 * len(spawning) / count,
        **given_spawn,
        "depth": sum(t.depth for t in trees) / count,
        "truncated": 100 * endings[Ending.CUT_OFF] / count,
        "invalid_spawns": 100 * invalid / max(1, spawns + invalid),
        "false_claims": 100 * endings[Ending.FALSE_CLAIM] / count,
        "faulty_form": 100 * sum(bool(t.form) for t in trees) / count,
        "replaced_spawns": 100 * replaced / max(1, spawns + invalid),
    }


def failure_reasons(trees: Sequence[ThreadTree]) -> dict[str, float]:
    """Percent of trees per verdict, solved ones left out."""
    counts = Counter(t.verdict for t in trees if not t.solved)
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
