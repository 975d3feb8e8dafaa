"""Weights to two engines, as training sends them, against one flat gloo broadcast and against one call per tensor."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from apr_ray.bench.recording import bench_config, fresh_policy, fresh_weights
from apr_ray.bench.timing import REPEATS, Result, in_turn
from apr_ray.config import Config
from apr_ray.core.engine import GenerateRequest, SamplingParams
from apr_ray.core.weights import WeightUpdate, WeightVersion
from apr_ray.engines.torch_engine import TorchEngine
from apr_ray.model.state import checksum, pack_weights, trainable_parameters
from apr_ray.rollout.pool import RolloutPool
from apr_ray.weights.object_store import ObjectStoreTransport

SIZES = {
    "4mb": ("model.hidden_size=160", "model.layers=3", "model.heads=4", "model.ffn_size=520"),
    "50mb": ("model.hidden_size=384", "model.layers=7", "model.heads=12", "model.ffn_size=1060"),
}
ENGINES = 2
DECODING = 16
"""Requests that run in each engine while weights come in."""


def run(sizes: tuple[str, ...] = ("4mb", "50mb"), overrides: tuple[str, ...] = (), repeats: int = REPEATS) -> Result:
    """`ratio`: a flat gloo broadcast's median over ours, at the last size (the goal is 0.5 or more).

    Ours packs, sends, checks and applies; the broadcast only sends. `stall` is how long one update keeps an engine from
    decoding: the check, the copy, and computing the running requests' KV again.
    """
    result: Result = {}
    with private_ray():
        for size in sizes:
            parts = _one_size(bench_config((*SIZES[size], *overrides)), repeats)
            result |= {f"{name}_{size}": value for name, value in parts.items()}
    last = sizes[-1]
    return {"ratio": result[f"of_gloo_{last}"], "of_per_tensor": result[f"of_per_tensor_{last}"]} | result


@contextmanager
def private_ray() -> Iterator[None]:
    """A Ray of its own for a bench, unless one runs."""
    if ray.is_initialized():
        yield
        return
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


class Sender:
    """Where the learner stands: packs a policy's weights, or broadcasts them flat."""

    def __init__(self, config: Config) -> None:
        import torch

        torch.set_num_threads(1)
        self.policy = fresh_policy(config)
        self.flat = torch.from_numpy(pack_weights(trainable_parameters(self.policy), WeightVersion(0, 0)).flat)

    def weights(self, version: WeightVersion) -> WeightUpdate:
        return pack_weights(trainable_parameters(self.policy), version)

    def size(self) -> int:
        return self.flat.numel()

    def tensors(self) -> list[Any]:
        """One object reference per parameter."""
        return [ray.put(parameter.detach().numpy()) for _, parameter in trainable_parameters(self.policy)]

    def address(self) -> tuple[str, int]:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return "127.0.0.1", int(probe.getsockname()[1])

    def join(self, rank: int, address: tuple[str, int]) -> None:
        join_gloo(rank, address)

    def broadcast(self) -> None:
        import torch.distributed as dist

        dist.broadcast(self.flat, src=0)


