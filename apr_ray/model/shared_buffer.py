"""Numbers in memory that other processes of this node map too: written once, read by all where they lie.

The memory is an anonymous file (memfd): it is gone with the last process that maps it, however that ends, and does not
count against /dev/shm, which containers keep small. Linux only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from apr_ray.core.errors import SyncFailed
from apr_ray.core.weights import TensorSpec, WeightUpdate, WeightVersion


@dataclass(frozen=True, slots=True)
class SharedName:
    """Where another process of this node finds an array: a descriptor of its owner, and the file that must be there."""

    process: int
    descriptor: int
    inode: int
    numbers: int


def new_shared(numbers: int) -> np.ndarray[Any, Any]:
    """A flat float32 array of zeros in memory of its own that can be shared."""
    descriptor = os.memfd_create("apr-ray-weights")
    os.ftruncate(descriptor, 4 * numbers)
    return _mapped(descriptor, numbers)


def shared_tensor(flat: Any) -> torch.Tensor | None:
    """The tensor in shared memory that an array of `new_shared` or `open_shared` is; None for any other array, and for
    a tensor on a GPU."""
    tensor = flat.base if isinstance(flat, np.ndarray) else None
    if isinstance(tensor, torch.Tensor) and tensor.is_shared() and tensor.numel() == flat.size:
        return tensor
    return None


def name_of(flat: np.ndarray[Any, Any]) -> SharedName | None:
    """By which `open_shared` finds an array as long as this process holds it; None where it is not in shared memory."""
    tensor = shared_tensor(flat)
    if tensor is None:
        return None
    descriptor, _ = tensor.untyped_storage()._share_fd_cpu_()  # shared already: its descriptor, nothing is copied
    return SharedName(os.getpid(), descriptor, os.fstat(descriptor).st_ino, flat.size)


KEPT_MAPPINGS = 2
_mappings: dict[int, np.ndarray[Any, Any]] = {}
"""By inode, the last ones opened: to map 50 MB anew costs as much as to read them, and weights come into two buffers by
turns. What is mapped lives, so its inode is nobody else's."""


def open_shared(name: SharedName) -> np.ndarray[Any, Any]:
    """Map another process's array; nothing is copied.

    Raises:
        OSError: the owner is gone, has let go of it, or runs on another node.
    """
    descriptor = os.open(f"/proc/{name.process}/fd/{name.descriptor}", os.O_RDWR)
    found = os.fstat(descriptor)
    if (found.st_ino, found.st_size) != (name.inode, 4 * name.numbers):
        os.close(descriptor)
        raise OSError(f"descriptor {name.descriptor} of process {name.process} is not that array")
    flat = _mappings.pop(name.inode, None)
    if flat is None:
        flat = _mapped(descriptor, name.numbers)
    else:
        os.close(descriptor)
    _mappings[name.inode] = flat
    while len(_mappings) > KEPT_MAPPINGS:
        del _mappings[next(iter(_mappings))]
    return flat


@dataclass(frozen=True)
class MemorySource:
    """An update in another process's shared memory. See `core.weights.WeightSource`."""

    name: SharedName
    layout: tuple[TensorSpec, ...]
    version: WeightVersion
    checksum: int

    def fetch(self) -> WeightUpdate:
        """A view of that memory; nothing is copied. It holds this version as long as its owner does not write another
        there: two buffers by turns hold it until the next but one comes."""
        try:
            flat = open_shared(self.name)
        except OSError as error:
            raise SyncFailed(
                f"cannot map the weights in the memory of process {self.name.process}: {error}",
                "Does it run, and on this node? weights.transport=object_store and collective reach other nodes",
            ) from error
        return WeightUpdate(self.version, self.layout, flat, self.checksum)


def memory_source(update: WeightUpdate) -> MemorySource | None:
    """Where other processes of this node can take an update from; None where it is not in shared memory."""
    name = name_of(update.flat)
    return None if name is None else MemorySource(name, update.specs, update.version, update.checksum)


def _mapped(descriptor: int, numbers: int) -> np.ndarray[Any, Any]:
    """Torch maps it, so that a tensor of it goes to another process by its descriptor."""
    storage = torch.UntypedStorage._new_shared_fd_cpu(descriptor, 4 * numbers)  # type: ignore[attr-defined]
    os.close(descriptor)  # the storage has one of its own
    return torch.empty(0, dtype=torch.float32).set_(storage).numpy()
