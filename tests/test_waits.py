"""How long threads wait for each other, from the events of a tree."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from apr_ray.bench.recording import Waits, record
from apr_ray.bench.trees import waits_in_steps
from apr_ray.core.engine import FinishReason
from apr_ray.engines.scripted_engine import Reply, ScriptedEngine
from apr_ray.tasks.registry import load_task
from apr_ray.threads.events import CallEnded, Joined, Spawned, TokensSampled
from apr_ray.threads.runtime import run_tree


def heard(events: list[tuple[float, Any]]) -> Waits:
    """Events of one tree at these moments: seconds, and twice as many steps."""
    waits, now = Waits(), [0.0]
    hear = waits.listener(lambda: (now[0], 2 * now[0]))
    for moment, event in events:
        now[0] = moment
        hear(event)
    return waits


A_TREE: list[tuple[float, Any]] = [
    (1, TokensSampled((), 0, (5, 6))),
    (3, CallEnded((), 0, FinishReason.STOP, 2)),
    (3, Spawned((), ((0,), (1,)))),
    (5, TokensSampled((0,), 0, (5,))),
    (8, TokensSampled((1,), 0, (5,))),
    (9, TokensSampled((1,), 0, (6,))),
    (10, CallEnded((1,), 0, FinishReason.STOP, 2)),
    (14, CallEnded((0,), 0, FinishReason.STOP, 1)),
    (15, Joined((), ())),
    (17, TokensSampled((), 1, (5,))),
    (18, TokensSampled((), 1, (6,))),
    (19, CallEnded((), 1, FinishReason.STOP, 2)),
]


def test_a_child_waits_since_its_spawn_and_a_parent_since_its_last_child() -> None:
    waits = heard(A_TREE)
    assert waits.spawn_to_child == [(2, 4), (5, 10)]
    assert waits.join_to_parent == [(3, 6)]
    assert waits.medians() == {
        "spawn_to_child_token_ms": 3500,
        "spawn_to_child_token_steps": 7,
        "join_to_token_ms": 3000,
        "join_to_token_steps": 6,
    }


def test_a_tree_that_spawns_nothing_has_no_waits() -> None:
    assert heard(A_TREE[:2]).medians() == {}


def test_every_spawn_and_join_of_a_tree_is_timed() -> None:
    recording = record(8)
    task: Any = load_task(recording.config.task)
    engine = ScriptedEngine(lambda asked: Reply(recording.replies[asked.prompt_ids]), chunk_tokens=1)
    waits = Waits()

    async def run() -> None:
        for request in recording.requests:
            hear = waits.listener(lambda: (0.0, float(engine.sampled)))
            protocol, bounds = task.protocol(task.tokenizer()), recording.config.bounds
            await run_tree(engine, protocol, request, bounds, tree_id="timed", listener=hear)

    asyncio.run(run())
    assert len(waits.spawn_to_child) == sum(tree.children for tree in recording.trees) > 0
    assert len(waits.join_to_parent) == sum(len(tree.joins) for tree in recording.trees) > 0
    assert min(steps for _, steps in (*waits.spawn_to_child, *waits.join_to_parent)) >= 1


def test_steps_of_an_engine_that_does_not_count_them_are_those_of_its_long_calls() -> None:
    tree = record(4).trees[0]
    assert all(len(call.sampled_ids) >= 20 for call in tree.calls[:1])
    timed = [replace(call, first_token_s=1.0, end_s=1.0 + 0.5 * (len(call.sampled_ids) - 1)) for call in tree.calls]
    found = waits_in_steps(heard(A_TREE), [replace(tree, calls=tuple(timed))])
    assert found["step_ms"] == pytest.approx(500)
    assert found["join_to_token_steps"] == pytest.approx(6)
    assert found["spawn_to_child_token_steps"] == pytest.approx(7)
