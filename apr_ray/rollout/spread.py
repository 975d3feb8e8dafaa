"""Lanes over several engines: a tree's children decode on the engines of all workers, side by side."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray

from apr_ray.core.engine import Chunk, Engine, EngineStats, FinishReason, GenerateRequest
from apr_ray.core.weights import WeightUpdate, WeightVersion


class SpreadEngine:
    """The engine that a worker's trees see: its own, with the others' behind it.

    A root decodes on its worker's own engine, where its prefix is cached; the i-th child of a thread on the i-th next
    worker's. So siblings are apart, a thread's calls come to one engine, and nothing depends on what else runs.

    Args:
        own: this worker's engine.
        index: its place among the workers.
        workers: all of them, this one included.
    """

    def __init__(self, own: Engine, index: int, workers: Sequence[Any]) -> None:
        self.own = own
        self.index = index
        self.workers = workers
        self.capabilities = own.capabilities
        self.context_tokens = own.context_tokens

    def place(self, thread: tuple[int, ...]) -> int:
        """The worker on which a thread decodes."""
        return (self.index + sum(1 + number for number in thread)) % len(self.workers)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """See `core.engine.Engine.generate`. A worker that dies ends its requests with ERROR."""
        place = self.place(request.thread)
        if place == self.index:
            async for chunk in self.own.generate(request):
                yield chunk
            return
        worker = self.workers[place]
        stream = worker.generate.options(num_returns="streaming").remote(request)
        ended = False
        try:
            async for reference in stream:
                chunk = await reference
                ended = chunk.finish is not None
                yield chunk
        except ray.exceptions.RayActorError as error:
            ended = True
            lost = f"worker {place} died: {type(error).__name__}"
            yield Chunk((), (), WeightVersion(0, 0), finish=FinishReason.ERROR, error=lost)
        finally:
            if not ended:
                worker.abort.remote(request.request_id)

    async def abort(self, request_id_prefix: str) -> None:
        """See `core.engine.Engine.abort`: here, and wherever such a request may run."""
        for place, worker in enumerate(self.workers):
            if place != self.index:
                worker.abort.remote(request_id_prefix)
        await self.own.abort(request_id_prefix)

    async def update_weights(self, update: WeightUpdate, *, keep_kv: bool = False) -> None:
        """Of its own engine: every worker gets the weights itself."""
        await self.own.update_weights(update, keep_kv=keep_kv)

    def stats(self) -> EngineStats:
        """Of its own engine."""
        return self.own.stats()

    async def close(self) -> None:
        """Closes its own engine."""
        await self.own.close()
