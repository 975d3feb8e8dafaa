"""Through memory that learners and workers of one node share: rank 0 writes each piece where every worker reads it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from apr_ray.core.errors import SyncFailed
from apr_ray.core.weights import TensorSpec, WeightUpdate, WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.model.state import RunningChecksum
from apr_ray.rollout.pool import Membership
from apr_ray.weights.transport import Sending, Transport, receive, wait_for_all


class SharedMemoryTransport(Transport):
    """Two buffers of the weights' size by turns, in anonymous files (memfd): the memory is gone with the last process
    that maps it, however that ends. Linux only, one node only."""

    def send(self, learners: LearnerGroup, members: Membership, version: WeightVersion) -> Sending:
        """See `Transport.send`."""
        if self.opened is not learners:
            self.open_sink(learners, MemorySink())
        calls = self.send_into_sink(learners, version)
        source = wait_for_all(calls, self.config.timeout_s, f"the sync of weights {version}")[0]
        return Sending(receive(members.workers, source), lambda: ray.put(source))


@dataclass
class MemorySink:
    """Rank 0's end. See `core.weights.WeightSink`."""

    buffers: list[tuple[int, mmap.mmap]] = field(default_factory=list)
    turn: int = 0

    def open(self) -> None:
        """Memory is taken when the size is known."""

    def take(
        self, layout: tuple[TensorSpec, ...], pieces: Iterator[np.ndarray[Any, Any]], version: WeightVersion
    ) -> MemorySource:
        """Write the pieces one after the other; returns where they lie."""
        size = 4 * sum(spec.size for spec in layout)
        if not self.buffers:
            self.buffers = [_new_buffer(size) for _ in range(2)]
        self.turn = 1 - self.turn
        descriptor, memory = self.buffers[self.turn]
        flat: np.ndarray[Any, Any] = np.frombuffer(memory, dtype=np.float32)
        offset, running, total = 0, RunningChecksum(), 0
        for piece in pieces:
            flat[offset : offset + piece.size] = piece
            total = running.add(piece)
            offset += piece.size
        node = ray.get_runtime_context().get_node_id()
        return MemorySource(os.getpid(), descriptor, size, node, layout, version, total)

    def close(self) -> None:
        """Let go of the memory; workers that still map it keep it."""
        for descriptor, _ in self.buffers:
            os.close(descriptor)
        self.buffers.clear()


def _new_buffer(size: int) -> tuple[int, mmap.mmap]:
    descriptor = os.memfd_create("apr-ray-weights")
    os.ftruncate(descriptor, size)
    return descriptor, mmap.mmap(descriptor, size)


@dataclass(frozen=True)
class MemorySource:
    """A worker's end: the sender's memory, by its process and descriptor. See `core.weights.WeightSource`."""

    process: int
    descriptor: int
    size: int
    node: str
    layout: tuple[TensorSpec, ...]
    version: WeightVersion
    checksum: int

    def fetch(self) -> WeightUpdate:
        """A view of the shared memory; nothing is copied. It holds this version until the next but one is sent."""
        here = ray.get_runtime_context().get_node_id()
        if here != self.node:
            raise SyncFailed(
                f"weights lie in the memory of node {self.node[:8]}, this worker runs on {here[:8]}",
                "Use weights.transport=object_store or collective across nodes",
            )
        try:
            with open(f"/proc/{self.process}/fd/{self.descriptor}", "rb") as file:
                memory = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise SyncFailed(f"cannot map the learner's weights: {error.strerror}", "Does it run?") from error
        return WeightUpdate(self.version, self.layout, np.frombuffer(memory, dtype=np.float32), self.checksum)
