"""A rollout worker: one engine, many concurrent trees."""

from __future__ import annotations

import logging
import os

from apr_ray.config import BoundsConfig, Config
from apr_ray.core.engine import Engine, EngineStats, FinishReason, GenerateRequest, SamplingParams
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.weights import WeightUpdate
from apr_ray.engines.registry import build_engine
from apr_ray.model.llama import require_vocabulary
from apr_ray.parts import own_log
from apr_ray.tasks.registry import load_task
from apr_ray.threads.runtime import Bounds, TreeRequest, run_tree

log = logging.getLogger(__name__)


def bounds_of(config: BoundsConfig) -> Bounds:
    """The runtime's bounds from the configured ones."""
    return Bounds(**config.model_dump())


def _exit_with_engine(reason: str) -> None:
    """End this process: an actor that outlives its engine would hold its place and answer nothing."""
    log.critical("the rollout worker ends with its engine: %s", reason)
    os._exit(1)


class RolloutWorker:
    """A Ray actor around one engine; its methods are coroutines on one loop, between which the engine steps."""

    def __init__(self, config: Config, checkpoint: str, worker_id: str) -> None:
        import torch

        self.worker_id = worker_id  # first: Ray prints it with whatever fails below
        torch.set_num_threads(1)
        task = load_task(config.task)
        tokenizer = task.load_tokenizer(checkpoint)
        require_vocabulary(checkpoint, tokenizer)
        self.protocol = task.protocol(tokenizer)
        self.engine: Engine = build_engine(config.engine, checkpoint, _exit_with_engine)
        self.bounds = bounds_of(config.bounds)
        self.started = 0

    async def join(self, update: WeightUpdate | None) -> str:
        """Take the pool's current weights, if they are not the checkpoint's; returns where this worker logs."""
        if update is not None:
            await self.update_weights(update)
        return own_log()

    async def run_tree(self, request: TreeRequest) -> ThreadTree:
        """Run one tree to its end."""
        self.started += 1
        tree_id = f"{self.worker_id}-{self.started:09d}"
        return await run_tree(
            self.engine, self.protocol, request, self.bounds, tree_id=tree_id, engine_id=self.worker_id
        )

    async def update_weights(self, update: WeightUpdate) -> None:
        """Check and apply a version; raises WeightsRejected with nothing applied."""
        await self.engine.update_weights(update)

    async def sample_for_check(
        self, number: int, prompt: tuple[int, ...], tokens: int, temperature: float
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """A short generation with its logprobs, to compare with the learner's; `number` is its seed."""
        request = GenerateRequest(
            f"check-{number:06d}", prompt, SamplingParams(temperature, max_new_tokens=tokens, seed=number)
        )
        ids: list[int] = []
        logprobs: list[float] = []
        async for chunk in self.engine.generate(request):
            if chunk.finish is FinishReason.ERROR:
                raise RuntimeError(chunk.error)
            ids += chunk.token_ids
            logprobs += chunk.logprobs
        return tuple(ids), tuple(logprobs)

    async def stats(self) -> EngineStats:
        """The engine's counters."""
        return self.engine.stats()

    def __repr__(self) -> str:
        return f"RolloutWorker({self.worker_id})"
