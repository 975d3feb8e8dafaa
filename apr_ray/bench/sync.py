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
BY_TENSOR = ("per_tensor", "one_by_one")
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


class Senders:
    """Every way to send the learners' weights to the pool's workers.

    Attributes:
        version: sent last.
        sending_s: of each way, seconds until all was sent, once per call.
        checksum: of the weights that the learners hold.
    """

    def __init__(self, config: Config, learners: LearnerGroup, pool: RolloutPool, policy: Any, folder: str) -> None:
        self.config, self.learners, self.pool = config, learners, pool
        self.version = WeightVersion(0, 0)
        packed = pack_weights(trainable_parameters(policy), self.version)
        self.checksum, self.layout = packed.checksum, packed.specs

        names = (*TRANSPORTS, *(ON_A_GPU if config.learner.gpus_per_rank else ()))
        weights = config.weights.model_copy(update={"folder": f"{folder}/weights"})
        self.transports = {name: build_transport(weights.model_copy(update={"transport": name})) for name in names}
        self.sending_s: dict[str, list[float]] = {name: [] for name in (*names, *BY_TENSOR)}

        place = Place(("", 0), 0, 1 + ENGINES, 1, "gloo", 60.0)
        address = self.ask_rank_0(partial(_open_baseline, place=place))
        self.places = [Place(address, 1 + i, 1 + ENGINES, 1, "gloo", 60.0) for i in range(ENGINES)]

    def ways(self) -> dict[str, Callable[[], object]]:
        """By name, baselines first."""
        baselines: dict[str, Callable[[], object]] = {"gloo": self.broadcast}
        baselines |= {name: partial(self.by_tensor, name) for name in BY_TENSOR}
        return baselines | {name: partial(self.sync, name) for name in self.transports}

    def sync(self, name: str) -> None:
        """By one of our transports."""
        self.version = self.version.next()
        sent = self.transports[name].broadcast(self.learners, self.pool, self.version)
        self.sending_s[name].append(sent.send_s)

    def broadcast(self) -> None:
        """One flat broadcast over gloo, which nobody checks or applies."""
        sent = self.learners.actors[0].__ray_call__.remote(_send_flat)
        received = [
            worker.receive_flat.remote(place, self.learners.parameters)
            for worker, place in zip(self.pool.workers, self.places, strict=True)
        ]
        ray.get([sent, *received])

    def by_tensor(self, name: str) -> None:
        """A call per tensor and worker: all at once, or with `one_by_one` each when the last one's are answered."""
        self.version, start = self.version.next(), time.perf_counter()
        calls = []
        for spec, tensor in zip(self.layout, self.ask_rank_0(_put_each), strict=True):
            calls += [worker.take.remote(spec, tensor, self.learners.parameters) for worker in self.pool.workers]
            if name == "one_by_one":
                ray.get(calls)
        ray.get(calls)
        self.sending_s[name].append(time.perf_counter() - start)
        ray.get([w.apply_taken.remote(self.version, self.layout, self.checksum) for w in self.pool.workers])

    def stage(self) -> None:
        """Bring the next version to the workers, who do not apply it yet."""
        self.version = self.version.next()
        update, _ = self.learners.weights(self.version)
        received = receive(self.pool.membership().workers, update)
        wait_for_all(received, self.config.weights.timeout_s, "a sync")

    def differing(self) -> int:
        """How many receivers hold other bytes than were sent, by the baselines before and by each transport now."""
        sent = (self.checksum, self.checksum)
        count: int = sum(pair != sent for pair in self.ask_workers("checksums"))
        for name in self.transports:
            self.checksum = self.ask_rank_0(_change_weights)
            self.sync(name)
            count += sum(held != self.checksum for held in self.ask_workers("held_checksum"))
        return count

    def ask_rank_0(self, question: Callable[..., Any]) -> Any:
        """The answer of a function of the learner's actor, run there."""
        return ray.get(self.learners.actors[0].__ray_call__.remote(question))

    def ask_workers(self, method: str, *arguments: Any) -> list[Any]:
        """Every worker's answer."""
        answers: list[Any] = ray.get([getattr(w, method).remote(*arguments) for w in self.pool.workers])
        return answers


def _timed(
    config: Config, learners: LearnerGroup, pool: RolloutPool, policy: Any, folder: str, repeats: int
) -> dict[str, float]:
    senders = Senders(config, learners, pool, policy, folder)
    times = in_turn(senders.ways(), repeats)
    sent_s = {name: statistics.median(taken[1:]) for name, taken in senders.sending_s.items()}

    without, longer = [], []
    for _ in turns("decoding with and without an update", min(repeats, DECODE_PAIRS)):
        senders.stage()
        with_update = max(senders.ask_workers("decode_s", True))
        without.append(max(senders.ask_workers("decode_s", False)))
        longer.append(with_update - without[-1])

    result = {
        "gloo_ms": 1000 * times["gloo"],
        "of_per_tensor": times["per_tensor"] / times["object_store"],
        "of_per_tensor_send": sent_s["per_tensor"] / sent_s["object_store"],
        "of_one_by_one": times["one_by_one"] / times["object_store"],
        "megabytes": 4 * learners.parameters / 1e6,
        "stall_ms": 1000 * statistics.median(longer),
        "decode_without_update_ms": 1000 * statistics.median(without),
        "differing_receivers": float(senders.differing()),
        "learner_peak_mb": senders.ask_rank_0(lambda actor: peak_mb()),
        "worker_peak_mb": max(senders.ask_workers("peak_mb")),
    }
    for name in senders.sending_s:
        result |= {
            f"{name}_ms": 1000 * times[name],
            f"{name}_send_ms": 1000 * sent_s[name],
            f"of_gloo_{name}": times["gloo"] / times[name],
        }
    if config.learner.gpus_per_rank:
        result |= senders.ask_rank_0(_copies_ms)
    for transport in senders.transports.values():
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
