"""The `apr-ray` command. It wires parts together and holds no logic; heavy imports wait until a command needs them."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback

from apr_ray.cli import build, look  # in the order of the help
from apr_ray.cli.common import app
from apr_ray.core.errors import AprError

FORESEEN = {
    errno.EACCES: "Choose a path where you may write and read, or change its permissions",
    errno.EPERM: "Choose a path where you may write and read, or change its permissions",
    errno.EROFS: "Choose a path on another disk",
    errno.EISDIR: "Give the name of a file",
    errno.ENOTDIR: "A part of the path is a file: give another path",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 65536",
    errno.ENFILE: "The machine has too many files open: end something",
}
"""Errors of the system that need no traceback, and what to do about them."""
__all__ = ["app", "build", "explain", "look", "main"]


def explain(error: BaseException) -> str | None:
    """An error in one line with its remedy, or None for one that needs its traceback."""
    cause = getattr(error, "cause", None)  # Ray wraps what an actor raised
    if isinstance(cause, BaseException):
        inner = explain(cause)
        if inner is not None:
            return inner
    if isinstance(error, AprError):
        return str(error)
    if _says_disk_full(error):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"the disk is full{where}. Free space and go on with --resume: the last complete checkpoint is untouched"
    if isinstance(error, OSError) and error.filename is not None and error.errno in FORESEEN:
        return f"{error.filename}: {error.strerror}. {FORESEEN[error.errno]}"
    return None


def _says_disk_full(error: BaseException) -> bool:
    """Python, Arrow and DeepSpeed raise OSError; safetensors and SQLite errors of their own, and Ray may know only the
    text of what an actor raised."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(text in str(error) for text in (os.strerror(errno.ENOSPC), "database or disk is full"))


def main() -> None:
    """Entry point: errors in one line with the remedy, `--debug` for the traceback, Ctrl-C ends everything."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning of Ray's about GPUs
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone ends no command
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(args=arguments)  # usage errors and Ctrl-C end here, with an exit status
    except Exception as error:
        line = explain(error)
        if "--debug" in sys.argv or line is None:
            traceback.print_exc()
        print(f"error: {line or 'unexpected, see above; please report it'}", file=sys.stderr)
        sys.exit(1)