class Receiver:
    """Where a rollout worker stands: an engine that decodes all the while."""

    def __init__(self, config: Config) -> None:
        import torch

        torch.set_num_threads(1)
        shape, state = fresh_weights(config)
        self.engine = TorchEngine(shape, state, max_sequences=DECODING, cache_slots=0)
        self.buffer = torch.zeros(sum(array.size for array in state.values()))
        self.parts: dict[int, np.ndarray[Any, Any]] = {}
        self.stalls_s: list[float] = []

    async def join(self, rank: int, address: tuple[str, int]) -> None:
        join_gloo(rank, address)

    async def broadcast(self) -> None:
        import torch.distributed as dist

        dist.broadcast(self.buffer, src=0)

    async def take(self, index: int, part: np.ndarray[Any, Any]) -> None:
        self.parts[index] = part.copy()  # calls with large arguments may come in any order

    async def update_weights(self, update: WeightUpdate) -> None:
        await self.engine.update_weights(update)

    def steps(self) -> int:
        steps = self.engine.stats().steps
        assert steps is not None  # the embedded engine counts them
        return steps

    async def update_while_decoding(self, update: WeightUpdate, tokens: int) -> float:
        """Seconds of decoding that an update costs: the longest pause between two steps, less a usual one.

        The update comes when half of `tokens` are decoded.
        """
        pauses: list[float] = []
        halfway = asyncio.Event()

        async def watch() -> None:
            first = steps = self.steps()
            since = time.perf_counter()
            while True:
                await asyncio.sleep(0)
                now, done = time.perf_counter(), self.steps()
                if done == steps:
                    continue
                pauses.append(now - since)
                steps, since = done, now
                if not halfway.is_set() and done >= first + tokens // 2:
                    halfway.set()
                    pauses.clear()  # the first steps prefill, and wake everything up

        async def decode(i: int) -> None:
            asked = GenerateRequest(f"d{i:03d}", (5, 6, 7, 8), SamplingParams(max_new_tokens=tokens, seed=i))
            async for _ in self.engine.generate(asked):
                pass

        watcher = asyncio.create_task(watch())
        decoders = [asyncio.create_task(decode(i)) for i in range(DECODING)]
        await halfway.wait()
        await self.engine.update_weights(update)
        await asyncio.gather(*decoders)
        watcher.cancel()
        return max(pauses) - float(np.median(pauses))

    async def checksums(self) -> tuple[int, int, str]:
        """Of what gloo brought, of what came tensor by tensor, and the version that the engine runs."""
        parts = np.concatenate([self.parts[i].ravel() for i in sorted(self.parts)])
        return checksum(self.buffer.numpy()), checksum(parts), str(self.engine.version)


def join_gloo(rank: int, address: tuple[str, int]) -> None:
    """Enter the group of one sender and all receivers."""
    import torch.distributed as dist

    where = f"tcp://{address[0]}:{address[1]}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=1 + ENGINES)


class _Learners:
    """The part of a learner group that a transport uses."""

    def __init__(self, sender: Any, parameters: int) -> None:
        self.sender = sender
        self.parameters = parameters

    def weights(self, version: WeightVersion) -> Any:
        return self.sender.weights.remote(version)


def _one_size(config: Config, repeats: int) -> dict[str, float]:
    options = {"num_cpus": 0.5, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    sender: Any = ray.remote(Sender).options(**options).remote(config)
    receivers: list[Any] = [ray.remote(Receiver).options(**options).remote(config) for _ in range(ENGINES)]
    address = ray.get(sender.address.remote())
    ray.get([actor.join.remote(rank, address) for rank, actor in enumerate([sender, *receivers])])
    pool, transport = RolloutPool(receivers, 1), ObjectStoreTransport()
    learners: Any = _Learners(sender, ray.get(sender.size.remote()))
    version = WeightVersion(0, 0)

    def ours() -> None:
        nonlocal version
        version = version.next()
        transport.broadcast(learners, pool, version)

    def gloo() -> None:
        ray.get([actor.broadcast.remote() for actor in [sender, *receivers]])

    def per_tensor() -> None:
        tensors = ray.get(sender.tensors.remote())
        ray.get([receiver.take.remote(i, t) for receiver in receivers for i, t in enumerate(tensors)])

    times = in_turn({"ours": ours, "gloo": gloo, "per_tensor": per_tensor}, repeats)
    sent = ray.get(sender.weights.remote(version))
    arrived = ray.get([receiver.checksums.remote() for receiver in receivers])
    update = sender.weights.remote(version.next())
    stalls = ray.get([receiver.update_while_decoding.remote(update, 40) for receiver in receivers])
    for actor in (sender, *receivers):
        ray.kill(actor)
    return {
        "of_gloo": times["gloo"] / times["ours"],
        "of_per_tensor": times["per_tensor"] / times["ours"],
        "ms": 1000 * times["ours"],
        "gloo_ms": 1000 * times["gloo"],
        "per_tensor_ms": 1000 * times["per_tensor"],
        "megabytes": 4 * learners.parameters / 1e6,
        "stall_ms": 1000 * max(stalls),
        "differing_receivers": float(sum(a != (sent.checksum, sent.checksum, str(version)) for a in arrived)),
    }
