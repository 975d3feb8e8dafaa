"""The settings as one typed tree, and what its sections demand of each other.

Every default stands in its section and nowhere else; `apr-ray config show` prints them all.
"""

from __future__ import annotations

from pydantic import model_validator

from apr_ray.config.running import (
    EngineConfig,
    EvalConfig,
    PlacementConfig,
    RayConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrackingConfig,
    WeightsConfig,
)
from apr_ray.config.section import PathText, Section
from apr_ray.config.training import BoundsConfig, DataConfig, GrpoConfig, LearnerConfig, ModelConfig, SftConfig


class Config(Section):
    """The whole tree."""

    run: RunConfig = RunConfig()
    ray: RayConfig = RayConfig()
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    init_from: PathText | None = None
    """Checkpoint folder that training or evaluation begins with."""
    data: DataConfig = DataConfig()
    learner: LearnerConfig = LearnerConfig()
    sft: SftConfig = SftConfig()
    grpo: GrpoConfig = GrpoConfig()
    bounds: BoundsConfig = BoundsConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    placement: PlacementConfig = PlacementConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _context_fits(self) -> Config:
        engine, model = self.engine.context_tokens, self.model.context_tokens
        if engine is not None and engine > model and self.init_from is None:
            raise ValueError(f"engine.context_tokens {engine} is above model.context_tokens {model}")
        if self.data.max_sequence_tokens > model and self.init_from is None:
            raise ValueError(
                f"data.max_sequence_tokens {self.data.max_sequence_tokens} is above model.context_tokens {model}"
            )
        return self

    @model_validator(mode="after")
    def _muon_sees_whole_matrices(self) -> Config:
        for name in ("sft", "grpo"):
            rate = getattr(self, name).optimizer.muon_rate
            if rate and self.learner.zero_stage:
                raise ValueError(
                    f"{name}.optimizer.muon_rate {rate:g} needs learner.zero_stage 0, it is {self.learner.zero_stage}:"
                    " Muon's steps are of whole matrices"
                )
        return self

    @model_validator(mode="after")
    def _gpus_are_used(self) -> Config:
        engine, gpus = self.engine, self.rollout.gpus_per_worker
        on_cpu = engine.device == "cpu" or (engine.name == "torch" and engine.device is None)
        if gpus and (engine.name == "sglang_server" or on_cpu):
            raise ValueError(
                f"rollout.gpus_per_worker is {gpus:g}, engine {engine.name} uses none (engine.device {engine.device})"
            )
        if engine.device == "cuda" and not gpus and engine.name != "sglang_server":
            raise ValueError("engine.device is cuda, rollout.gpus_per_worker is 0: a worker reserves what it uses")
        if engine.name == "torch" and gpus > 1:
            raise ValueError(f"rollout.gpus_per_worker is {gpus:g}, the torch engine uses one GPU or a share of it")
        return self

    @model_validator(mode="after")
    def _weights_stay_on_a_gpu(self) -> Config:
        if self.weights.transport != "cuda_ipc":
            return self
        if self.engine.name == "sglang_server" or not self.rollout.gpus_per_worker:
            raise ValueError(
                "weights.transport cuda_ipc needs an engine of the workers' own on a GPU: engine.name is"
                f" {self.engine.name}, rollout.gpus_per_worker {self.rollout.gpus_per_worker:g}"
            )
        if not self.learner.gpus_per_rank:
            raise ValueError(
                "weights.transport cuda_ipc needs learners on the engines' GPU, learner.gpus_per_rank is 0"
            )
        learner, rollout = self.learner, self.rollout
        if self.placement.mode == "colocated":
            reserved = learner.ranks * learner.gpus_per_rank
        else:
            reserved = learner.gpus_per_rank + rollout.workers * rollout.gpus_per_worker
        if reserved > 1 + 1e-9:
            raise ValueError(
                f"weights.transport cuda_ipc is for parts that share one GPU, they reserve {reserved:g}: lower"
                " learner.gpus_per_rank, rollout.gpus_per_worker or rollout.workers, or use shared_memory"
            )
        return self

    @model_validator(mode="after")
    def _nccl_has_gpus(self) -> Config:
        learner, rollout, weights = self.learner, self.rollout, self.weights
        both = learner.gpus_per_rank and rollout.gpus_per_worker
        if weights.transport == "collective" and weights.backend == "nccl" and not both:
            raise ValueError(
                f"weights.backend nccl is between GPUs: learner.gpus_per_rank is {learner.gpus_per_rank:g},"
                f" rollout.gpus_per_worker {rollout.gpus_per_worker:g}"
            )
        return self

    @model_validator(mode="after")
    def _a_drained_worker_has_all_of_its_trees(self) -> Config:
        if self.grpo.ahead and self.rollout.fan_out == "spread" and self.weights.mode == "drain":
            raise ValueError(
                "weights.mode drain lets a worker's trees end first, and with rollout.fan_out spread their children run"
                " on others: with grpo.ahead use weights.mode=pause, or rollout.fan_out=local"
            )
        return self

    @model_validator(mode="after")
    def _each_worker_has_a_server(self) -> Config:
        servers = len(self.engine.server_urls)
        if self.engine.name == "sglang_server" and servers != self.rollout.workers:
            raise ValueError(
                f"rollout.workers is {self.rollout.workers}, engine.server_urls names {servers}: each worker has one"
                " server, whose weights it changes"
            )
        return self

    @model_validator(mode="after")
    def _colocated_parts_match(self) -> Config:
        learner, rollout = self.learner, self.rollout
        if self.placement.mode != "colocated":
            return self
        if self.grpo.ahead:
            raise ValueError("grpo.ahead needs learners and engines at work together, placement.mode is colocated")
        if learner.ranks != rollout.workers:
            raise ValueError(
                f"colocated, each rank shares one worker's place: learner.ranks {learner.ranks},"
                f" rollout.workers {rollout.workers}"
            )
        if learner.gpus_per_rank != rollout.gpus_per_worker or rollout.gpus_per_worker > 1:
            raise ValueError(
                "colocated, a rank and a worker share at most one GPU:"
                f" learner.gpus_per_rank {learner.gpus_per_rank:g}, rollout.gpus_per_worker {rollout.gpus_per_worker:g}"
            )
        return self
