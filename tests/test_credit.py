"""Which call of a tree is answerable for its reward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as File

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_ray.config import load_config
from apr_ray.core.engine import FinishReason, VersionSpan
from apr_ray.core.errors import ConfigError
from apr_ray.core.ledger import Call, Disposition, Group, Join, JoinOutcome, Outcome, Path, Spawn, ThreadTree
from apr_ray.core.weights import FIRST_VERSION
from apr_ray.evaluation.audit_ledger import call_advantages
from apr_ray.evaluation.kept_batch import KeptBatch, KeptStep
from apr_ray.rl.batches import grpo_batch
from apr_ray.rl.credit import causal_credit, tree_credit

HERE = File(__file__)
FOUND, NONE = JoinOutcome.SOLVED, JoinOutcome.NO_SOLUTION


def a_call(path: Path, segment: int, prompt: tuple[int, ...]) -> Call:
    return Call(
        path, segment, prompt, (1, 2), (-0.1, -0.2), (), (), FinishReason.STOP,
        (VersionSpan(FIRST_VERSION, 0, 2),), FIRST_VERSION, 0, 0, 0.0, 0.0, 0.0, "e",
    )  # fmt: skip


def tree(reward: float, *children: tuple[int, str]) -> ThreadTree:
    """A root that spawned these children, (its state, its message), and went on; without any it never spawned."""
    root = a_call((), 0, (9,))
    if not children:
        return ThreadTree("p", 0, (root,), (), (), "", Outcome.ANSWERED, reward=reward, verdict="x")
    paths = tuple((i,) for i in range(len(children)))
    outcomes = tuple(FOUND if message else NONE for _, message in children)
    messages = tuple(message for _, message in children)
    calls = (
        root,
        a_call((), 1, (9, 9)),
        *(a_call(path, 0, (state,)) for path, (state, _) in zip(paths, children, strict=True)),
    )
    spawn = Spawn((), 0, paths, ("",) * len(paths))
    join = Join((), 0, outcomes, ("",) * len(paths), (), 0, messages)
    return ThreadTree("p", 0, calls, (spawn,), (join,), "", Outcome.ANSWERED, reward=reward, verdict="x")


def shares(*trees: ThreadTree) -> list[list[float]]:
    """Advantages by tree, in the order root, resumed root, children."""
    return [[pytest.approx(a) for a in of_tree] for of_tree in causal_credit(trees)]


def test_a_child_that_rightly_found_nothing_is_neither_praised_nor_blamed() -> None:
    """State 5 leads nowhere and state 6 to the target: what is made of 6 decides both trees."""
    found = causal_credit([tree(1.0, (5, ""), (6, "path")), tree(0.0, (5, ""), (6, ""))])
    (_, _, dead_end, solver), (_, _, same_dead_end, missed) = found
    assert dead_end == same_dead_end == 0.0
    assert (solver, missed) == (1.0, -1.0)
    of_tree = tree_credit([1.0, -1.0], [tree(1.0, (5, "")), tree(0.0, (5, ""))])
    assert of_tree == [[1.0] * 3, [-1.0] * 3]


def test_the_same_message_has_the_mean_of_its_rewards() -> None:
    """Of three that were given state 6, two brought the same path, and one of their trees failed later."""
    found = shares(tree(1.0, (6, "path")), tree(0.0, (6, "path")), tree(0.0, (6, "")))
    assert [of_tree[2] for of_tree in found] == [(1 / 2 - 1 / 3) * 3 / 2] * 2 + [(0 - 1 / 3) * 3 / 2]


def test_a_root_that_was_told_of_nothing_is_compared_with_others_that_were() -> None:
    """That no child found anything is no fault of the call after the join, where one claims and one does not."""
    found = shares(tree(1.0, (6, "path")), tree(-0.2, (5, "")), tree(0.0, (5, "")))
    assert [of_tree[0] for of_tree in found] == [1.1, -0.7, -0.4], "the decision to spawn: against all"
    assert found[1][1] == -0.2
    assert found[2][1] == 0.2
    assert found[0][1] == 1.1, "alone with its news: its tree's advantage"


def test_what_nobody_else_was_given_takes_its_trees_advantage() -> None:
    found = shares(tree(1.0, (5, "path")), tree(0.0, (6, "")), tree(0.0))
    assert found == [[1.0] * 3, [-0.5] * 3, [-0.5]]


def test_a_child_given_twice_is_compared_once_with_each_tree() -> None:
    """Two of one tree are not independent: they share its reward."""
    found = shares(tree(1.0, (6, "path"), (6, "")), tree(0.0, (6, "")))
    assert found[0][2:] == [1.0, 1.0], "the second one has no equal: its tree's advantage"
    assert found[1][2] == -1.0


def test_a_child_whose_tree_ended_before_the_join_brought_nothing() -> None:
    whole = tree(0.0, (6, "path"))
    cut = ThreadTree("p", 1, whole.calls, whole.spawns, (), "", Outcome.BOUND_TIME, reward=1.0, verdict="x")
    assert causal_credit([whole, cut])[1][2] == 1.0


def test_calls_without_an_advantage_are_left_out_and_counted() -> None:
    """The dead ends' four tokens; all others are trained, with the advantage of their own call."""
    group = Group("p", (tree(1.0, (5, ""), (6, "path")), tree(0.0, (5, ""), (6, ""))))
    made = grpo_batch(
        [group], skip_zero_advantage=True, advantage_kind="leave_one_out", credit="causal", loss_mean="token"
    )
    assert made.dispositions == {Disposition.ZERO_ADVANTAGE: 4, Disposition.TRAINED: 12}
    assert len(made.batch) == 6
    used = made.batch.loss_weights[made.batch.loss_weights != 0]
    assert used == pytest.approx(1 / 16), "those that are left out stay in the denominator"


def test_causal_credit_needs_rewards_to_share() -> None:
    with pytest.raises(ConfigError, match=r"credit causal.*advantage is group: use leave_one_out"):
        load_config(overrides=["grpo.credit=causal"])


@st.composite
def groups_of_trees(draw: st.DrawFn) -> list[ThreadTree]:
    """Few states and messages, so that many are alike; some children are given twice, some trees are cut before."""
    out = []
    for _ in range(draw(st.integers(1, 5))):
        children = draw(st.lists(st.tuples(st.integers(5, 7), st.sampled_from(["", "a", "b"])), max_size=4))
        one = tree(draw(st.sampled_from([1.0, 0.0, -0.2])), *children)
        out.append(replace(one, joins=()) if draw(st.booleans()) and children else one)
    return out


@settings(max_examples=300)
@given(groups_of_trees())
def test_the_audit_shares_out_the_same_advantages(trees: list[ThreadTree]) -> None:
    """Two ways that share no code."""
    step = KeptStep(1, "0.0", 8, 0.2, 0.0, 1.0, 0, "", {}, None, advantage="leave_one_out", credit="causal")
    audited = call_advantages(KeptBatch(step, tuple(trees), HERE), trees)
    for ours, theirs in zip(causal_credit(trees), audited, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)
        assert [a == 0 for a in ours] == [a == 0 for a in theirs], "what is left out is left out by both"
