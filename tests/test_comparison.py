"""A policy against the one before: the yardstick, pairs of problems, and what an evaluation on disk is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from apr_ray.core.engine import FinishReason, VersionSpan
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import SOLVED, Call, Join, JoinOutcome, Outcome, Spawn, ThreadTree
from apr_ray.core.trees_io import write_trees
from apr_ray.core.weights import FIRST_VERSION
from apr_ray.evaluation.claims import claims_by_confidence, confidence
from apr_ray.evaluation.comparison import best_mode, compare, comparison_rows, read_evaluation
from apr_ray.metrics.intervals import t_interval
from apr_ray.metrics.trees import tree_metrics


def trees(solved: str, children: str = "") -> list[ThreadTree]:
    """One tree a character: `1` is solved; `children` gives each its number of children."""
    return [
        ThreadTree(
            f"p{i}", 0, (), spawned(int(n)), (), "", Outcome.ANSWERED, verdict=SOLVED if c == "1" else "wrong_value"
        )
        for i, (c, n) in enumerate(zip(solved, children or "0" * len(solved), strict=True))
    ]


def spawned(children: int) -> tuple[Spawn, ...]:
    return (Spawn((), 0, tuple((i,) for i in range(children)), ("",) * children),) if children else ()


def test_the_yardstick_is_the_best_temperature_before() -> None:
    """A gain at temperature 1 that decoding at 0.3 has for nothing is none."""
    before = {"greedy": trees("1100"), "t0.3": trees("1110"), "t1.0": trees("1000"), "greedy-targets": trees("1111")}
    after = {"greedy": trees("1111"), "t1.0": trees("1110"), "greedy-targets": trees("0111")}
    best, changes = compare(before, after)
    assert best == best_mode(before) == "t0.3"
    greedy, targets, sampled = changes
    assert (greedy.mode, greedy.over_yardstick.mean, greedy.over_itself.mean) == ("greedy", 0.25, 0.5)
    assert (sampled.mode, sampled.over_yardstick.mean, sampled.over_itself.mean) == ("t1.0", 0.0, 0.5)
    assert (targets.mode, targets.over_yardstick.mean) == ("greedy-targets", -0.25), "other problems: the same mode"


def test_children_are_compared_where_both_spawn() -> None:
    before = {"greedy": trees("1111", "2003")}
    after = {"greedy": trees("1111", "5407")}
    (change,) = compare(before, after)[1]
    assert change.children is not None
    assert (change.children.mean, change.children.count) == (3.5, 2)
    assert comparison_rows([change])[0][3].startswith("+3.50 [")
    (none,) = compare({"greedy": trees("1", "0")}, {"greedy": trees("1", "2")})[1]
    assert none.children is None


def test_samples_of_a_problem_are_one_value() -> None:
    """They are not independent: the interval is over problems."""
    twice = [*trees("10"), *(replace(tree, sample=1) for tree in trees("11"))]
    (change,) = compare({"t1.0": trees("00")}, {"t1.0": twice})[1]
    assert (change.over_itself.mean, change.over_itself.count) == (0.75, 2)


def test_a_mean_has_students_interval() -> None:
    values = [0.1, 0.4, 0.3, 0.8]
    found = t_interval(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), (expected.low, expected.high))
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


def test_metrics_read_the_verdict_and_never_the_reward() -> None:
    """-0.2 is truthy, and a coin pays for what is wrong."""
    paid = [replace(tree, reward=reward) for tree, reward in zip(trees("10", "30"), (-0.2, 1.0), strict=True)]
    found = tree_metrics(paid)
    assert found["false_claims"] == 50
    assert (found["spawned"], found["children_given_spawn"], found["accuracy_given_spawn"]) == (50, 3, 1.0)
    assert "accuracy_given_spawn" not in tree_metrics(trees("10"))


def test_an_evaluation_on_disk_is_a_folder_of_modes_or_a_run(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    for step, solved in ((0, "00"), (12, "11")):
        write_trees(tmp_path / "eval" / f"step-{step:06d}-t0.3.jsonl", trees(solved))
    write_trees(tmp_path / "eval" / "step-000012-greedy-targets.jsonl", trees("1"))
    assert read_evaluation(tmp_path) == {"t0.3": trees("11"), "greedy-targets": trees("1")}
    assert read_evaluation(tmp_path, 0) == {"t0.3": trees("00")}
    out = tmp_path / "out"
    out.mkdir()
    write_trees(out / "greedy.jsonl", trees("01"))
    assert read_evaluation(out) == {"greedy": trees("01")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(AprError, match="holds no evaluation"):
        read_evaluation(tmp_path / "empty")


def test_claims_are_binned_by_their_least_likely_token() -> None:
    """The root's tokens and those of the child that joined a solution count; a sibling's do not."""
    sure = claiming(-0.1, -0.2, sibling=-9.0, right=True)
    assert confidence(sure) == pytest.approx(math.exp(-0.2))
    trees = [sure, claiming(-0.1, -3.0, sibling=-0.1, right=False), claiming(-2.5, -0.1, sibling=-0.1, right=True)]
    trees.append(replace(sure, outcome=Outcome.NO_ANSWER, verdict="no_answer"))
    unsure, certain = claims_by_confidence(trees, bins=2)
    assert (unsure.count, unsure.right) == (2, 0.5)
    assert (certain.count, certain.right) == (1, 1.0)
    assert claims_by_confidence([], bins=2) == []


def claiming(root: float, child: float, sibling: float, right: bool) -> ThreadTree:
    def call(path: tuple[int, ...], logprob: float) -> Call:
        return Call(
            path, 0, (7,), (1, 2), (-0.05, logprob), (), (), FinishReason.STOP,
            (VersionSpan(FIRST_VERSION, 0, 2),), FIRST_VERSION, 0, 0, 0.0, 0.0, 0.0, "e",
        )  # fmt: skip

    calls = (call((), root), call((0,), child), call((1,), sibling))
    joins = (Join((), 0, (JoinOutcome.SOLVED, JoinOutcome.NO_SOLUTION), ("", ""), (), 0, ("path", "")),)
    verdict = SOLVED if right else "bad_arithmetic"
    return ThreadTree("p", 0, calls, spawned(2), joins, "", Outcome.ANSWERED, verdict=verdict)
