"""Thread trees of a trained policy on a real engine: pool and runtime, the engine alone, and the released code's way.

pool      our way: ids in and out, streamed, children started where the spawn is sampled      ─┐ the same trees: as
alone     the same calls in the same order, as many tokens each, straight into the engine      ─┘ many tokens
released  the released code's way, on an SGLang with the same arguments (`differing_server_args` names those that are
          not): a server, a thread and a request for every call, text in and text out, tokenised again on both sides.
          It asks for no logprobs; ours does

They take turns, each with an empty cache. SGLang draws from one stream of its own, so `released` has trees of its own.

`profile` says where a way's time goes. A way's tokens/s are the cores that the scheduler (SGLang's process that
computes) keeps busy, over its CPU seconds a token: so two ways differ by how much of its core they leave to it, and by
how many calls it has to compute at once (`calls_at_once`; a step of more calls costs less a token).

Where `others_cores` is not near 0 a ratio of speeds says who got more of what others left; that of the CPU seconds a
token (`of_released_cpu`) is less disturbed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import ray

from apr_ray.bench.recording import Waits, bench_config, replay_trees
from apr_ray.bench.released import differing_arguments, released_way, same_server, server_args
from apr_ray.bench.rollout import WatchedWorker
from apr_ray.bench.timing import MACHINE, Result, cpu_seconds, median_ratio, turns
from apr_ray.config import Config
from apr_ray.core.engine import EngineStats
from apr_ray.core.ledger import Outcome, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.model.llama import load_policy
from apr_ray.model.state import pack_weights, trainable_parameters
from apr_ray.rollout.pool import RolloutPool, calls_at_once
from apr_ray.tasks.registry import load_task
from apr_ray.threads.runtime import TreeRequest

TREES, REPEATS = 96, 3
CONCURRENT = 64
"""Trees at the same time."""
WARM_UP = 16
"""Trees that are not counted."""
LONG_TOKENS = 20
"""Calls of at least so many tokens tell how long a step of the engine takes."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Measurements of one way to run all trees.

    Attributes:
        cpu_s: see `timing.cpu_seconds`.
        prompt_tokens, cached_tokens: that the engine was given, and that it had KV of.
    """

    wall_s: float
    trees: Sequence[ThreadTree]
    cpu_s: Mapping[str, float]
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running trees, and the turns it had.

    Attributes:
        forget: no KV of an earlier turn is served.
        run: the trees.
        counts: prompt tokens so far, and those of them from the cache.
        processes: those that work for it; the first is where SGLang's processes belong.
    """

    forget: Callable[[], object]
    run: Callable[[Sequence[TreeRequest]], Sequence[ThreadTree]]
    counts: Callable[[], tuple[int, int]]
    processes: tuple[str, ...]
    turns: list[Turn] = field(default_factory=list)

    def take(self, requests: Sequence[TreeRequest], cpu: Callable[[], Mapping[str, float]]) -> Turn:
        """One turn, which is not kept."""
        self.forget()
        prompt, cached = self.counts()
        before, start = cpu(), time.perf_counter()
        trees = self.run(requests)
        wall, used = time.perf_counter() - start, cpu()
        prompt_after, cached_after = self.counts()
        used = {part: seconds - before.get(part, 0.0) for part, seconds in used.items()}
        return Turn(wall, trees, used, prompt_after - prompt, cached_after - cached)


