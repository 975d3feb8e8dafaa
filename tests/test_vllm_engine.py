"""What `VLLMEngine` makes of vLLM's answers, good and bad, with a scripted vLLM in place of the real one.

The real one is held to the same interface as every engine in `test_engine_conformance.py` (`make test-vllm`).
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apr_ray.config import EngineConfig, load_config
from apr_ray.core.engine import Chunk, FinishReason, GenerateRequest, SamplingParams
from apr_ray.core.errors import AprError, ConfigError, EngineAsleep, PartDied
from apr_ray.core.weights import WeightVersion
from apr_ray.engines import vllm_engine
from apr_ray.engines.registry import build_engine
from apr_ray.engines.vllm_engine import VLLMEngine
from apr_ray.engines.vllm_worker import WorkerExtension
from apr_ray.model.llama import load_policy
from apr_ray.model.state import pack_weights, trainable_parameters


class ScriptedVLLM:
    """Draws token 7 for every request at each step, until `lengths` says that it has enough; keeps what it was told."""

    def __init__(self, length: int = 5) -> None:
        self.length = length
        self.running: dict[str, int] = {}
        self.told: list[str] = []
        self.failing = ""
        self.may_step = threading.Event()
        self.may_step.set()
        self.threads: set[int] = set()
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=32))

    def tell(self, what: str) -> None:
        self.told.append(what)
        self.threads.add(threading.get_ident())
        if what == self.failing:
            raise ValueError("disk on fire")

    def add_request(self, key: str, prompt: dict[str, Any], sampling: Any, priority: int) -> None:
        self.tell(f"add {priority}")
        self.running[key] = 0

    def abort_request(self, keys: list[str]) -> None:
        self.tell(f"abort {len(keys)}")
        for key in keys:
            self.running.pop(key, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Any]:
        self.may_step.wait()
        self.tell("step")
        outputs = []
        for key in list(self.running):
            self.running[key] += 1
            ended = self.running[key] == self.length
            if ended:
                del self.running[key]
            completion = SimpleNamespace(
                token_ids=[7], logprobs=[{7: SimpleNamespace(logprob=-0.5)}], finish_reason="length" if ended else None
            )
            outputs.append(SimpleNamespace(request_id=key, outputs=[completion], num_cached_tokens=2))
        return outputs

    def reset_prefix_cache(self, reset_running_requests: bool) -> None:
        self.tell(f"reset {reset_running_requests}")

    def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.tell(name)

    def sleep(self, level: int) -> None:
        self.tell(f"sleep {level}")

    def wake_up(self) -> None:
        self.tell("wake")


@pytest.fixture
def engine_over(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Callable[..., VLLMEngine]:
    def make(vllm: ScriptedVLLM, on_cpu: bool = True, **options: Any) -> VLLMEngine:
        monkeypatch.setattr(vllm_engine, "require_device", lambda device: on_cpu)
        monkeypatch.setattr(vllm_engine, "launch", lambda arguments, on_cpu: vllm)
        monkeypatch.setattr(vllm_engine, "_sampling", lambda running: running.limit)
        monkeypatch.setattr(vllm_engine, "shut_down", lambda engine: engine.tell("shut down"))
        return VLLMEngine(checkpoint, stream_interval=2, **options)

    return make


def request(name: str = "a", priority: int = 0) -> GenerateRequest:
    return GenerateRequest(name, (5, 6, 7), SamplingParams(1.0, max_new_tokens=5), priority)


async def collect(engine: VLLMEngine, asked: GenerateRequest | None = None) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(asked or request())]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(bounded())


def update(checkpoint: Path) -> Any:
    return pack_weights(trainable_parameters(load_policy(checkpoint)), WeightVersion(0, 1))


def test_several_gpus_are_this_workers_own_and_share_the_memory_of_kv(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    """By itself vLLM would ask Ray for a bundle of each GPU; and the memory that it takes for KV is one GPU's."""
    asked: list[dict[str, Any]] = []

    def keep(arguments: dict[str, Any], on_cpu: bool) -> ScriptedVLLM:
        asked.append(arguments)
        return ScriptedVLLM()

    monkeypatch.setattr(vllm_engine, "require_device", lambda device: False)
    monkeypatch.setattr(vllm_engine, "launch", keep)
    for server_args in ({}, {"tensor_parallel_size": 2}):
        VLLMEngine(checkpoint, kv_tokens=5000, server_args=server_args)
    one, two = asked
    assert "distributed_executor_backend" not in one
    assert two["distributed_executor_backend"] == "mp"
    assert two["kv_cache_memory_bytes"] == one["kv_cache_memory_bytes"] / 2


def test_tokens_come_at_the_interval_and_all_calls_from_one_thread(engine_over: Callable[..., VLLMEngine]) -> None:
    vllm = ScriptedVLLM()

    async def main() -> list[Chunk]:
        engine = engine_over(vllm)
        chunks = await collect(engine, request(priority=3))
        assert engine.stats().sampled_tokens == 5
        assert engine.capabilities.cache_block == 32
        await engine.close()
        await engine.close()
        return chunks

    chunks = run(main())
    assert [c.token_ids for c in chunks] == [(7,), (7, 7), (7, 7)]
    assert [c.logprobs for c in chunks] == [(-0.5,), (-0.5, -0.5), (-0.5, -0.5)]
    assert (chunks[0].cached_tokens, chunks[-1].finish) == (2, FinishReason.LENGTH)
    assert vllm.told == ["add -3", *["step"] * 5, "shut down"]
    assert len(vllm.threads) == 1
    assert threading.get_ident() not in vllm.threads


