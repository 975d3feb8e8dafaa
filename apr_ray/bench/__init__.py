"""Measuring one part against a named baseline, side by side in one run; one file a bench.

Compared parts must compute the same thing; each bench reports by how much their results differ.
"""

from __future__ import annotations

from importlib import import_module

from apr_ray.bench.timing import Result
from apr_ray.core.errors import AprError

BENCHES = ("engine", "learner", "oracle", "rollout", "solver", "step", "sync")

__all__ = ["BENCHES", "Result", "run_bench"]


def run_bench(name: str) -> Result:
    """Run one bench at its full size. Raises AprError for an unknown name."""
    if name not in BENCHES:
        raise AprError(f"unknown bench {name!r}", f"Choose one of {', '.join(BENCHES)}")
    result: Result = import_module(f"apr_ray.bench.{name}").run()
    return result
