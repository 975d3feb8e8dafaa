"""MLflow: runs, metrics, and trees as traces with their real times."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Call, ThreadTree

PARAMS_PER_CALL = 100
"""MLflow takes at most this many parameters in one request."""
SQLITE_FULL = "database or disk is full"


class MlflowTracker:
    """A run in an MLflow experiment. AprError says that its database or server fails, OSError that the disk is full.

    Args:
        uri: tracking URI; `sqlite:////abs/path.db` needs no server.
        experiment: made where it does not exist yet, with its artifacts under `artifacts`.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path) -> None:
        import mlflow

        for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracing.export.async_export_queue"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they report every migration and every flush
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(uri)
        self.mlflow = mlflow
        self.client = mlflow.MlflowClient()
        with self._answering():
            found = self.client.get_experiment_by_name(experiment)
            self.experiment_id = (
                found.experiment_id
                if found
                else self.client.create_experiment(experiment, artifact_location=artifacts.as_uri())
            )
        self.run_id = ""

    def start(self, name: str, params: Mapping[str, Any], run_id: str | None = None) -> str:
        """Begin a run; its parameters are the flattened config. Where `run_id` is unknown here, as after a change of
        `tracking.uri`, a new one begins."""
        with self._answering():
            if run_id and self._knows(run_id):
                self.run_id = run_id
                self.client.update_run(run_id, status="RUNNING")
                return run_id
            run = self.client.create_run(self.experiment_id, run_name=name)
            self.run_id = run.info.run_id
            entities = [self.mlflow.entities.Param(k, str(v)[:500]) for k, v in params.items()]
            for start in range(0, len(entities), PARAMS_PER_CALL):
                self.client.log_batch(self.run_id, params=entities[start : start + PARAMS_PER_CALL])
        return self.run_id

    def _knows(self, run_id: str) -> bool:
        try:
            self.client.get_run(run_id)
        except self.mlflow.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One request for a whole step."""
        now = int(time.time() * 1000)
        entities = [self.mlflow.entities.Metric(k, v, now, step) for k, v in metrics.items()]
        with self._answering():
            self.client.log_batch(self.run_id, metrics=entities)

    def log_trees(self, trees: Sequence[ThreadTree], step: int) -> None:
        """Each tree as a trace: a span for the tree, one per thread, one per call."""
        with self._answering():
            self.mlflow.set_experiment(experiment_id=self.experiment_id)
            for tree in trees:
                if tree.calls:
                    self._log_tree(tree, step)
            self.mlflow.flush_trace_async_logging()

    def _log_tree(self, tree: ThreadTree, step: int) -> None:
        start_span = self.mlflow.start_span_no_context
        by_path: dict[tuple[int, ...], list[Call]] = {}
        for call in tree.calls:
            by_path.setdefault(call.path, []).append(call)
        root = start_span(
            f"tree {tree.problem_key}",
            inputs={"problem": tree.problem_key, "sample": str(tree.sample)},
            attributes={"run_id": self.run_id, "step": str(step), "outcome": tree.outcome.value},
            metadata={"mlflow.sourceRun": self.run_id},
            start_time_ns=_ns(min(c.start_s for c in tree.calls)),
        )
        for path, calls in sorted(by_path.items()):
            name = "parent" if not path else "child " + ".".join(map(str, path))
            thread = start_span(name, parent_span=root, start_time_ns=_ns(min(c.start_s for c in calls)))
            for call in calls:
                span = start_span(
                    f"call {call.segment}",
                    parent_span=thread,
                    attributes={
                        "prompt_tokens": str(len(call.prompt_ids)),
                        "sampled_tokens": str(call.sampled_tokens),
                        "cached_tokens": str(call.cached_tokens),
                        "finish": call.finish.value,
                        "weight_version": str(call.versions[-1].version) if call.versions else "",
                        "kv_version": str(call.kv_version),
                    },
                    start_time_ns=_ns(call.start_s),
                )
                span.end(end_time_ns=_ns(call.end_s))
            thread.end(end_time_ns=_ns(max(c.end_s for c in calls)))
        root.end(
            outputs={"text": tree.final_text, "verdict": tree.verdict},
            end_time_ns=_ns(max(c.end_s for c in tree.calls)),
        )

    def finish(self, status: str = "FINISHED") -> None:
        """End the run."""
        with self._answering():
            self.client.set_terminated(self.run_id, status)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except self.mlflow.MlflowException as error:
            if SQLITE_FULL in str(error):  # by default the database lies on the run's disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise AprError(
                f"MLflow failed: {str(error).splitlines()[0]}",
                "The run's folder has all metrics; go on with --resume RUN, without MLflow if tracking.tracker=none",
            ) from error


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
