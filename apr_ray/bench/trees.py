"""Thread trees of a trained policy on a real engine: pool and runtime, the engine alone, and the released code's way.

pool    our way: ids in and out, streamed, children started where the spawn is sampled      ─┐ the same trees: as
alone   the same calls in the same order, as many tokens each, straight into the engine      ─┘ many tokens
http    the released code's way, on the same SGLang: a server, a thread and a request for every call, text in and
        text out, tokenised again on both sides
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as FilePath
from typing import Any

import ray

from apr_ray.bench.recording import bench_config, replay_trees
from apr_ray.bench.sglang_process import sglang_server
from apr_ray.bench.timing import Result, turns
from apr_ray.config import Config
from apr_ray.core.engine import Capabilities, Chunk, FinishReason, GenerateRequest
from apr_ray.core.ledger import Outcome, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.model.llama import load_policy
from apr_ray.model.state import pack_weights, trainable_parameters
from apr_ray.rollout.pool import RolloutPool, calls_at_once
from apr_ray.rollout.worker import RolloutWorker
from apr_ray.tasks.registry import load_task
from apr_ray.threads.runtime import TreeRequest, run_tree

TREES, REPEATS = 96, 2
CONCURRENT = 64
"""Trees at the same time."""
WARM_UP = 16
"""Trees that are not counted."""
LONG_TOKENS = 20
"""Calls of at least so many tokens tell how long a step of the engine takes."""


def run(engine: str, checkpoint: str, trees: int = TREES, repeats: int = REPEATS) -> Result:
    """`ratio`: sampled tokens/s of pool, actor and runtime over those of the engine alone (the goal is 0.9).

    Args:
        engine: torch, sglang or vllm.
        checkpoint: a trained policy of the quickstart's task.
        trees: how many, `CONCURRENT` at a time.
        repeats: medians are over them.
    """
    config = _config(engine)
    task = load_task(config.task)
    requests = [TreeRequest(p, seed=i) for i, p in enumerate(task.problems("train", trees, config.run.seed))]
    made: list[ThreadTree] = []
    pool_speed, alone_speed, trees_per_s = [], [], []
    worker = _worker(config, checkpoint)
    pool = RolloutPool([worker], CONCURRENT)
    for turn in turns("pool, engine alone", repeats + 1):
        ray.get(worker.forget.remote())
        start = time.perf_counter()
        ours = [tree for _, tree in pool.run(requests if turn else requests[:WARM_UP])]
        took = time.perf_counter() - start
        ray.get(worker.forget.remote())
        alone = ray.get(worker.replay.remote(ours, CONCURRENT))
        if turn:  # the first warms up
            tokens = sum(tree.total_tokens for tree in ours)
            made += ours
            pool_speed.append(tokens / took)
            alone_speed.append(tokens / alone)
            trees_per_s.append(trees / took)
    pool.stop()
    result: Result = {
        "ratio": statistics.median(p / a for p, a in zip(pool_speed, alone_speed, strict=True)),
        "pool_tokens_per_s": statistics.median(pool_speed),
        "alone_tokens_per_s": statistics.median(alone_speed),
        "pool_trees_per_s": statistics.median(trees_per_s),
        "trees": float(len(made)),
        "children_per_tree": sum(tree.children for tree in made) / len(made),
        "engine_errors": float(sum(tree.outcome is Outcome.ENGINE_ERROR for tree in made)),
    } | _waits(made)
    if engine == "sglang":
        released = _released(config, checkpoint, requests)
        result |= released | {"of_released": statistics.median(trees_per_s) / released["released_trees_per_s"]}
    return result


def _config(engine: str) -> Config:
    settings = [f"engine.name={engine}", "engine.max_sequences=128", f"rollout.concurrent_trees={CONCURRENT}"]
    if engine != "torch":
        settings += ["engine.device=cpu", "engine.kv_tokens=60000"]
    return bench_config(settings)


def _worker(config: Config, checkpoint: str) -> Any:
    options = {
        "num_cpus": 0.5,
        "max_concurrency": calls_at_once(config),
    }
    worker: Any = ray.remote(TreesWorker).options(**options).remote(config, checkpoint, "worker-00")
    ray.get(worker.join.remote(None))
    return worker


class TreesWorker(RolloutWorker):
    """A rollout worker whose engine can be timed alone, and made to forget its cache."""

    def __init__(self, config: Config, checkpoint: str, worker_id: str) -> None:
        super().__init__(config, checkpoint, worker_id)
        self.policy = load_policy(checkpoint)
        self.version = WeightVersion(0, 0)

    async def forget(self) -> None:
        """New weights, which are the old ones: no KV is served from before."""
        self.version = self.version.next()
        await self.engine.update_weights(pack_weights(trainable_parameters(self.policy), self.version))

    async def replay(self, trees: Sequence[ThreadTree], concurrent: int) -> float:
        """Seconds of `recording.replay_trees`."""
        start = time.perf_counter()
        await replay_trees(self.engine, trees, concurrent)
        return time.perf_counter() - start


def _waits(trees: Sequence[ThreadTree]) -> dict[str, float]:
    """From the spawn to a child's first tokens and from the last join to the parent's next, in ms and in steps of the
    engine: the time from one token of a long call to its next."""
    spawns, joins, steps = [], [], []
    for tree in trees:
        calls = {(call.path, call.segment): call for call in tree.calls}
        for call in tree.calls:
            if len(call.sampled_ids) >= LONG_TOKENS:
                steps.append((call.end_s - call.first_token_s) / (len(call.sampled_ids) - 1))
        for spawn in tree.spawns:
            children = [calls[child, 0] for child in spawn.children if (child, 0) in calls]
            after = calls.get((spawn.path, spawn.segment + 1))
            spawns += [child.first_token_s - calls[spawn.path, spawn.segment].end_s for child in children]
            if after is not None and children:
                joins.append(after.first_token_s - max(c.end_s for c in tree.calls if c.path in spawn.children))
    result = {}
    for name, taken in (("spawn_to_child_token", spawns), ("join_to_parent_token", joins)):
        if taken and steps:  # a policy may spawn nothing
            result[f"{name}_ms"] = 1000 * statistics.median(taken)
            result[f"{name}_steps"] = statistics.median(taken) / statistics.median(steps)
    return result | ({"step_ms": 1000 * statistics.median(steps)} if steps else {})


# --- the released code's way ------------------------------------------------------------------------------------------


class TextCalls:
    """An engine as the released code has it: each call blocks a thread on one HTTP request, text in and text out."""

    capabilities = Capabilities(seeds=False, deterministic=False, keeps_kv=False, sleeps=False)

    def __init__(self, url: str, tokenizer: Any, context_tokens: int, threads: ThreadPoolExecutor) -> None:
        self.url = url
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.threads = threads
        self.http_s = self.tokenizer_s = 0.0

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """One chunk with all tokens, in the end."""
        loop = asyncio.get_running_loop()
        ids, stopped = await loop.run_in_executor(self.threads, self._call, request)
        finish = FinishReason.STOP if stopped else FinishReason.LENGTH
        yield Chunk(tuple(ids), (0.0,) * len(ids), WeightVersion(0, 0), finish=finish)

    def _call(self, request: GenerateRequest) -> tuple[list[int], bool]:
        sampling = request.sampling
        begun = time.perf_counter()
        text = self.tokenizer.decode(request.prompt_ids)
        body = {
            "text": text,
            "sampling_params": {
                "temperature": sampling.temperature,
                "max_new_tokens": sampling.max_new_tokens,
                "stop_token_ids": sorted(sampling.stop_ids),
                "no_stop_trim": True,
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
            },
        }
        asked = urllib.request.Request(
            f"{self.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        sent = time.perf_counter()
        with urllib.request.urlopen(asked, timeout=600) as response:
            answer = json.loads(response.read())
        came = time.perf_counter()
        ids = self.tokenizer.encode(answer["text"])
        stopped = answer["meta_info"]["finish_reason"]["type"] == "stop"
        if stopped and ids[-1:] != [answer["meta_info"]["finish_reason"]["matched"]]:
            ids.append(int(answer["meta_info"]["finish_reason"]["matched"]))
        self.http_s += came - sent
        self.tokenizer_s += time.perf_counter() - came + sent - begun
        return ids, stopped

    async def abort(self, request_id_prefix: str) -> None:
        """Nothing: the released code cannot."""


def _released(config: Config, checkpoint: str, requests: Sequence[TreeRequest]) -> dict[str, float]:
    """Trees/s, and where its seconds go, summed over threads."""
    task = load_task(config.task)
    tokenizer = task.load_tokenizer(checkpoint)
    protocol = task.protocol(tokenizer)
    with (
        sglang_server(FilePath(checkpoint), max_sequences=128, text=True) as server,
        ThreadPoolExecutor(CONCURRENT * (1 + config.bounds.max_children)) as threads,
    ):
        engine = TextCalls(server.url, tokenizer, config.model.context_tokens, threads)

        async def run_all(requests: Sequence[TreeRequest]) -> list[ThreadTree]:
            places = asyncio.Semaphore(CONCURRENT)

            async def one(number: int, request: TreeRequest) -> ThreadTree:
                async with places:
                    bounds = config.bounds
                    return await run_tree(engine, protocol, request, bounds, tree_id=f"text-{number}")  # type: ignore[arg-type]

            return list(await asyncio.gather(*(one(n, request) for n, request in enumerate(requests))))

        asyncio.run(run_all(requests[:WARM_UP]))
        engine.http_s = engine.tokenizer_s = 0.0
        start = time.perf_counter()
        trees = asyncio.run(run_all(requests))
        took = time.perf_counter() - start
    calls = sum(len(tree.calls) for tree in trees)
    return {
        "released_trees_per_s": len(trees) / took,
        "released_tokens_per_s": sum(tree.total_tokens for tree in trees) / took,
        "released_calls": float(calls),
        "released_http_s_per_call": engine.http_s / calls,
        "released_tokenizer_ms_per_call": 1000 * engine.tokenizer_s / calls,
        "released_children_per_tree": sum(tree.children for tree in trees) / len(trees),
    }
