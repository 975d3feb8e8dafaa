"""Ctrl-C in every phase of the quickstart: it ends soon, in one line, and leaves no process; `--resume` goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ENDS_S = 60.0
"""How long a phase may take to end; a rank may be in the middle of a step."""


def said(text: str) -> Callable[[Path, str], bool]:
    return lambda run, log: text in log


PHASES: dict[str, Callable[[Path, str], bool]] = {
    "demonstrations": lambda run, log: any(run.glob(".data.partial-*")),
    "supervised training": said("supervised:"),
    "evaluation": said("evaluate step 0, greedy"),
    "GRPO": said("GRPO:"),
}


def begin(root: Path, *arguments: str) -> tuple[subprocess.Popen[str], Path]:
    log = root / "log"
    process = subprocess.Popen(
        [sys.executable, "-m", "apr_ray.cli", "quickstart", *arguments],
        stderr=log.open("a"),
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    return process, log


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_ends_every_phase_and_the_run_goes_on(tmp_path: Path) -> None:
    """One run, interrupted in each phase and resumed into the next."""
    run = tmp_path / "q"
    arguments = ["--fast", f"run.root={tmp_path}", "run.name=q", "tracking.tracker=none"]
    for phase, reached in PHASES.items():
        process, log = begin(tmp_path, *(["--resume", str(run)] if run.exists() else arguments))
        before = log.read_text()
        while not reached(run, log.read_text().removeprefix(before)):
            assert process.poll() is None, f"{phase}: {log.read_text()}"
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(ENDS_S) != 0
        assert "Traceback" not in log.read_text(), phase
        _, alive = psutil.wait_procs(started, timeout=ENDS_S)
        assert not alive, f"{phase}: {alive}"

    process, log = begin(tmp_path, "--resume", str(run))
    assert process.wait(400) == 0, log.read_text()
    assert (run / "report.html").exists()
