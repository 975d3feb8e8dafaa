"""MLflow on SQLite where it is not as it was: another database, none at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from apr_ray.core.errors import AprError
from apr_ray.tracking.mlflow_tracker import MlflowTracker


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


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(AprError, match=r"MLflow failed: .*127\.0\.0\.1.*without MLflow if tracking\.tracker=none"):
        MlflowTracker("http://127.0.0.1:1", "e", tmp_path / "artifacts")
