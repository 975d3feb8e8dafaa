"""One rank of the learner group, as a Ray actor. What takes long to import, it imports when it starts."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from apr_ray.config import Config, OptimizerConfig
from apr_ray.core.batch import TrainBatch
from apr_ray.core.errors import AprError
from apr_ray.core.weights import TensorSpec, WeightSink, WeightVersion
from apr_ray.parts import lasting_imports, own_log
from apr_ray.tasks.registry import load_task

if TYPE_CHECKING:
    from apr_ray.learner.precision import StepTimes
    from apr_ray.learner.steps import GrpoStep, StepStats

UNUSED = ("mlflow", "scipy", "sklearn")
"""What DeepSpeed (for its autotuner) and transformers (for losses and generation that nobody asks for here) import
where they find it, which takes seconds of every rank's start."""


class LearnerActor:
    """A thin shell around one `Trainer`."""

    def __init__(self, config: Config, optimizer: OptimizerConfig, init_from: str | None, rank: int) -> None:
        for unused in UNUSED:
            sys.modules.setdefault(unused, None)  # type: ignore[arg-type]  # as if it were not installed
        if not config.learner.gpus_per_rank:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from an actor that reserved none
        with lasting_imports():
            import deepspeed  # noqa: F401
            import torch
            from transformers import LlamaForCausalLM  # noqa: F401

        if config.learner.gpus_per_rank and not torch.cuda.is_available():
            raise AprError(
                f"a rank has reserved {config.learner.gpus_per_rank:g} GPU, torch {torch.__version__} finds none here",
                "Install a CUDA build of torch, or set learner.gpus_per_rank=0",
            )
        torch.set_num_threads(1)
        self.config = config
        self.optimizer = optimizer
        self.init_from = init_from
        self.rank = rank
        self.sinks: dict[str, WeightSink] = {}
        self.packed: np.ndarray[Any, Any] | None = None
        """Where `weights` packs them, kept for the next time."""

    def log(self) -> str:
        """Where this rank logs. While it is in a step it does not answer."""
        return own_log()

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen: its node and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            ip = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            return str(ip), int(probe.getsockname()[1])

    def start(self, address: str, port: int) -> int:
        """Join the group and build the policy; returns its parameter count."""
        from apr_ray.learner.device import init_process_group
        from apr_ray.learner.trainer import Trainer
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

    def time_precisions(self) -> StepTimes:
        from apr_ray.learner.precision import time_precisions

        return time_precisions(self.trainer.policy, self.config.learner.micro_batch_tokens, self.trainer.device)

    def sft_step(self, batch: TrainBatch, learning_rate: float, bf16: bool) -> StepStats:
        return self.trainer.sft_step(batch, learning_rate, bf16)

    def grpo_step(self, batch: TrainBatch, step: GrpoStep, learning_rate: float) -> list[StepStats]:
        return self.trainer.grpo_step(batch, step, learning_rate)

    def freeze_reference(self, checkpoint: str | None) -> None:
        self.trainer.freeze_reference(checkpoint)

    def sleep(self) -> None:
        self.trainer.sleep()

    def wake(self) -> None:
        self.trainer.wake()

    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[np.ndarray[Any, Any]]:
        return self.trainer.logprobs(sequences, temperature)

    def weights(self, version: WeightVersion) -> tuple[Any, None]:
        """Rank 0's are sent; the others only take part in gathering them. The second value says that it was done: the
        driver can wait for it without fetching the first."""
        if self.rank:
            with self.trainer.whole_policy():
                return None, None
        update = self.trainer.weights(version, self.packed)
        self.packed = update.flat  # Ray copies what is in it before this actor's next call
        return update, None

    def open_sink(self, name: str, sink: WeightSink) -> tuple[tuple[TensorSpec, ...], Any]:
        """Where `send_weights` will put the weights (rank 0 only); returns what its receivers must know."""
        self.sinks[name] = sink
        return self.trainer.layout(), sink.open()

    def close_sink(self, name: str) -> None:
        self.sinks.pop(name).close()

    def send_weights(self, name: str, version: WeightVersion, piece_numbers: int) -> Any:
        """Rank 0 sends; the others only take part in gathering, to the end even where sending fails."""
        sink, layout = self.sinks.get(name), self.trainer.layout()
        pieces = self.trainer.weight_pieces(piece_numbers, until_sent=sink.until_sent if sink else lambda: None)
        try:
            if sink is None:
                return None
            if (room := sink.room(layout, version)) is not None:
                pieces = self.trainer.weight_pieces(piece_numbers, room)
            return sink.take(layout, pieces, version)
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
