"""Measuring one part against a named baseline, side by side in one run; one file a bench.

Compared parts must compute the same thing; each bench reports by how much their results differ.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from apr_ray.bench.timing import Result
from apr_ray.config import parse_config
from apr_ray.core.errors import AprError
from apr_ray.engines.registry import require_engine
from apr_ray.training.run_dir import find_policy

BENCHES = ("engine", "gpu", "learner", "oracle", "rollout", "solver", "step", "sync")

__all__ = ["BENCHES", "Result", "run_bench"]


def run_bench(name: str, **options: Any) -> Result:
    """Run one bench, at its full size where nothing else is asked for.

    Args:
        name: which.
        options: those of its `run` that the command names; None and () are left out. `engine` puts a real engine in
            place of the embedded one, over the policy `checkpoint`; `sizes` are of `sync.SIZES`; `trees` are recorded
            ones; `repeats` are turns of each side; `overrides` are of the config.

    Raises:
        AprError: the bench is unknown, does not take what was given, or lacks the engine or the policy.
    """
    if name not in BENCHES:
        raise AprError(f"unknown bench {name!r}", f"Choose one of {', '.join(BENCHES)}")
    bench = import_module(f"apr_ray.bench.{name}")
    known = inspect.signature(bench.run).parameters.keys()
    given = {key: value for key, value in options.items() if value}
    if unknown := sorted(given.keys() - known):
        flags = {key: "overrides" if key == "overrides" else f"--{key}" for key in options}
        takes = [flag for key, flag in flags.items() if key in known]
        raise AprError(f"bench {name} takes no {flags[unknown[0]]}", f"It takes {', '.join(takes) or 'nothing'}")
    if engine := given.get("engine"):  # before a Ray is started
        require_engine(parse_config({"engine": {"name": engine}}).engine)
    if checkpoint := given.get("checkpoint"):
        given["checkpoint"] = str(find_policy(Path(checkpoint)))
    result: Result = bench.run(**given)
    return result
