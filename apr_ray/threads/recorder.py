"""From an engine's stream to one `Call` of the ledger."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from apr_ray.core.engine import Chunk, Engine, FinishReason, GenerateRequest, VersionSpan
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Call, Path, Replaced
from apr_ray.core.weights import FIRST_VERSION

log = logging.getLogger(__name__)


async def chunks_of(engine: Engine, request: GenerateRequest) -> AsyncGenerator[Chunk]:
    """An engine's stream; whatever it raises, a time limit of its own included, becomes its last chunk.

    Only errors of the engine: the body of the caller's loop runs outside of this generator.
    """
    try:
        async with aclosing(engine.generate(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk
                if chunk.finish is not None:
                    return
        raise AprError("the engine's stream ended without a finish reason")
    except Exception as error:  # noqa: BLE001  a failing engine is an outcome, however it fails
        why = str(error) if isinstance(error, AprError) else repr(error)
        log.warning("request %s: the engine failed: %s", request.request_id, why)
        yield Chunk((), (), FIRST_VERSION, finish=FinishReason.ERROR, error=why)


class Recorder:
    """Builds one `Call` from what the engine streams."""

    def __init__(self, path: Path, segment: int, prompt: tuple[int, ...], engine_id: str) -> None:
        self.path = path
        self.segment = segment
        self.prompt = prompt
        self.engine_id = engine_id
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.forced: list[int] = []
        self.replaced: list[Replaced] = []
        self.spans: list[VersionSpan] = []
        self.finish = FinishReason.ABORTED
        self.error = ""
        self.kv_version = FIRST_VERSION
        self.seed = 0
        self.cached: int | None = None
        self.sampled = 0
        self.start_s = time.time()
        self.first_token_s = 0.0

    def add(self, chunk: Chunk) -> None:
        """Take in a chunk; one that goes on under the same weights makes their span longer."""
        if self.cached is None:
            self.cached = chunk.cached_tokens
        self.engine_id = chunk.engine_id or self.engine_id
        if not chunk.token_ids:
            return
        self.first_token_s = self.first_token_s or time.time()
        start = len(self.ids)
        self.sampled += len(chunk.token_ids)
        self.ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.kv_version = chunk.kv_version or chunk.version
        if self.spans and (self.spans[-1].version, self.spans[-1].kv) == (chunk.version, chunk.kv_version):
            start = self.spans.pop().start
        self.spans.append(VersionSpan(chunk.version, start, len(self.ids), chunk.kv_version))

    def replace_last(self, forced: int) -> None:
        """Put a forced token in the place of the last one, which is kept as `Replaced`."""
        position = len(self.ids) - 1
        self.replaced.append(Replaced(position, self.ids[position], self.logprobs[position]))
        self.forced.append(position)
        self.ids[position] = forced
        self.logprobs[position] = 0.0

    def call(self) -> Call:
        """The call as recorded so far, as if it ended now."""
        now = time.time()
        return Call(
            path=self.path,
            segment=self.segment,
            prompt_ids=self.prompt,
            sampled_ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            forced=tuple(self.forced),
            replaced=tuple(self.replaced),
            finish=self.finish,
            versions=tuple(self.spans),
            kv_version=self.kv_version,
            seed=self.seed,
            cached_tokens=self.cached or 0,
            start_s=self.start_s,
            first_token_s=self.first_token_s or now,
            end_s=now,
            engine_id=self.engine_id,
            error=self.error,
        )
