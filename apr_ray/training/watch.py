"""Logging and evaluation beside a loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from apr_ray.config import Config
from apr_ray.core.ledger import Problem
from apr_ray.core.task import VALIDATION
from apr_ray.core.tracker import Tracker
from apr_ray.core.trees_io import write_trees
from apr_ray.evaluation.evaluate import EvalPart, EvalResult, eval_parts, evaluate
from apr_ray.metrics.names import QUICK
from apr_ray.reward.actor import RewardClient
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tasks.registry import load_task
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.run_dir import LoopState, RunDir


@dataclass(frozen=True)
class Watch:
    """Logs metrics to run folder and tracker, and evaluates the policy on problems that it never trains on.

    `best/` is chosen on validation problems alone: the test set is only read.
    """

    config: Config
    run: RunDir
    tracker: Tracker
    bars: ProgressBars

    @cached_property
    def validation(self) -> Sequence[Problem]:
        """The problems of quick evaluations."""
        settings = self.config.evaluation
        return load_task(self.config.task).problems(VALIDATION, settings.during_training_problems, settings.seed)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """To the run folder and the tracker."""
        self.run.log(metrics, step)
        self.tracker.log(metrics, step)

    def full_evaluation(self, pool: RolloutPool, reward: RewardClient, state: LoopState) -> bool:
        """Every temperature on all test problems, and problems with held-out targets greedily; the trees are kept under
        `eval/`. A quick evaluation follows.

        Returns:
            Whether the policy is the best so far by what quick evaluations look at.
        """
        folder = self.run.path / "eval"
        folder.mkdir(exist_ok=True)
        for part in eval_parts(self.config.evaluation, load_task(self.config.task)):
            result = self._evaluate(pool, reward, part, state.step)
            self._record(result, state.step, part.mode)
            write_trees(folder / f"step-{state.step:06d}-{part.mode}.jsonl", result.trees)
        return self.quick_evaluation(pool, reward, state)

    def quick_evaluation(self, pool: RolloutPool, reward: RewardClient, state: LoopState) -> bool:
        """Greedy accuracy on validation problems; whether it is the best so far."""
        result = self._evaluate(pool, reward, EvalPart(QUICK, 0.0, self.validation, 1), state.step)
        self._record(result, state.step, QUICK)
        improved = result.accuracy > state.best_accuracy
        state.best_accuracy = max(state.best_accuracy, result.accuracy)
        return improved

    def _evaluate(self, pool: RolloutPool, reward: RewardClient, part: EvalPart, step: int) -> EvalResult:
        with self.bars.bar(f"evaluate step {step}, {part.mode}", len(part.problems) * part.samples) as bar:
            return evaluate(
                pool,
                reward,
                part.problems,
                temperature=part.temperature,
                samples=part.samples,
                seed=self.config.run.seed,
                budget=self.config.rollout.budget,
                bar=bar,
            )

    def _record(self, result: EvalResult, step: int, mode: str) -> None:
        self.log(result.metrics(mode), step)
        self.tracker.log_trees(result.trees[: self.config.evaluation.traced_trees], step)


@dataclass(frozen=True, slots=True)
class Judge:
    """Evaluates a loop's policy on its engines, on which nothing else may run meanwhile."""

    watch: Watch
    pool: RolloutPool
    reward: RewardClient
    state: LoopState

    def full(self) -> bool:
        """See `Watch.full_evaluation`."""
        return self.watch.full_evaluation(self.pool, self.reward, self.state)

    def quick(self) -> bool:
        """See `Watch.quick_evaluation`."""
        return self.watch.quick_evaluation(self.pool, self.reward, self.state)
