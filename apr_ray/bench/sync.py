"""Weights to two engines, by every transport, against one flat broadcast and against one call per tensor."""

from __future__ import annotations

import asyncio
import logging
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from apr_ray.bench.recording import bench_config, fresh_policy
from apr_ray.bench.timing import Result, in_turn, turns
from apr_ray.config import Config, OptimizerConfig
from apr_ray.core.engine import GenerateRequest, SamplingParams
from apr_ray.core.errors import AprError
from apr_ray.core.weights import TensorSpec, WeightUpdate, WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.model.llama import save_policy
from apr_ray.model.state import checksum, pack_weights, trainable_parameters
from apr_ray.rollout.pool import RolloutPool
from apr_ray.rollout.worker import RolloutWorker
from apr_ray.tasks.registry import load_task
from apr_ray.weights.collective import CollectiveSink, Group, Place
from apr_ray.weights.registry import build_transport
from apr_ray.weights.transport import receive, wait_for_all

SIZES = {
    "4mb": ("model.hidden_size=160", "model.layers=3", "model.heads=4", "model.ffn_size=520"),
    "50mb": ("model.hidden_size=384", "model.layers=7", "model.heads=12", "model.ffn_size=1060"),
    "900mb": ("model.hidden_size=1024", "model.layers=18", "model.heads=16", "model.ffn_size=2752"),
}
TRANSPORTS = ("object_store", "collective", "shared_memory", "disk")
ON_A_GPU = ("cuda_ipc",)
ENGINES = 2
DECODING = 16
"""Requests that run in each engine while weights come in."""
DECODED_TOKENS = 64
"""Of each."""
DECODE_PAIRS = 5
"""How often they are timed with an update and without."""


def run(
    sizes: tuple[str, ...] = ("4mb", "50mb"),
    overrides: tuple[str, ...] = (),
    repeats: int = 15,
    engine: str = "torch",
    device: str = "cpu",
) -> Result:
    """`ratio`: a flat broadcast's median over that of the default transport, at the last size (the goal is 0.5).

    A transport packs, sends (`send_ms` is until then), checks and applies; the broadcast, between the same processes
    over gloo, only sends. One call per tensor and worker sends, and what came is then checked and applied as any update
    is: `of_per_tensor` compares the whole, `of_per_tensor_send` sending alone. There all calls are made at once; in
    `of_one_by_one` each tensor's when the last one's are answered, as OpenRLHF sends. `stall` is by how much longer
    running requests take when one update comes in: the check beside them, the copy, and computing their KV again; a
    median of differences. With `device` cuda, learner and engines share one GPU; a copy of as many bytes on
    it, and one to the host, are timed too.
    """
    for size in sizes:
        if size not in SIZES:
            raise AprError(f"unknown size {size!r}", f"Choose of {', '.join(SIZES)}")
    result: Result = {}
    settings: tuple[str, ...] = ("engine.max_sequences=32", "engine.cache_slots=8")  # a context takes up to 150 MB
    if engine != "torch":
        settings = (f"engine.name={engine}", f"engine.device={device}", "engine.max_sequences=32")
        settings = (*settings, "engine.kv_tokens=4096")
    if device not in ("cpu", "cuda"):
        raise AprError(f"unknown device {device!r}", "Choose cpu or cuda")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise AprError(f"--device cuda: torch {torch.__version__} finds no GPU", "Run it where there is one")
        settings = (*settings, "engine.device=cuda", "rollout.gpus_per_worker=0.3", "learner.gpus_per_rank=0.3")
    overrides = (*settings, *overrides)
    with private_ray():
        for size in sizes:
            parts = _one_size(bench_config((*SIZES[size], *overrides)), repeats)
            named = {f"{name}_{size}": value for name, value in parts.items()}
            sys.stderr.write(f"{named}\n")  # the next size takes minutes
            result |= named
    last = sizes[-1]
    return {
        "ratio": result[f"of_gloo_object_store_{last}"],
        "of_per_tensor": result[f"of_per_tensor_{last}"],
        "of_per_tensor_send": result[f"of_per_tensor_send_{last}"],
        "of_one_by_one": result[f"of_one_by_one_{last}"],
    } | result


@contextmanager
def private_ray() -> Iterator[None]:
    """A Ray of its own for a bench, unless one runs."""
    if ray.is_initialized():
        yield
        return
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


