"""The learner group: one Ray actor per rank, driven as one."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from apr_ray.config import Config, LearnerConfig, OptimizerConfig
from apr_ray.core.batch import TrainBatch
from apr_ray.core.weights import TensorSpec, WeightSink, WeightVersion
from apr_ray.learner.trainer import GrpoStep, StepStats, Trainer, init_process_group, merge
from apr_ray.tasks.registry import load_task


class LearnerActor:
    """A thin shell around one `Trainer`."""

    def __init__(self, config: Config, optimizer: OptimizerConfig, init_from: str | None, rank: int) -> None:
        import torch

        torch.set_num_threads(1)
        self.config = config
        self.optimizer = optimizer
        self.init_from = init_from
        self.rank = rank
        self.sinks: dict[str, WeightSink] = {}

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen: its node and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            ip = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            return str(ip), int(probe.getsockname()[1])

    def start(self, address: str, port: int) -> int:
        """Join the group and build the policy; returns its parameter count."""
        from apr_ray.model.llama import load_policy, new_policy, parameter_count, require_vocabulary

        learner = self.config.learner
        init_process_group(self.rank, learner.ranks, address, port)
        task = load_task(self.config.task)
        self.tokenizer = task.load_tokenizer(self.init_from) if self.init_from else task.tokenizer()
        if self.init_from:
            require_vocabulary(self.init_from, self.tokenizer)
            policy = load_policy(self.init_from)
        else:
            policy = new_policy(self.config.model, self.tokenizer, self.config.run.seed)
        count = parameter_count(policy)
        self.trainer = Trainer(policy, learner, self.optimizer, self.rank, learner.ranks)
        return count

    def sft_step(self, batch: TrainBatch, learning_rate: float) -> StepStats:
        return self.trainer.sft_step(batch, learning_rate, self.config.sft.precision == "bf16")

    def grpo_step(self, batch: TrainBatch, step: GrpoStep, learning_rate: float) -> list[StepStats]:
        return self.trainer.grpo_step(batch, step, learning_rate)

    def freeze_reference(self, checkpoint: str | None) -> None:
        self.trainer.freeze_reference(checkpoint)

    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[np.ndarray[Any, Any]]:
        return self.trainer.logprobs(sequences, temperature)

    def weights(self, version: WeightVersion) -> Any:
        """Rank 0's are sent; the others only take part in gathering them."""
        update = self.trainer.weights(version)
        return update if self.rank == 0 else None

    def open_sink(self, name: str, sink: WeightSink) -> Any:
        """Where `send_weights` will put the weights (rank 0 only); returns what its receivers must know."""
        self.sinks[name] = sink
        return self.trainer.layout(), sink.open()

    def close_sink(self, name: str) -> None:
        self.sinks.pop(name).close()

    def send_weights(self, name: str, version: WeightVersion, piece_numbers: int) -> Any:
        """Rank 0 sends; the others only take part in gathering, to the end even where sending fails."""
        pieces = self.trainer.weight_pieces(piece_numbers)
        try:
            return self.sinks[name].take(self.trainer.layout(), pieces, version) if self.rank == 0 else None
        finally:
            for _ in pieces:
                pass

    def save(self, directory: str) -> None:
        """Rank 0 writes the policy in Hugging Face form, every rank its part of the optimiser."""
        from apr_ray.model.llama import save_policy

        self.trainer.save(Path(directory) / "optimizer")
        with self.trainer.whole_policy() as policy:
            if self.rank == 0:
                save_policy(policy, self.tokenizer, self.config.task, Path(directory) / "policy")

    def load(self, directory: str) -> None:
        self.trainer.load(Path(directory) / "optimizer")


class LearnerGroup:
    """All ranks as one. Build it with `start`.

    Every method sends the same call to every rank and waits for all; a rank that dies raises Ray's actor error.
    """

    def __init__(self, actors: Sequence[Any], parameters: int, zero_stage: int) -> None:
        self.actors = list(actors)
        self.parameters = parameters
        self.zero_stage = zero_stage

    @classmethod
    def start(cls, config: Config, optimizer: OptimizerConfig, init_from: str | None = None) -> LearnerGroup:
        """Start the ranks and let them meet."""
        learner: LearnerConfig = config.learner
        options = {"num_cpus": learner.cpus_per_rank, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
        actors: list[Any] = [
            ray.remote(LearnerActor).options(**options).remote(config, optimizer, init_from, rank)
            for rank in range(learner.ranks)
        ]
        address, port = ray.get(actors[0].address.remote())
        counts = ray.get([actor.start.remote(address, port) for actor in actors])
        return cls(actors, counts[0], learner.zero_stage)

    def submit_sft_step(self, batch: TrainBatch, learning_rate: float) -> list[Any]:
        """Start a step; give the result to `finish_sft_step`. Steps run in the order they were submitted."""
        reference = ray.put(batch)
        return [actor.sft_step.remote(reference, learning_rate) for actor in self.actors]

    def finish_sft_step(self, pending: list[Any]) -> StepStats:
        """Wait for a submitted step."""
        return merge(ray.get(pending))

    def grpo_step(self, batch: TrainBatch, step: GrpoStep, learning_rate: float) -> list[StepStats]:
        """All inner steps on one batch; one merged entry per inner step."""
        reference = ray.put(batch)
        per_rank = ray.get([actor.grpo_step.remote(reference, step, learning_rate) for actor in self.actors])
        return [merge(inner) for inner in zip(*per_rank, strict=True)]

    def freeze_reference(self, checkpoint: str | None = None) -> None:
        """Take a checkpoint's policy, or the present one, as the reference of the KL term."""
        ray.get([actor.freeze_reference.remote(checkpoint) for actor in self.actors])

    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[np.ndarray[Any, Any]]:
        """Logprobs of whole sequences under the present weights, from rank 0."""
        result: list[np.ndarray[Any, Any]] = ray.get(
            [actor.logprobs.remote(sequences, temperature) for actor in self._needed()]
        )[0]
        return result

    def _needed(self) -> list[Any]:
        """The ranks without which rank 0 cannot read the weights: all of them where they share the parameters."""
        return self.actors if self.zero_stage == 3 else self.actors[:1]

    def weights(self, version: WeightVersion) -> Any:
        """An object reference to the present weights as `version`."""
        references = [actor.weights.remote(version) for actor in self._needed()]
        return references[0]

    def open_sink(self, name: str, sink: WeightSink) -> tuple[tuple[TensorSpec, ...], Any]:
        """Give rank 0 a sink; returns the layout of the weights and what the sink's receivers must know."""
        opened: tuple[tuple[TensorSpec, ...], Any] = ray.get(self.actors[0].open_sink.remote(name, sink))
        return opened

    def close_sink(self, name: str) -> None:
        """Close a sink of rank 0."""
        ray.get(self.actors[0].close_sink.remote(name))

    def send_weights(self, name: str, version: WeightVersion, piece_numbers: int) -> dict[str, Any]:
        """Start sending the present weights into an open sink: an object reference per rank that takes part."""
        return {
            f"learner-{rank}": actor.send_weights.remote(name, version, piece_numbers)
            for rank, actor in enumerate(self._needed())
        }

    def save(self, directory: Path) -> None:
        """Write `policy/` and `optimizer/` under a folder."""
        ray.get([actor.save.remote(str(directory)) for actor in self.actors])

    def load(self, directory: Path) -> None:
        """Read back what `save` wrote."""
        ray.get([actor.load.remote(str(directory)) for actor in self.actors])

    def stop(self) -> None:
        """End the actors."""
        for actor in self.actors:
            ray.kill(actor)
