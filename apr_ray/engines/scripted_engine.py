"""An engine that says what a script tells it: for tests of whatever stands on engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from apr_ray.core.engine import Capabilities, Chunk, EngineStats, FinishReason, GenerateRequest
from apr_ray.core.errors import AprError, EngineAsleep
from apr_ray.core.weights import WeightUpdate, WeightVersion

LOGPROB = -0.5


@dataclass(frozen=True, slots=True)
class Reply:
    """The engine's output for one request.

    Attributes:
        token_ids: sampled in order; a stop id among them ends the request there.
        endless: never ends by itself; the last token repeats.
        fails: ends with ERROR after the tokens.
    """

    token_ids: Sequence[int]
    endless: bool = False
    fails: bool = False


class ScriptedEngine:
    """Replies come from `script(request)`; one chunk of `chunk_tokens` per turn of the loop.

    Args:
        script: called once per request.
        gate: awaited with the request id before every chunk, so that a test decides who goes on when.
    """

    capabilities = Capabilities(seeds=True, deterministic=True, keeps_kv=True, sleeps=True)

    def __init__(
        self,
        script: Callable[[GenerateRequest], Reply],
        context_tokens: int = 4096,
        chunk_tokens: int = 8,
        gate: Callable[[str], asyncio.Future[None]] | None = None,
    ) -> None:
        self.script = script
        self.context_tokens = context_tokens
        self.chunk_tokens = chunk_tokens
        self.gate = gate
        self.version = WeightVersion(0, 0)
        self.asleep = False
        self.requests: list[GenerateRequest] = []
        self.active: dict[str, bool] = {}
        """Running requests; True once aborted."""
        self.sampled = 0

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """See `core.engine.Engine.generate`."""
        if self.asleep:
            raise EngineAsleep
        if len(request.prompt_ids) >= self.context_tokens:
            raise AprError(f"prompt of {len(request.prompt_ids)} tokens in a context of {self.context_tokens}", "")
        self.requests.append(request)
        reply = self.script(request)
        self.active[request.request_id] = False
        limit = min(request.sampling.max_new_tokens, self.context_tokens - len(request.prompt_ids))
        sent = 0
        try:
            while True:
                await (self.gate(request.request_id) if self.gate else asyncio.sleep(0))
                if self.active[request.request_id]:
                    yield Chunk((), (), self.version, finish=FinishReason.ABORTED)
                    return
                ids, finish = self._next(reply, request, sent, limit)
                sent += len(ids)
                self.sampled += len(ids)
                error = "scripted failure" if finish is FinishReason.ERROR else ""
                yield Chunk(tuple(ids), (LOGPROB,) * len(ids), self.version, finish=finish, error=error)
                if finish is not None:
                    return
        finally:
            del self.active[request.request_id]

    def _next(
        self, reply: Reply, request: GenerateRequest, sent: int, limit: int
    ) -> tuple[list[int], FinishReason | None]:
        ids: list[int] = []
        while len(ids) < self.chunk_tokens:
            at = sent + len(ids)
            if at >= limit:
                return ids, FinishReason.LENGTH
            if at >= len(reply.token_ids) and not reply.endless:
                return ids, FinishReason.ERROR if reply.fails else FinishReason.LENGTH
            ids.append(reply.token_ids[min(at, len(reply.token_ids) - 1)])
            if ids[-1] in request.sampling.stop_ids:
                return ids, FinishReason.STOP
        return ids, None

    async def abort(self, request_id_prefix: str) -> None:
        """End matching requests at their next turn."""
        for request_id in self.active:
            if request_id.startswith(request_id_prefix):
                self.active[request_id] = True

    async def update_weights(self, update: WeightUpdate, *, keep_kv: bool = False) -> None:
        """Only the version is taken over."""
        if self.asleep:
            raise EngineAsleep
        self.version = update.version

    async def sleep(self) -> None:
        """See `core.engine.Engine.sleep`; there is nothing to give back."""
        if self.active:
            raise AprError(f"{len(self.active)} requests run", "Let them end, or abort them")
        self.asleep = True

    async def wake(self) -> None:
        """See `core.engine.Engine.wake`."""
        self.asleep = False

    def stats(self) -> EngineStats:
        """Counters since start."""
        return EngineStats(0, 0, self.sampled, 0, len(self.active), 0)

    async def close(self) -> None:
        """Abort everything."""
        await self.abort("")
