"""Weights as data: from a model to one flat buffer, from a buffer back, and the checks between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from apr_ray.core.errors import WeightsRejected
from apr_ray.core.weights import TensorSpec, WeightUpdate, WeightVersion, layout_of

CACHED_NUMBERS = 1 << 18
"""1 MB in float32."""
SUMMED_NUMBERS = 1 << 24
"""Of a tensor at a time: to sum and to look at them takes several times their memory."""
GOLDEN = 0x1E37_79B9_7F4A_7C15
"""Neighbours' multiples of it have little in common."""


def pack_weights(
    parameters: Iterable[tuple[str, torch.Tensor]], version: WeightVersion, flat: np.ndarray[Any, Any] | None = None
) -> WeightUpdate:
    """All parameters, by their Hugging Face names, in one float32 buffer: `flat`, if given.

    Other dtypes are converted to float32, which holds bfloat16 and float16 exactly.
    """
    named = list(parameters)
    layout = layout_of((name, tuple(tensor.shape)) for name, tensor in named)
    if flat is None:
        flat = np.empty(sum(spec.size for spec in layout), dtype=np.float32)
    running, total = RunningChecksum(), 0
    for (_, tensor), spec in zip(named, layout, strict=True):
        part = flat[spec.offset : spec.offset + spec.size]
        copy_flat([tensor], part)
        total = running.add(part)  # while it is in a core's cache
    return WeightUpdate(version, layout, flat, total)


def flatten(state: Mapping[str, np.ndarray[Any, Any]], layout: Sequence[TensorSpec]) -> np.ndarray[Any, Any]:
    """Arrays by name as one flat float32 buffer in this layout."""
    flat = np.empty(sum(spec.size for spec in layout), dtype=np.float32)
    for spec in layout:
        flat[spec.offset : spec.offset + spec.size] = state[spec.name].reshape(-1)
    return flat


def copy_flat(tensors: Iterable[torch.Tensor], flat: Any) -> None:
    """Tensors one after the other into a flat float32 array, or tensor, that holds just as many numbers."""
    into, offset = torch.as_tensor(flat), 0
    for tensor in tensors:
        into[offset : offset + tensor.numel()].copy_(tensor.detach().reshape(-1))
        offset += tensor.numel()


def checksum(flat: np.ndarray[Any, Any]) -> int:
    """See `RunningChecksum`, of one buffer."""
    return RunningChecksum().add(flat)


class RunningChecksum:
    """XXH3 of bytes as they come, without its highest bit, so that it fits a signed number of 64 bits.

    It guards against what gets lost or mixed up on the way, not against an attacker; and it reads at the speed of
    memory, of which two checks of every update are made.
    """

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, flat: np.ndarray[Any, Any]) -> int:
        """Take in a buffer; returns the checksum of all so far."""
        self._hash.update(np.ascontiguousarray(flat).view(np.uint8).data)
        return self._hash.intdigest() & 0x7FFF_FFFF_FFFF_FFFF


def checksum_of_tensor(flat: torch.Tensor) -> int:
    """A checksum of float32 numbers on the device where they lie: the sum of their bits, each times an odd number of
    its place, modulo 2^64. A number that changes always changes it."""
    bits, total = flat.view(torch.int32), torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), SUMMED_NUMBERS):
        piece = bits[start : start + SUMMED_NUMBERS]
        place = torch.arange(start, start + len(piece), device=flat.device)
        total += (place.mul_(GOLDEN).bitwise_or_(1) * piece).sum()
    return int(total)


def check_update(
    update: WeightUpdate,
    expected: Mapping[str, tuple[int, ...]],
    current: WeightVersion,
    copy_to: Any = None,
) -> None:
    """Raise WeightsRejected, naming the first fault, unless the update can be applied whole.

    Args:
        update: what came.
        expected: parameter names to shapes.
        current: the version now running; the update's must be newer.
        copy_to: where its numbers are copied meanwhile, which spares a pass over memory: an array, or a tensor if the
            update's is one. What is there counts only if nothing is raised.
    """

    def refuse(what: str) -> None:
        raise WeightsRejected(f"weights {update.version} refused: {what}", "Nothing was applied; send a full update")

    if update.version <= current:
        refuse(f"the engine already runs {current}")
    dtype = str(update.flat.dtype).removeprefix("torch.")
    if dtype != "float32" or update.flat.ndim != 1:
        refuse(f"the buffer is {dtype} with {update.flat.ndim} dimensions, not flat float32")
    shapes = {spec.name: spec.shape for spec in update.specs}
    if len(shapes) != len(update.specs):
        refuse("a parameter is named twice")
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            refuse(f"{name} is missing")
        if name not in expected:
            refuse(f"{name} is unknown")
        if shapes[name] != expected[name]:
            refuse(f"{name} has shape {shapes[name]}, expected {expected[name]}")
    end = 0
    for spec in update.specs:
        if spec.offset != end:
            refuse(f"{spec.name} begins at {spec.offset}, expected {end}")
        end += spec.size
    if end != len(update.flat):
        refuse(f"the buffer holds {len(update.flat)} numbers, its parameters {end}")
    read = _read_tensor if isinstance(update.flat, torch.Tensor) else _read_once
    total, finite = read(update.flat, copy_to)
    if total != update.checksum:
        refuse("the checksum is wrong")
    if not finite:
        bad = next(s.name for s in update.specs if not torch.as_tensor(update.state_dict()[s.name]).isfinite().all())
        refuse(f"{bad} holds a number that is not finite")


def _read_once(flat: np.ndarray[Any, Any], copy_to: np.ndarray[Any, Any] | None) -> tuple[int, bool]:
    """Checksum, and whether all numbers are finite, in one pass over memory, by pieces that fit into a core's cache; of
    the copy, where there is one.

    A sum is not finite where a term is not; where it is not for another reason, the terms are looked at.
    """
    running, total, finite = RunningChecksum(), 0, True
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, flat.size, CACHED_NUMBERS):
            piece = flat[start : start + CACHED_NUMBERS]
            if copy_to is not None:
                copy_to[start : start + CACHED_NUMBERS] = piece
                piece = copy_to[start : start + CACHED_NUMBERS]
            total = running.add(piece)
            finite = finite and bool(np.isfinite(piece.sum()) or np.isfinite(piece).all())
    return total, finite


def _read_tensor(flat: torch.Tensor, copy_to: torch.Tensor | None) -> tuple[int, bool]:
    """The same of a tensor, on its device."""
    if copy_to is not None:
        flat = copy_to.copy_(flat)
    return checksum_of_tensor(flat), all(bool(part.isfinite().all()) for part in flat.split(SUMMED_NUMBERS))


def trainable_parameters(policy: Any) -> list[tuple[str, torch.Tensor]]:
    """Parameters by Hugging Face name, tied ones once, in a stable order."""
    return list(policy.named_parameters())
