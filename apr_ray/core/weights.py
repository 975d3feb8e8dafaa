"""Weight versions, and the interface that carries weights from learners to engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True, order=True)
class WeightVersion:
    """Which weights: `incarnation` counts resumes of the run, `counter` the updates applied in all.

    A run that is resumed from an older checkpoint gets a new incarnation, so that the weights it will make are never
    confused with those of the run that was lost.
    """

    incarnation: int
    counter: int

    def next(self) -> WeightVersion:
        """The version after one more optimiser phase."""
        return WeightVersion(self.incarnation, self.counter + 1)

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.counter}"

    @classmethod
    def parse(cls, text: str) -> WeightVersion:
        """Inverse of `str`. Raises ValueError on anything else."""
        incarnation, dot, counter = text.partition(".")
        if not dot or not incarnation.isdecimal() or not counter.isdecimal():
            raise ValueError(f"not a weight version: {text!r}")
        return cls(int(incarnation), int(counter))


StateDict = Mapping[str, np.ndarray[Any, np.dtype[Any]]]
"""Hugging Face parameter names to arrays."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one parameter lies in a flat buffer: `offset` counts elements, not bytes."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """All parameters of one version in one flat float32 buffer, with a CRC-32 of its bytes.

    One buffer, because one large copy is many times faster than one per parameter (measured by `apr-ray bench sync`).
    """

    version: WeightVersion
    specs: tuple[TensorSpec, ...]
    flat: np.ndarray[Any, np.dtype[np.float32]]
    checksum: int

    def state_dict(self) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Views into `flat` by parameter name; nothing is copied."""
        views = {}
        for spec in self.specs:
            size = int(np.prod(spec.shape, dtype=np.int64))
            views[spec.name] = self.flat[spec.offset : spec.offset + size].reshape(spec.shape)
        return views


class WeightTransport(Protocol):
    """Carries a version from the learner group to every engine of a pool."""

    def broadcast(self, learners: Any, pool: Any, version: WeightVersion) -> SyncReport:
        """Send the learners' weights to the pool as `version`; returns when every engine runs it."""
        ...


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one broadcast cost."""

    version: WeightVersion
    total_s: float
    gather_s: float
    apply_s: float
    weight_bytes: int
