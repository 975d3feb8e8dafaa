"""Through memory of the GPU that learners and workers share: rank 0 gathers on it, engines copy from there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from apr_ray.core.errors import SyncFailed
from apr_ray.core.weights import TensorSpec, WeightUpdate, WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.model.state import checksum_of_tensor
from apr_ray.rollout.pool import Membership
from apr_ray.weights.transport import Sending, Transport

KEPT_MAPPINGS = 2
_mapped: dict[tuple[Any, ...], torch.Tensor] = {}
"""By handle, the last buffers that this process has mapped, each once: torch counts who lets go of them."""


class CudaIpcTransport(Transport):
    """Two buffers of the weights' size by turns, in rank 0's memory of the GPU; nothing passes through the host."""

    def send(self, learners: LearnerGroup, members: Membership, version: WeightVersion) -> Sending:
        """See `Transport.send`."""
        if self.opened is not learners:
            self.open_sink(learners, GpuSink())
        sent = self.send_into_sink(learners, version)
        return self.passed_on(members, sent["learner-0"], sent, version)


@dataclass
class GpuSink:
    """Rank 0's end. See `core.weights.WeightSink`."""

    buffers: list[torch.Tensor] = field(default_factory=list)
    handles: list[tuple[Any, ...]] = field(default_factory=list)
    """By which other processes map the buffers, as torch names them."""
    version: WeightVersion | None = None
    """The version in the first of them, or about to be written there."""

    def open(self) -> None:
        """Memory is taken when the size is known."""

    def room(self, layout: tuple[TensorSpec, ...], version: WeightVersion) -> torch.Tensor:
        """The buffer whose turn it is."""
        if not self.buffers:
            size = sum(spec.size for spec in layout)
            self.buffers = [torch.empty(size, device="cuda") for _ in range(2)]
            self.handles = [reduce_tensor(buffer)[1] for buffer in self.buffers]  # type: ignore[no-untyped-call]
        if version != self.version:  # sent again, it leaves alone the one before, which late workers may still read
            self.buffers.reverse()
            self.handles.reverse()
        self.version = version
        return self.buffers[0]

    def take(self, layout: tuple[TensorSpec, ...], pieces: Iterator[Any], version: WeightVersion) -> GpuSource:
        """Wait for all pieces; returns where they lie."""
        for _ in pieces:
            pass
        total = checksum_of_tensor(self.buffers[0])  # waits for the GPU
        return GpuSource(_gpu(), self.handles[0], layout, version, total)

    def until_sent(self) -> None:
        """At once: pieces are parts of `room`."""

    def close(self) -> None:
        """Let go of the memory."""
        self.buffers.clear()
        self.handles.clear()


@dataclass(frozen=True)
class GpuSource:
    """An update in another process's memory of a GPU. See `core.weights.WeightSource`.

    Attributes:
        gpu: the GPU's own name, since its number depends on the process.
        handle: what torch rebuilds the tensor from.
    """

    gpu: str
    handle: tuple[Any, ...]
    layout: tuple[TensorSpec, ...]
    version: WeightVersion
    checksum: int

    def fetch(self) -> WeightUpdate:
        """A view of that memory; nothing is copied. It holds this version until the next but one is sent."""
        if (here := _gpu()) != self.gpu:
            raise SyncFailed(
                f"the weights lie on GPU {self.gpu}, this worker computes on {here or 'none'}",
                "weights.transport=cuda_ipc is for parts that share a GPU; use shared_memory, or object_store",
            )
        if self.handle not in _mapped:
            try:
                _mapped[self.handle] = rebuild_cuda_tensor(*self.handle)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise SyncFailed(
                    f"cannot map the weights on GPU {self.gpu}: {error}",
                    "Does rank 0 of the learners run, and on this node? weights.transport=object_store reaches others",
                ) from error
            for handle in list(_mapped)[:-KEPT_MAPPINGS]:
                del _mapped[handle]
        return WeightUpdate(self.version, self.layout, _mapped[self.handle], self.checksum)


def _gpu() -> str:
    """The GPU that this process computes on, "" where it has none."""
    return str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else ""
