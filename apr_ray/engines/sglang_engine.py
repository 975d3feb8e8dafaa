"""`SGLangEngine`: SGLang's own engine in this process, behind `core.engine.Engine`.

Batching, the radix cache and sampling are SGLang's. This module translates, and makes good where SGLang does less than
the interface says:

- SGLang ends a request at the checkpoint's end token whether it was asked to or not; a request that did not name it
  goes on from there (`_Running.part` counts these continuations);
- it aborts by prefix, also where one request is meant: every id that it sees ends with a mark that no prefix has;
- it tells which version drew which token only at a request's end: the requests that run while weights change are held
  back from then on and come in one piece, cut where the versions meet;
- its calls for new weights report failure and raise nothing, and a half-applied update cannot be undone: the engine is
  then dead, as it is when one of its processes ends;
- its shutdown kills every child of this process, whoever started it: a `ProcessGuard` kills the engine's alone, also
  when this process is killed first.

All KV is flushed with a change of weights and running requests are prefilled again, so every token's KV is of its
own version.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import difflib
import gc
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from apr_ray.core.engine import Capabilities, Chunk, EngineStats, FinishReason, GenerateRequest
from apr_ray.core.errors import AprError, ConfigError, EngineAsleep, PartDied
from apr_ray.core.weights import WeightUpdate, WeightVersion
from apr_ray.engines.process_guard import ProcessGuard, environment
from apr_ray.engines.torch_engine.decoder import DecoderShape
from apr_ray.model.llama import read_config
from apr_ray.model.state import check_update

log = logging.getLogger(__name__)
T = TypeVar("T")
FIRST_VERSION = WeightVersion(0, 0)
ID_END = "#"
"""Ends every id that SGLang sees. Request ids may not hold it, so no id is another's prefix."""
IDLE_S = 60.0
"""How long SGLang may take to end what was aborted, before it sleeps."""
SPARE_TOKENS = 6
"""SGLang keeps this much of its context length to itself: a request of `context_tokens` needs that many more."""


@dataclass(eq=False)
class _Running:
    """A request and what has come of it.

    Attributes:
        limit: tokens it may sample in all.
        ids: sampled so far, over all parts.
        part: how many times it was sent to SGLang, less one.
        sent: whether SGLang has it.
        held: weights changed while it ran; its tokens are kept until SGLang tells their versions.
        version: the weights in force when its present part was sent.
        ended: its last chunk is out.
    """

    request: GenerateRequest
    limit: int
    chunks: asyncio.Queue[Chunk] = field(default_factory=asyncio.Queue)
    ids: list[int] = field(default_factory=list)
    cached: int | None = None
    part: int = 0
    sent: bool = False
    held: bool = False
    aborted: bool = False
    ended: bool = False
    version: WeightVersion = FIRST_VERSION
    pump: asyncio.Task[None] | None = None

    @property
    def sglang_id(self) -> str:
        return f"{self.request.request_id}{ID_END}{self.part:03d}{ID_END}"


