"""Shared by all actors: how they start, where each logs, and the error that names a dead one."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from apr_ray.core.errors import PartDied

DEAD = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectLostError)
"""What Ray raises for an answer that will not come: the actor died, Ray killed it as its machine ran out of memory, or
the machine that held its answer died."""
REASON_WIDTH = 200


@contextmanager
def lasting_imports() -> Iterator[None]:
    """In an actor, around the imports of its start: nothing that they make is garbage, so nothing looks for any, then
    or later. It takes a sixth off the imports of torch, transformers and DeepSpeed.

    What is imported inside, torch first of all, uses one OpenMP thread: actors share their machine's cores. This is
    said here because for a `runtime_env` Ray starts every actor a process of its own, at half a second each, and those
    that it keeps ready go unused.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def own_log() -> str:
    """In an actor: the file with what this process writes to stderr, as `machine:path`."""
    context = ray.get_runtime_context()
    folder = f"{context.get_temp_dir()}/{context.get_session_name()}/logs"
    return f"{ray.util.get_node_ip_address()}:{folder}/worker-{context.get_worker_id()}-*.err"  # type: ignore[no-untyped-call]


def reason(error: Exception) -> str:
    """Why an actor died, as Ray tells it: the first sentences of its last line."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        used = re.search(r"\d\S* used / \d[^\s.]*(\.\d+\w+)?", str(error))
        return f"its machine ran out of memory ({used[0]})" if used else "its machine ran out of memory"
    sentences = re.split(r"(?<=\.) ", str(error).strip().splitlines()[-1])
    text = sentences.pop(0)
    while sentences and len(text) + len(sentences[0]) < REASON_WIDTH:
        text = f"{text} {sentences.pop(0)}"
    return text.rstrip(".")


def died(part: str, error: Exception, log: str) -> PartDied:
    """The error that ends a run whose `part` died; `log` is its `own_log`, "" where it never told."""
    where = f"Its log is {log}; g" if log else "G"
    return PartDied(f"{part} died: {reason(error)}", f"{where}o on with --resume RUN")
