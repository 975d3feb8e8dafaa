"""The surroundings of both loops: a Ray session, and a tracker that is always ended."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

from apr_ray.config import Config
from apr_ray.core.errors import AprError, ConfigError
from apr_ray.core.tracker import Tracker
from apr_ray.engines.process_guard import ProcessGuard, environment, kill_marked
from apr_ray.engines.registry import require_engine
from apr_ray.model.llama import require_vocabulary
from apr_ray.placement import Need, require_room
from apr_ray.tasks.registry import load_task
from apr_ray.tracking.trackers import build_tracker
from apr_ray.training.run_dir import LoopState, RunDir, flat_params

log = logging.getLogger(__name__)
CONNECT_S = 5.0
LONGEST_TMPDIR = 40
"""Bytes. A socket's path has 107, of which Ray's session folder takes up to 65."""
STARTS = 3
"""Attempts to start a private Ray, which gives its parts 30 s each: on a machine that is busy they may take longer."""
START_S = 120.0


def require_startable(config: Config, policy: str | Path | None = None) -> None:
    """Raise AprError for what would stop a run only later, before it has a folder or a Ray.

    A cluster's nodes may have an engine that this machine lacks; there, workers look for it themselves.
    """
    if sys.platform != "linux":
        raise AprError(
            f"apr-ray trains on Linux, this is {sys.platform}", "Use a Linux machine or container; solve works anywhere"
        )
    task = load_task(config.task)
    tracking = config.tracking
    if tracking.tracker == "mlflow" and tracking.uri is None and "?" in str(Path(config.run.root).resolve()):
        raise ConfigError(
            f"run.root {config.run.root!r} holds a '?', which ends the path in the URI of MLflow's SQLite file",
            "Choose another run.root, or set tracking.uri",
        )
    if policy is not None:
        require_vocabulary(policy, task.load_tokenizer(str(policy)))
    if config.ray.address is None:
        require_engine(config.engine)
        if config.learner.gpus_per_rank or config.engine.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise ConfigError(
                    f"learner.gpus_per_rank or engine.device ask for a GPU, torch {torch.__version__} finds none",
                    "Install a CUDA build of torch on a machine with a GPU, or leave the preset gpu out",
                )
        port = config.ray.dashboard_port
        if port and not ray.is_initialized() and _is_busy(port):
            raise ConfigError(f"ray.dashboard_port {port} is in use", "Choose a free port, or 0 for no dashboard")
    else:
        _require_answer(config.ray.address)


@contextmanager
def ray_session(config: Config, needs: Sequence[Need] = ()) -> Iterator[None]:
    """Connect to Ray, or start a private one. All that runs there ends with the block, or with this process.

    Inside another session that one is used. Raises ConfigError where there can never be room for `needs`.
    """
    if ray.is_initialized():
        require_room(needs, config)
        yield
        return
    require_startable(config)
    start = _private_ray if config.ray.address is None else _cluster
    with start(config):
        try:
            require_room(needs, config)
            yield
        finally:
            ray.shutdown()


@contextmanager
def _cluster(config: Config) -> Iterator[None]:
    try:
        ray.init(address=config.ray.address, log_to_driver=False)
    except ConnectionError as error:
        raise AprError(
            f"no Ray cluster at {config.ray.address!r}: {error}", "Start one, or leave ray.address out"
        ) from error
    yield


@contextmanager
def _private_ray(config: Config) -> Iterator[None]:
    folder = tempfile.gettempdir()
    if len(folder.encode()) > LONGEST_TMPDIR:
        raise AprError(
            f"TMPDIR {folder} has {len(folder.encode())} bytes, Ray's sockets there leave {LONGEST_TMPDIR}",
            "Set a shorter one: TMPDIR=/tmp",
        )
    needed = (
        config.rollout.workers * config.rollout.cpus_per_worker
        + config.learner.ranks * config.learner.cpus_per_rank
        + (config.data.workers or 0) * 0.5
    )
    guard = ProcessGuard()
    try:
        with guard.marking(), environment({"RAY_gcs_server_port_wait_time_s": f"{START_S:.0f}"}):
            # Learners and rollout workers take turns, so a machine may promise more CPUs than it has.
            cpus = max(os.cpu_count() or 1, int(needed + 0.999))
            for attempt in range(1, STARTS + 1):
                try:
                    _start_ray(config, cpus)
                    break
                except Exception as error:
                    ray.shutdown()
                    kill_marked(guard.mark)
                    if "timed out" not in str(error).lower():
                        raise
                    if attempt == STARTS:
                        load = os.getloadavg()[0]
                        raise AprError(
                            f"Ray did not start in {STARTS} attempts: {' '.join(str(error).split())[:120]}",
                            f"The machine may be busy (load {load:.0f} on {os.cpu_count()} cores): try again later",
                        ) from error
                    log.warning("Ray did not start in time: the machine is busy; trying again")
        yield
    finally:
        guard.close()


def _start_ray(config: Config, cpus: int) -> None:
    ray.init(
        "local",  # also where RAY_ADDRESS is set, or `ray start` was run on this machine
        num_cpus=cpus,
        include_dashboard=bool(config.ray.dashboard_port),
        dashboard_port=config.ray.dashboard_port or None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _require_answer(address: str) -> None:
    """Raise ConfigError where nothing listens at `host:port`: Ray itself would try for many minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto", which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()  # [::1]:6379
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster at ray.address {address}: {error}", "Start one, or leave ray.address out"
        ) from error


def _is_busy(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


@contextmanager
def tracked(config: Config, run: RunDir, state: LoopState) -> Iterator[Tracker]:
    """A tracker whose run ends as the block ends: FINISHED, KILLED (Ctrl-C) or FAILED."""
    tracker = build_tracker(config)
    state.tracker_run_id = tracker.start(run.name, flat_params(config), state.tracker_run_id or None)
    try:
        yield tracker
    except BaseException as error:
        with suppress(AprError, OSError):  # what ended the run is what there is to say
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.finish()
