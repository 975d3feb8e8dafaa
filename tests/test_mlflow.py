"""MLflow on SQLite where it is not as it was: another database, none at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from apr_ray.cli import explain
from apr_ray.config import Config
from apr_ray.core.errors import AprError, PartDied
from apr_ray.tracking.mlflow_tracker import MlflowTracker
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.session import tracked


def test_a_run_that_the_database_does_not_know_begins_anew_there(tmp_path: Path) -> None:
    """As after `--resume RUN tracking.uri=NEW`, or where the run was moved."""
    old = MlflowTracker(f"sqlite:///{tmp_path / 'old.db'}", "e", tmp_path / "artifacts")
    first = old.start("r", {"a": 1})
    assert old.start("r", {"a": 1}, first) == first
    new = MlflowTracker(f"sqlite:///{tmp_path / 'new.db'}", "e", tmp_path / "artifacts")
    second = new.start("r", {"a": 1}, first)
    assert second != first
    new.log({"train/loss": 0.5}, 3)
    new.finish()
    found = new.client.get_run(second)
    assert (found.data.metrics, found.data.params, found.info.status) == ({"train/loss": 0.5}, {"a": "1"}, "FINISHED")


def test_a_database_that_fails_is_named_by_traces_too_and_does_not_hide_what_ended_the_run(
    tmp_path: Path, small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker(f"sqlite:///{tmp_path / 'old.db'}", "e", tmp_path / "artifacts")
    tracker.start("r", {})

    said = ["database or disk is full"]

    def fails(*_: object, **__: object) -> None:
        raise tracker.mlflow.MlflowException(said[-1])

    monkeypatch.setattr(tracker.mlflow, "set_experiment", fails)
    monkeypatch.setattr(tracker.client, "set_terminated", fails)
    with pytest.raises(OSError, match="No space") as caught:
        tracker.log_trees([], 1)
    assert str(explain(caught.value)).startswith("the disk is full")
    monkeypatch.setattr("apr_ray.training.session.build_tracker", lambda _: tracker)
    run = RunDir(tmp_path, small_config)
    for what in ("database or disk is full", "it is locked"):
        said.append(what)
        with pytest.raises(PartDied, match="rank 1"), tracked(small_config, run, LoopState()):
            raise PartDied("rank 1 died")
    with pytest.raises(AprError, match="MLflow failed"):
        tracker.log_trees([], 1)
    with pytest.raises(AprError, match="MLflow failed"), tracked(small_config, run, LoopState()):
        pass


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(AprError, match=r"MLflow failed: .*127\.0\.0\.1.*without MLflow if tracking\.tracker=none"):
        MlflowTracker("http://127.0.0.1:1", "e", tmp_path / "artifacts")
