"""The settings as typed sections. Every default stands here and nowhere else; `apr-ray config show` prints them all."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]


def _part_of_one_or_whole(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("several GPUs are reserved whole")
    return gpus


Beta = Annotated[float, Field(ge=0, lt=1)]
Gpus = Annotated[Rate, AfterValidator(_part_of_one_or_whole)]


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, values do not change, the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TaskConfig(Section):
    """Which task, and its own options."""

    name: str = "countdown"
    """Found among the entry points `apr_ray.tasks`, or imported as `module:Class`."""
    options: dict[str, Any] = {}
    """Typed and checked by the task; `apr-ray config show` lists them."""


class ModelConfig(Section):
    """A Llama-2 architecture (paper section 4.1), small by default."""

    hidden_size: Positive = 128
    """Width of the residual stream."""
    layers: Positive = 4
    """Transformer blocks."""
    heads: Positive = 4
    """Attention heads."""
    kv_heads: Positive | None = None
    """Key/value heads; as many as `heads` where not given."""
    ffn_size: Positive = 344
    """Width of the gated feed-forward layer."""
    context_tokens: Positive = 1024
    """Longest sequence, prompt and output together."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tied_embeddings: bool = True
    """Whether the output layer is the embedding table."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} over {self.heads} heads is not an even head size")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


class DataConfig(Section):
    """Problems and demonstrations."""

    train_problems: Positive = 50_000
    """Demonstrated problems; a problem counts once per solver seed."""
    solver_seeds: Positive = 1
    """Solver runs per problem."""
    max_sequence_tokens: Positive = 1024
    """Longer demonstrations are dropped, whole trees at a time, and counted."""
    workers: Positive = 2
    """Ray tasks that solve side by side."""


class LearnerConfig(Section):
    """The DeepSpeed learner group."""

    ranks: Positive = 1
    """Learner processes."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What ranks share instead of each holding it whole: 1 optimiser state, 2 gradients too, 3 parameters too."""
    zero3_whole_parameters: Count = 100_000
    """At stage 3 a parameter of at most so many numbers stays whole on every rank: gathering it costs more."""
    micro_batch_tokens: Positive = 4096
    """Padded tokens per forward pass, at most (a longer sequence goes alone)."""
    cpus_per_rank: Rate = 0.5
    """Ray CPUs reserved per rank. Learners and rollout workers take turns, so each may reserve half a core."""
    gpus_per_rank: Fraction = 0.0
    """GPUs reserved per rank, 1 or a share of one; with 0 it trains on the CPU."""


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat
    """Peak."""
    warmup_steps: Count = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after warm-up, over the progress of training."""
    final_fraction: Fraction = 0.0
    """Learning rate at the end over its peak."""
    weight_decay: Rate = 0.01
    """Decoupled, of all parameters."""
    beta1: Beta = 0.9
    """Decay of the first moment."""
    beta2: Beta = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment. Where it is larger than that root, steps are in proportion to the
    gradient, as in SGD with momentum: less noise goes into parameters whose gradient is small."""
    final_norm_scale: PositiveFloat | None = None
    """Learning rate of the last normalisation's gains over `learning_rate`, with an `eps` of 1e-8. They scale all
    logits, so this is how fast a policy may become surer of itself as a whole. The same rate where not given."""
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm."""


class SftConfig(Section):
    """Supervised training on demonstrations (paper section 3.2)."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, warmup_steps=100, schedule="linear")
    batch_tokens: Positive = 4096
    """Real tokens per optimiser step, over all ranks."""
    tokens: Positive = 10_000_000
    """Tokens trained on in all."""
    max_minutes: PositiveFloat | None = None
    """Ends training by the clock; the schedule then follows the clock too."""
    child_first_fraction: Fraction = 0.2
    """First share of training in which only children's short sequences are shown (curriculum)."""
    child_share: Fraction = 1.0
    """Share of the children's sequences shown after that, drawn anew each epoch: a tree has several, much alike."""
    mask: Literal["none", "given", "prompt"] = "none"
    """What carries no loss: nothing, as in the paper; what a thread was given at its start (a parent's later calls then
    train its earlier text and the joins again); or the whole prompt of every call."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16 runs the matrix products of a step under autocast; weights, optimiser and loss stay in float32. auto is bf16
    where every rank's processor multiplies it, else fp32: a CPU without such instructions is six times slower with
    bf16."""
    eval_every: Positive = 5000
    """Steps between evaluations on held-out problems; the best policy is kept."""
    save_every: Positive = 500
    """Steps between checkpoints."""
    log_every: Positive = 20
    """Steps between lines of metrics."""