def run(engine: str, checkpoint: str, trees: int = TREES, repeats: int = REPEATS) -> Result:
    """`ratio`: sampled tokens/s of pool, actor and runtime over those of the engine alone (the goal is 0.9).
    `of_released`: trees/s over the released code's way; `of_released_tokens_per_s` does not depend on how long the
    trees of either happened to be.

    Args:
        engine: torch, sglang or vllm.
        checkpoint: a trained policy of the quickstart's task.
        trees: how many, `CONCURRENT` at a time.
        repeats: turns of each way; medians are over them.
    """
    config = _config(engine)
    task = load_task(config.task)
    requests = [TreeRequest(p, seed=i) for i, p in enumerate(task.problems("train", trees, config.run.seed))]
    with ExitStack() as stack:
        worker = _worker(config, checkpoint)
        pool = RolloutPool([worker], CONCURRENT)
        stack.callback(pool.stop)
        ways = _in_the_actor(pool, worker)
        names = {child.pid: "ray" for child in psutil.Process().children()}
        names |= {os.getpid(): "driver", ray.get(worker.__ray_call__.remote(lambda _: os.getpid())): "worker"}
        calls, differing = None, ""
        if engine == "sglang":
            server = stack.enter_context(same_server(config, checkpoint))
            names[server.process.pid] = "server"
            ours = ray.get(worker.__ray_call__.remote(server_args))
            differing = differing_arguments(ours, server.get("/server_info"))
            run_released, calls = stack.enter_context(released_way(config, checkpoint, server.url, CONCURRENT))
            ways["released"] = Way(server.flush_cache, run_released, calls.counts, ("server", "driver"))
        for turn in turns(", ".join(ways), repeats + 1):
            for way in ways.values():
                taken = way.take(requests if turn else requests[:WARM_UP], partial(cpu_seconds, names))
                if turn:  # the first warms up
                    way.turns.append(taken)
            if not turn:
                ray.get(worker.waits.remote())
                if calls is not None:
                    calls.answers.clear()
        waited: Waits = ray.get(worker.waits.remote())
    result = _result(ways)
    if calls is not None:
        told = {f"released_{name}": value for name, value in calls.per_call().items()}
        result |= {**told, "differing_server_args": differing}
    if engine != "torch":  # it streams in chunks; `bench.rollout` has it stream every token for that
        result |= waits_in_steps(waited, _trees(ways["pool"]))
    return result


def _result(ways: Mapping[str, Way]) -> Result:
    seconds = {name: [turn.wall_s for turn in way.turns] for name, way in ways.items()}
    made = _trees(ways["pool"])
    result: Result = {
        "ratio": median_ratio(seconds["alone"], seconds["pool"]),
        "trees": float(len(made)),
        "children_per_tree": sum(tree.children for tree in made) / len(made),
        "engine_errors": float(sum(tree.outcome is Outcome.ENGINE_ERROR for tree in made)),
    }
    if released := ways.get("released"):
        drawn = _trees(released)
        speed = {name: [_tokens(turn) / turn.wall_s for turn in ways[name].turns] for name in ("pool", "released")}
        result |= {
            "of_released": median_ratio(seconds["released"], seconds["pool"]),  # as many trees
            "of_released_tokens_per_s": median_ratio(speed["pool"], speed["released"]),
            "released_children_per_tree": sum(tree.children for tree in drawn) / len(drawn),
        }
    profiles = {name: profile(way) for name, way in ways.items()}
    if "released" in profiles:
        result["of_released_cpu"] = profiles["released"]["all_us_per_token"] / profiles["pool"]["all_us_per_token"]
    for name, way in ways.items():
        numbers = profiles[name] | ({} if name == "alone" else _calls(way))  # alone has the times of the pool's calls
        result |= {f"{name}_{part}": value for part, value in numbers.items()}
    return result


def profile(way: Way) -> dict[str, float]:
    """Speed, medians over turns; and where the time goes, over all turns together.

    `PART_cores`: CPU seconds a second of a process and of what it started. `others_cores`: of everything else on the
    machine. `scheduler_us_per_token` and `all_us_per_token`: CPU microseconds a sampled token, of SGLang's scheduler
    and of all parts. `cached_share`: of the prompt tokens, those whose KV was there.
    """
    wall = sum(turn.wall_s for turn in way.turns)
    tokens = sum(map(_tokens, way.turns))
    used: dict[str, float] = defaultdict(float)
    for turn in way.turns:
        for part, seconds in turn.cpu_s.items():
            used[part] += seconds
    sglangs = f"{way.processes[0]}_"
    parts = {part.removeprefix(sglangs): s for part, s in used.items() if part.startswith(way.processes)}
    result = {
        "tokens_per_s": statistics.median(_tokens(turn) / turn.wall_s for turn in way.turns),
        "trees_per_s": statistics.median(len(turn.trees) / turn.wall_s for turn in way.turns),
        "tokens": float(tokens),
        "cached_share": sum(turn.cached_tokens for turn in way.turns) / sum(turn.prompt_tokens for turn in way.turns),
        **{f"{part}_cores": seconds / wall for part, seconds in sorted(parts.items())},
        "others_cores": (used[MACHINE] - sum(parts.values())) / wall,
        "all_us_per_token": 1e6 * sum(parts.values()) / tokens,
    }
    if "scheduler" in parts:
        result["scheduler_us_per_token"] = 1e6 * parts["scheduler"] / tokens
    return result


