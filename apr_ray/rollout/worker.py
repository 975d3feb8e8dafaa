"""A rollout worker: one engine, many concurrent trees."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import ray

from apr_ray.config import Config
from apr_ray.core.engine import Chunk, Engine, EngineStats, FinishReason, GenerateRequest, SamplingParams
from apr_ray.core.errors import ConfigError, SyncFailed
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.weights import WeightSource, WeightUpdate, WeightVersion
from apr_ray.engines.registry import build_engine
from apr_ray.parts import lasting_imports, own_log
from apr_ray.rollout.spread import SpreadEngine
from apr_ray.tasks.registry import load_task
from apr_ray.threads.events import Listener
from apr_ray.threads.runtime import TreeRequest, run_tree

log = logging.getLogger(__name__)
CHECK_PRIORITY = 1_000_000
"""Above that of every thread."""


def require_mode(mode: str, engine: str, keeps_kv: bool) -> None:
    """Raise ConfigError where an engine cannot do what `weights.mode` asks."""
    if mode == "in_flight" and not keeps_kv:
        raise ConfigError(
            f"weights.mode in_flight keeps the KV of what runs, which engine {engine} cannot",
            "Use weights.mode=pause, which computes it again",
        )


def require_sleep(mode: str, engine: str, sleeps: bool) -> None:
    """Raise ConfigError where an engine cannot take turns with the learners, as `placement.mode` asks."""
    if mode == "colocated" and not sleeps:
        raise ConfigError(
            f"placement.mode colocated has engines sleep while the learners train, which {engine} cannot here",
            "Use placement.mode=disaggregated; SGLang and vLLM sleep on a GPU",
        )


def _exit_with_engine(reason: str) -> None:
    """End this process: an actor that outlives its engine would hold its place and answer nothing."""
    log.critical("the rollout worker ends with its engine: %s", reason)
    os._exit(1)


class _Trees:
    """Counts the trees that run, and holds back new ones while those end."""

    def __init__(self) -> None:
        self.running = 0
        self.changed = asyncio.Condition()
        self.open = True

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Around one tree: waits until trees may start."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.open)
            self.running += 1
        try:
            yield
        finally:
            async with self.changed:
                self.running -= 1
                self.changed.notify_all()

    @asynccontextmanager
    async def halted(self, drain: bool) -> AsyncIterator[None]:
        """With `drain`: no tree starts or runs inside. Without: nothing."""
        if not drain:
            yield
            return
        async with self.changed:
            self.open = False
            await self.changed.wait_for(lambda: not self.running)
        try:
            yield
        finally:
            async with self.changed:
                self.open = True
                self.changed.notify_all()


class RolloutWorker:
    """A Ray actor around one engine; its methods are coroutines on one loop, between which the engine steps."""

    def __init__(self, config: Config, checkpoint: str, worker_id: str, place: int = 0) -> None:
        if not config.rollout.gpus_per_worker:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from an actor that reserved none
        with lasting_imports():
            import torch

            from apr_ray.model.llama import require_vocabulary

        self.worker_id = worker_id  # first: Ray prints it with whatever fails below
        self.node_id = str(ray.get_runtime_context().get_node_id())
        torch.set_num_threads(1)
        task = load_task(config.task)
        tokenizer = task.load_tokenizer(checkpoint)
        require_vocabulary(checkpoint, tokenizer)
        self.protocol = task.protocol(tokenizer)
        self.place = place
        self.engine = self.new_engine(config, checkpoint)
        self.mode = config.weights.mode
        require_mode(self.mode, config.engine.name, self.engine.capabilities.keeps_kv)
        require_sleep(config.placement.mode, config.engine.name, self.engine.capabilities.sleeps)
        self.lanes: Engine = self.engine
        self.received: WeightUpdate | None = None
        self.held: WeightUpdate | None = None
        self.trees = _Trees()
        self.bounds = config.bounds
        self.started = 0

    def new_engine(self, config: Config, checkpoint: str) -> Engine:
        """The engine as configured; this process ends with it."""
        sleeps = config.placement.mode == "colocated"
        return build_engine(config.engine, checkpoint, _exit_with_engine, sleeps=sleeps, place=self.place)

    async def join(self, source: WeightSource | None) -> str:
        """Take the pool's current weights, if they are neither the checkpoint's nor here already; returns where this
        worker logs."""
        if source is not None:
            update = await asyncio.to_thread(source.fetch)
            if self.held is None or update.version != self.held.version:
                await self._apply(update)
        return own_log()

    async def run_tree(self, request: TreeRequest) -> ThreadTree:
        """Run one tree to its end."""
        async with self.trees.one():
            self.started += 1
            tree_id = f"{self.worker_id}-{self.started:09d}"
            return await run_tree(
                self.lanes,
                self.protocol,
                request,
                self.bounds,
                tree_id=tree_id,
                engine_id=self.worker_id,
                listener=self.listener(),
            )

    def listener(self) -> Listener | None:
        """The listener for the next tree's events."""
        return None

    async def meet(self, index: int, workers: Sequence[Any]) -> None:
        """Learn who the pool's workers are, and which of them this is: from now on children are spread over all."""
        self.lanes = SpreadEngine(self.engine, index, workers)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """A request of another worker's tree."""
        async with aclosing(self.engine.generate(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield replace(chunk, engine_id=self.worker_id)

    async def abort(self, request_id: str) -> None:
        """End a request of another worker's tree."""
        await self.engine.abort(request_id)

    async def node(self) -> str:
        """On which of Ray's nodes this worker runs."""
        return self.node_id

    async def receive_weights(self, source: WeightSource) -> WeightSource | None:
        """Bring a version into this process while decoding goes on; `apply_weights` puts it to work.

        Returns where other workers of this node can take it from, where it lies in memory that they can map.
        """
        from apr_ray.model.shared_buffer import memory_source

        self.received = await asyncio.to_thread(source.fetch)
        return memory_source(self.received)

    async def apply_weights(self) -> None:
        """Put the version that was received to work, as `weights.mode` says.

        Raises WeightsRejected with nothing applied.
        """
        update, self.received = self.received, None
        if update is None:
            raise SyncFailed("no weights were received", "Send them before they are applied")
        await self._apply(update)

    async def _apply(self, update: WeightUpdate) -> None:
        async with self.trees.halted(drain=self.mode == "drain"):
            await self.engine.update_weights(update, keep_kv=self.mode == "in_flight")
        self.held = update

    async def held_weights(self) -> tuple[WeightUpdate | None, None]:
        """The update that the engine runs, for a worker that joins late; None before the first. The second value says
        that this one lives, without the first being fetched."""
        return self.held, None

    async def sleep(self) -> None:
        """Give the engine's memory back. What still runs is of trees that nobody waits for: their worker died."""
        await self.engine.abort("")
        await self.engine.sleep()

    async def wake(self) -> None:
        """Take it again."""
        await self.engine.wake()

    async def sample_for_check(
        self, number: int, prompt: tuple[int, ...], tokens: int, temperature: float
    ) -> tuple[tuple[int, ...], tuple[float, ...], tuple[WeightVersion, ...]]:
        """A short generation: its ids, their logprobs, and the versions that the engine says they were drawn under.

        `number` is its seed. It goes before all that waits: a full worker's children would all come first.
        """
        sampling = SamplingParams(temperature, max_new_tokens=tokens, seed=number)
        request = GenerateRequest(f"check-{number:06d}", prompt, sampling, priority=CHECK_PRIORITY)
        ids: list[int] = []
        logprobs: list[float] = []
        versions: list[WeightVersion] = []
        async with aclosing(self.engine.generate(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.finish is FinishReason.ERROR:
                    raise SyncFailed(f"{self.worker_id} failed at the check: {chunk.error}", "See its log")
                ids += chunk.token_ids
                logprobs += chunk.logprobs
                if chunk.token_ids and chunk.version not in versions:
                    versions.append(chunk.version)
        return tuple(ids), tuple(logprobs), tuple(versions)

    async def stats(self) -> EngineStats:
        """The engine's counters."""
        return self.engine.stats()

    def __repr__(self) -> str:
        return f"RolloutWorker({self.worker_id})"
