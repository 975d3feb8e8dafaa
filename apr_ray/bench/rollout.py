"""Pool and runtime against the engine alone on the same tokens; how long threads wait for each other."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from apr_ray.bench.recording import (
    Moment,
    Recording,
    ReplayEngine,
    Replies,
    Waits,
    fresh_policy,
    largest_difference,
    record,
    replay_trees,
    thread_sums,
)
from apr_ray.bench.sync import private_ray
from apr_ray.bench.timing import REPEATS, Result, all_in_turn, in_turn, median_ratio
from apr_ray.config import Config
from apr_ray.core.engine import Engine
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Path, ThreadTree
from apr_ray.model.llama import save_policy
from apr_ray.rollout.pool import RolloutPool, calls_at_once
from apr_ray.rollout.worker import RolloutWorker
from apr_ray.tasks.registry import load_task
from apr_ray.threads.events import Listener

LATENCY_TURNS = 3
"""At most: a turn takes a minute, and is a mean over many trees already."""
WAITING_TREES = 128
"""At most, of which threads' waits are taken: as many as run at the same time."""


def run(
    trees: int | None = None,
    repeats: int | None = None,
    engine: str | None = None,
    checkpoint: str | None = None,
    alone_trees: int = 24,
) -> Result:
    """`ratio`: seconds of the engine alone, calls and their order given, over those of pool, actor and runtime; the
    median over turns, of which each holds both, as a machine may be a third slower half a minute later.

    256 recorded trees on the embedded engine; with `engine` and `checkpoint`, a trained policy's own (`bench.trees`).
    The latency of a tree is measured on the first `alone_trees`, one at a time; the waits for a spawn and for a join
    while up to `WAITING_TREES` run, in a part of its own that streams every token.
    """
    if engine is not None or checkpoint is not None:
        from apr_ray.bench import trees as real

        if engine is None or checkpoint is None:
            missing = "--engine" if engine is None else "--checkpoint"
            raise AprError(f"{missing} is missing", "Give both: --engine sglang --checkpoint runs/NAME/sft/final")
        with private_ray():
            return real.run(engine, checkpoint, trees or real.TREES, repeats or real.REPEATS)
    repeats = repeats or REPEATS
    recording = record(trees or 256)
    config = recording.config
    made: dict[str, Any] = {}
    with private_ray(), tempfile.TemporaryDirectory() as folder:
        save_policy(fresh_policy(config), load_task(config.task).tokenizer(), config.task, f"{folder}/policy")
        pool = replaying_pool(recording, f"{folder}/policy", workers=1)

        def ours() -> None:
            made["trees"] = [tree for _, tree in sorted(pool.run(recording.requests), key=lambda item: item[0])]

        def alone() -> None:
            made["alone"] = ray.get(pool.workers[0].replay.remote(recording.trees, config.rollout.concurrent_trees))

        taken = all_in_turn({"pool": ours, "alone": alone}, repeats)
        pool.stop()
        latency = lane_latency_s(recording, f"{folder}/policy", alone_trees, min(repeats, LATENCY_TURNS))
        waits = waits_of(recording, f"{folder}/policy")
    times = {name: statistics.median(seconds) for name, seconds in taken.items()}
    return {
        "ratio": median_ratio(taken["alone"], taken["pool"]),
        "pool_tokens_per_s": recording.sampled_tokens / times["pool"],
        "engine_alone_tokens_per_s": recording.sampled_tokens / times["alone"],
        "trees": float(len(recording.trees)),
        "one_tree_local_ms": 1000 * latency["local"],
        "one_tree_spread_ms": 1000 * latency["spread"],
        "local_of_spread_latency": latency["local"] / latency["spread"],
        "max_delta_logprob_per_thread": largest_difference(thread_sums(made["trees"]), made["alone"]),
    } | waits


def lane_latency_s(recording: Recording, checkpoint: str, trees: int, repeats: int) -> dict[str, float]:
    """Mean seconds of a tree, one at a time over two workers: children on their parent's engine, or over both."""
    requests = recording.requests[:trees]
    pools = {lanes: replaying_pool(recording, checkpoint, workers=2, fan_out=lanes) for lanes in ("local", "spread")}

    def one_by_one(pool: RolloutPool) -> None:
        for request in requests:
            list(pool.run([request]))

    times = in_turn({lanes: partial(one_by_one, pool) for lanes, pool in pools.items()}, repeats)
    for pool in pools.values():
        pool.stop()
    return {lanes: seconds / len(requests) for lanes, seconds in times.items()}


def waits_of(recording: Recording, checkpoint: str) -> Result:
    """`Waits.medians`, and of how many joins. Every token is handed out at once: a chunk of several comes later."""
    engine = recording.config.engine.model_copy(update={"stream_interval": 1})
    config = recording.config.model_copy(update={"engine": engine})
    pool = replaying_pool(replace(recording, config=config), checkpoint, workers=1)
    for _ in range(2):  # the first warms up
        list(pool.run(recording.requests[:WAITING_TREES]))
        waits: Waits = ray.get(pool.workers[0].waits.remote())
    pool.stop()
    return {"joins": float(len(waits.join_to_parent)), **waits.medians()}


def replaying_pool(recording: Recording, checkpoint: str, workers: int, fan_out: str = "local") -> RolloutPool:
    """A pool whose engines take the recorded tokens."""
    rollout = recording.config.rollout.model_copy(update={"fan_out": fan_out})
    config = recording.config.model_copy(update={"rollout": rollout})
    options = {"num_cpus": rollout.cpus_per_worker, "max_concurrency": calls_at_once(config)}
    replies = ray.put(recording.replies)
    actors: list[Any] = [
        ray.remote(ReplayWorker).options(**options).remote(config, checkpoint, f"worker-{i:02d}", replies)
        for i in range(workers)
    ]
    ray.get([actor.join.remote(None) for actor in actors])
    return RolloutPool(actors, rollout.concurrent_trees, spread_children=fan_out == "spread")


class WatchedWorker(RolloutWorker):
    """A rollout worker that knows how long the threads of its trees waited for each other."""

    def __init__(self, config: Config, checkpoint: str, worker_id: str) -> None:
        super().__init__(config, checkpoint, worker_id)
        self.waited = Waits()

    def listener(self) -> Listener:
        """Hears how long threads wait."""
        return self.waited.listener(self._now)

    def _now(self) -> Moment:
        return time.perf_counter(), float(self.engine.stats().steps or 0)

    async def waits(self) -> Waits:
        """Of the trees since it was last asked."""
        waited, self.waited = self.waited, Waits()
        return waited


class ReplayWorker(WatchedWorker):
    """A rollout worker over a `ReplayEngine`; it can also run the engine's part alone."""

    def __init__(self, config: Config, checkpoint: str, worker_id: str, replies: Replies) -> None:
        self.replies = replies
        super().__init__(config, checkpoint, worker_id)

    def new_engine(self, config: Config, checkpoint: str) -> Engine:
        """An engine that takes the recorded tokens."""
        what = config.engine
        engine = ReplayEngine.from_checkpoint(
            checkpoint,
            max_sequences=what.max_sequences,
            cache_slots=what.cache_slots,
            stream_interval=what.stream_interval,
        )
        engine.replies = self.replies
        return engine

    async def replay(self, trees: Sequence[ThreadTree], concurrent: int) -> dict[tuple[str, Path], float]:
        """See `recording.replay_trees`."""
        return await replay_trees(self.engine, trees, concurrent)
