"""How a policy keeps the rule that its prices imply: claim where P(right) is above `RewardConfig.claim_threshold`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from apr_ray.core.ledger import Ending, JoinOutcome, ThreadTree


@dataclass(frozen=True, slots=True)
class ClaimBin:
    """Claims of about the same confidence: their mean confidence, the share that is right, how many."""

    confidence: float
    right: float
    count: int


def confidence(tree: ThreadTree) -> float:
    """Probability of the least likely token among the root's calls and those of its children that joined a solution."""
    solved = {
        child
        for spawn in tree.spawns
        for join in tree.joins
        if (join.path, join.segment) == (spawn.path, spawn.segment)
        for child, outcome in zip(spawn.children, join.outcomes, strict=True)
        if outcome is JoinOutcome.SOLVED
    }
    logprobs = [p for call in tree.calls if not call.path or call.path in solved for p in call.logprobs]
    return math.exp(min(logprobs, default=0.0))


def claims_by_confidence(trees: Sequence[ThreadTree], bins: int = 5) -> list[ClaimBin]:
    """Judged trees that claim an answer, least confident first, in bins of about equal size; fewer of few claims."""
    claims = sorted(
        ((confidence(t), t.solved) for t in trees if t.ending in (Ending.SOLVED, Ending.FALSE_CLAIM)),
        key=lambda claim: claim[0],
    )
    edges = [round(i * len(claims) / bins) for i in range(bins + 1)]
    out = []
    for start, end in itertools.pairwise(edges):
        if part := claims[start:end]:
            mean = sum(c for c, _ in part) / len(part)
            out.append(ClaimBin(mean, sum(right for _, right in part) / len(part), len(part)))
    return out
