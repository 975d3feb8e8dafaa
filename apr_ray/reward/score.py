"""The verdict on a tree."""

from __future__ import annotations

from apr_ray.core.ledger import SOLVED, Outcome, Problem
from apr_ray.core.task import Task, Verdict


def score(task: Task, problem: Problem, outcome: Outcome, text: str) -> Verdict:
    """The verdict on a tree; one that did not end in an answer is not looked at, its outcome is the reason."""
    if outcome is not Outcome.ANSWERED:
        return Verdict(False, outcome.value)
    verdict = task.verify(problem, text)
    return Verdict(True, SOLVED) if verdict.solved else verdict
