"""The cluster file and `ray job submit`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from apr_ray.config import load_config

ROOT = Path(__file__).parents[1]


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """Filled in and validated by Ray's own launcher, without a cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled: dict[str, Any] = prepare_config(config)
    validate_config(filled)
    return filled


def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def test_the_cluster_file_is_valid_and_scales_from_nothing() -> None:
    config = checked(cluster())
    worker = config["available_node_types"]["worker"]
    assert worker["min_workers"] == 0
    assert worker["max_workers"] == config["max_workers"] > 0
    assert config["head_node_type"] in config["available_node_types"]


def test_the_check_of_the_cluster_file_can_fail() -> None:
    with pytest.raises(Exception, match="head_node_type"):
        checked({**cluster(), "head_node_type": "nowhere"})


def test_the_job_configs_fit_over_every_preset() -> None:
    for preset in sorted((ROOT / "apr_ray" / "presets").glob("*.yaml")):
        config = load_config([preset, ROOT / "jobs" / "on-cluster.yaml"])
        assert config.ray.address == "auto"


SUBMIT = """
import sys, time, ray
from ray.job_submission import JobStatus, JobSubmissionClient
ray.init(num_cpus=4, include_dashboard=True, dashboard_port=int(sys.argv[2]), log_to_driver=False)
client = JobSubmissionClient(f"http://127.0.0.1:{sys.argv[2]}")
command = f"{sys.executable} -m apr_ray.cli data -c quickstart --out {sys.argv[1]}/demos"
end = time.monotonic() + 150
while True:
    try:
        job = client.submit_job(entrypoint=f"{command} data.train_problems=40 ray.address=auto run.root={sys.argv[1]}")
        break
    except RuntimeError as error:  # the agent that starts jobs comes up after ray.init returns
        if "No available agent" not in str(error) or time.monotonic() > end:
            raise
        time.sleep(1)
while not client.get_job_status(job).is_terminal() and time.monotonic() < end:
    time.sleep(0.5)
print(client.get_job_logs(job))
assert client.get_job_status(job) is JobStatus.SUCCEEDED, client.get_job_status(job)
"""


def test_a_submitted_job_runs_on_the_cluster_it_was_given(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT, str(tmp_path), str(port)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demonstrations" in done.stdout
    assert list((tmp_path / "demos").glob("*.parquet"))
