"""The cluster file, the configs of jobs, and a whole job on a cluster of one node."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from apr_ray.config import Config, load_config, to_yaml
from apr_ray.training.run_dir import RunDir

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")


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


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray cluster of one node in processes of its own."""

    address: str
    environment: Mapping[str, str]


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it wants a token
    except OSError:
        return False
    return True


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A head that shares no port with any other Ray on this machine, and finds no compiler.

    The agent on every node that starts jobs listens on one fixed port by default. Any second Ray on a machine, a
    private one of another test too, gets none there: it runs on without, and says only "No available agent".
    """
    (tmp_path / "bin").mkdir()
    # Ray starts its workers with bash; what watches a job sleeps between its looks, and would spin without `sleep`.
    for needed in (SCRIPTS / "apr-ray", shutil.which("bash"), shutil.which("sleep")):
        assert needed is not None
        (tmp_path / "bin" / Path(needed).name).symlink_to(needed)
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDA_HOME")}
    environment |= {
        "PATH": str(tmp_path / "bin"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    session = tempfile.mkdtemp(prefix="apr-")  # sockets lie there, whose paths may not be long
    dashboard, agent, runtime_env, client = free_ports(4)
    options = {
        "port": 0,  # 0: Ray chooses one that is free
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": 0,
        "metrics-export-port": 0,
        "runtime-env-agent-port": runtime_env,  # were it 0, Ray's client server would wait 30 s for it, and no longer
        "ray-client-server-port": client,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": session,
        "num-cpus": 4,
        "object-store-memory": 100_000_000,
    }
    command = [str(SCRIPTS / "ray"), "start", "--head", "--block", *(f"--{k}={v}" for k, v in options.items())]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        while not all(answers(f"http://127.0.0.1:{port}/api/healthz") for port in (dashboard, agent)):
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            time.sleep(0.2)
        yield Head(f"http://127.0.0.1:{dashboard}", environment)
    finally:
        if process.poll() is None:
            started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            os.killpg(process.pid, signal.SIGKILL)  # on SIGTERM it lingers; the kernel ends what it started
            for left in psutil.wait_procs(started, timeout=10)[1]:
                left.kill()
            process.wait()
        shutil.rmtree(session, ignore_errors=True)


@pytest.mark.timeout(900)  # a dozen processes import torch in it, slowly where other work runs beside
def test_a_submitted_job_runs_the_whole_pipeline_without_a_compiler(
    head: Head, small_config: Config, tmp_path: Path
) -> None:
    """As jobs/README.md says it, on the cluster that it was submitted to; only the sizes are smaller."""
    (tmp_path / "small.yaml").write_text(to_yaml(small_config))
    assert not [name for name in COMPILERS if shutil.which(name, path=head.environment["PATH"])]
    job = [
        *("apr-ray", "quickstart", "-c", str(tmp_path / "small.yaml"), "-c", "jobs/on-cluster.yaml"),
        *("data.train_problems=30", "sft.tokens=4000", "grpo.steps=1", "evaluation.problems=2"),
        *("rollout.workers=1", "learner.ranks=1", f"run.root={tmp_path}", "run.name=job"),
    ]
    done = subprocess.run(
        [SCRIPTS / "ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--", *job],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=head.environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    run = RunDir.resume(tmp_path / "job")
    assert run.config.ray.address == "auto"
    assert (run.path / "report.html").is_file()
    for phase in ("sft", "grpo"):
        assert (run.path / phase / "final" / "model.safetensors").is_file()
    (step,) = [row for row in RunDir.resume(run.path / "grpo").metrics() if "train/loss" in row]
    assert step["sync/delta_logprob_mean"] < 1e-4
