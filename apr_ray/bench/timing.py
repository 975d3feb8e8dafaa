"""Taking times so that a machine's drift hits both sides alike, and which process used the processors meanwhile."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import psutil

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


def all_in_turn(
    works: Mapping[str, Callable[[], object]], repeats: int = REPEATS, warm_ups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each work, after the warm-ups, taken in turn (A B C A B C …)."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in turns(", ".join(works), repeats + warm_ups):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn >= warm_ups:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of turns that were neighbours: a machine may be a third slower half a minute later."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


MACHINE = "machine"


def cpu_seconds(names: Mapping[int, str]) -> dict[str, float]:
    """CPU seconds that this process and all below it have used so far, by part; of the whole machine as `MACHINE`.

    Args:
        names: of processes, by id. One without a name counts with the one that started it, but SGLang's own are apart:
            `NAME_scheduler`, `NAME_detokenizer`.
    """
    this = psutil.Process()
    used: dict[str, float] = defaultdict(float)
    part_of: dict[int, str] = {}
    for process in [this, *this.children(recursive=True)]:  # who started it comes before it
        with contextlib.suppress(psutil.NoSuchProcess):
            part = names.get(process.pid) or part_of.get(process.ppid(), "")
            _, sglang, title = process.name().partition("sglang::")
            if sglang:
                part = f"{part}_{title.partition('_')[0]}"
            part_of[process.pid] = part
            times = process.cpu_times()
            used[part] += times.user + times.system
    machine = psutil.cpu_times()
    used[MACHINE] = machine.user + machine.nice + machine.system + machine.irq + machine.softirq
    return used


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in a process of its own: for what cannot be undone, such as a process group."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