class TimedWorker(RolloutWorker):
    """A rollout worker that also takes the baselines' weights, and times its own decoding."""

    async def take(self, spec: TensorSpec, part: np.ndarray[Any, Any], numbers: int) -> None:
        """One parameter of many; calls with large arguments may come in any order."""
        if not hasattr(self, "taken"):
            self.taken = np.zeros(numbers, dtype=np.float32)
        self.taken[spec.offset : spec.offset + spec.size] = part.reshape(-1)

    async def apply_taken(self, version: WeightVersion, layout: tuple[TensorSpec, ...], total: int) -> None:
        """Put to work what came parameter by parameter."""
        self.received = WeightUpdate(version, layout, self.taken, total)
        await self.apply_weights()

    async def receive_flat(self, place: Place, size: int) -> None:
        """One flat broadcast and nothing else."""
        if not hasattr(self, "group"):
            import torch.distributed as dist

            self.group = Group(place, dist.TCPStore(*place.address, is_master=False))  # type: ignore[attr-defined]
            self.flat = torch.zeros(size)
        await asyncio.to_thread(lambda: self.group.finish(self.group.broadcast(self.flat)))

    async def checksums(self) -> tuple[int, int]:
        """Of what the broadcast brought, and of what came tensor by tensor; both are let go of."""
        sums = checksum(self.flat.numpy()), checksum(self.taken)
        del self.flat
        return sums

    async def held_checksum(self) -> int:
        """Of the weights that the engine was given last."""
        assert self.held is not None
        return checksum(torch.as_tensor(self.held.flat).cpu().numpy())

    async def decode_s(self, updates: bool) -> float:
        """Seconds for `DECODING` requests of `DECODED_TOKENS` tokens each.

        With `updates`, weights that were received are applied when every request has begun.
        """
        begun = [asyncio.Event() for _ in range(DECODING)]
        start = time.perf_counter()

        async def decode(i: int) -> None:
            asked = GenerateRequest(
                f"timed-{i:03d}", (5, 6, 7, 8 + i), SamplingParams(max_new_tokens=DECODED_TOKENS, seed=i)
            )
            async for _ in self.engine.generate(asked):
                begun[i].set()

        decoders = [asyncio.create_task(decode(i)) for i in range(DECODING)]
        for event in begun:
            await event.wait()
        if updates:
            await self.apply_weights()
        await asyncio.gather(*decoders)
        return time.perf_counter() - start

    async def peak_mb(self) -> float:
        """The most memory that this process has had."""
        return peak_mb()


