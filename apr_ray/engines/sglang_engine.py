"""`SGLangEngine`: SGLang's own engine in this process, behind `core.engine.Engine`.

`sglang_base.py` translates requests; here SGLang's processes are started, given weights, put to sleep, and watched. Its
own shutdown kills every child of this process, whoever started it: a `ProcessGuard` kills the engine's alone, also when
this process is killed first.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import inspect
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apr_ray.core.engine import FinishReason
from apr_ray.core.errors import AprError, ConfigError
from apr_ray.core.weights import FIRST_VERSION, WeightUpdate, WeightVersion
from apr_ray.engines.process_guard import ProcessGuard, environment
from apr_ray.engines.requests import refuse_unknown
from apr_ray.engines.sglang_base import IDLE_S, SPARE_TOKENS, SGLangBase, require_success
from apr_ray.model.shared_buffer import new_shared, shared_tensor

JOIN_S = 5.0
"""For a process that was killed to be gone."""


class SGLangEngine(SGLangBase):
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
        super().__init__(checkpoint, context_tokens, on_death)
        self._on_cuda = device == "cuda"
        arguments = {
            "model_path": str(checkpoint),
            "context_length": self.context_tokens + SPARE_TOKENS,
            "max_running_requests": max_sequences,
            "stream_interval": stream_interval,
            "dtype": dtype,
            "skip_tokenizer_init": True,
            "sleep_on_idle": True,  # else its scheduler takes a whole core while there is nothing to do
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
        self.capabilities = replace(
            self.capabilities, sleeps=saves_memory, cache_block=int(launched.page_size or self.capabilities.cache_block)
        )
        self._manager = self._engine.tokenizer_manager
        self._manager.signal_handler_class = _NoSignalHandlers
        self.tells_versions = hasattr(self._manager, "begin_weight_update")  # both came with the same SGLang
        self._processes = _take_over(self._engine)
        self._copy: np.ndarray[Any, Any] | None = None
        self._gpu_copy: torch.Tensor | None = None
        threading.Thread(target=self._watch_processes, name="sglang-death-watch", daemon=True).start()

    def _outputs(self, request: dict[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        from sglang.srt.managers.io_struct import GenerateReqInput

        outputs: AsyncGenerator[Mapping[str, Any], None] = self._manager.generate_request(
            GenerateReqInput(**request), None
        )
        return outputs

    async def _abort_in_sglang(self, prefix: str, ids: Sequence[str]) -> None:
        """One message to SGLang's scheduler. `TokenizerManager.abort_request` drops a prefix that is not an id."""
        from sglang.srt.managers.io_struct import AbortReq

        self._manager._dispatch_to_scheduler(AbortReq(rid=prefix, abort_all=not prefix))

    def _room(self, update: WeightUpdate) -> Any:
        """Shared memory, unless a transport has brought the weights in such. It is kept from update to update: taking
        fresh pages costs several times what the copy does. Of weights on a GPU a copy there, since a process cannot
        pass on what it has mapped of another's."""
        if shared_tensor(update.flat) is not None:
            return None
        if isinstance(update.flat, torch.Tensor):
            if self._gpu_copy is None:
                self._gpu_copy = torch.empty_like(update.flat)
            return self._gpu_copy
        if self._copy is None:
            self._copy = new_shared(sum(map(math.prod, self.expected.values())))
        return self._copy

    @contextlib.asynccontextmanager
    async def _staged(self, update: WeightUpdate) -> AsyncIterator[list[bytes]]:
        """See `SGLangBase._staged`: memory that SGLang maps."""
        flat = self._gpu_copy if isinstance(update.flat, torch.Tensor) else shared_tensor(update.flat)
        if flat is None:
            assert self._copy is not None
            flat = shared_tensor(self._copy)
            assert flat is not None
        yield _flattened_bucket(update, flat, int(self._engine.server_args.tp_size))

    async def _apply(self, staged: list[bytes], version: WeightVersion) -> None:
        """See `SGLangBase._apply`. An SGLang that tells no versions dies if it is to flush while anything waits."""
        from sglang.srt.managers import io_struct

        manager, in_steps = self._manager, self.tells_versions
        if not in_steps:
            await self._until_idle()
        await manager.pause_generation(io_struct.PauseGenerationReqInput(mode="retract"))
        if in_steps:
            begin = io_struct.BeginWeightUpdateReqInput()
            require_success("begin_weight_update", *await manager.begin_weight_update(begin))
        load = io_struct.UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=staged,
            load_format="flattened_bucket",
            flush_cache=True,
            weight_version=str(version),
        )
        require_success("update_weights_from_tensor", *await manager.update_weights_from_tensor(load))
        if in_steps:
            end = io_struct.EndWeightUpdateReqInput()
            require_success("end_weight_update", *await manager.end_weight_update(end))
        await manager.continue_generation(io_struct.ContinueGenerationReqInput(torch_empty_cache=self._on_cuda))

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

    async def _until_idle(self) -> None:
        """A flush waits until SGLang's scheduler has nothing any more."""
        flushed = await self._manager.flush_cache(timeout_s=IDLE_S)
        require_success("flush_cache", flushed.success, flushed.message)

    async def _release(self) -> None:
        """SGLang's scheduler dies if it is told to release while it is busy."""
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        await self._until_idle()
        await self._manager.release_memory_occupation(ReleaseMemoryOccupationReqInput())

    # --- life and death ---------------------------------------------------------------------------------------------

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
            process.join(JOIN_S)  # the guard has killed them, or has said which it could not kill
        for task in self._manager.asyncio_tasks:
            task.cancel()
        for socket in (self._manager.recv_from_detokenizer, self._manager.send_to_scheduler, self._engine.send_to_rpc):
            socket.close(linger=0)

    def _watch_processes(self) -> None:
        """Wait, in a thread of its own, until one of SGLang's processes ends."""
        multiprocessing.connection.wait([process.sentinel for process in self._processes])
        if self._closing:
            return
        ended = [f"process {p.pid} ended with exit code {p.exitcode}" for p in self._processes if not p.is_alive()]
        self._die("SGLang " + (", ".join(ended) or "lost a process"))


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
        refuse_unknown(arguments, inspect.signature(ServerArgs).parameters.keys(), "SGLang")
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


def _flattened_bucket(update: WeightUpdate, flat: torch.Tensor, ranks: int) -> list[bytes]:
    """An update in memory that can be shared as SGLang's one-buffer form, once per tensor-parallel rank (each connects
    for its own descriptor); nothing is copied."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    metadata = []
    for spec in update.specs:
        shape = torch.Size(spec.shape)
        start, size = 4 * spec.offset, 4 * shape.numel()
        metadata.append(FlattenedTensorMetadata(spec.name, shape, torch.float32, start, start + size, size))
    payload = {"flattened_tensor": flat.view(torch.uint8), "metadata": metadata}
    return [MultiprocessingSerializer.serialize(payload) for _ in range(ranks)]
