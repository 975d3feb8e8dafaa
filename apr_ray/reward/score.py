"""What a tree is worth."""

from __future__ import annotations

from apr_ray.core.ledger import Outcome, Problem
from apr_ray.core.task import Task, Verdict


def score(task: Task, problem: Problem, outcome: Outcome, text: str) -> Verdict:
    """The verdict on a tree; one that did not end in an answer is not looked at, its outcome is the reason."""
    if outcome is not Outcome.ANSWERED:
        return Verdict(False, outcome.value)
    return task.verify(problem, text)