def test_a_chunk_holds_tokens_of_one_version(engine_over: Callable[..., VLLMEngine], checkpoint: Path) -> None:
    vllm = ScriptedVLLM()

    async def main() -> list[Chunk]:
        engine = engine_over(vllm)
        task = asyncio.create_task(collect(engine))
        while engine.stats().sampled_tokens < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        vllm.may_step.clear()
        swap = asyncio.create_task(engine.update_weights(update(checkpoint)))
        await asyncio.sleep(0.3)  # the update waits behind the step that is under way
        assert engine.version.counter == 0
        vllm.may_step.set()
        await swap
        chunks = await task
        await engine.close()
        return chunks

    chunks = run(main())
    swapped = vllm.told.index("apr_ray_load")
    assert vllm.told[swapped - 1] == "reset True"
    before = vllm.told[:swapped].count("step")
    assert sum(len(c.token_ids) for c in chunks if c.version.counter == 0) == before
    assert sum(len(c.token_ids) for c in chunks if c.version.counter == 1) == 5 - before > 0


def test_an_abort_ends_a_request_while_a_step_runs(engine_over: Callable[..., VLLMEngine]) -> None:
    vllm = ScriptedVLLM(1000)

    async def main() -> list[list[Chunk]]:
        engine = engine_over(vllm)
        tasks = [asyncio.create_task(collect(engine, request(name))) for name in ("t-1/0", "t-1/1", "t-2/0")]
        while engine.stats().active_requests < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        vllm.may_step.clear()
        await engine.abort("t-1/")
        ended = [await task for task in tasks[:2]]
        vllm.may_step.set()
        tasks[2].cancel()
        await asyncio.gather(tasks[2], return_exceptions=True)
        while engine.scheduled():  # noqa: ASYNC110
            await asyncio.sleep(0)
        await engine.close()
        return ended

    assert [chunks[-1].finish for chunks in run(main())] == [FinishReason.ABORTED] * 2
    assert not vllm.running


@pytest.mark.parametrize("failing", ["step", "apr_ray_load", "reset True"])
def test_what_fails_ends_the_engine(engine_over: Callable[..., VLLMEngine], checkpoint: Path, failing: str) -> None:
    vllm = ScriptedVLLM(1000)
    told: list[str] = []

    async def main() -> list[Chunk]:
        engine = engine_over(vllm, on_death=told.append)
        task = asyncio.create_task(collect(engine))
        while engine.stats().active_requests < 1:  # noqa: ASYNC110
            await asyncio.sleep(0)
        vllm.failing = failing
        if failing != "step":
            with pytest.raises(PartDied, match="disk on fire"):
                await engine.update_weights(update(checkpoint))
        chunks = await task
        with pytest.raises(PartDied, match="disk on fire"):
            await collect(engine, request("later"))
        await engine.close()
        return chunks

    chunks = run(main())
    assert chunks[-1].finish is FinishReason.ERROR
    assert "disk on fire" in chunks[-1].error
    assert len(told) == 1


def test_on_a_gpu_it_sleeps_when_it_is_idle(engine_over: Callable[..., VLLMEngine]) -> None:
    vllm = ScriptedVLLM()

    async def main() -> None:
        engine = engine_over(vllm, on_cpu=False, sleeps=True)
        assert engine.capabilities.sleeps
        task = asyncio.create_task(collect(engine))
        await asyncio.sleep(0)
        with pytest.raises(AprError, match="1 requests run, a first"):
            await engine.sleep()
        await task
        await engine.sleep()
        with pytest.raises(EngineAsleep):
            await collect(engine, request("b"))
        await engine.wake()
        await collect(engine, request("c"))
        await engine.close()

    run(main())
    assert [what for what in vllm.told if what in ("sleep 1", "wake")] == ["sleep 1", "wake"]


def test_what_vllm_cannot_be_given_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"server_args\.max_model_len may not be given: set engine\.context_tokens"):
        load_config([], ["engine.name=vllm", "engine.server_args={max_model_len: 5}"])
    with pytest.raises(ConfigError, match=r"server_args\.scheduling_policy may not be given: apr-ray sets it itself"):
        load_config([], ["engine.name=vllm", "engine.server_args={scheduling_policy: fcfs}"])
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(AprError, match=r"is vllm, but vllm is not installed\. pip install 'apr-ray\[vllm\]'"):
        build_engine(EngineConfig(name="vllm"), str(checkpoint))
    monkeypatch.setattr(vllm_engine, "require_device", lambda device: True)
    with pytest.raises(ConfigError, match=r"engine\.kv_tokens is 100, one full request needs 800"):
        VLLMEngine(checkpoint, kv_tokens=100)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_worker_loads_arrays_and_tensors(checkpoint: Path, on_gpu: bool) -> None:
    """What `cuda_ipc` brings is a tensor already; here on the CPU."""
    loaded: dict[str, torch.Tensor] = {}

    def load_weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded.update(tensors)
        return set(loaded)

    came = update(checkpoint)
    worker = WorkerExtension()
    worker.model_runner = SimpleNamespace(get_model=lambda: SimpleNamespace(load_weights=load_weights))
    assert worker.apr_ray_load(replace(came, flat=torch.from_numpy(came.flat)) if on_gpu else came) == len(came.specs)
    for name, array in came.state_dict().items():
        assert torch.equal(loaded[name], torch.from_numpy(array))
