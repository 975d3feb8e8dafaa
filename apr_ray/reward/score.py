"""The verdict on a tree."""

from __future__ import annotations

from dataclasses import replace

from apr_ray.core.ledger import SOLVED, Outcome, Problem, ThreadTree
from apr_ray.core.task import Task, Verdict


def score(task: Task, problem: Problem, outcome: Outcome, text: str) -> Verdict:
    """The verdict on a tree; one that did not end in an answer is not looked at, its outcome is the reason."""
    if outcome is not Outcome.ANSWERED:
        return Verdict(False, outcome.value)
    verdict = task.verify(problem, text)
    return replace(verdict, reason=SOLVED) if verdict.solved else verdict


def with_verdict(tree: ThreadTree, verdict: Verdict) -> ThreadTree:
    """The tree, judged."""
    return replace(tree, verdict=verdict.reason, form=verdict.form)
