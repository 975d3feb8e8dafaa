"""Lanes over several engines: a tree's children decode on the engines of all workers, side by side."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from apr_ray.core.engine import Chunk, Engine, EngineStats, FinishReason, GenerateRequest
from apr_ray.core.weights import FIRST_VERSION, WeightUpdate
from apr_ray.parts import DEAD


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
        """See `core.engine.Engine.generate`. What a worker that dies has begun goes on here, from where it was."""
        place = self.place(request.thread)
        if place == self.index:
            async with aclosing(self.own.generate(request)) as own:  # type: ignore[type-var]
                async for chunk in own:
                    yield chunk
            return
        worker = self.workers[place]
        stream = worker.generate.options(num_returns="streaming").remote(request)
        ended = False
        sampled: tuple[int, ...] = ()
        last = Chunk((), (), FIRST_VERSION)
        try:
            async for reference in stream:
                chunk = await reference
                ended = chunk.finish is not None
                sampled += chunk.token_ids
                last = chunk
                yield chunk
        except DEAD:
            if ended:
                return
            ended = True
            if end := _end_of(request, sampled):  # only its last, empty chunk was lost
                yield replace(last, token_ids=(), logprobs=(), finish=end)
                return
            async with aclosing(self.own.generate(_rest_of(request, sampled))) as rest:  # type: ignore[type-var]
                async for chunk in rest:
                    yield chunk
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

    async def sleep(self) -> None:
        """Of its own engine."""
        await self.own.sleep()

    async def wake(self) -> None:
        """Of its own engine."""
        await self.own.wake()

    def stats(self) -> EngineStats:
        """Of its own engine."""
        return self.own.stats()

    async def close(self) -> None:
        """Closes its own engine."""
        await self.own.close()


def _end_of(request: GenerateRequest, sampled: tuple[int, ...]) -> FinishReason | None:
    """Why nothing is left to sample, if so."""
    if sampled and sampled[-1] in request.sampling.stop_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(sampled) >= request.sampling.max_new_tokens else None


def _rest_of(request: GenerateRequest, sampled: tuple[int, ...]) -> GenerateRequest:
    """The rest of a request that has some of its tokens: a draw depends on its position, not on the request."""
    left = replace(request.sampling, max_new_tokens=request.sampling.max_new_tokens - len(sampled))
    return replace(request, prompt_ids=(*request.prompt_ids, *sampled), sampling=left)
