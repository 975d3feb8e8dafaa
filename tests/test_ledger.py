"""Trees: their numbers, their on-disk form, their lanes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_ray.core.engine import FinishReason, VersionSpan
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Call, Join, JoinOutcome, Outcome, Replaced, Spawn, ThreadTree
from apr_ray.core.trees_io import read_trees, tree_from_json, tree_to_json, write_trees
from apr_ray.core.weights import WeightVersion
from apr_ray.evaluation.lanes import lanes_of, render_lanes
from apr_ray.metrics.intervals import wilson
from apr_ray.metrics.names import METRICS, is_known
from apr_ray.metrics.trees import failure_reasons, staleness, tree_metrics


def call(path: tuple[int, ...], segment: int, tokens: int) -> Call:
    version = WeightVersion(1, 4)
    return Call(
        path, segment, (1, 2), tuple(range(tokens)), (-0.5,) * tokens, (0,), (Replaced(0, 9, -1.0),), FinishReason.STOP,
        (VersionSpan(version, 0, 1), VersionSpan(version.next(), 1, tokens, version)), version,
        3, 1, 10.0, 10.1, 11.0, "e",
    )  # fmt: skip


TREE = ThreadTree(
    "3,5,7->22", 2,
    (call((), 0, 10), call((), 1, 20), call((0,), 0, 5), call((0,), 1, 6), call((0, 0), 0, 3), call((1,), 0, 8)),
    (Spawn((), 0, ((0,), (1,)), ("#0,0", "#0,1")), Spawn((0,), 0, ((0, 0),), ("#0,0,0",))),
    (
        Join((), 0, (JoinOutcome.SOLVED, JoinOutcome.NO_SOLUTION), ("", "truncated"), (4, 5), 7),
        Join((0,), 0, (JoinOutcome.NO_SOLUTION,), ("",), (6,), 2),
    ),
    "text", Outcome.ANSWERED, reward=1.0, verdict="solved",
)  # fmt: skip


def test_work_and_span() -> None:
    assert TREE.total_tokens == 52
    assert TREE.sequential_tokens == 10 + max(5 + 3 + 6, 8) + 20
    assert (TREE.children, TREE.depth) == (3, 2)


def test_lanes_follow_causal_time() -> None:
    lanes = lanes_of(TREE)
    assert [lane.path for lane in lanes] == [(), (0,), (0, 0), (1,)]
    assert [(s.start, s.end) for s in lanes[0].stretches] == [(0, 10), (24, 44)]
    assert [(s.start, s.end) for s in lanes[2].stretches] == [(15, 18)]
    assert lanes[0].stretches[-1].end == TREE.sequential_tokens
    assert [lane.outcome for lane in lanes] == ["solved", "solved", "no_solution", "no_solution"]
    text = render_lanes(TREE, width=44)
    assert text.splitlines()[0].split("│")[1] == "█" * 10 + "·" * 14 + "█" * 20
    assert render_lanes(replace(TREE, calls=(), spawns=(), joins=()))


def test_the_on_disk_form_gives_an_equal_tree_back(tmp_path: Path) -> None:
    write_trees(tmp_path / "t.jsonl", [TREE, TREE])
    assert list(read_trees(tmp_path / "t.jsonl")) == [TREE, TREE]


def test_an_unknown_format_or_a_cut_file_is_an_error(tmp_path: Path) -> None:
    data = json.loads(json.dumps(tree_to_json(TREE)))
    with pytest.raises(AprError, match="tree format is 99"):
        tree_from_json({**data, "format": 99})
    with pytest.raises(AprError, match="malformed"):
        tree_from_json({k: v for k, v in data.items() if k != "calls"})
    write_trees(tmp_path / "t.jsonl", [TREE])
    text = (tmp_path / "t.jsonl").read_text()
    (tmp_path / "t.jsonl").write_text(text[: len(text) // 2])
    with pytest.raises(AprError, match=":1 is not JSON"):
        list(read_trees(tmp_path / "t.jsonl"))
    for line, said in (("[1]", "not a tree"), ('{"format": 99}', "tree format is 99"), ('{"format": 1}', "malformed")):
        (tmp_path / "t.jsonl").write_text(text + line + "\n")
        with pytest.raises(AprError, match=rf"t\.jsonl:2: {said}"):
            list(read_trees(tmp_path / "t.jsonl"))


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_weight_versions_order_and_parse(a: int, b: int) -> None:
    assert WeightVersion.parse(str(WeightVersion(a, b))) == WeightVersion(a, b)
    assert WeightVersion(a, b) < WeightVersion(a, b).next() < WeightVersion(a + 1, 0)
    for text in ("1", "1.", ".2", "1.-2", "a.b", "1.2.3"):
        with pytest.raises(ValueError, match="not a weight version"):
            WeightVersion.parse(text)


def test_tree_metrics_are_means_and_stand_in_the_table() -> None:
    cut = ThreadTree("p", 0, (call((), 0, 6),), (), (), "", Outcome.TRUNCATED, reward=0.0, verdict="truncated")
    found = tree_metrics([TREE, cut])
    assert found["total_tokens"] == (52 + 6) / 2
    assert found["truncated"] == 50
    assert failure_reasons([TREE, cut]) == {"truncated": 50}
    assert staleness([TREE], WeightVersion(1, 6)) == 2
    assert staleness([TREE], WeightVersion(2, 6)) == 3, "weights that a resume lost are not fresh"
    assert all(is_known(f"rollout/{name}") and is_known(f"eval/t1.0/{name}") for name in found)
    assert not is_known("eval/accuracy")
    assert len({m.name for m in METRICS}) == len(METRICS)
    assert all(m.unit and m.meaning for m in METRICS)


def test_wilson_interval_against_known_values() -> None:
    """10 of 20: 0.299 to 0.701 (textbook)."""
    low, high = wilson(10, 20)
    assert (round(low, 3), round(high, 3)) == (0.299, 0.701)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 50)[0] == 0.0
    assert wilson(50, 50)[1] == pytest.approx(1.0)
