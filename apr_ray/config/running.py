"""Settings of engines, workers, weight sync, evaluation, tracking, and of where all of it runs."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from apr_ray.config.section import Count, Gpus, PathText, Positive, PositiveFloat, Rate, Section, Seed, Temperature


class TaskConfig(Section):
    """Which task, and its own options."""

    name: str = "countdown"
    """Found among the entry points `apr_ray.tasks`, or imported as `module:Class`."""
    options: dict[str, Any] = Field(default={})
    """Typed and checked by the task; `apr-ray config show` lists them."""


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


SERVERS_OWN = ["device", "dtype", "kv_tokens", "max_sequences", "stream_interval"]
"""Settings that a server was started with."""


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
    server_args: dict[str, Any] = Field(default={})
    """Further arguments of SGLang's or vLLM's engine, passed on as they are."""
    server_urls: list[str] = Field(default=[])
    """SGLang servers, one per rollout worker, as `http://host:30000`; they must see `run.root` at the same path."""

    @property
    def exact(self) -> bool:
        """Whether it computes in float32; a server's precision is its own business."""
        return self.dtype == "float32" and self.name != "sglang_server"

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> EngineConfig:
        """Refuse settings that the chosen engine would ignore in silence."""
        ignored = {"torch": ["kv_tokens"], "sglang_server": SERVERS_OWN}.get(self.name, [])
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


EXACT_TOLERANCE = 5e-5
"""In float32 a mean of 2e-7 was measured with the embedded engine, and less than 5e-6 for any token of any engine
(docs/weights.md, docs/engines.md)."""
ROUNDED_TOLERANCE = 0.05


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
    folder: PathText | None = None
    """Where the disk transport writes; all nodes must see it."""
    mismatch_tolerance: PositiveFloat | None = None
    """Largest mean |Δ logprob| between engine and learner after a sync, and on those tokens of a batch that the
    learner's present weights drew; above it the run stops. By default 5e-5 where both compute in float32, which one
    optimiser step at a rate of 1e-5 exceeds, and 0.05 where one does not."""
    check_calls: Positive = 8
    """Calls compared after each sync."""

    def tolerance(self, exact: bool) -> float:
        """`mismatch_tolerance`, or its default; `exact` where engine and learner compute in float32."""
        return self.mismatch_tolerance or (EXACT_TOLERANCE if exact else ROUNDED_TOLERANCE)

    @model_validator(mode="after")
    def _disk_has_a_folder(self) -> WeightsConfig:
        if self.transport == "disk" and self.folder is None:
            raise ValueError("transport disk needs weights.folder, a folder that all nodes share")
        return self


class EvalConfig(Section):
    """Evaluation on held-out problems."""

    problems: Positive = 500
    """Problems of a full evaluation."""
    samples: Positive = 1
    """Trees per problem at temperature > 0."""
    temperatures: tuple[Temperature, ...] = (0.0, 0.3, 0.6, 1.0)
    """Sampling temperatures of a full evaluation; 0 is greedy."""
    split: Literal["heldout", "validation", "heldout_targets"] = "heldout"
    """Problems of a full evaluation: the test set, the validation set, or those whose targets are never trained on."""
    seed: Seed = 0
    """Draws the problems. Runs with other `run.seed`s are evaluated on the same ones, so that they can be compared."""
    targets_problems: Count = 0
    """Problems with held-out targets that a full evaluation decodes greedily besides."""
    during_training_problems: Positive = 100
    """Validation problems of an evaluation during training, greedy: `best/` is chosen by them."""
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


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class RunConfig(Section):
    """Names, places and seeds."""

    root: PathText = "runs"
    """Folder that holds all runs and the MLflow database."""
    name: str | None = None
    """Folder under `root`; made from the command and the time where not given."""

    @field_validator("root", mode="before")
    @classmethod
    def _a_root_is_given(cls, root: Any) -> Any:
        if root == "null":
            raise ValueError("null is no folder; the default is runs")
        return root

    @field_validator("name")
    @classmethod
    def _a_name_is_a_path_below(cls, name: str | None) -> str | None:
        parts = name.split("/") if name is not None else ["a"]
        if any(part in ("", ".", "..") or len(part.encode()) > 200 or _CONTROL.search(part) for part in parts):
            raise ValueError("a name has no control characters, at most 200 bytes, is no . or .. and begins with no /")
        return name

    seed: Seed = 0
    """Decides problems, demonstrations, initial weights and every draw."""


class RayConfig(Section):
    """How to reach Ray."""

    address: str | None = None
    """A running cluster's address ("auto" finds it); a private local Ray is started where not given."""
    dashboard_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 starts no dashboard."""
