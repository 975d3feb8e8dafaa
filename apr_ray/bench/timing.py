"""Taking times so that a machine's drift hits both sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from apr_ray.tracking.progress import ProgressBars

Result = dict[str, float | str]
"""What a bench returns: `ratio` (ours over the baseline's speed: more is better) and its parts, with units in names."""

REPEATS = 5


def turns(title: str, count: int) -> Iterator[int]:
    """0, 1, … with a progress bar."""
    with ProgressBars().bar(title, count) as bar:
        for turn in range(count):
            bar.update(turn)
            yield turn
        bar.update(count)


def in_turn(works: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each work; see `all_in_turn`."""
    return {name: statistics.median(taken) for name, taken in all_in_turn(works, repeats).items()}


def all_in_turn(works: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Seconds of each work, after one warm-up, taken in turn (A B C A B C …)."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in turns(", ".join(works), repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in a process of its own: for what cannot be undone, such as a process group."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
