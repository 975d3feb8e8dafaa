"""Shared by the SGLang engine in this process and the client of an SGLang server: requests become chunks.

Batching, the radix cache and sampling are SGLang's. This module translates, and makes good where SGLang does less than
`core.engine.Engine` says:

- SGLang ends a request at the checkpoint's end token whether it was asked to or not; a request that did not name it
  goes on from there (`sglang_requests.Running.part` counts these continuations);
- it aborts by prefix, also where one request is meant: every id that it sees ends with a mark that no prefix has;
- it tells which version drew which token only at a request's end: the requests that run while weights change are held
  back from then on and come in one piece, cut where the versions meet. An older SGLang does not tell it at all
  (`SGLangBase.tells_versions`): there what runs is ended before the change, and goes on from there after it;
- its calls for new weights report failure and raise nothing, and a half-applied update cannot be undone: the engine is
  then dead, as it is when SGLang ends.

All KV is flushed with a change of weights and running requests are prefilled again, so every token's KV is of its
own version.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from apr_ray.core.engine import Capabilities, Chunk, EngineStats, FinishReason, GenerateRequest
from apr_ray.core.errors import AprError, EngineAsleep, PartDied
from apr_ray.core.weights import FIRST_VERSION, WeightUpdate, WeightVersion
from apr_ray.engines.requests import context_limit, token_limit
from apr_ray.engines.sglang_requests import ID_END, Running, sglang_request
from apr_ray.engines.torch_engine.decoder import DecoderShape
from apr_ray.model.llama import read_config
from apr_ray.model.state import check_update

log = logging.getLogger(__name__)
T = TypeVar("T")

IDLE_S = 60.0
"""How long SGLang may take to end what was aborted, before it sleeps or takes weights."""
SPARE_TOKENS = 6
"""SGLang keeps this much of its context length to itself: a request of `context_tokens` needs that many more."""


class SGLangBase:
    """The half of an engine that does not know where SGLang is. Use it from one event loop.

    Args:
        checkpoint: the folder of the policy.
        context_tokens: prompt and sampled tokens of one request together; the model's own limit by default.
        on_death: called with the reason when SGLang ends by itself. Without it, running requests end with ERROR and
            new ones are refused.
    """

    capabilities = Capabilities(seeds=False, deterministic=False, keeps_kv=False, sleeps=False)
    tells_versions = True
    """Whether SGLang says, at a request's end, which version drew which token."""

    def __init__(
        self, checkpoint: str | Path, context_tokens: int | None, on_death: Callable[[str], None] | None
    ) -> None:
        shape = DecoderShape.from_config(read_config(checkpoint))
        self.context_tokens = context_limit(context_tokens, shape.context)
        self.vocab = shape.vocab
        self.expected = shape.parameter_shapes()
        self.version = FIRST_VERSION
        self.on_death = on_death
        self.by_id: dict[str, Running] = {}
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "sampled_tokens"), 0)
        self._open = asyncio.Event()  # closed while weights change
        self._open.set()
        self._updating = asyncio.Lock()
        self._asleep = False
        self._death = ""  # why it is dead; empty while it lives
        self._dead = asyncio.Event()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- what SGLang is asked ---------------------------------------------------------------------------------------

    def _outputs(self, request: dict[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """SGLang's stream for a request of its native interface: all tokens so far, each time. Closing it aborts."""
        raise NotImplementedError

    async def _abort_in_sglang(self, prefix: str, ids: Sequence[str]) -> None:
        """End the requests with these ids; they are all whose ids start with the prefix."""
        raise NotImplementedError

    def _room(self, update: WeightUpdate) -> Any:
        """Memory for a copy of the weights, made while they are checked; None where `_staged` needs none."""
        return None

    def _staged(self, update: WeightUpdate) -> contextlib.AbstractAsyncContextManager[Any]:
        """The weights where SGLang can read them, put there while it decodes on, and gone when the block ends."""
        raise NotImplementedError

    async def _apply(self, staged: Any, version: WeightVersion) -> None:
        """Retract what runs, load, flush all KV, go on. RuntimeError with SGLang's message if a step fails.

        Without `tells_versions`, nothing runs but what nobody waits for any more."""
        raise NotImplementedError

    # --- requests ---------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """See `core.engine.Engine.generate`."""
        running = self._accept(request)
        try:
            while True:
                chunk = await running.chunks.get()
                yield chunk
                if chunk.finish is not None:
                    return
        finally:
            del self.by_id[request.request_id]
            if not running.ended and running.pump is not None:
                running.pump.cancel()  # on which SGLang aborts it

    def _accept(self, request: GenerateRequest) -> Running:
        self._require_awake()
        limit = token_limit(request, self.context_tokens, self.vocab, self.by_id)
        if ID_END in request.request_id:
            raise AprError(f"request id {request.request_id!r} holds a {ID_END!r}", "Leave it out of request ids")
        running = Running(request, limit)
        self.by_id[request.request_id] = running
        self._counts["prompt_tokens"] += len(request.prompt_ids)
        self._loop = asyncio.get_running_loop()
        running.pump = self._loop.create_task(self._pump(running))
        running.pump.add_done_callback(lambda task: self._report_failure(running, task))
        return running

    async def _pump(self, running: Running) -> None:
        """Turn SGLang's outputs of one request into chunks, until it ends."""
        while True:
            await self._open.wait()
            if running.aborted:
                self._emit(running, [], [], FinishReason.ABORTED)
                return
            running.back.clear()
            try:
                if await self._run_part(running):
                    return
            finally:
                running.back.set()
            running.part += 1

    async def _run_part(self, running: Running) -> bool:
        """Send a request, or what is left of it, to SGLang; False if it is to go on from where SGLang ended it."""
        running.version, running.held, running.interrupted = self.version, False, False
        before, unasked = len(running.ids), False
        async with contextlib.aclosing(self._outputs(sglang_request(running))) as outputs:
            async for output in outputs:
                meta = output["meta_info"]
                ended = meta["finish_reason"]
                if running.cached is None:
                    running.cached = int(meta.get("cached_tokens", 0))
                    self._counts["cached_tokens"] += running.cached
                if (running.aborted or running.interrupted) and ended is None:  # again: it may have come too early
                    await self._abort_in_sglang(running.sglang_id, [running.sglang_id])
                if ended is None and running.held:
                    continue
                done = len(running.ids) - before
                ids = [int(i) for i in output["output_ids"][done:]]
                if len(output["output_ids"]) < len(meta["output_token_logprobs"]):
                    ids = []  # an abort of what had to wait again brings its last token alone
                logprobs = [float(entry[0]) for entry in meta["output_token_logprobs"][done : done + len(ids)]]
                finish, error = self._finish_reason(running, ended, ids)
                unasked = ended is not None and finish is None
                if running.held:
                    self._emit_by_version(running, ids, logprobs, meta["weight_versions"], done, finish, error)
                else:
                    self._emit(running, ids, logprobs, finish, error)
        if not running.ended and not unasked:
            raise RuntimeError("SGLang's stream ended without saying why")
        return not unasked

    def _finish_reason(
        self, running: Running, ended: Mapping[str, Any] | None, ids: Sequence[int]
    ) -> tuple[FinishReason | None, str]:
        """SGLang's finish reason, which came with the new tokens `ids`, as ours; None if the request goes on."""
        if ended is None:
            return None, ""
        last = ids[-1] if ids else None  # an abort or the limit hides that a stop token came with it
        if ended["type"] == "abort":
            if running.aborted:
                return FinishReason.ABORTED, ""
            if not running.interrupted or ended.get("status_code"):  # SGLang's own reason has one
                return FinishReason.ERROR, f"SGLang aborted the request: {ended.get('message')}"
        elif ended["type"] == "stop":
            last = ended["matched"]
            if not isinstance(last, int):
                return FinishReason.ERROR, f"SGLang ended the request: {last}"
        if last in running.request.sampling.stop_ids:
            return FinishReason.STOP, ""
        at_limit = ended["type"] == "length" or len(running.ids) + len(ids) >= running.limit
        return (FinishReason.LENGTH, "") if at_limit else (None, "")

    def _emit(
        self,
        running: Running,
        ids: list[int],
        logprobs: list[float],
        finish: FinishReason | None,
        error: str = "",
        version: WeightVersion | None = None,
    ) -> None:
        if running.ended or (not ids and finish is None):
            return
        running.ended = finish is not None
        running.ids += ids
        self._counts["sampled_tokens"] += len(ids)
        running.chunks.put_nowait(
            Chunk(tuple(ids), tuple(logprobs), version or running.version, running.cached or 0, finish, error)
        )

    def _emit_by_version(
        self,
        running: Running,
        ids: list[int],
        logprobs: list[float],
        spans: list[Mapping[str, Any]],
        done: int,
        finish: FinishReason | None,
        error: str,
    ) -> None:
        """Emit what was held back, cut at the positions where SGLang says that the version changed.

        Raises RuntimeError where a token has no version: it could be neither trained on nor left out.
        """
        version, covered = running.version, 0
        for span in spans:
            start, end = max(int(span["start"]) - done, 0), int(span["end"]) - done
            version = WeightVersion.parse(span["version"])
            if start > covered:
                break
            if start < end:
                self._emit(running, ids[start:end], logprobs[start:end], None, version=version)
                covered = end
        if covered < len(ids):
            raise RuntimeError(f"SGLang names the weights of {covered} tokens, and sampled {len(ids)}")
        if finish is not None:
            self._emit(running, [], [], finish, error, version)

    def _report_failure(self, running: Running, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._emit(running, [], [], FinishReason.ERROR, f"{type(error).__name__}: {error}")

    async def abort(self, request_id_prefix: str) -> None:
        """End every request whose id starts with the prefix."""
        matching = [r for r in self.by_id.values() if r.request.request_id.startswith(request_id_prefix)]
        for running in matching:
            running.aborted = True
        if sent := [running.sglang_id for running in matching if running.sent]:
            await self._abort_in_sglang(request_id_prefix, sent)

    # --- weights ----------------------------------------------------------------------------------------------------

    async def update_weights(self, update: WeightUpdate, *, keep_kv: bool = False) -> None:
        """Check the whole update, then apply it between two steps; running requests are prefilled again under it.

        KV is never kept: of a request that is paused in place, SGLang counts tokens as the new weights' that the old
        ones drew (measured on the CPU).

        Raises:
            WeightsRejected: nothing was applied.
            PartDied: SGLang failed half-way; the engine is dead.
        """
        if keep_kv:
            raise AprError("SGLang's KV is not kept over an update", "Use weights.mode=pause")
        async with self._updating:
            self._require_awake()
            await asyncio.to_thread(check_update, update, self.expected, self.version, self._room(update))
            self._loop = asyncio.get_running_loop()
            async with self._staged(update) as staged:
                self._open.clear()
                try:
                    await self._whole(self._swap(staged, update.version), f"SGLang took weights {update.version}")
                    self.version = update.version  # before anything is sent again
                finally:
                    self._open.set()

    async def _swap(self, staged: Any, version: WeightVersion) -> None:
        """Hold back or end what runs, then apply."""
        sent = [running for running in self.by_id.values() if running.sent]
        for running in sent:
            running.held, running.interrupted = self.tells_versions, not self.tells_versions
        if sent and not self.tells_versions:
            await self._abort_in_sglang("", [running.sglang_id for running in sent])
            await self._until_back(sent)
        await self._apply(staged, version)

    async def _until_back(self, sent: Sequence[Running]) -> None:
        try:
            async with asyncio.timeout(IDLE_S):
                await asyncio.gather(*(running.back.wait() for running in sent))
        except TimeoutError:
            left = [running.sglang_id for running in sent if running.sent]
            raise RuntimeError(
                f"{len(left)} aborted requests have not ended in {IDLE_S:g} s, {left[0]} first"
            ) from None

    # --- life and death ---------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters since start. A request waits until its first token; SGLang does not tell its steps."""
        active = sum(bool(r.ids) or r.held for r in self.by_id.values())
        return EngineStats(
            steps=None, active_requests=active, waiting_requests=len(self.by_id) - active, **self._counts
        )

    def _require_alive(self) -> None:
        if self._death:
            raise PartDied(f"the SGLang engine is gone: {self._death}", "Restart the worker")

    def _require_awake(self) -> None:
        self._require_alive()
        if self._asleep:
            raise EngineAsleep

    def _die(self, reason: str) -> None:
        """From now on nothing is accepted; what runs ends with ERROR. May be called from any thread."""
        if self._death:
            return
        self._death = reason
        log.error("the SGLang engine is dead: %s", reason)
        if self.on_death is not None:
            self.on_death(reason)
        if (loop := self._loop) is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._begin_end, reason)

    def _begin_end(self, reason: str) -> None:
        self._ending = asyncio.ensure_future(self._end_all(FinishReason.ERROR, reason))  # kept, or it may be collected

    async def _end_all(self, finish: FinishReason, error: str) -> None:
        """Give every request its last chunk and stop what feeds it."""
        self._dead.set()
        pumps = [running.pump for running in self.by_id.values() if running.pump is not None]
        for running in list(self.by_id.values()):
            self._emit(running, [], [], finish, error)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    async def _whole(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """Do what must not be left half done; PartDied, and the engine is dead, where it is."""
        try:
            await self._or_death(work)
        except RuntimeError as error:
            self._die(f"it failed while {what}: {error}")
            raise PartDied(self._death, "Restart the worker") from error
        except asyncio.CancelledError:
            self._die(f"the caller gave up while {what}")
            raise

    async def _or_death(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; RuntimeError if the engine dies first, where SGLang would wait for ever."""
        task, death = asyncio.ensure_future(work), asyncio.ensure_future(self._dead.wait())
        try:
            await asyncio.wait([task, death], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise RuntimeError(self._death)
            return task.result()
        finally:
            task.cancel()
            death.cancel()


def require_success(step: str, success: bool, message: str) -> None:
    """RuntimeError with SGLang's message where it says that a step failed."""
    if not success:
        raise RuntimeError(f"{step}: {message}")