class GrpoConfig(Section):
    """GRPO over whole trees (paper section 3.3)."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    steps: Positive = 150
    """Rollout phases in all."""
    max_minutes: PositiveFloat | None = None
    """Ends training by the clock, at the end of a step."""
    problems_per_step: Positive = 64
    """Groups per step."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Trees per problem, over which advantages are normalised."""
    inner_steps: Positive = 2
    """Optimiser steps on each batch of rollouts."""
    advantage: Literal["group", "success"] = "group"
    """`group`: z-scores of a group's rewards. `success`: the reward itself, which with one inner step is supervised
    training on the solved trees (rejection sampling): a control."""
    reward: Literal["task", "random"] = "task"
    """`random` draws every tree's reward by a fair coin: a control, from which nothing can be learned."""
    clip: PositiveFloat = 0.2
    """PPO's clip range on the ratio."""
    loss_mean: Literal["call", "tree", "token"] = "call"
    """What the loss is a mean of. `call`, as in the paper: of a call's tokens, then of a tree's calls, then of trees;
    `tree`: of a tree's tokens, then of trees; `token`: of all tokens of the batch."""
    ratio: Literal["behaviour", "proximal"] = "behaviour"
    """Whose probability the clipped ratio divides by: the engine's that drew the token, or the learner's at the start
    of the batch. The latter clips the learner's own steps alone; `correction` then accounts for the engine."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """With `ratio: proximal`, what is done with the importance weight proximal / behaviour: left out, cut off at
    `correction_cap`, or set to 0 outside [1 / cap, cap]. It multiplies the loss without its KL term."""
    correction_level: Literal["token", "call", "tree"] = "token"
    """Over what the weight is taken: a token, or the product over the trained tokens of its call or tree."""
    correction_cap: Annotated[float, Field(gt=1)] = 2.0
    """Largest importance weight."""
    correction_from: Rate = 0.0
    """Weights are 1 in a batch whose mean |Δ logprob| between engine and learner is not above this."""
    kl_coefficient: Rate = 0.001
    """Weight of the k3 penalty against the initial policy; 0 leaves it out."""
    temperature: PositiveFloat = 1.0
    """At which trees are sampled, and logprobs taken."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of a step's matrix products, as in `sft.precision`. Its ratios compare logprobs with the engine's, which in bf16
    differ by chance: use it where the engine is below float32 too."""
    max_staleness: Count = 0
    """A tree drawn under weights older than this many versions is not used."""
    overlap: bool = False
    """Sample the next step's trees while the learners train on this one's: one version off, so `max_staleness` must be
    at least 1. Worth it where learners and workers have machines of their own. See `weights.mode` for what becomes of
    the trees that run when new weights come."""
    eval_every: Positive = 10
    """Steps between evaluations on held-out problems; the best policy is kept."""
    initial_evaluation: bool = True
    """Evaluate, on all held-out problems, the policy that training begins with."""
    save_every: Positive = 10
    """Steps between checkpoints."""
    keep_batches: Literal["off", "last", "every"] = "last"
    """Batches kept for `apr-ray audit`, with the policy that drew them: of the steps that begin from a checkpoint, as
    that policy lies on disk anyway; the last of them, or every one."""

    @model_validator(mode="after")
    def _overlap_is_stale(self) -> GrpoConfig:
        if self.overlap and self.max_staleness < 1:
            raise ValueError("overlap samples one version off: max_staleness must be at least 1")
        return self

    @model_validator(mode="after")
    def _correction_has_something_to_correct(self) -> GrpoConfig:
        if self.correction != "none" and self.ratio == "behaviour":
            raise ValueError(
                f"correction {self.correction} needs ratio proximal; ratio {self.ratio} divides by the engine's"
                " probability already"
            )
        return self


class BoundsConfig(Section):
    """Bounds of one tree; hitting one is a recorded outcome."""

    max_depth: Count = 1
    """Levels of children; 0 forbids spawning."""
    max_children: Positive = 16
    """Children per spawn."""
    max_rounds: Count = 8
    """Spawn rounds per thread; 0 forbids spawning."""
    max_call_tokens: Positive = 1024
    """Sampled tokens of one call."""
    max_tree_tokens: Positive = 16_384
    """Sampled tokens of all threads of a tree."""
    max_seconds: PositiveFloat = 300.0
    """Wall time of a tree."""
    cancel_on_success: bool = False
    """Abort the siblings of a child that solved; they join as "Cancelled"."""


SET_BY_US = {
    "torch": {},
    "sglang_server": {},
    "sglang": {
        "context_length": "engine.context_tokens",
        "device": "engine.device",
        "dtype": "engine.dtype",
        "enable_memory_saver": "placement.mode",
        "enable_weights_cpu_backup": "placement.mode",
        "max_running_requests": "engine.max_sequences",
        "max_total_tokens": "engine.kv_tokens",
        "stream_interval": "engine.stream_interval",
        **dict.fromkeys(
            (
                "custom_sigquit_handler",
                "disable_priority_preemption",
                "dp_size",
                "enable_priority_scheduling",
                "incremental_streaming_output",
                "model_path",
                "schedule_low_priority_values_first",
                "skip_tokenizer_init",
                "tokenizer_worker_num",
                "weight_version",
            ),
            "",
        ),
    },
    "vllm": {
        "dtype": "engine.dtype",
        "enable_sleep_mode": "placement.mode",
        "kv_cache_memory_bytes": "engine.kv_tokens",
        "max_model_len": "engine.context_tokens",
        "max_num_seqs": "engine.max_sequences",
        "stream_interval": "engine.stream_interval",
        **dict.fromkeys(
            (
                "async_scheduling",
                "data_parallel_size",
                "enable_prefix_caching",
                "generation_config",
                "logprobs_mode",
                "model",
                "scheduling_policy",
                "skip_tokenizer_init",
                "worker_extension_cls",
            ),
            "",
        ),
    },
}
"""Per engine, arguments of its own that `engine.server_args` may not hold, and the key that sets them; "" if none does.
"""


class EngineConfig(Section):
    """The inference engine of each rollout worker."""

    name: Literal["torch", "sglang", "sglang_server", "vllm"] = "torch"
    """Which engine; `torch` is the embedded one, `sglang_server` a client of servers that someone runs."""
    max_sequences: Positive = 64
    """Requests that decode side by side; more wait."""
    cache_slots: Count = 64
    """Ended requests whose KV the torch engine keeps; the others keep what fits into `kv_tokens`."""
    context_tokens: Positive | None = None
    """Defaults to the model's."""
    stream_interval: Positive = 16
    """Tokens per streamed chunk."""
    deterministic: bool = False
    """A request's tokens and logprobs do not depend, to the last bit, on what else is in the batch (torch only).

    Measured on 2 CPU cores, a model of 0.4 M parameters, 40 tokens of prompt: 1.9 times slower when all 64
    `max_sequences` are in use, 8 times when 4 are: every step computes all rows. Keep `max_sequences` near what runs.
    """
    device: Literal["cpu", "cuda"] | None = None
    """What the engine finds by default; the torch engine then takes the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and KV. Below float32 the engine's logprobs differ from a float32 learner's: see
    `weights.mismatch_tolerance`."""
    kv_tokens: Positive | None = None
    """Tokens whose KV SGLang or vLLM holds: what fits into the GPU by default, on a CPU `max_sequences` contexts."""
    server_args: dict[str, Any] = {}
    """Further arguments of SGLang's or vLLM's engine, passed on as they are."""
    server_urls: list[str] = []
    """SGLang servers, one per rollout worker, as `http://host:30000`; they must see `run.root` at the same path."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> EngineConfig:
        """What an engine would not even look at, and whose absence would be noticed late."""
        ignored = {"torch": ["kv_tokens"], "sglang_server": ["device", "dtype", "kv_tokens"]}.get(self.name, [])
        for key in ignored if self.name == "torch" else [*ignored, "deterministic"]:
            value, default = getattr(self, key), type(self).model_fields[key].default
            if value != default:
                undo = f"engine.{key}={json.dumps(default)}"
                raise ValueError(f"{key} is {value}, which engine {self.name} knows nothing of: set {undo}")
        return self

    @model_validator(mode="after")
    def _server_args_are_free(self) -> EngineConfig:
        if self.name in ("torch", "sglang_server") and self.server_args:
            raise ValueError(f"server_args {sorted(self.server_args)} are SGLang's or vLLM's, name is {self.name}")
        ours = SET_BY_US[self.name]
        for key in sorted(self.server_args.keys() & ours.keys()):
            where = f"set {ours[key]} instead" if ours[key] else "apr-ray sets it itself"
            raise ValueError(f"server_args.{key} may not be given: {where}")
        return self

    @model_validator(mode="after")
    def _servers_are_named(self) -> EngineConfig:
        if (self.name == "sglang_server") != bool(self.server_urls):
            raise ValueError(f"name is {self.name} and server_urls {self.server_urls}: a server needs both")
        if len(set(self.server_urls)) != len(self.server_urls):
            raise ValueError(f"server_urls names a server twice: {self.server_urls}")
        return self


class RolloutConfig(Section):
    """The pool of rollout workers."""

    workers: Annotated[int, Field(ge=1)] = 2
    """Rollout actors, one engine each."""
    min_workers: Positive | None = None
    """Workers that must be ready before work begins; the others join when there is room for them. All by default."""
    concurrent_trees: Positive = 64
    """Trees each worker runs at the same time."""
    cpus_per_worker: Rate = 0.5
    """Ray CPUs reserved per worker."""
    gpus_per_worker: Gpus = 0.0
    """GPUs reserved per worker: as many as its engine uses, or a share of one; the torch engine uses at most one."""
    fan_out: Literal["local", "spread"] = "local"
    """Where children decode: on their parent's engine, or spread over the engines of all workers, which cuts a tree's
    latency while engines idle. A parent always stays where its prefix is cached."""
    max_restarts: Count = 3
    """Workers that may die, each being replaced, before the run ends."""
    budget: Positive | None = None
    """Condition every root prompt on this budget (paper section 4.2: children per round for APR, tokens for SoS+). The
    policy must have seen such prefixes: `task.options.budgets`."""

    @model_validator(mode="after")
    def _workers_suffice(self) -> RolloutConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is above workers {self.workers}")
        return self


class PlacementConfig(Section):
    """Where learners and engines run."""

    mode: Literal["disaggregated", "colocated"] = "disaggregated"
    """Every rank and every worker has CPUs and GPUs of its own; or each rank shares one worker's, and they take turns:
    engines give their memory back while the learners train, and learners their optimiser's meanwhile."""
    autoscaling: bool = False
    """The cluster adds nodes when something waits for room. Where it does not, what can never fit is refused."""


