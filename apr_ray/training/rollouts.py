"""The trees of each step, which may be drawn one step ahead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from apr_ray.config import Config
from apr_ray.core.ledger import Problem, ThreadTree
from apr_ray.evaluation.evaluate import tree_seed
from apr_ray.rollout.pool import RolloutPool
from apr_ray.threads.runtime import TreeRequest


class Rollouts:
    """The trees of each step, which may begin before they are asked for (`grpo.overlap`)."""

    def __init__(self, pool: RolloutPool, train: Sequence[Problem], config: Config) -> None:
        self.pool = pool
        self.train = train
        self.config = config
        self.thread = ThreadPoolExecutor(1, "rollouts")
        self.begun: dict[int, Future[tuple[list[ThreadTree], float]]] = {}

    def problems(self, step: int, refill: int = 0) -> Sequence[Problem]:
        """Those of one step, or of one round of its refills: each has its own, so a resumed run draws the same."""
        grpo = self.config.grpo
        first = (refill * grpo.steps + step) * grpo.problems_per_step
        return self.train[first : first + grpo.problems_per_step]

    def problems_of(self, trees: Sequence[ThreadTree], step: int) -> list[Problem]:
        """One for each group of a step's trees, refills included."""
        rounds = range(1 + self.config.grpo.refill_rounds)
        by_key = {problem.key: problem for refill in rounds for problem in self.problems(step, refill)}
        return [by_key[tree.problem_key] for tree in trees[:: self.config.grpo.group_size]]

    def refill(self, step: int, refill: int, count: int) -> tuple[list[ThreadTree], float]:
        """Trees of the first `count` problems of a round of refills, and the seconds that they took."""
        return self._timed(self.problems(step, refill)[:count], step)

    def begin(self, step: int) -> None:
        """Start a step's trees."""
        self.begun[step] = self.thread.submit(self._sample, step)

    def take(self, step: int) -> tuple[list[ThreadTree], float]:
        """A step's trees, and the seconds that they took."""
        if step not in self.begun:
            return self._sample(step)
        return self.begun.pop(step).result()

    def settle(self) -> None:
        """Wait for what was begun and will not be taken: an evaluation that follows has the engines to itself."""
        for begun in self.begun.values():
            begun.result()
        self.begun.clear()

    def stop(self) -> None:
        """End the thread, whose pool must have been stopped."""
        self.thread.shutdown(cancel_futures=True)

    def _sample(self, step: int) -> tuple[list[ThreadTree], float]:
        return self._timed(self.problems(step), step)

    def _timed(self, problems: Sequence[Problem], step: int) -> tuple[list[ThreadTree], float]:
        start = time.perf_counter()
        trees = sample_trees(self.pool, problems, self.config, step)
        return trees, time.perf_counter() - start


def sample_trees(pool: RolloutPool, problems: Sequence[Problem], config: Config, step: int) -> list[ThreadTree]:
    """`group_size` trees per problem, in the order (problem, sample)."""
    grpo = config.grpo
    requests = [
        TreeRequest(
            p, s, tree_seed(config.run.seed, f"step-{step}", p.key, s), grpo.temperature, budget=config.rollout.budget
        )
        for p in problems
        for s in range(grpo.group_size)
    ]
    ended = dict(pool.run(requests))
    return [ended[i] for i in range(len(requests))]
