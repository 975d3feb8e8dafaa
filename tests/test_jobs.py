"""The cluster file, the configs of jobs, and a whole job on a cluster of one node."""

from __future__ import annotations

import json
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
from contextlib import ExitStack, contextmanager
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
    """The first node of a Ray cluster, in processes of its own; `session` is its temporary folder."""

    address: str
    environment: Mapping[str, str]
    session: Path


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


@contextmanager
def started_head(log: Path, environment: Mapping[str, str], **more: object) -> Iterator[Head]:
    """A head that shares no port with any other Ray on this machine.

    The agent on every node that starts jobs listens on one fixed port by default. Any second Ray on a machine, a
    private one of another test too, gets none there: it runs on without, and says only "No available agent".
    """
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
    environment = {
        **environment,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options |= {name.replace("_", "-"): value for name, value in more.items()}
    command = [str(SCRIPTS / "ray"), "start", "--head", "--block", *(f"--{k}={v}" for k, v in options.items())]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        while not all(answers(f"http://127.0.0.1:{port}/api/healthz") for port in (dashboard, agent)):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield Head(f"http://127.0.0.1:{dashboard}", environment, Path(session))
    finally:
        if process.poll() is None:
            started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            os.killpg(process.pid, signal.SIGKILL)  # on SIGTERM it lingers; the kernel ends what it started
            for left in psutil.wait_procs(started, timeout=10)[1]:
                left.kill()
            process.wait()
        shutil.rmtree(session, ignore_errors=True)


def submitted(head: Head, config: Path, root: Path, *overrides: str) -> None:
    """A whole quickstart as jobs/README.md says it, on that cluster; only the sizes are smaller."""
    job = [
        *("apr-ray", "quickstart", "-c", str(config), "-c", "jobs/on-cluster.yaml"),
        *("data.train_problems=30", "sft.tokens=4000", "grpo.steps=1", "evaluation.problems=2"),
        *("rollout.workers=1", "learner.ranks=1", f"run.root={root}", "run.name=job", *overrides),
    ]
    done = subprocess.run(
        [SCRIPTS / "ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--", *job],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=head.environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "succeeded" in done.stdout
    run = RunDir.resume(root / "job")
    assert run.config.ray.address == "auto"
    assert (run.path / "report.html").is_file()
    for phase in ("sft", "grpo"):
        assert (run.path / phase / "final" / "model.safetensors").is_file()
    (step,) = [row for row in RunDir.resume(run.path / "grpo").metrics() if "train/loss" in row]
    assert step["sync/delta_logprob_mean"] < 1e-4


@pytest.mark.timeout(900)  # a dozen processes import torch in it, slowly where other work runs beside
def test_a_submitted_job_runs_the_whole_pipeline_without_a_compiler(small_config: Config, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(to_yaml(small_config))
    (tmp_path / "bin").mkdir()
    # Ray starts its workers with bash; what watches a job sleeps between its looks, and would spin without `sleep`.
    for needed in (SCRIPTS / "apr-ray", shutil.which("bash"), shutil.which("sleep")):
        assert needed is not None
        (tmp_path / "bin" / Path(needed).name).symlink_to(needed)
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDA_HOME")}
    environment["PATH"] = str(tmp_path / "bin")
    assert not [name for name in COMPILERS if shutil.which(name, path=environment["PATH"])]
    with started_head(tmp_path / "head.log", environment) as head:
        submitted(head, tmp_path / "small.yaml", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cluster_grows_for_a_job_and_shrinks_after_it(small_config: Config, tmp_path: Path) -> None:
    """With the node types of cluster.yaml, whose nodes are raylets on this machine: two are added, as a rank and a
    worker fit on none together, nor on the head; when the job has ended they go."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    (tmp_path / "small.yaml").write_text(to_yaml(small_config))
    config = cluster()
    types = config["available_node_types"]
    head_type = types.pop("head")
    [port] = free_ports(1)
    scaling = {
        "cluster_name": config["cluster_name"],
        "max_workers": config["max_workers"],
        "idle_timeout_minutes": 0.2,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{port}",
            "disable_node_updaters": True,
            "use_node_id_as_ip": True,  # they all have this machine's
        },
        "available_node_types": types | {"ray.head.default": head_type | {"node_config": {}}},
        "head_node_type": "ray.head.default",
        **{"auth": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False},
        **{f"{when}_commands": [] for when in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
    }
    (tmp_path / "scaling.json").write_text(json.dumps(scaling))
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    environment["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = FAKE_HEAD_NODE_ID
    more = {"port": port, "node-ip-address": "127.0.0.1", "autoscaling-config": tmp_path / "scaling.json"}
    with started_head(tmp_path / "head.log", environment, **more) as head:
        submitted(head, tmp_path / "small.yaml", tmp_path, "rollout.cpus_per_worker=9", "learner.cpus_per_rank=9")
        nodes: list[int] = []
        end = time.monotonic() + 120
        while (not nodes or nodes[-1] > 1) and time.monotonic() < end:
            nodes.append(alive_nodes(head))
            time.sleep(1)
        log = (head.session / "session_latest" / "logs" / "monitor.log").read_text()
    assert nodes[-1] == 1, log
    assert "\n 2 worker\n" in log, log


def alive_nodes(head: Head) -> int:
    listed = subprocess.run(
        [SCRIPTS / "ray", "list", "nodes", "--address", head.address, "--format", "json", "--filter", "state=ALIVE"],
        capture_output=True, text=True, check=True, env=head.environment,
    )  # fmt: skip
    return len(json.loads(listed.stdout))
