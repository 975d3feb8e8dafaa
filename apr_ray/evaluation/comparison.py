"""A policy against the one before, on the same problems.

The yardstick is the policy before at its *own best temperature*: sampling colder costs nothing, so a gain at
temperature 1 that decoding at 0.6 has as well is no gain. That temperature is chosen on the problems it is judged by,
which favours the policy before. All differences are paired by problem.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.trees_io import read_trees
from apr_ray.metrics.intervals import Interval, t_interval
from apr_ray.metrics.names import ON_TARGETS, mode_title

Evaluation = Mapping[str, Sequence[ThreadTree]]
"""Judged trees by the mode that they were decoded in."""
NAME = re.compile(r"(?:step-(?P<step>\d+)-)?(?P<mode>(?:greedy|t[0-9.]+)(?:-targets)?)\.jsonl")


def read_evaluation(folder: Path, step: int | None = None) -> dict[str, list[ThreadTree]]:
    """The trees that `apr-ray eval --out` wrote into a folder, or those of a full evaluation of a run.

    Args:
        step: of a run, where the folder holds several evaluations; the last one by default.

    Raises AprError where there is none.
    """
    places = [place for place in (folder, folder / "eval", folder / "grpo" / "eval") if place.is_dir()]
    for place in places:
        found = [match for path in sorted(place.glob("*.jsonl")) if (match := NAME.fullmatch(path.name))]
        if found:
            last = max(int(match["step"] or 0) for match in found)
            chosen = [match for match in found if int(match["step"] or 0) == (last if step is None else step)]
            trees = {match["mode"]: list(read_trees(place / match.string)) for match in chosen}
            for match in chosen:
                if not trees[match["mode"]]:
                    raise AprError(f"{place / match.string} holds no tree", "Evaluate again with --out")
            return trees
    raise AprError(f"{folder} holds no evaluation", "Give a folder that `apr-ray eval --out` wrote, or a run's")


def solved_shares(trees: Sequence[ThreadTree]) -> dict[str, float]:
    """By problem, the share of its trees that are solved."""
    return _means([(t.problem_key, float(t.solved)) for t in trees])


def _means(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return {key: sum(found) / len(found) for key, found in values.items()}


def best_mode(before: Evaluation) -> str:
    """The mode with the highest accuracy, of those on the problems of the split."""
    modes = [mode for mode in before if not mode.endswith(ON_TARGETS)]
    if not modes:
        raise AprError("the evaluation before has no mode on the split", "Give evaluation.temperatures")
    return max(modes, key=lambda mode: sum(solved_shares(before[mode]).values()) / len(solved_shares(before[mode])))


def paired(before: Mapping[str, float], after: Mapping[str, float]) -> Interval:
    """The mean of after - before over problems, the policies fixed. Raises AprError where problems differ."""
    if before.keys() != after.keys():
        raise AprError(
            f"evaluations of {len(before)} and {len(after)} problems share {len(before.keys() & after.keys())}",
            "Evaluate both with the same task, evaluation.split, evaluation.problems and evaluation.seed",
        )
    return t_interval([after[key] - before[key] for key in sorted(before)])


@dataclass(frozen=True, slots=True)
class Change:
    """One mode, before and after.

    Attributes:
        over_yardstick: accuracy less that of the policy before at its best temperature.
        over_itself: accuracy less that of the policy before in the same mode.
        children: less those before, on the problems that spawn both before and after; None where there is none.
    """

    mode: str
    over_yardstick: Interval
    over_itself: Interval
    children: Interval | None


def compare(before: Evaluation, after: Evaluation) -> tuple[str, list[Change]]:
    """The yardstick's mode, and the change of every mode that both have. On held-out targets the yardstick is the same
    mode before: they are decoded greedily alone."""
    best = best_mode(before)
    yardstick = solved_shares(before[best])
    changes = []
    for mode in sorted(before.keys() & after.keys()):
        own, now = solved_shares(before[mode]), solved_shares(after[mode])
        against = own if mode.endswith(ON_TARGETS) else yardstick
        changes.append(Change(mode, paired(against, now), paired(own, now), _children(before[mode], after[mode])))
    return best, changes


def _children(before: Sequence[ThreadTree], after: Sequence[ThreadTree]) -> Interval | None:
    first, second = (
        _means([(t.problem_key, float(t.children)) for t in trees if t.spawns]) for trees in (before, after)
    )
    both = sorted(first.keys() & second.keys())
    return t_interval([second[key] - first[key] for key in both]) if both else None


COMPARISON_HEAD = ("mode", "accuracy over the yardstick", "over the same mode before", "children, where both spawn")


def comparison_rows(changes: Sequence[Change]) -> list[tuple[str, str, str, str]]:
    """For a table under `COMPARISON_HEAD`."""
    rows = []
    for change in changes:
        children = "none"
        if (c := change.children) is not None:
            children = f"{c.mean:+.2f} [{c.low:+.2f}, {c.high:+.2f}] on {c.count}"
        rows.append((mode_title(change.mode), str(change.over_yardstick), str(change.over_itself), children))
    return rows
