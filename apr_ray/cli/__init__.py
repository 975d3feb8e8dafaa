"""The `apr-ray` command. It wires parts together and holds no logic; heavy imports wait until a command needs them."""

from __future__ import annotations

import errno
import os
import sys
import traceback

from apr_ray.cli import build, look  # in the order of the help
from apr_ray.cli.common import app
from apr_ray.core.errors import AprError

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
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return f"no permission for {error.filename}. Choose another run.root"
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
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(args=arguments)  # usage errors and Ctrl-C end here, with an exit status
    except Exception as error:
        line = explain(error)
        if "--debug" in sys.argv or line is None:
            traceback.print_exc()
        print(f"error: {line or 'unexpected, see above; please report it'}", file=sys.stderr)
        sys.exit(1)