class WeightsConfig(Section):
    """Weight sync and its check."""

    transport: Literal["object_store", "collective", "shared_memory", "cuda_ipc", "disk", "none"] = "object_store"
    """How weights get from the learners to the workers: Ray's object store (any number of nodes, workers may come and
    go); a torch.distributed broadcast (the least memory and copies); memory shared on one node, or on one GPU;
    files; or not at all, a control at which the check after the sync must stop the run."""
    mode: Literal["drain", "pause", "in_flight"] = "pause"
    """What becomes of trees that run when new weights come: they end first; they pause, and their KV is computed again;
    or they go on between two steps with the KV they have (the torch engine only)."""
    piece_numbers: Positive = 4_000_000
    """Numbers sent at a time, by all transports but the object store; a larger parameter goes alone."""
    timeout_s: PositiveFloat = 120.0
    """Longest wait for any part during a sync; then the run stops and says who is missing."""
    backend: Literal["gloo", "nccl"] = "gloo"
    """Of the collective transport: between CPUs, or between GPUs."""
    folder: str | None = None
    """Where the disk transport writes; all nodes must see it."""
    mismatch_tolerance: PositiveFloat = 1e-3
    """Largest mean |Δ logprob| between engine and learner after a sync, and on those tokens of a batch that the
    learner's present weights drew; above it the run stops."""
    check_calls: Positive = 8
    """Calls compared after each sync."""

    @model_validator(mode="after")
    def _disk_has_a_folder(self) -> WeightsConfig:
        if self.transport == "disk" and self.folder is None:
            raise ValueError("transport disk needs weights.folder, a folder that all nodes share")
        return self


