"""The learner group: all ranks' actors, driven as one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from apr_ray.config import Config, LearnerConfig, OptimizerConfig
from apr_ray.core.batch import TrainBatch
from apr_ray.core.weights import WeightSink, WeightVersion
from apr_ray.learner.actor import LearnerActor
from apr_ray.learner.precision import StepTimes, slowest
from apr_ray.learner.steps import GrpoStep, StepStats, merge
from apr_ray.parts import DEAD, died
from apr_ray.placement import Places, learner_places

NAMING_S = 30.0
"""How long to ask, after a call that failed, which rank died."""


class LearnerGroup:
    """All ranks as one. Build it with `start`.

    Every method sends the same call to every rank and waits for all.

    Raises:
        PartDied: from any method, where a rank died; the message names it. The others may wait for it in a collective
            for as long as they live, so nobody waits for them.
    """

    def __init__(self, actors: Sequence[Any], zero_stage: int, places: Places) -> None:
        self.actors = list(actors)
        self.zero_stage = zero_stage
        self.places = places
        self.parameters = 0
        self.logs = [""] * places.need.count

    @classmethod
    def start(cls, config: Config, optimizer: OptimizerConfig, init_from: str | None = None) -> LearnerGroup:
        """Wait for room, start the ranks and let them meet. Where that fails, nothing is left."""
        learner: LearnerConfig = config.learner
        group = cls([], learner.zero_stage, learner_places(config))
        try:
            for rank in range(learner.ranks):
                actor = ray.remote(LearnerActor).options(**group.places.options(rank))
                group.actors.append(actor.remote(config, optimizer, init_from, rank))
            group.places.wait()
            group.logs = group._all([actor.log.remote() for actor in group.actors])
            [(address, port)] = group._all([group.actors[0].address.remote()])
            group.parameters = group._all([actor.start.remote(address, port) for actor in group.actors])[0]
        except BaseException:
            group.stop()
            raise
        return group

    def time_precisions(self) -> StepTimes:
        """Seconds of a micro-batch in fp32 and bf16 on the slowest rank, all ranks timing at once."""
        return slowest(self._all([actor.time_precisions.remote() for actor in self.actors]))

    def submit_sft_step(self, batch: TrainBatch, learning_rate: float, bf16: bool = False) -> list[Any]:
        """Start a step; give the result to `finish_sft_step`. Steps run in the order they were submitted."""
        reference = ray.put(batch)
        return [actor.sft_step.remote(reference, learning_rate, bf16) for actor in self.actors]

    def finish_sft_step(self, pending: list[Any]) -> StepStats:
        """Wait for a submitted step."""
        return merge(self._all(pending))

    def grpo_step(self, batch: TrainBatch, step: GrpoStep, learning_rate: float) -> list[StepStats]:
        """All inner steps on one batch; one merged entry per inner step."""
        reference = ray.put(batch)
        per_rank = self._all([actor.grpo_step.remote(reference, step, learning_rate) for actor in self.actors])
        return [merge(inner) for inner in zip(*per_rank, strict=True)]

    def freeze_reference(self, checkpoint: str | None = None) -> None:
        """Take a checkpoint's policy, or the present one, as the reference of the KL term."""
        self._all([actor.freeze_reference.remote(checkpoint) for actor in self.actors])

    def sleep(self) -> None:
        """Give back the memory of what only a step needs: see `Trainer.sleep`."""
        self._all([actor.sleep.remote() for actor in self.actors])

    def wake(self) -> None:
        """Take it again, before the next step."""
        self._all([actor.wake.remote() for actor in self.actors])

    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[np.ndarray[Any, Any]]:
        """Logprobs of whole sequences under the present weights, from rank 0."""
        answers = self._all([actor.logprobs.remote(sequences, temperature) for actor in self._needed()])
        result: list[np.ndarray[Any, Any]] = answers[0]
        return result

    def _needed(self) -> list[Any]:
        """The ranks without which rank 0 cannot read the weights: all of them where they share the parameters."""
        return self.actors if self.zero_stage == 3 else self.actors[:1]

    def save(self, directory: Path) -> None:
        """Write `policy/` and `optimizer/` under a folder."""
        self._all([actor.save.remote(str(directory)) for actor in self.actors])

    def load(self, directory: Path) -> None:
        """Read back what `save` wrote."""
        self._all([actor.load.remote(str(directory)) for actor in self.actors])

    # What follows returns at once, with object references: a sync bounds the wait for them.

    def weights(self, version: WeightVersion) -> tuple[Any, dict[str, Any]]:
        """Start packing the present weights as `version`: a reference to them, and one per rank that takes part,
        without the weights."""
        made = [actor.weights.options(num_returns=2).remote(version) for actor in self._needed()]
        return made[0][0], {f"learner-{rank}": done for rank, (_, done) in enumerate(made)}

    def open_sink(self, name: str, sink: WeightSink) -> Any:
        """Give rank 0 a sink; the answer is the layout of the weights and what the sink's receivers must know."""
        return self.actors[0].open_sink.remote(name, sink)

    def close_sink(self, name: str) -> Any:
        """Close a sink of rank 0."""
        return self.actors[0].close_sink.remote(name)

    def send_weights(self, name: str, version: WeightVersion, piece_numbers: int) -> dict[str, Any]:
        """Start sending the present weights into an open sink: an object reference per rank that takes part."""
        return {
            f"learner-{rank}": actor.send_weights.remote(name, version, piece_numbers)
            for rank, actor in enumerate(self._needed())
        }

    def stop(self) -> None:
        """End the actors and give their places back."""
        for actor in self.actors:
            ray.kill(actor)
        self.places.remove()

    def _all(self, references: Sequence[Any]) -> list[Any]:
        """The answers."""
        try:
            answers: list[Any] = ray.get(list(references))
        except ray.exceptions.RayError:
            self._name_the_dead()  # of a rank that died, the others may be the first to tell
            raise
        return answers

    def _name_the_dead(self) -> None:
        """Raise PartDied if a rank is dead. Living ranks need not answer: they may be in a collective."""
        asked = {actor.log.remote(): rank for rank, actor in enumerate(self.actors)}
        end = time.monotonic() + NAMING_S
        while asked and (left := end - time.monotonic()) > 0:
            for reference in ray.wait(list(asked), timeout=left)[0]:
                rank = asked.pop(reference)
                try:
                    ray.get(reference)
                except DEAD as error:
                    raise died(f"learner rank {rank}", error, self.logs[rank]) from error
