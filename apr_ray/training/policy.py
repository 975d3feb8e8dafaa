"""The policy under training: learners, engines, and the way between them. Nobody else counts weight versions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apr_ray.config import Config
from apr_ray.core.batch import TrainBatch
from apr_ray.core.weights import FIRST_VERSION, WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.learner.steps import GrpoStep, StepStats
from apr_ray.rollout.pool import RolloutPool
from apr_ray.training.turns import Turns
from apr_ray.weights.check import check_engines
from apr_ray.weights.transport import Transport


class Policy:
    """Weights that the learners change and the engines run.

    Args:
        version: of the weights that the learners hold.
        folder: where those lie on disk.

    Attributes:
        folder: of the current weights; None while they exist only in memory.
    """

    def __init__(
        self,
        config: Config,
        learners: LearnerGroup,
        pool: RolloutPool,
        transport: Transport,
        version: WeightVersion,
        folder: Path,
    ) -> None:
        self.learners, self.pool, self.transport = learners, pool, transport
        self.turns = Turns(config, learners)
        self.version = version
        self.folder: Path | None = folder
        self.weights, self.exact = config.weights, config.engine.exact
        self.temperature = config.grpo.temperature
        self.objective = GrpoStep.of(config.grpo)

    def restore(self) -> None:
        """Bring the learners' weights to engines that started on the run's first policy, where those differ: after a
        resume, maybe before the first checkpoint."""
        if self.version != FIRST_VERSION:
            self.transport.broadcast(self.learners, self.pool, self.version)

    def learn(self, batch: TrainBatch, rate: float) -> list[StepStats]:
        """All inner steps on a batch; none on an empty one."""
        self.turns.learn(self.pool)
        stats = self.learners.grpo_step(batch, self.objective, rate) if len(batch) else []
        self.turns.engines(self.pool)
        return stats

    def publish(self, stats: Sequence[StepStats], prompts: Sequence[tuple[int, ...]]) -> float | None:
        """The learners' weights to every engine, as the next version, and the check; no version without a step.

        Args:
            stats: of the optimiser steps since the last version.
            prompts: to sample from at the check.

        Returns:
            The check's mean |Δ logprob|; None where no step was taken.

        Raises:
            SyncFailed, WeightsRejected, PartDied, MismatchError: see `Transport.broadcast` and `check_engines`.
        """
        if not stats:
            return None
        self.version, self.folder = self.version.next(), None
        self.transport.broadcast(self.learners, self.pool, self.version)
        asked = prompts[: self.weights.check_calls]
        return check_engines(self.learners, self.pool, asked, self.temperature, self.weights, self.version, self.exact)

    def save(self, folder: Path) -> None:
        """Write policy and optimiser into a checkpoint."""
        self.learners.save(folder)