class EvalConfig(Section):
    """Evaluation on held-out problems."""

    problems: Positive = 500
    """Held-out problems of a full evaluation."""
    samples: Positive = 1
    """Trees per problem at temperature > 0."""
    temperatures: tuple[Rate, ...] = (0.0, 1.0)
    """Sampling temperatures of a full evaluation; 0 is greedy."""
    split: Literal["heldout", "heldout_targets"] = "heldout"
    """Held out by (multiset, target), or by target."""
    during_training_problems: Positive = 100
    """Held-out problems of an evaluation during training, greedy."""
    traced_trees: Count = 3
    """Trees per evaluation that go to the tracker as traces."""

    @field_validator("temperatures")
    @classmethod
    def _some_and_distinct(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if not temperatures or len(set(temperatures)) < len(temperatures):
            raise ValueError("give at least one temperature, each once")
        return temperatures


class TrackingConfig(Section):
    """Where metrics go."""

    tracker: Literal["mlflow", "console", "none"] = "mlflow"
    """Which tracker."""
    uri: str | None = None
    """MLflow tracking URI; a SQLite file under `run.root` by default."""
    experiment: str = "apr-ray"
    """MLflow experiment."""


class RunConfig(Section):
    """Names, places and seeds."""

    root: str = "runs"
    """Folder that holds all runs and the MLflow database."""
    name: str | None = None
    """Folder under `root`; made from the command and the time where not given."""
    seed: Count = 0
    """Decides problems, demonstrations, initial weights and every draw."""


class RayConfig(Section):
    """How to reach Ray."""

    address: str | None = None
    """A running cluster's address ("auto" finds it); a private local Ray is started where not given."""
    dashboard_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 starts no dashboard."""


class Config(Section):
    """The whole tree."""

    run: RunConfig = RunConfig()
    ray: RayConfig = RayConfig()
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    init_from: str | None = None
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
    def _gpus_are_used(self) -> Config:
        engine, gpus = self.engine, self.rollout.gpus_per_worker
        if gpus and (engine.name == "sglang_server" or (engine.name == "torch" and engine.device != "cuda")):
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
        if self.engine.name not in ("torch", "sglang") or not self.rollout.gpus_per_worker:
            raise ValueError(
                "weights.transport cuda_ipc needs engine torch or sglang on a GPU: engine.name is"
                f" {self.engine.name}, rollout.gpus_per_worker {self.rollout.gpus_per_worker:g}"
            )
        if not self.learner.gpus_per_rank:
            raise ValueError(
                "weights.transport cuda_ipc needs learners on the engines' GPU, learner.gpus_per_rank is 0"
            )
        return self

    @model_validator(mode="after")
    def _a_drained_worker_has_all_of_its_trees(self) -> Config:
        if self.grpo.overlap and self.rollout.fan_out == "spread" and self.weights.mode == "drain":
            raise ValueError(
                "weights.mode drain lets a worker's trees end first, and with rollout.fan_out spread their children run"
                " on others: with grpo.overlap use weights.mode=pause, or rollout.fan_out=local"
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
        if self.grpo.overlap:
            raise ValueError("grpo.overlap needs learners and engines at work together, placement.mode is colocated")
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
