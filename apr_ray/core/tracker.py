"""Where metrics and trees of a run are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from apr_ray.core.ledger import ThreadTree


class Tracker(Protocol):
    """A sink for what a run produces. Calls come from one thread, steps do not decrease."""

    def start(self, name: str, params: Mapping[str, Any], run_id: str | None = None) -> str:
        """Begin a run, or go on with `run_id`; returns its id."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics by their names in `apr_ray.metrics.names`."""
        ...

    def log_trees(self, trees: Sequence[ThreadTree], step: int) -> None:
        """Record trees as traces with their real times."""
        ...

    def finish(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        ...
