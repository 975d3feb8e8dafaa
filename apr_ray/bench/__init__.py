"""Measuring one part against a named baseline, side by side in one run; one file a bench.

Compared parts must compute the same thing; each bench reports by how much their results differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from apr_ray.bench.timing import Result
from apr_ray.core.errors import AprError

BENCHES = ("engine", "gpu", "learner", "oracle", "rollout", "solver", "step", "sync")

__all__ = ["BENCHES", "Result", "run_bench"]


def run_bench(name: str, engine: str | None = None, checkpoint: str | None = None, sizes: Sequence[str] = ()) -> Result:
    """Run one bench at its full size.

    Args:
        name: which.
        engine: for `sync` and `rollout`, a real engine in place of the embedded one.
        checkpoint: for `rollout` with an engine, a trained policy.
        sizes: for `sync`, how much to send: of `sync.SIZES`.

    Raises:
        AprError: the bench is unknown, or does not take what was given.
    """
    if name not in BENCHES:
        raise AprError(f"unknown bench {name!r}", f"Choose one of {', '.join(BENCHES)}")
    bench = import_module(f"apr_ray.bench.{name}")
    options: dict[str, Any] = {"engine": engine, "checkpoint": checkpoint, "sizes": tuple(sizes)}
    given = {key: value for key, value in options.items() if value}
    if unknown := sorted(given.keys() - inspect.signature(bench.run).parameters.keys()):
        raise AprError(f"bench {name} has no --{unknown[0]}", "--engine is for rollout and sync, --sizes for sync")
    result: Result = bench.run(**given)
    return result