class SGLangEngine:
    """An engine over a Hugging Face Llama checkpoint folder. Use it from one event loop.

    Args:
        checkpoint: the folder.
        max_sequences: requests that run at the same time; the rest wait.
        context_tokens: prompt and sampled tokens of one request together; the model's own limit by default.
        stream_interval: tokens per chunk; the first token and the end of a request come at once.
        kv_tokens: tokens whose KV fits in memory; as much as the GPU holds by default, on a CPU `max_sequences` full
            contexts.
        device: "cpu" or "cuda"; what SGLang finds by default.
        dtype: of weights and KV.
        server_args: further arguments of `sglang.Engine`, as they are.
        sleeps: whether it will be asked to sleep, which takes SGLang's memory saver; on a CPU there is none.
        on_death: called from another thread, with the reason, when the engine ends by itself. Without it, running
            requests end with ERROR and new ones are refused.

    Raises:
        AprError: SGLang is not installed, or does not start.
        ConfigError: an argument that SGLang does not know, or a context longer than the model's.
    """

    capabilities = Capabilities(
        seeds=False, deterministic=False, in_flight_update=True, keeps_kv=False, priorities=True, sleeps=False
    )

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        max_sequences: int = 64,
        context_tokens: int | None = None,
        stream_interval: int = 16,
        kv_tokens: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        server_args: Mapping[str, Any] | None = None,
        sleeps: bool = False,
        on_death: Callable[[str], None] | None = None,
    ) -> None:
        shape = DecoderShape.from_config(read_config(checkpoint))
        if context_tokens is not None and context_tokens > shape.context:
            raise ConfigError(
                f"engine.context_tokens is {context_tokens}, the model was built for {shape.context}",
                "Lower it, or use a model with a longer context",
            )
        self.context_tokens = context_tokens or shape.context
        self.vocab = shape.vocab
        self.expected = shape.parameter_shapes()
        self.version = FIRST_VERSION
        self.on_death = on_death
        self.by_id: dict[str, _Running] = {}
        self._on_cuda = device == "cuda"
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "sampled_tokens"), 0)
        self._open = asyncio.Event()  # closed while weights change
        self._open.set()
        self._updating = asyncio.Lock()
        self._asleep = False
        self._death = ""  # why it is dead; empty while it lives
        self._dead = asyncio.Event()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        arguments = {
            "model_path": str(checkpoint),
            "context_length": self.context_tokens + SPARE_TOKENS,
            "max_running_requests": max_sequences,
            "stream_interval": stream_interval,
            "dtype": dtype,
            "skip_tokenizer_init": True,
            "enable_priority_scheduling": True,
            "disable_priority_preemption": True,
            "weight_version": str(FIRST_VERSION),
            "custom_sigquit_handler": _ignore_signal,
            **_device_arguments(device, kv_tokens, max_sequences, self.context_tokens),
            # Weights come back from a copy in host memory: an engine that wakes runs those it slept with.
            **({"enable_memory_saver": True, "enable_weights_cpu_backup": True} if sleeps and device != "cpu" else {}),
            **(server_args or {}),
        }
        self._guard, self._engine = _launch(arguments)
        launched = self._engine.server_args
        saves_memory = bool(launched.enable_memory_saver) and launched.device == "cuda"
        self.capabilities = replace(self.capabilities, sleeps=saves_memory)
        self._manager = self._engine.tokenizer_manager
        self._manager.signal_handler_class = _NoSignalHandlers
        self._processes = _take_over(self._engine)
        threading.Thread(target=self._watch_processes, name="sglang-death-watch", daemon=True).start()

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

    def _accept(self, request: GenerateRequest) -> _Running:
        self._require_awake()
        prompt = request.prompt_ids
        if not prompt:
            raise AprError(f"request {request.request_id} has an empty prompt", "Give at least one token")
        if len(prompt) >= self.context_tokens:
            raise AprError(
                f"prompt of {len(prompt)} tokens leaves no room in a context of {self.context_tokens}",
                "Shorten it, or raise engine.context_tokens",
            )
        if min(prompt) < 0 or max(prompt) >= self.vocab:
            raise AprError(f"prompt holds token ids outside 0..{self.vocab - 1}", "Use the checkpoint's tokenizer")
        if ID_END in request.request_id:
            raise AprError(f"request id {request.request_id!r} holds a {ID_END!r}", "Leave it out of request ids")
        if request.request_id in self.by_id:
            raise AprError(f"request id {request.request_id!r} is already running", "Give each request its own id")
        running = _Running(request, min(request.sampling.max_new_tokens, self.context_tokens - len(prompt)))
        self.by_id[request.request_id] = running
        self._counts["prompt_tokens"] += len(prompt)
        self._loop = asyncio.get_running_loop()
        running.pump = self._loop.create_task(self._pump(running))
        running.pump.add_done_callback(lambda task: self._report_failure(running, task))
        return running

    async def _pump(self, running: _Running) -> None:
        """Turn SGLang's outputs of one request into chunks, until it ends."""
        while True:
            await self._open.wait()
            if running.aborted:
                self._emit(running, [], [], FinishReason.ABORTED)
                return
            if await self._run_part(running):
                return
            running.part += 1

    async def _run_part(self, running: _Running) -> bool:
        """Send a request, or what is left of it, to SGLang; False if it ended at an end token nobody asked for."""
        running.version, running.held, running.sent = self.version, False, True
        before, unasked = len(running.ids), False
        outputs = self._manager.generate_request(self._sglang_request(running), None)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                meta = output["meta_info"]
                ended = meta["finish_reason"]
                if running.cached is None:
                    running.cached = int(meta.get("cached_tokens", 0))
                    self._counts["cached_tokens"] += running.cached
                if ended is None and running.held:
                    continue
                done = len(running.ids) - before
                ids = [int(i) for i in output["output_ids"][done:]]
                logprobs = [float(entry[0]) for entry in meta["output_token_logprobs"][done : done + len(ids)]]
                finish, error = self._finish_reason(running, ended, before + done + len(ids))
                unasked = ended is not None and finish is None
                if running.held:
                    self._emit_by_version(running, ids, logprobs, meta["weight_versions"], done, finish, error)
                else:
                    self._emit(running, ids, logprobs, finish, error)
        running.sent = False
        return not unasked

    def _sglang_request(self, running: _Running) -> Any:
        from sglang.srt.managers.io_struct import GenerateReqInput

        sampling = running.request.sampling
        return GenerateReqInput(
            rid=running.sglang_id,
            input_ids=[*running.request.prompt_ids, *running.ids],
            sampling_params={
                "temperature": sampling.temperature,
                "top_k": sampling.top_k or -1,
                "top_p": sampling.top_p,
                "max_new_tokens": running.limit - len(running.ids),
                "stop_token_ids": sorted(sampling.stop_ids),
                "ignore_eos": not sampling.stop_ids,  # with stop ids it would ignore those too
            },
            return_logprob=True,
            stream=True,
            priority=running.request.priority,
        )

    def _finish_reason(
        self, running: _Running, ended: Mapping[str, Any] | None, sampled: int
    ) -> tuple[FinishReason | None, str]:
        """What SGLang's finish reason means here; None while a request goes on."""
        if ended is None:
            return None, ""
        if ended["type"] == "abort":
            if running.aborted:
                return FinishReason.ABORTED, ""
            return FinishReason.ERROR, f"SGLang aborted the request: {ended.get('message')}"
        if ended["type"] == "length":
            return FinishReason.LENGTH, ""
        if not isinstance(ended["matched"], int):
            return FinishReason.ERROR, f"SGLang ended the request: {ended['matched']}"
        if ended["matched"] in running.request.sampling.stop_ids:
            return FinishReason.STOP, ""
        return (FinishReason.LENGTH, "") if sampled >= running.limit else (None, "")

    def _emit(
        self,
        running: _Running,
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
        running: _Running,
        ids: list[int],
        logprobs: list[float],
        spans: list[Mapping[str, Any]],
        done: int,
        finish: FinishReason | None,
        error: str,
    ) -> None:
        """Emit what was held back, cut at the positions where SGLang says that the version changed."""
        version = running.version
        for span in spans:
            start, end = max(int(span["start"]) - done, 0), int(span["end"]) - done
            version = WeightVersion.parse(span["version"])
            if start < end:
                self._emit(running, ids[start:end], logprobs[start:end], None, version=version)
        if finish is not None:
            self._emit(running, [], [], finish, error, version)

    def _report_failure(self, running: _Running, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._emit(running, [], [], FinishReason.ERROR, f"{type(error).__name__}: {error}")

    async def abort(self, request_id_prefix: str) -> None:
        """End every request whose id starts with the prefix, with one message to SGLang's scheduler."""
        from sglang.srt.managers.io_struct import AbortReq

        matching = [r for r in self.by_id.values() if r.request.request_id.startswith(request_id_prefix)]
        for running in matching:
            running.aborted = True
        if any(running.sent for running in matching):
            # `TokenizerManager.abort_request` drops a prefix that is not itself an id.
            self._manager._dispatch_to_scheduler(AbortReq(rid=request_id_prefix, abort_all=not request_id_prefix))

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
            await asyncio.to_thread(check_update, update, self.expected, self.version)
            self._loop = asyncio.get_running_loop()
            self._open.clear()
            for running in self.by_id.values():
                running.held = running.sent
            try:
                await self._whole(self._apply(update), f"SGLang took weights {update.version}")
            finally:
                self._open.set()
            self.version = update.version

    async def _apply(self, update: WeightUpdate) -> None:
        """Retract what runs, load, flush all KV, go on. RuntimeError with SGLang's message if a step fails."""
        from sglang.srt.managers.io_struct import (
            BeginWeightUpdateReqInput,
            ContinueGenerationReqInput,
            EndWeightUpdateReqInput,
            PauseGenerationReqInput,
            UpdateWeightsFromTensorReqInput,
        )

        manager = self._manager
        await manager.pause_generation(PauseGenerationReqInput(mode="retract"))
        _require_success("begin_weight_update", await manager.begin_weight_update(BeginWeightUpdateReqInput()))
        load = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=_flattened_bucket(update, int(self._engine.server_args.tp_size)),
            load_format="flattened_bucket",
            flush_cache=True,
            weight_version=str(update.version),
        )
        _require_success("update_weights_from_tensor", await manager.update_weights_from_tensor(load))
        _require_success("end_weight_update", await manager.end_weight_update(EndWeightUpdateReqInput()))
        await manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=self._on_cuda))

    # --- memory -----------------------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """See `core.engine.Engine.sleep`: KV, weights and graphs leave the GPU. Not run on a GPU yet."""
        async with self._updating:
            self._require_alive()
            if self._asleep:
                return
            if not self.capabilities.sleeps:
                raise AprError(
                    "this SGLang engine cannot sleep", "Its memory saver needs a GPU and placement.mode=colocated"
                )
            if going_on := [name for name, running in self.by_id.items() if not running.aborted]:
                raise AprError(f"{len(going_on)} requests run, {going_on[0]} first", "Let them end, or abort them")
            self._loop = asyncio.get_running_loop()
            self._asleep = True
            await self._whole(self._release(), "SGLang went to sleep")

    async def wake(self) -> None:
        """See `core.engine.Engine.wake`."""
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        async with self._updating:
            self._require_alive()
            if self._asleep:
                resume = self._manager.resume_memory_occupation(ResumeMemoryOccupationReqInput())
                await self._whole(resume, "SGLang woke up")
                self._asleep = False

    async def _release(self) -> None:
        """SGLang's scheduler dies if it is told to release while it is busy: a flush waits until it is idle."""
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        flushed = await self._manager.flush_cache(timeout_s=IDLE_S)
        _require_success("flush_cache", (flushed.success, flushed.message))
        await self._manager.release_memory_occupation(ReleaseMemoryOccupationReqInput())

    # --- life and death ---------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters since start. A request waits until its first token; SGLang does not tell its steps."""
        active = sum(bool(r.ids) or r.held for r in self.by_id.values())
        return EngineStats(
            steps=None, active_requests=active, waiting_requests=len(self.by_id) - active, **self._counts
        )

    def scheduler_load(self) -> tuple[int, int, int]:
        """(running requests, waiting requests, tokens of KV in use by them) as SGLang's scheduler last told."""
        loads = self._manager.load_snapshot_reader.read_all()
        return (
            sum(load.num_running_reqs for load in loads),
            sum(load.num_waiting_reqs for load in loads),
            sum(load.num_used_tokens for load in loads),
        )

    @property
    def process_ids(self) -> tuple[int, ...]:
        """SGLang's processes: schedulers and detokenizers."""
        return tuple(process.pid for process in self._processes if process.pid is not None)

    async def close(self) -> None:
        """End every request with ABORTED, SGLang's processes and its sockets. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._death = self._death or "the engine was closed"
        await self._end_all(FinishReason.ABORTED, "")
        self._guard.close()
        for process in self._processes:
            process.join()
        for task in self._manager.asyncio_tasks:
            task.cancel()
        for socket in (self._manager.recv_from_detokenizer, self._manager.send_to_scheduler, self._engine.send_to_rpc):
            socket.close(linger=0)

    def _require_alive(self) -> None:
        if self._death:
            raise PartDied(f"the SGLang engine is gone: {self._death}", "Restart the worker")

    def _require_awake(self) -> None:
        self._require_alive()
        if self._asleep:
            raise EngineAsleep

    def _watch_processes(self) -> None:
        """Wait, in a thread of its own, until one of SGLang's processes ends."""
        multiprocessing.connection.wait([process.sentinel for process in self._processes])
        if self._closing:
            return
        ended = [f"process {p.pid} ended with exit code {p.exitcode}" for p in self._processes if not p.is_alive()]
        self._die("SGLang " + (", ".join(ended) or "lost a process"))

    def _die(self, reason: str) -> None:
        """From now on nothing is accepted; what runs ends with ERROR. May be called from any thread."""
        if self._death:
            return
        self._death = reason
        log.error("the SGLang engine is dead: %s", reason)
        if self.on_death is not None:
            self.on_death(reason)
        if (loop := self._loop) is not None and not loop.is_closed():
            loop.call_soon_threadsafe(lambda: loop.create_task(self._end_all(FinishReason.ERROR, reason)))

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


