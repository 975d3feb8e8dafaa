"""Processes that an engine or a driver starts die with the process that started them, however that one dies.

A kill -9 leaves no chance to clean up, and `PR_SET_PDEATHSIG` is set by SGLang's processes only after their imports
(many seconds), follows the parent's thread instead of its process, and does not reach grandchildren; some of Ray's
processes outlive a killed driver by more than a minute. So everything that is started inherits a mark in its
environment, and a guard process waits for the end of the one that owns the mark:

    owner ── pipe ──▶ guard      the pipe closes when the owner ends, by `close` or by any signal
      └─ marked ─▶ scheduler ─▶ …    then the guard kills whatever bears the mark

A marked process may be an owner itself; what it starts bears both marks.

Run as a script (standard library only), this file is the guard. It needs Linux's /proc.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

log = logging.getLogger(__name__)
MARK = "APR_RAY_MARKS"
POLL_S = 1.0
"""How often the guard looks whether its parent changed: for owners that were forked while they held the pipe."""
QUIET_ROUNDS = 3
"""Scans in a row that must find nothing: a process may be between its start and its first instruction."""
ROUND_S = 0.1
GIVE_UP_S = 30.0


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process's environment for the processes started inside; then put the old ones back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class ProcessGuard:
    """Starts the guard of a new mark. Start marked processes inside `marking`; `close` kills them."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, self.mark, str(os.getpid())],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is the owner's to handle
        )

    def marking(self) -> contextlib.AbstractContextManager[None]:
        """Processes started inside bear the mark, beside those that this process bears.

        `SPT_NOENV` keeps `setproctitle` from writing a process's title over its environment, and so over the mark.
        """
        marks = " ".join([*os.environ.get(MARK, "").split(), self.mark])
        return environment({MARK: marks, "SPT_NOENV": "1"})

    def close(self, timeout_s: float = GIVE_UP_S + 10) -> None:
        """Kill what bears the mark and wait until it is gone; what cannot be killed is logged. Idempotent."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        if self._guard.wait(timeout_s) and not kill_marked(self.mark):  # itself killed, it has killed nobody
            log.error("processes %s cannot be killed: a driver may hold them", marked_processes(self.mark))


def marked_processes(mark: str) -> list[int]:
    """Ids of the running processes that bear a mark."""
    prefix = f"{MARK}=".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            environ = (folder / "environ").read_bytes()
        except OSError:  # it ended, or belongs to someone else
            continue
        marks = next((v.removeprefix(prefix) for v in environ.split(b"\0") if v.startswith(prefix)), b"")
        if mark.encode() in marks.split():
            found.append(int(folder.name))
    return found


def kill_marked(mark: str) -> bool:
    """SIGKILL everything that bears a mark, until nothing does; whether that was so within `GIVE_UP_S`."""
    quiet, end = 0, time.monotonic() + GIVE_UP_S
    while quiet < QUIET_ROUNDS and time.monotonic() < end:
        found = marked_processes(mark)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        quiet = 0 if found else quiet + 1
        time.sleep(ROUND_S)
    return quiet >= QUIET_ROUNDS


def _guard(mark: str, owner: int) -> bool:
    while os.getppid() == owner:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    return kill_marked(mark)


if __name__ == "__main__":
    sys.exit(not _guard(sys.argv[1], int(sys.argv[2])))
