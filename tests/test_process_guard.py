"""Whatever happens to the owner, what it started under a mark is gone afterwards; what it started otherwise is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from apr_ray.engines.process_guard import MARK, ProcessGuard, kill_marked, marked_processes

OWNER = """
import subprocess, sys
from apr_ray.engines.process_guard import ProcessGuard
guard = ProcessGuard()
stranger = subprocess.Popen(["sleep", "600"])
with guard.marking():
    # A child that starts a grandchild in a session of its own and then waits.
    subprocess.Popen(["sh", "-c", "setsid sleep 600 & wait"])
print(guard.mark, stranger.pid, flush=True)
sys.stdin.read()
"""


def owner() -> tuple[subprocess.Popen[str], str, int]:
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    mark, stranger = process.stdout.readline().split()
    return process, mark, int(stranger)


def wait_for(mark: str, count: int) -> None:
    end = time.monotonic() + 60
    while len(marked_processes(mark)) != count:
        assert time.monotonic() < end, f"{marked_processes(mark)} bear the mark, expected {count}"
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_marked_processes_die_with_their_owner(how: signal.Signals | None) -> None:
    process, mark, stranger = owner()
    wait_for(mark, 2)  # the shell and its sleep; the guard and the owner bear no mark
    if how is None:
        assert process.stdin is not None
        process.stdin.close()
    else:
        process.send_signal(how)
    process.wait()
    wait_for(mark, 0)
    os.kill(stranger, signal.SIGKILL)  # raises if it was killed too


def test_what_is_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = ProcessGuard()
    with guard.marking():
        child = subprocess.Popen(["sleep", "600"])
    monkeypatch.setattr("apr_ray.engines.process_guard.GIVE_UP_S", 0.0)
    assert not kill_marked(guard.mark)
    monkeypatch.undo()
    assert kill_marked(guard.mark)
    child.wait(1)
    guard.close()


def test_close_returns_once_they_are_gone() -> None:
    guard = ProcessGuard()
    with guard.marking():
        child = subprocess.Popen(["sleep", "600"])
    assert MARK not in os.environ
    assert marked_processes(guard.mark) == [child.pid]
    guard.close()
    assert child.wait(1) == -signal.SIGKILL
    guard.close()


def test_a_guard_that_was_killed_itself_leaves_nothing_either() -> None:
    guard = ProcessGuard()
    with guard.marking():
        child = subprocess.Popen(["sleep", "600"])
    guard._guard.kill()
    guard._guard.wait()
    assert marked_processes(guard.mark) == [child.pid]
    guard.close()
    assert child.wait(1) == -signal.SIGKILL
