"""The stream of groups: problems in, whole groups of judged trees out, as fresh as they have to be.

    problems ─▶ pool.run ─▶ reward.score ─▶ prices ─▶ fresh groups │ stale groups

With `grpo.ahead` 0 a step's trees are drawn when they are asked for. With 1 those of the next step are drawn while the
learners train on this one's, with more those of as many further steps: the same loop, and trees that are older.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from apr_ray.config import Config
from apr_ray.core.ledger import Group, Problem, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.evaluation.evaluate import tree_seed
from apr_ray.reward.actor import RewardClient
from apr_ray.rl.rewards import priced
from apr_ray.rollout.pool import RolloutPool
from apr_ray.threads.runtime import TreeRequest
from apr_ray.training.step import Step


@dataclass(frozen=True, slots=True)
class Drawn:
    """The trees of one step.

    Attributes:
        trees: judged, with their rewards, group by group; those of refills last.
        problems: one for each group.
        fresh, stale: the groups that may be trained on, and those whose weights are too old (contract 9).
        rollout_s: seconds that sampling took, beside learning where it ran ahead.
    """

    trees: list[ThreadTree]
    problems: list[Problem]
    fresh: list[Group]
    stale: list[Group]
    rollout_s: float

    @property
    def tokens(self) -> int:
        """Sampled, over all trees."""
        return sum(tree.total_tokens for tree in self.trees)

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """A root prompt of each group."""
        size = len(self.trees) // len(self.problems)
        return [tree.calls[0].prompt_ids for tree in self.trees[::size] if tree.calls]


class GroupStream:
    """Groups of trees, step by step.

    Args:
        train: problems; a step takes the next `grpo.problems_per_step`, its refills others.
    """

    def __init__(self, pool: RolloutPool, reward: RewardClient, train: Sequence[Problem], config: Config) -> None:
        self.pool = pool
        self.reward = reward
        self.train = train
        self.config = config
        self.thread = ThreadPoolExecutor(1, "rollouts")
        self.begun: dict[int, Future[tuple[list[ThreadTree], float]]] = {}

    def take(self, step: Step, version: WeightVersion) -> Drawn:
        """A step's groups; those that are at most `grpo.max_staleness` versions older than `version` are fresh.

        Where groups without variance leave it short, `grpo.refill_rounds` times others are drawn besides.
        """
        grpo, number = self.config.grpo, step.number - 1
        with step.phase("wait"):
            trees, rollout_s = self.begun.pop(number).result() if number in self.begun else self._sample(number)
            self._run_ahead(number)
        problems = list(self._problems(number))
        with step.phase("reward"):
            trees = self._judged(problems, trees, number)

        for refill in range(1, grpo.refill_rounds + 1):
            mixed = sum(len({tree.reward for tree in one.trees}) > 1 for one in group(trees, grpo.group_size))
            further = self._problems(number, refill)[: max(0, grpo.problems_per_step - mixed)]
            if not further:
                break
            with step.phase("wait"):
                more, took_s = self._timed(further, number)
            with step.phase("reward"):
                trees = [*trees, *self._judged(further, more, number)]
            problems, rollout_s = [*problems, *further], rollout_s + took_s

        fresh, stale = fresh_groups(group(trees, grpo.group_size), version, grpo.max_staleness)
        return Drawn(trees, problems, fresh, stale, rollout_s)

    def settle(self) -> None:
        """Wait for trees that were begun and will not be taken: an evaluation that follows has the engines to
        itself."""
        for begun in self.begun.values():
            begun.result()
        self.begun.clear()

    def stop(self) -> None:
        """End the thread, whose pool must have been stopped."""
        self.thread.shutdown(cancel_futures=True)

    def _run_ahead(self, number: int) -> None:
        """Begin the next steps' trees, up to the next evaluation."""
        grpo = self.config.grpo
        for later in range(number + 1, min(number + grpo.ahead, grpo.steps - 1) + 1):
            if later % grpo.eval_every == 0:  # the step before it ends in an evaluation
                break
            if later not in self.begun:
                self.begun[later] = self.thread.submit(self._sample, later)

    def _problems(self, number: int, refill: int = 0) -> Sequence[Problem]:
        """Those of one step, or of one round of its refills: each has its own, so a resumed run draws the same."""
        grpo = self.config.grpo
        first = (refill * grpo.steps + number) * grpo.problems_per_step
        return self.train[first : first + grpo.problems_per_step]

    def _sample(self, number: int) -> tuple[list[ThreadTree], float]:
        return self._timed(self._problems(number), number)

    def _timed(self, problems: Sequence[Problem], number: int) -> tuple[list[ThreadTree], float]:
        start = time.perf_counter()
        trees = sample_trees(self.pool, problems, self.config, number)
        return trees, time.perf_counter() - start

    def _judged(self, problems: Sequence[Problem], trees: Sequence[ThreadTree], number: int) -> list[ThreadTree]:
        """Trees with verdicts and rewards, `group_size` of them for each problem."""
        grpo = self.config.grpo
        judged = self.reward.score([problem for problem in problems for _ in range(grpo.group_size)], trees)
        if grpo.reward.coin:
            return randomly_rewarded(judged, self.config.run.seed, number)
        return priced(judged, grpo.reward)


def sample_trees(pool: RolloutPool, problems: Sequence[Problem], config: Config, number: int) -> list[ThreadTree]:
    """`group_size` trees per problem, in the order (problem, sample); `number` counts steps from 0."""
    grpo = config.grpo
    requests = [
        TreeRequest(
            p, s, tree_seed(config.run.seed, f"step-{number}", p.key, s), grpo.temperature, budget=config.rollout.budget
        )
        for p in problems
        for s in range(grpo.group_size)
    ]
    ended = dict(pool.run(requests))
    return [ended[i] for i in range(len(requests))]


def randomly_rewarded(trees: Sequence[ThreadTree], seed: int, number: int) -> list[ThreadTree]:
    """Rewards by a fair coin, the same for the same seed and step."""
    return [replace(t, reward=float(tree_seed(seed, f"coin-{number}", t.problem_key, t.sample) % 2)) for t in trees]


def group(trees: Sequence[ThreadTree], size: int) -> list[Group]:
    """Consecutive trees of one problem as groups."""
    return [Group(trees[i].problem_key, tuple(trees[i : i + size])) for i in range(0, len(trees), size)]


def fresh_groups(
    groups: Sequence[Group], version: WeightVersion, max_staleness: int
) -> tuple[list[Group], list[Group]]:
    """Groups all of whose trees were drawn under weights at most `max_staleness` versions old, and the others
    (contract 9). Weights of another incarnation are never fresh."""
    fresh: list[Group] = []
    stale: list[Group] = []
    for one in groups:
        versions = {v for tree in one.trees for v in tree.versions()}
        recent = all(
            v.incarnation == version.incarnation and version.counter - v.counter <= max_staleness for v in versions
        )
        (fresh if recent else stale).append(one)
    return fresh, stale