def peak_mb() -> float:
    """The most memory that this process has had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def _one_size(config: Config, repeats: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        policy = fresh_policy(config)
        save_policy(policy, load_task(config.task).tokenizer(), config.task, f"{folder}/policy")
        learner = config.learner.model_copy(update={"ranks": 1})
        config = config.model_copy(update={"learner": learner})
        learners = LearnerGroup.start(config, OptimizerConfig(learning_rate=1e-5), f"{folder}/policy")
        pool = RolloutPool(_workers(config, f"{folder}/policy"), 1)
        try:
            return _timed(config, learners, pool, policy, folder, repeats)
        finally:
            pool.stop()
            learners.stop()


def _workers(config: Config, checkpoint: str) -> list[Any]:
    options = {"num_cpus": 0.5, "num_gpus": config.rollout.gpus_per_worker, "max_concurrency": 64}
    workers: list[Any] = [
        ray.remote(TimedWorker).options(**options).remote(config, checkpoint, f"worker-{i:02d}") for i in range(ENGINES)
    ]
    ray.get([worker.join.remote(None) for worker in workers])
    return workers


def _timed(
    config: Config, learners: LearnerGroup, pool: RolloutPool, policy: Any, folder: str, repeats: int
) -> dict[str, float]:
    packed = pack_weights(trainable_parameters(policy), WeightVersion(0, 0))
    expected, layout = packed.checksum, packed.specs
    version = WeightVersion(0, 0)
    options = {"folder": f"{folder}/weights"}
    names = (*TRANSPORTS, *(ON_A_GPU if config.learner.gpus_per_rank else ()))
    transports = {
        name: build_transport(config.weights.model_copy(update={"transport": name, **options})) for name in names
    }

    sending: dict[str, list[float]] = {name: [] for name in (*names, "per_tensor", "one_by_one")}

    def sync(name: str) -> None:
        nonlocal version
        version = version.next()
        sending[name].append(transports[name].broadcast(learners, pool, version).send_s)

    place = Place(("", 0), 0, 1 + ENGINES, 1, "gloo", 60.0)
    address = ray.get(learners.actors[0].__ray_call__.remote(partial(_open_baseline, place=place)))
    places = [Place(address, 1 + i, 1 + ENGINES, 1, "gloo", 60.0) for i in range(ENGINES)]

    def gloo() -> None:
        sent = learners.actors[0].__ray_call__.remote(_send_flat)
        ray.get(
            [sent, *(w.receive_flat.remote(p, learners.parameters) for w, p in zip(pool.workers, places, strict=True))]
        )

    def by_tensor(name: str) -> None:
        nonlocal version
        version, start = version.next(), time.perf_counter()
        tensors = ray.get(learners.actors[0].__ray_call__.remote(_put_each))
        calls = []
        for spec, tensor in zip(layout, tensors, strict=True):
            calls += [worker.take.remote(spec, tensor, learners.parameters) for worker in pool.workers]
            if name == "one_by_one":
                ray.get(calls)
        ray.get(calls)
        sending[name].append(time.perf_counter() - start)
        ray.get([worker.apply_taken.remote(version, layout, expected) for worker in pool.workers])

    works: dict[str, Callable[[], object]] = {"gloo": gloo}
    works |= {name: partial(by_tensor, name) for name in ("per_tensor", "one_by_one")}
    works |= {name: partial(sync, name) for name in names}
    times = in_turn(works, repeats)
    arrived = ray.get([worker.checksums.remote() for worker in pool.workers])
    without, longer = [], []
    for _ in turns("decoding with and without an update", min(repeats, DECODE_PAIRS)):
        version = version.next()
        update, _ = learners.weights(version)
        wait_for_all(receive(pool.membership().workers, update), config.weights.timeout_s, "a sync")
        with_update = max(ray.get([worker.decode_s.remote(True) for worker in pool.workers]))
        without.append(max(ray.get([worker.decode_s.remote(False) for worker in pool.workers])))
        longer.append(with_update - without[-1])
    differing = sum(pair != (expected, expected) for pair in arrived)
    for name in names:
        expected = ray.get(learners.actors[0].__ray_call__.remote(_change_weights))
        sync(name)
        differing += sum(held != expected for held in ray.get([w.held_checksum.remote() for w in pool.workers]))
    sent_s = {name: statistics.median(taken[1:]) for name, taken in sending.items()}
    result = {
        "gloo_ms": 1000 * times["gloo"],
        "of_per_tensor": times["per_tensor"] / times["object_store"],
        "of_per_tensor_send": sent_s["per_tensor"] / sent_s["object_store"],
        "of_one_by_one": times["one_by_one"] / times["object_store"],
        "megabytes": 4 * learners.parameters / 1e6,
        "stall_ms": 1000 * statistics.median(longer),
        "decode_without_update_ms": 1000 * statistics.median(without),
        "learner_peak_mb": ray.get(learners.actors[0].__ray_call__.remote(lambda actor: peak_mb())),
        "worker_peak_mb": max(ray.get([worker.peak_mb.remote() for worker in pool.workers])),
        "differing_receivers": float(differing),
    }
    if config.learner.gpus_per_rank:
        result |= ray.get(learners.actors[0].__ray_call__.remote(_copies_ms))
    for name in sending:
        result |= {
            f"{name}_ms": 1000 * times[name],
            f"{name}_send_ms": 1000 * sent_s[name],
            f"of_gloo_{name}": times["gloo"] / times[name],
        }
    for transport in transports.values():
        transport.close()
    return result


def _open_baseline(actor: Any, place: Place) -> tuple[str, int]:
    update = actor.trainer.weights(WeightVersion(0, 0))
    actor.baseline = CollectiveSink(place)
    actor.flat = torch.from_numpy(update.flat)
    address: tuple[str, int] = actor.baseline.open()
    return address


def _send_flat(actor: Any) -> None:
    sink = actor.baseline
    if sink.group is None:
        sink.group = Group(sink.place, sink.store)
    sink.group.finish(sink.group.broadcast(actor.flat))


def _change_weights(actor: Any) -> int:
    """Other weights from now on; returns their checksum."""
    for _, parameter in trainable_parameters(actor.trainer.policy):
        parameter.data.mul_(1.01)
    changed: int = actor.trainer.weights(WeightVersion(0, 0)).checksum
    return changed


def _put_each(actor: Any) -> list[Any]:
    """One object reference per parameter."""
    return [ray.put(p.detach().cpu().numpy()) for _, p in trainable_parameters(actor.trainer.policy)]


def _copies_ms(actor: Any) -> dict[str, float]:
    """Medians of one copy of as many bytes: on the GPU, from it to memory of the host, and back."""
    here = torch.from_numpy(actor.trainer.weights(WeightVersion(0, 0)).flat)
    there, other = here.cuda(), here.cuda()
    copies = {"gpu_copy_ms": (other, there), "copy_to_host_ms": (here, there), "copy_from_host_ms": (there, here)}
    result = {}
    for name, (into, source) in copies.items():
        taken = []
        for _ in range(9):
            torch.cuda.synchronize()
            start = time.perf_counter()
            into.copy_(source)
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        result[name] = 1000 * statistics.median(taken)
    return result
