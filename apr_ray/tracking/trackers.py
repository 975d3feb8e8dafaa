"""The trackers, and which one a config names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apr_ray.config import Config
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.tracker import Tracker


class NoTracker:
    """Keeps nothing; the run directory still has `metrics.jsonl`."""

    def start(self, name: str, params: Mapping[str, Any], run_id: str | None = None) -> str:
        return run_id or ""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_trees(self, trees: Sequence[ThreadTree], step: int) -> None:
        pass

    def finish(self, status: str = "FINISHED") -> None:
        pass


class ConsoleTracker(NoTracker):
    """Prints each step's metrics as a line."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.console.print(f"step {step}  {text}", highlight=False, markup=False, soft_wrap=True)


def build_tracker(config: Config) -> Tracker:
    """The configured tracker; MLflow is imported only when asked for."""
    if config.tracking.tracker == "none":
        return NoTracker()
    if config.tracking.tracker == "console":
        return ConsoleTracker()
    from apr_ray.tracking.mlflow_tracker import MlflowTracker

    root = Path(config.run.root).resolve()
    uri = config.tracking.uri or f"sqlite:///{root / 'mlflow.db'}"
    return MlflowTracker(uri, config.tracking.experiment, root / "mlflow-artifacts")
