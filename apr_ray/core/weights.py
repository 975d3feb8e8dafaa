"""Weight versions, and the interface that carries weights from learners to engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
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


FIRST_VERSION = WeightVersion(0, 0)
"""Of the weights that an engine starts on."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one parameter lies in a flat buffer: `offset` counts elements, not bytes."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """All parameters of one version in one flat float32 buffer, with a checksum of its bytes.

    One buffer, because one large copy is many times faster than one per parameter (measured by `apr-ray bench sync`).
    It is a numpy array, or, by `weights.transport=cuda_ipc`, a torch tensor on a GPU.
    """

    version: WeightVersion
    specs: tuple[TensorSpec, ...]
    flat: Any
    checksum: int

    def fetch(self) -> WeightUpdate:
        """See `WeightSource`: it is here already."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Views into `flat` by parameter name; nothing is copied."""
        views = {}
        for spec in self.specs:
            views[spec.name] = self.flat[spec.offset : spec.offset + spec.size].reshape(spec.shape)
        return views


class WeightSource(Protocol):
    """Where a rollout worker gets a version from. It is sent to the worker, so it pickles."""

    def fetch(self) -> WeightUpdate:
        """Bring the weights into this process. Blocks, so it is called beside the worker's event loop.

        Raises SyncFailed where they do not come.
        """
        ...


class WeightSink(Protocol):
    """Where rank 0 of the learners puts a version, piece by piece. It lives in that process from version to version."""

    def open(self) -> Any:
        """Make ready; returns what sources must know."""
        ...

    def room(self, layout: tuple[TensorSpec, ...], version: WeightVersion) -> Any:
        """Memory of the sink's for the whole version, an array or a tensor, of which the pieces are then parts; None if
        it needs none."""
        ...

    def take(
        self, layout: tuple[TensorSpec, ...], pieces: Iterator[np.ndarray[Any, Any]], version: WeightVersion
    ) -> Any:
        """Send all pieces. Without `room`, a piece is valid until the next but one is asked for, or until `until_sent`
        returns."""
        ...

    def until_sent(self) -> None:
        """Wait until the last piece may be written over; called from within `pieces`, so it never raises."""
        ...

    def close(self) -> None:
        """Let go of what `open` made."""
        ...


class WeightTransport(Protocol):
    """Carries a version from the learner group to every engine of a pool."""

    def broadcast(self, learners: Any, pool: Any, version: WeightVersion) -> SyncReport:
        """Send the learners' weights to the pool as `version`; returns when every engine runs it.

        Raises:
            SyncFailed: not everyone got it in time; no engine has applied it, or the message names those that have not.
            WeightsRejected: an engine refused it.
        """
        ...

    def close(self) -> None:
        """Let go of files, memory and groups."""
        ...


@dataclass(frozen=True, slots=True)
class SyncReport:
    """Seconds of one broadcast: until every worker had the weights, and from there until every engine ran them."""

    version: WeightVersion
    total_s: float
    send_s: float
    apply_s: float
    weight_bytes: int


def layout_of(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[TensorSpec, ...]:
    """Parameters one after the other in a flat buffer, in the order given."""
    specs, offset = [], 0
    for name, shape in shapes:
        specs.append(TensorSpec(name, shape, offset))
        offset += prod(shape)
    return tuple(specs)


def pieces_of(layout: Sequence[TensorSpec], numbers: int) -> list[Sequence[TensorSpec]]:
    """Neighbouring parameters together, up to `numbers` numbers a piece; a larger parameter goes alone."""
    pieces: list[list[TensorSpec]] = []
    size = 0
    for spec in layout:
        if not pieces or size + spec.size > numbers:
            pieces.append([])
            size = 0
        pieces[-1].append(spec)
        size += spec.size
    return pieces  # type: ignore[return-value]
