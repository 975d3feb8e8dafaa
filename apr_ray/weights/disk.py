"""Through files: rank 0 writes safetensors, every worker reads them. For parts that share nothing but a file system."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from apr_ray.config import WeightsConfig
from apr_ray.core.errors import SyncFailed
from apr_ray.core.weights import TensorSpec, WeightUpdate, WeightVersion, layout_of
from apr_ray.learner.group import LearnerGroup
from apr_ray.model.state import RunningChecksum
from apr_ray.rollout.pool import Membership
from apr_ray.weights.transport import Sending, Transport


class DiskTransport(Transport):
    """A file per version in a folder of this run's own under `weights.folder`, complete as soon as it has its name; the
    two newest are kept.

    Rank 0 holds a whole copy of the weights while it writes.
    """

    def __init__(self, config: WeightsConfig) -> None:
        super().__init__(config)
        self.folder = Path(config.folder or "").absolute() / f"sync-{uuid.uuid4().hex}"

    def send(self, learners: LearnerGroup, members: Membership, version: WeightVersion) -> Sending:
        """See `Transport.send`."""
        if self.opened is not learners:
            self.open_sink(learners, FileSink(str(self.folder)))
        sent = self.send_into_sink(learners, version)
        return self.passed_on(members, sent["learner-0"], sent, version)

    def discard(self) -> None:
        """See `Transport.discard`: the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class FileSink:
    """Writes each version as a safetensors file. See `core.weights.WeightSink`."""

    folder: str
    kept: list[Path] = field(default_factory=list)
    flat: np.ndarray[Any, Any] | None = None
    """Pieces that are gathered and not yet written."""

    def open(self) -> None:
        """Make the folder."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)

    def room(self, layout: tuple[TensorSpec, ...], version: WeightVersion) -> np.ndarray[Any, Any]:
        """For a whole copy of the weights, until it is written."""
        self.flat = np.empty(sum(spec.size for spec in layout), dtype=np.float32)
        return self.flat

    def take(
        self, layout: tuple[TensorSpec, ...], pieces: Iterator[np.ndarray[Any, Any]], version: WeightVersion
    ) -> FileSource:
        """Write the file under another name, then give it its own."""
        running, total = RunningChecksum(), 0
        for piece in pieces:
            total = running.add(piece)
        flat, self.flat = self.flat, None
        assert flat is not None
        update = WeightUpdate(version, layout, flat, total)
        path = Path(self.folder) / f"weights-{version}.safetensors"
        order = "\n".join(spec.name for spec in layout)
        about = {"version": str(version), "xxh3": str(update.checksum), "order": order}
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as part:
            try:
                save_file(update.state_dict(), part.name, metadata=about)
                os.replace(part.name, path)
            except BaseException:
                os.unlink(part.name)
                raise
        if path not in self.kept:  # else it was sent again
            self.kept.append(path)
        for old in self.kept[:-2]:
            old.unlink(missing_ok=True)
        del self.kept[:-2]
        return FileSource(str(path))

    def until_sent(self) -> None:
        """At once: pieces are parts of `room`."""

    def close(self) -> None:
        """Remove the files."""
        for path in self.kept:
            path.unlink(missing_ok=True)
        self.kept.clear()


@dataclass(frozen=True)
class FileSource:
    """Reads one version from its file. See `core.weights.WeightSource`."""

    path: str

    def fetch(self) -> WeightUpdate:
        """The file as one flat buffer, in the order it was sent in."""
        try:
            with safe_open(self.path, framework="numpy") as file:
                about = file.metadata()
                names = about["order"].split("\n")
                layout = layout_of((name, tuple(file.get_slice(name).get_shape())) for name in names)
                flat = np.empty(sum(spec.size for spec in layout), dtype=np.float32)
                for spec in layout:
                    flat[spec.offset : spec.offset + spec.size] = file.get_tensor(spec.name).reshape(-1)
        except OSError as error:
            raise SyncFailed(
                f"cannot read weights {self.path}: {error}", "Do all nodes share weights.folder?"
            ) from error
        return WeightUpdate(WeightVersion.parse(about["version"]), layout, flat, int(about["xxh3"]))
