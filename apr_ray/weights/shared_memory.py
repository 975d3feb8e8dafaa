"""Through memory that learners and workers of one node share: rank 0 writes each piece where every worker reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apr_ray.core.weights import TensorSpec, WeightUpdate, WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.model.shared_buffer import MemorySource, memory_source, new_shared
from apr_ray.model.state import RunningChecksum
from apr_ray.rollout.pool import Membership
from apr_ray.weights.transport import Sending, Transport


class SharedMemoryTransport(Transport):
    """Two buffers of the weights' size by turns (`model.shared_buffer`). Linux only, one node only."""

    def send(self, learners: LearnerGroup, members: Membership, version: WeightVersion) -> Sending:
        """See `Transport.send`."""
        if self.opened is not learners:
            self.open_sink(learners, MemorySink())
        sent = self.send_into_sink(learners, version)
        return self.passed_on(members, sent["learner-0"], sent, version)


@dataclass
class MemorySink:
    """Rank 0's end. See `core.weights.WeightSink`."""

    buffers: list[np.ndarray[Any, Any]] = field(default_factory=list)
    version: WeightVersion | None = None
    """The version in the first of them, or about to be written there."""

    def open(self) -> None:
        """Memory is taken when the size is known."""

    def room(self, layout: tuple[TensorSpec, ...], version: WeightVersion) -> np.ndarray[Any, Any]:
        """The buffer whose turn it is."""
        if not self.buffers:
            size = sum(spec.size for spec in layout)
            self.buffers = [new_shared(size) for _ in range(2)]
        if version != self.version:  # sent again, it leaves alone the one before, which late workers may still read
            self.buffers.reverse()
        self.version = version
        return self.buffers[0]

    def take(
        self, layout: tuple[TensorSpec, ...], pieces: Iterator[np.ndarray[Any, Any]], version: WeightVersion
    ) -> MemorySource | None:
        """Wait for all pieces; returns where they lie."""
        running, total = RunningChecksum(), 0
        for piece in pieces:
            total = running.add(piece)
        return memory_source(WeightUpdate(version, layout, self.buffers[0], total))

    def until_sent(self) -> None:
        """At once: pieces are parts of `room`."""

    def close(self) -> None:
        """Let go of the memory; workers that still map it keep it."""
        self.buffers.clear()
