"""`VLLMEngine`: vLLM's own engine in this process, behind `core.engine.Engine`.

Batching, the prefix cache and sampling are vLLM's. Its engine is not safe for threads and its step blocks, so one
thread owns it and one task drives it:

    generate, abort ──▶ what to add, what to end ──┐
    task _drive:  turn ─▶ (thread: add, end, step) ─▶ tokens of that step ─▶ chunks
                  update_weights, sleep, wake (thread: between two turns) ─▶ the version of the next step

All tokens of a step are of one version. With new weights all KV is dropped and what runs is prefilled again, by vLLM
itself, so every token's KV is of its own version.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from apr_ray.core.engine import Capabilities, Chunk, EngineStats, FinishReason, GenerateRequest
from apr_ray.core.errors import AprError, EngineAsleep, PartDied
from apr_ray.core.weights import FIRST_VERSION, WeightUpdate, WeightVersion
from apr_ray.engines.process_guard import ProcessGuard
from apr_ray.engines.requests import context_limit, token_limit
from apr_ray.engines.torch_engine.decoder import DecoderShape
from apr_ray.engines.vllm_setup import engine_arguments, launch, require_device, require_head_size, shut_down
from apr_ray.model.llama import read_config
from apr_ray.model.state import check_update

log = logging.getLogger(__name__)
T = TypeVar("T")

FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
MAX_TEMPERATURE = 2.0
"""vLLM refuses more, and raises what is below 0.01 to that, when parameters are made; not afterwards."""


@dataclass(eq=False)
class _Running:
    """A request and what has come of it.

    Attributes:
        key: its id for vLLM, never used twice.
        limit: tokens it may sample in all.
        version: the weights that drew `ids`.
        ids, logprobs: sampled and not streamed yet.
        streamed: whether a chunk went out.
        ended: its last chunk is out.
    """

    request: GenerateRequest
    key: str
    limit: int
    version: WeightVersion = FIRST_VERSION
    chunks: asyncio.Queue[Chunk] = field(default_factory=asyncio.Queue)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cached: int = 0
    streamed: bool = False
    ended: bool = False


class _Sampled(NamedTuple):
    """The tokens of one step for one request."""

    key: str
    ids: list[int]
    logprobs: list[float]
    cached: int
    finish: str | None


class VLLMEngine:
    """An engine over a Hugging Face Llama checkpoint folder. Use it from one event loop.

    Args:
        checkpoint: the folder.
        max_sequences: requests that run at the same time; the rest wait.
        context_tokens: prompt and sampled tokens of one request together; the model's own limit by default.
        stream_interval: tokens per chunk; the first token and the end of a request come at once.
        kv_tokens: tokens whose KV fits in memory; what fits into the GPU by default, on a CPU `max_sequences` full
            contexts.
        device: "cpu" or "cuda"; which of the two vLLM was built for is a property of the package.
        dtype: of weights and KV.
        server_args: further arguments of vLLM's engine (`EngineArgs`), as they are.
        sleeps: whether it will be asked to sleep, which takes vLLM's sleep mode; on a CPU there is none.
        on_death: called with the reason when the engine fails. Without it, running requests end
            with ERROR and new ones are refused.

    Raises:
        AprError: vLLM is not installed, or does not start.
        ConfigError: an argument that vLLM does not know, a context longer than the model's, or another device than
            vLLM was built for.
    """

    capabilities = Capabilities(seeds=True, deterministic=False, keeps_kv=False, sleeps=False)

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
        self.context_tokens = context_limit(context_tokens, shape.context)
        self.vocab = shape.vocab
        self.expected = shape.parameter_shapes()
        self.version = FIRST_VERSION
        self.on_death = on_death
        self.by_id: dict[str, _Running] = {}
        self.stream_interval = stream_interval
        self._by_key: dict[str, _Running] = {}
        self._keys = itertools.count()
        self._to_add: deque[_Running] = deque()
        self._to_end: deque[str] = deque()
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "sampled_tokens", "steps"), 0)
        self._updating = asyncio.Lock()
        self._asleep = False
        self._death = ""  # why it is dead; empty while it lives
        self._closed = False
        self._driver: asyncio.Task[None] | None = None
        on_cpu = require_device(device)
        require_head_size(shape, on_cpu)
        arguments = engine_arguments(
            checkpoint,
            shape,
            server_args or {},
            max_sequences=max_sequences,
            context_tokens=self.context_tokens,
            kv_tokens=kv_tokens,
            dtype=dtype,
            sleeps=sleeps and not on_cpu,
            on_cpu=on_cpu,
        )
        self.capabilities = replace(self.capabilities, sleeps=sleeps and not on_cpu)
        self._guard = ProcessGuard()  # of worker processes, where vLLM starts some: with more than one GPU
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        try:
            with self._guard.marking():
                self._engine = self._thread.submit(launch, arguments, on_cpu).result()
        except BaseException:
            self._thread.shutdown()
            self._guard.close()
            raise
        self.capabilities = replace(
            self.capabilities, cache_block=int(self._engine.vllm_config.cache_config.block_size)
        )

    # --- requests ---------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """See `core.engine.Engine.generate`."""
        self._require_awake()
        limit = token_limit(request, self.context_tokens, self.vocab, self.by_id)
        running = _Running(request, f"{next(self._keys):09d}", limit)
        self.by_id[request.request_id] = self._by_key[running.key] = running
        self._counts["prompt_tokens"] += len(request.prompt_ids)
        self._to_add.append(running)
        self._drive_on()
        try:
            while True:
                chunk = await running.chunks.get()
                yield chunk
                if chunk.finish is not None:
                    return
        finally:
            del self.by_id[request.request_id]
            self._leave(running)

    async def abort(self, request_id_prefix: str) -> None:
        """End every request whose id starts with the prefix; its place is free at the next step."""
        for running in list(self.by_id.values()):
            if running.request.request_id.startswith(request_id_prefix) and not running.ended:
                self._leave(running)
                self._emit(running, FinishReason.ABORTED)

    def _leave(self, running: _Running) -> None:
        """vLLM need not go on with a request. Nothing happens where it has ended."""
        if not running.ended and self._by_key.pop(running.key, None) is not None:
            self._to_end.append(running.key)
            self._drive_on()

    def _drive_on(self) -> None:
        if not self._death and (self._driver is None or self._driver.done()):
            self._driver = asyncio.get_running_loop().create_task(self._drive())

    async def _drive(self) -> None:
        """Turn after turn while there is something to do, each one's tokens into chunks."""
        while self._by_key or self._to_end:
            try:
                version, sampled = await self._in_thread(self._turn)
            except Exception as error:  # noqa: BLE001  whatever vLLM raises in a step, it is not to be trusted after
                self._die(f"its step failed: {type(error).__name__}: {error}")
                return
            for one in sampled:
                running = self._by_key.get(one.key)
                if running is not None:  # else it was aborted while the step ran
                    self._take(running, one, version)

    def _turn(self) -> tuple[WeightVersion, list[_Sampled]]:
        """In the thread: add and end what was asked for, then one step. Returns what it drew, under which weights."""
        ended = [self._to_end.popleft() for _ in range(len(self._to_end))]  # first: each was added before it ended
        while self._to_add:
            running = self._to_add.popleft()
            self._engine.add_request(
                running.key,
                {"prompt_token_ids": list(running.request.prompt_ids)},
                _sampling(running),
                priority=-running.request.priority,  # vLLM's lower goes first
            )
        if ended:
            self._engine.abort_request(ended)
        if not self._engine.has_unfinished_requests():
            return self.version, []
        self._counts["steps"] += 1
        return self.version, [_sampled(output) for output in self._engine.step()]

    def _take(self, running: _Running, sampled: _Sampled, version: WeightVersion) -> None:
        if version != running.version and running.ids:
            self._emit(running)
        running.version = version
        if not running.streamed and not running.ids:
            running.cached = sampled.cached
            self._counts["cached_tokens"] += sampled.cached
        running.ids += sampled.ids
        running.logprobs += sampled.logprobs
        self._counts["sampled_tokens"] += len(sampled.ids)
        if sampled.finish is not None:
            del self._by_key[running.key]
            reason = FINISH.get(sampled.finish, FinishReason.ERROR)
            error = f"vLLM ended the request: {sampled.finish}" if reason is FinishReason.ERROR else ""
            self._emit(running, reason, error)
        elif running.ids and (not running.streamed or len(running.ids) >= self.stream_interval):
            self._emit(running)

    def _emit(self, running: _Running, finish: FinishReason | None = None, error: str = "") -> None:
        """Stream what was sampled and not streamed yet."""
        if running.ended:
            return
        ids, logprobs = tuple(running.ids), tuple(running.logprobs)
        running.ids, running.logprobs = [], []
        running.streamed, running.ended = True, finish is not None
        running.chunks.put_nowait(Chunk(ids, logprobs, running.version, running.cached, finish, error))

    # --- weights and memory -----------------------------------------------------------------------------------------

    async def update_weights(self, update: WeightUpdate, *, keep_kv: bool = False) -> None:
        """Check the whole update, then apply it between two steps; running requests are prefilled again under it.

        Raises:
            WeightsRejected: nothing was applied.
            PartDied: vLLM failed half-way; the engine is dead.
        """
        if keep_kv:
            raise AprError("vLLM's KV is not kept over an update", "Use weights.mode=pause")
        async with self._updating:
            self._require_awake()
            await asyncio.to_thread(check_update, update, self.expected, self.version)
            await self._whole(lambda: self._load(update), f"it took weights {update.version}")

    def _load(self, update: WeightUpdate) -> None:
        """In the thread: drop all KV, with what runs back among what waits, then load."""
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.collective_rpc("apr_ray_load", args=(update,))
        self.version = update.version

    async def sleep(self) -> None:
        """See `core.engine.Engine.sleep`: weights go to host memory, KV is dropped. Not run on a GPU yet."""
        async with self._updating:
            self._require_alive()
            if self._asleep:
                return
            if not self.capabilities.sleeps:
                raise AprError("this vLLM engine cannot sleep", "It needs a GPU and placement.mode=colocated")
            if going_on := [name for name, running in self.by_id.items() if not running.ended]:
                raise AprError(f"{len(going_on)} requests run, {going_on[0]} first", "Let them end, or abort them")
            self._asleep = True
            await self._whole(lambda: self._engine.sleep(level=1), "it went to sleep")

    async def wake(self) -> None:
        """See `core.engine.Engine.wake`."""
        async with self._updating:
            self._require_alive()
            if self._asleep:
                await self._whole(lambda: self._engine.wake_up(), "it woke up")
                self._asleep = False

    # --- life and death ---------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters since start. A request waits until its first token."""
        active = sum(running.streamed for running in self.by_id.values())
        return EngineStats(active_requests=active, waiting_requests=len(self.by_id) - active, **self._counts)

    def scheduled(self) -> int:
        """Requests that vLLM runs or has waiting, ended ones that it does not know of yet among them."""
        return len(self._by_key) + len(self._to_end)

    async def close(self) -> None:
        """End every request with ABORTED and give everything back. Idempotent."""
        await self.abort("")
        if self._driver is not None:
            await self._driver
        if not self._closed:
            self._closed = True
            self._death = self._death or "it was closed"
            await self._in_thread(lambda: shut_down(self._engine))
        self._thread.shutdown()
        self._guard.close()

    def _require_alive(self) -> None:
        if self._death:
            raise PartDied(f"the vLLM engine is gone: {self._death}", "Restart the worker")

    def _require_awake(self) -> None:
        self._require_alive()
        if self._asleep:
            raise EngineAsleep

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _whole(self, work: Callable[[], None], what: str) -> None:
        """Do what must not be left half done; PartDied, and the engine is dead, where it is."""
        try:
            await self._in_thread(work)
        except Exception as error:
            self._die(f"it failed while {what}: {type(error).__name__}: {error}")
            raise PartDied(self._death, "Restart the worker") from error
        except asyncio.CancelledError:
            self._die(f"the caller gave up while {what}")
            raise

    def _die(self, reason: str) -> None:
        """From now on nothing is accepted; what runs ends with ERROR."""
        if self._death:
            return
        self._death = f"vLLM: {reason}"
        log.error("the vLLM engine is dead: %s", reason)
        if self.on_death is not None:
            self.on_death(self._death)
        for running in self._by_key.values():
            self._emit(running, FinishReason.ERROR, self._death)
        self._by_key.clear()
        self._to_end.clear()


def _sampling(running: _Running) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = running.request.sampling
    params = SamplingParams(
        temperature=min(sampling.temperature, MAX_TEMPERATURE),
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        max_tokens=running.limit,
        stop_token_ids=sorted(sampling.stop_ids),
        ignore_eos=True,  # the end token ends a call only where it was asked to
        logprobs=0,  # the sampled token's
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )
    params.temperature = sampling.temperature
    return params


def _sampled(output: Any) -> _Sampled:
    (completion,) = output.outputs
    ids = [int(i) for i in completion.token_ids]
    logprobs = [float(row[i].logprob) for i, row in zip(ids, completion.logprobs or (), strict=True)]
    return _Sampled(output.request_id, ids, logprobs, int(output.num_cached_tokens or 0), completion.finish_reason)