def _calls(way: Way) -> dict[str, float]:
    """How many calls, the mean time of one from its start to its end, and how many there are at once on average."""
    taken = [call.end_s - call.start_s for tree in _trees(way) for call in tree.calls]
    wall = sum(turn.wall_s for turn in way.turns)
    return {"calls": float(len(taken)), "call_s": statistics.fmean(taken), "calls_at_once": sum(taken) / wall}


def _trees(way: Way) -> list[ThreadTree]:
    return [tree for turn in way.turns for tree in turn.trees]


def _tokens(turn: Turn) -> int:
    return sum(tree.total_tokens for tree in turn.trees)


def _config(engine: str) -> Config:
    settings = [f"engine.name={engine}", "engine.max_sequences=128", f"rollout.concurrent_trees={CONCURRENT}"]
    if engine != "torch":
        settings += ["engine.device=cpu", "engine.kv_tokens=60000"]
    return bench_config(settings)


def _worker(config: Config, checkpoint: str) -> Any:
    options = {"num_cpus": 0.5, "max_concurrency": calls_at_once(config)}
    worker: Any = ray.remote(TreesWorker).options(**options).remote(config, checkpoint, "worker-00")
    ray.get(worker.join.remote(None))
    return worker


class TreesWorker(WatchedWorker):
    """A rollout worker whose engine can be timed alone, and made to forget its cache."""

    def __init__(self, config: Config, checkpoint: str, worker_id: str) -> None:
        super().__init__(config, checkpoint, worker_id)
        self.policy = load_policy(checkpoint)
        self.version = WeightVersion(0, 0)

    async def forget(self) -> None:
        """New weights, which are the old ones: no KV is served from before."""
        self.version = self.version.next()
        await self.engine.update_weights(pack_weights(trainable_parameters(self.policy), self.version))

    async def replay(self, trees: Sequence[ThreadTree], concurrent: int) -> None:
        """See `recording.replay_trees`."""
        await replay_trees(self.engine, trees, concurrent)


def _in_the_actor(pool: RolloutPool, worker: Any) -> dict[str, Way]:
    """The pool's way and the engine's alone, which runs what the pool ran before it."""
    last: list[ThreadTree] = []

    def trees(requests: Sequence[TreeRequest]) -> list[ThreadTree]:
        last[:] = [tree for _, tree in pool.run(requests)]
        return list(last)

    def alone(_: Sequence[TreeRequest]) -> list[ThreadTree]:
        ray.get(worker.replay.remote(last, CONCURRENT))
        return list(last)

    def forget() -> None:
        ray.get(worker.forget.remote())

    def counts() -> tuple[int, int]:
        stats: EngineStats = ray.get(worker.stats.remote())
        return stats.prompt_tokens, stats.cached_tokens

    processes = ("worker", "driver", "ray")
    return {"pool": Way(forget, trees, counts, processes), "alone": Way(forget, alone, counts, processes)}


def waits_in_steps(waited: Waits, trees: Sequence[ThreadTree]) -> dict[str, float]:
    """`Waits.medians`. SGLang does not tell its steps: one is the time from one token of a long call to its next."""
    long = [call for tree in trees for call in tree.calls if len(call.sampled_ids) >= LONG_TOKENS]
    if not long:
        return {}
    step_s = statistics.median((c.end_s - c.first_token_s) / (len(c.sampled_ids) - 1) for c in long)
    return waited.medians(step_s) | {"step_ms": 1000 * step_s}
