"""Logging and evaluation beside a loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apr_ray.config import Config
from apr_ray.core.ledger import Problem
from apr_ray.core.tracker import Tracker
from apr_ray.core.trees_io import write_trees
from apr_ray.evaluation.evaluate import EvalResult, evaluate
from apr_ray.metrics.names import QUICK, mode_name
from apr_ray.reward.actor import RewardClient
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.run_dir import LoopState, RunDir


@dataclass(frozen=True, slots=True)
class Watch:
    """What a loop tells its run folder and its tracker, and how good its policy is on held-out problems."""

    config: Config
    run: RunDir
    tracker: Tracker
    heldout: Sequence[Problem]
    bars: ProgressBars

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """To the run folder and the tracker."""
        self.run.log(metrics, step)
        self.tracker.log(metrics, step)

    def full_evaluation(self, pool: RolloutPool, reward: RewardClient, state: LoopState) -> bool:
        """Every temperature, all held-out problems; the trees are kept under `eval/`.

        Returns:
            Whether the policy is the best so far by what quick evaluations look at; False without a greedy evaluation.
        """
        evaluation, step = self.config.evaluation, state.step
        improved = False
        for temperature in evaluation.temperatures:
            mode = mode_name(temperature)
            samples = 1 if temperature == 0 else evaluation.samples
            with self.bars.bar(f"evaluate step {step}, {mode}", len(self.heldout) * samples) as bar:
                result = evaluate(
                    pool,
                    reward,
                    self.heldout,
                    temperature=temperature,
                    samples=samples,
                    seed=self.config.run.seed,
                    budget=self.config.rollout.budget,
                    bar=bar,
                )
            self._record(result, step, mode)
            folder = self.run.path / "eval"
            folder.mkdir(exist_ok=True)
            write_trees(folder / f"step-{step:06d}-{mode}.jsonl", result.trees)
            if temperature == 0:
                first = result.trees[: evaluation.during_training_problems]
                improved = _is_best(state, sum(tree.reward or 0.0 for tree in first) / len(first))
        return improved

    def quick_evaluation(self, pool: RolloutPool, reward: RewardClient, state: LoopState) -> bool:
        """Greedy accuracy on the first held-out problems; whether it is the best so far."""
        result = evaluate(
            pool,
            reward,
            self.heldout[: self.config.evaluation.during_training_problems],
            temperature=0.0,
            seed=self.config.run.seed,
            budget=self.config.rollout.budget,
        )
        self._record(result, state.step, QUICK)
        return _is_best(state, result.accuracy)

    def _record(self, result: EvalResult, step: int, mode: str) -> None:
        self.log(result.metrics(mode), step)
        self.tracker.log_trees(result.trees[: self.config.evaluation.traced_trees], step)


def _is_best(state: LoopState, accuracy: float) -> bool:
    improved = accuracy > state.best_accuracy
    state.best_accuracy = max(state.best_accuracy, accuracy)
    return improved
