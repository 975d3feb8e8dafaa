"""The decision to spawn: what demonstrations teach of it, and how a policy's own is measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_ledger import TREE

from apr_ray.cli.common import find_config
from apr_ray.config import Config, load_config
from apr_ray.core.ledger import Replaced
from apr_ray.data.demonstrations import Demonstrations, rows_to_table, solve_rows
from apr_ray.data.sampler import SftSampler
from apr_ray.evaluation.decisions import DecisionPoint, decide, decision_points, first_choice, sampled_p_spawn
from apr_ray.tasks.countdown.protocol import CountdownProtocol
from apr_ray.tasks.countdown.task import CountdownTask
from apr_ray.tasks.registry import load_task

PAGE = Path(__file__).parents[1] / "docs" / "supervised.md"
PROBLEMS = 3000
SAMPLING_ERROR = 0.025
"""Of a share over 3,000 trees: 2.7 standard deviations."""


@pytest.fixture(scope="module")
def quickstart() -> Config:
    return load_config([find_config("quickstart")])


@pytest.fixture(scope="module")
def protocol() -> CountdownProtocol:
    task = CountdownTask(CountdownTask.options_type())
    return task.protocol(task.tokenizer())


def demonstrations(config: Config, folder: Path) -> Demonstrations:
    """The quickstart's first ones, without Ray."""
    import pyarrow.parquet as pq

    task = load_task(config.task)
    items = [
        {"index": i, "solver_seed": 0, "problem": json.dumps(dict(problem.to_json()))}
        for i, problem in enumerate(task.problems("train", PROBLEMS, config.run.seed))
    ]
    rows = solve_rows(task, task.tokenizer(), items, config.data.max_sequence_tokens, config.run.seed)
    pq.write_table(rows_to_table(rows), folder / "rows.parquet")
    return Demonstrations.load(folder)


def trained_share(data: Demonstrations, sampler: SftSampler, protocol: CountdownProtocol) -> tuple[float, set[int]]:
    """P(spawn) that a perfect fit learns at first decisions, and all ids that are a target somewhere with loss."""
    chosen, targets = [], set()
    for i in np.flatnonzero(~data.child):
        ids = data.ids[data.offsets[i] : data.offsets[i + 1]]
        start = max(1, int(sampler.skipped[i]))
        aims = sampler.target_of[ids]
        targets.update(aims[start:].tolist())
        place = first_choice(ids[data.given[i] :], protocol)
        if place is not None and place + data.given[i] >= start:
            chosen.append(bool(protocol.chooses_to_spawn(int(aims[place + data.given[i]]))))
    return sum(chosen) / len(chosen), targets


def test_the_trained_share_of_spawns_is_the_one_in_the_docs(
    quickstart: Config, protocol: CountdownProtocol, tmp_path: Path
) -> None:
    """And the tag that only the runtime writes is a target nowhere."""
    (stated,) = re.findall(r"trained P\(spawn\) at first decisions is (0\.\d+)", PAGE.read_text())
    data = demonstrations(quickstart, tmp_path)
    sampler = SftSampler(
        data, mask=quickstart.sft.mask, targets=protocol.supervised_targets(), batch_bins=2, bin_tokens=1024, seed=0
    )
    share, targets = trained_share(data, sampler, protocol)
    assert share == pytest.approx(float(stated), abs=SAMPLING_ERROR)
    assert protocol.spawn_open in targets
    assert protocol.join_open not in targets
    assert protocol.join_open in data.ids, "a join block stands in the data, or nothing was tested"


def test_what_the_runtime_writes_is_trained_as_what_it_forces(protocol: CountdownProtocol) -> None:
    assert protocol.supervised_targets() == {protocol.join_open: protocol.spawn_open}
    choices = {i: protocol.chooses_to_spawn(i) for i in range(protocol.tokenizer.vocab_size)}
    assert {i for i, spawns in choices.items() if spawns} == {protocol.spawn_open, protocol.join_open}
    assert [i for i, spawns in choices.items() if spawns is False] == [protocol.move]


def test_decision_points_end_where_a_demonstration_chose(quickstart: Config, protocol: CountdownProtocol) -> None:
    task = load_task(quickstart.task)
    points = decision_points(task, task.problems("validation", 100, 0), 0)
    assert len(points) > 90
    assert 0.3 < sum(point.spawns for point in points) / len(points) < 0.7
    for point in points:
        text = protocol.text(point.prefix)
        assert text.splitlines()[-1].startswith("Generated Node #") or text.endswith("No Solution\n")
        assert "<Calling Sub Searches>" not in text


def test_probabilities_are_summed_by_what_a_token_does(protocol: CountdownProtocol) -> None:
    """Two points; the policy gives the tags these probabilities, and 0.1 in all to tokens that decide nothing."""
    table = [
        {protocol.spawn_open: 0.6, protocol.join_open: 0.1, protocol.move: 0.2},
        {protocol.spawn_open: 0.2, protocol.join_open: 0.3, protocol.move: 0.4},
    ]

    def logprobs(sequences: Sequence[Sequence[int]], temperature: float) -> list[np.ndarray]:
        assert temperature == 1.0
        return [np.log([1.0, table[n][ids[-1]]]) for n, ids in enumerate(sequences)]

    found = decide([DecisionPoint((3,), True), DecisionPoint((4,), False)], protocol, logprobs)
    assert found is not None
    assert found.demonstrated == 0.5
    assert found.p_spawn == pytest.approx((0.7 / 0.9 + 0.5 / 0.9) / 2)
    assert found.greedy == 0.5
    assert found.margin(0.5) == pytest.approx(math.log(0.6 / 0.2))
    assert decide([], protocol, logprobs) is None


def test_a_sampled_tag_counts_as_the_choice_that_it_was(protocol: CountdownProtocol) -> None:
    root = TREE.calls[0]

    def tree(*ids: int, taken: int | None = None):  # type: ignore[no-untyped-def]
        replaced = () if taken is None else (Replaced(len(ids) - 1, taken, -1.0),)
        forced = tuple(r.position for r in replaced)
        call = replace(root, sampled_ids=ids, logprobs=(-1.0,) * len(ids), forced=forced, replaced=replaced)
        return replace(TREE, calls=(call, *TREE.calls[1:]))

    alone = tree(5, protocol.move, protocol.spawn_open)
    undecided = tree(5, 6)
    by_a_replaced_tag = tree(5, protocol.spawn_open, taken=protocol.join_open)
    assert sampled_p_spawn([alone, undecided, by_a_replaced_tag], protocol) == 0.5
    assert sampled_p_spawn([undecided], protocol) is None