# --- SGLang's own ways ------------------------------------------------------------------------------------------------


def _device_arguments(
    device: str | None, kv_tokens: int | None, max_sequences: int, context_tokens: int
) -> dict[str, Any]:
    """Arguments that depend on the device. On a CPU SGLang would take most of the memory for KV."""
    if device == "cpu":
        kv_tokens = kv_tokens or max_sequences * (context_tokens + SPARE_TOKENS)
    arguments: dict[str, Any] = {}
    if device is not None:
        arguments["device"] = device
    if device == "cpu":
        arguments["attention_backend"] = "torch_native"
    if kv_tokens is not None:
        if kv_tokens < context_tokens + SPARE_TOKENS:
            raise ConfigError(
                f"engine.kv_tokens is {kv_tokens}, one full request needs {context_tokens + SPARE_TOKENS}",
                "Raise it, or lower engine.context_tokens",
            )
        arguments["max_total_tokens"] = kv_tokens
    return arguments


def _launch(arguments: dict[str, Any]) -> tuple[ProcessGuard, Any]:
    """Start SGLang's processes, guarded. Raises AprError or ConfigError, with none of them left."""
    if arguments.get("device") == "cpu":
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")  # SGLang reads it at import and while it runs
    with _process_settings_kept():
        try:
            from sglang.srt.entrypoints.engine import Engine
            from sglang.srt.server_args import ServerArgs
        except ModuleNotFoundError as error:
            raise AprError(
                f"engine.name is sglang, but {error.name} is not installed",
                "Install SGLang 0.5.23: pip install 'apr-ray[sglang]' on a GPU machine, `make sglang` for CPU tests",
            ) from error
        _refuse_unknown(arguments, ServerArgs)
        multiprocessing.resource_tracker.ensure_running()  # by itself, it would bear the mark
        guard = ProcessGuard()
        sockets_before = _zmq_contexts()
        try:
            # The longer context holds SGLang's spare tokens only; no position beyond the model's own is ever used.
            with guard.marking(), environment({"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}):
                engine = Engine(**{"log_level": "error", **arguments})
        except BaseException as error:
            guard.close()
            for context in _zmq_contexts() - sockets_before:
                context.destroy(linger=0)
            if isinstance(error, RuntimeError | ValueError | OSError):
                raise AprError(f"SGLang did not start: {error}", "Its own log above names the cause") from error
            raise
    return guard, engine


def _zmq_contexts() -> set[Any]:
    """The open ZeroMQ contexts of this process. SGLang leaves its own open when it fails to start, and nobody holds
    them; collecting one as garbage waits for ever for messages to processes that are gone."""
    import zmq

    return {o for o in gc.get_objects() if issubclass(type(o), zmq.Context) and not o.closed}


@contextlib.contextmanager
def _process_settings_kept() -> Iterator[None]:
    """SGLang sets this process's event loop policy at import and its start method at launch: put both back."""
    policy = asyncio.get_event_loop_policy()
    method = multiprocessing.get_start_method(allow_none=True)
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(policy)
        multiprocessing.set_start_method(method, force=True)


def _refuse_unknown(arguments: Mapping[str, Any], server_args: Any) -> None:
    known = list(server_args.__struct_fields__)
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"engine.server_args.{name} is not an argument of SGLang's engine",
                f"Did you mean {near[0]!r}?" if near else "See sglang's ServerArgs",
            )


def _take_over(engine: Any) -> list[Any]:
    """SGLang's processes; from now on their deaths are this module's to see, and SGLang's clean-up is off."""
    watchdog = engine.tokenizer_manager._subprocess_watchdog
    watchdog.stop()
    atexit.unregister(engine.shutdown)
    return list(watchdog._processes)


def _ignore_signal(signum: int, frame: Any) -> None:
    """SGLang's processes send SIGQUIT when they fail; they also end, and the death watch sees that."""


class _NoSignalHandlers:
    """In place of SGLang's, which on SIGQUIT kill every process that this one started."""

    def __init__(self, manager: Any) -> None:
        del manager

    def sigterm_handler(self, signum: Any = None, frame: Any = None) -> None:
        """End at once, as a process does that handles no SIGTERM; the guard ends the children."""
        os._exit(143)

    def running_phase_sigquit_handler(self, signum: Any = None, frame: Any = None) -> None:
        """See `_ignore_signal`."""


def _require_success(step: str, result: tuple[bool, str]) -> None:
    success, message = result
    if not success:
        raise RuntimeError(f"{step}: {message}")


def _flattened_bucket(update: WeightUpdate, ranks: int) -> list[bytes]:
    """An update as SGLang's one-buffer form, once per tensor-parallel rank (each frees its own)."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    metadata = []
    for spec in update.specs:
        shape = torch.Size(spec.shape)
        start, size = 4 * spec.offset, 4 * shape.numel()
        metadata.append(FlattenedTensorMetadata(spec.name, shape, torch.float32, start, start + size, size))
    payloads = []
    for _ in range(ranks):
        # A copy: serialising moves the buffer to shared memory, and the update's may be read-only.
        flat = torch.tensor(update.flat).view(torch.uint8)
        payloads.append(MultiprocessingSerializer.serialize({"flattened_tensor": flat, "metadata": metadata}))
    return payloads
