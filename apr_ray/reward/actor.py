"""Verdicts on trees, in batches. Their prices are the loop's business (`rl.rewards`): a verdict is not a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from apr_ray.config import TaskConfig
from apr_ray.core.ledger import Outcome, Problem, ThreadTree
from apr_ray.core.task import Verdict
from apr_ray.parts import DEAD, died
from apr_ray.reward.score import score, with_verdict
from apr_ray.tasks.registry import load_task

RESTARTS = 3


class RewardActor:
    """Checks solutions away from the driver and the engines."""

    def __init__(self, task: TaskConfig) -> None:
        self.task = load_task(task)

    def score(self, items: Sequence[tuple[Problem, Outcome, str]]) -> list[Verdict]:
        """One verdict per (problem, outcome, final text)."""
        return [score(self.task, *item) for item in items]


class RewardClient:
    """The driver's end of the reward actor."""

    def __init__(self, task: TaskConfig) -> None:
        options = {
            "num_cpus": 0,  # it checks for a few milliseconds a step, and must never wait for room
            "max_restarts": RESTARTS,  # it holds nothing, so Ray may start it anew and ask again
            "max_task_retries": RESTARTS,
        }
        self.actor: Any = ray.remote(RewardActor).options(**options).remote(task)

    def score(self, problems: Sequence[Problem], trees: Sequence[ThreadTree]) -> list[ThreadTree]:
        """Trees with their verdicts; `problems[i]` is tree i's. Raises PartDied."""
        items = [(p, t.outcome, t.final_text) for p, t in zip(problems, trees, strict=True)]
        try:
            verdicts: list[Verdict] = ray.get(self.actor.score.remote(items))
        except DEAD as error:
            raise died(f"reward actor, after {RESTARTS} restarts,", error, "") from error
        return [with_verdict(tree, verdict) for tree, verdict in zip(trees, verdicts, strict=True)]

    def stop(self) -> None:
        """End the actor."""
        ray.kill(self.actor)
