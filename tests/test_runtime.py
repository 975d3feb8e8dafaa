"""The thread runtime on a scripted engine: spawn, join, bounds, failures, cancellation at every point."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from scripted_trees import (
    FINAL,
    HAPPY,
    NOTHING,
    OPEN,
    PROBLEM,
    ROOT,
    SOLVED,
    TOKENIZER,
    Script,
    child,
    ids,
    resumed,
    root,
    run,
    spawn,
)

from apr_ray.config import BoundsConfig
from apr_ray.core.engine import FinishReason
from apr_ray.core.ledger import Disposition, JoinOutcome, Outcome, ThreadTree
from apr_ray.engines.scripted_engine import Reply, ScriptedEngine
from apr_ray.tasks.countdown.protocol import CountdownProtocol
from apr_ray.tasks.countdown.verifier import verify_solution
from apr_ray.threads.events import CallEnded, CallStarted, Joined, Spawned, ThreadEvent, TokensSampled, TreeEnded
from apr_ray.threads.runtime import TreeRequest, run_tree


def test_spawn_children_join_answer() -> None:
    events: list[ThreadEvent] = []
    tree, _ = run(Script(*HAPPY), events=events)
    assert tree.outcome is Outcome.ANSWERED
    assert verify_solution(PROBLEM, tree.final_text)
    assert [c.path for c in tree.calls] == [(), (), (0,), (1,)]
    assert tree.joins[0].outcomes == (JoinOutcome.NO_SOLUTION, JoinOutcome.SOLVED)
    assert tree.children == 2
    assert tree.depth == 1
    kinds = [type(e) for e in events]
    assert kinds[0] is CallStarted
    assert kinds[-1] is TreeEnded
    assert kinds.index(Spawned) < kinds.index(Joined)
    assert sum(len(e.token_ids) for e in events if isinstance(e, TokensSampled)) == tree.total_tokens


def test_child_sees_only_its_message() -> None:
    """Contract 1, first half."""
    tree, engine = run(Script(*HAPPY))
    prompts = {TOKENIZER.decode(r.prompt_ids) for r in engine.requests}
    assert "Moving to Node #0,1\nCurrent State: 22:[7, 8], Operations: ['3+5=8']" in prompts
    assert tree.calls[2].prompt_ids == tuple(
        TOKENIZER.encode("Moving to Node #0,1\nCurrent State: 22:[7, 8], Operations: ['3+5=8']")
    )


def test_parent_sees_only_the_joined_messages() -> None:
    """Contract 1, second half: the spawn block is replaced, the unsolved child's words are nowhere."""
    tree, _ = run(Script(*HAPPY))
    context = TOKENIZER.decode(tree.calls[1].prompt_ids)
    message = SOLVED.split("Goal Reached\n", 1)[1]
    assert context == (
        ROOT
        + OPEN
        + "<Sub Searches>\n<No Solution in Sub Search 0 at level 1 at Node #0,1>\n"
        + f"<Goal Reached in Sub Search 1 at level 1 at Node #0,0>\n{message}<End Sub Searches>\n"
    )


def test_a_calls_ids_are_the_engines_bit_for_bit() -> None:
    """Contract 2: prompt and sampled ids stand in the ledger as the engine saw and made them."""
    tree, engine = run(Script(*HAPPY))
    assert sorted(r.prompt_ids for r in engine.requests) == sorted(c.prompt_ids for c in tree.calls)
    parent = tree.calls[0]
    assert parent.sampled_ids == tuple(ids(OPEN + spawn("#0,1", "#0,0")))
    kept = tree.joins[0].kept_tokens
    assert tree.calls[1].prompt_ids[: len(parent.prompt_ids) + kept] == parent.prompt_ids + parent.sampled_ids[:kept]


def test_two_spawn_rounds() -> None:
    again = "Moving to Node #0,0\nCurrent State: 22:[7, 15], Operations: ['3*5=15']\n"
    tree, _ = run(
        Script(
            (root, Reply(ids(OPEN + spawn("#0,1")))),
            (child("#0,1"), Reply(ids(NOTHING))),
            (resumed(1), Reply(ids(again + spawn("#0,0")))),
            (child("#0,0"), Reply(ids(SOLVED))),
            (resumed(2), Reply(ids(FINAL))),
        )
    )
    assert tree.outcome is Outcome.ANSWERED
    assert [s.children for s in tree.spawns] == [((0,),), ((1,),)]
    longest = sum(c.sampled_tokens for c in tree.calls)
    assert tree.sequential_tokens == longest


def test_depth_two() -> None:
    inner = "\nExploring Operation: 7+15=22, Resulting Numbers: [22, 1]\n"
    inner += "Generated Node #0,0,0: 22:[22, 1] Operation: 7+15=22\n"
    script = Script(
        (root, Reply(ids(OPEN + spawn("#0,0")))),
        (child("#0,0,0"), Reply(ids(NOTHING))),
        (
            lambda t: t.startswith("Moving to Node #0,0\n") and "<End Sub Searches>" in t,
            Reply(ids("No solution found.\n")),
        ),
        (child("#0,0"), Reply(ids(inner + spawn("#0,0,0", level=2)))),
        (resumed(1), Reply(ids("No solution found.\n"))),
    )
    tree, _ = run(script, BoundsConfig(max_depth=2), max_depth=2)
    assert tree.depth == 2
    assert [c.path for c in tree.calls] == [(), (), (0,), (0,), (0, 0)]
    assert tree.outcome is Outcome.NO_ANSWER
    shallow, _ = run(script, BoundsConfig(max_depth=1), max_depth=2)
    assert shallow.depth == 1
    assert shallow.joins[0].reasons == ("bound_depth",)


@pytest.mark.parametrize(("max_depth", "resuming"), [(1, {()}), (2, {(), (0,), (1,)})])
def test_only_threads_that_may_spawn_may_be_resumed(max_depth: int, resuming: set[tuple[int, ...]]) -> None:
    tree, engine = run(Script(*HAPPY), BoundsConfig(max_depth=2), max_depth)
    asked = {(r.request_id.split("/")[1], r.resumes) for r in engine.requests}
    assert asked == {(".".join(f"{i:03d}" for i in c.path), c.path in resuming) for c in tree.calls}
    assert tree.children == 2


def test_duplicate_ids_are_two_children() -> None:
    """Regression: they kill the released code's tree."""
    tree, _ = run(Script((root, Reply(ids(OPEN + spawn("#0,0", "#0,0")))), *HAPPY[1:]))
    assert tree.outcome is Outcome.ANSWERED
    assert tree.children == 2


def test_unknown_ids_are_an_invalid_spawn() -> None:
    tree, _ = run(Script((root, Reply(ids(OPEN + spawn("#0,7"))))))
    assert (tree.outcome, tree.detail, tree.invalid_spawns) == (Outcome.INVALID_SPAWN, "spawn_unknown_node", 1)


@pytest.mark.parametrize(
    ("bounds", "outcome"),
    [
        (BoundsConfig(max_call_tokens=50), Outcome.TRUNCATED),
        (BoundsConfig(max_tree_tokens=60), Outcome.BOUND_TOKENS),
        (BoundsConfig(max_rounds=0), Outcome.BOUND_ROUNDS),
        (BoundsConfig(max_depth=0), Outcome.BOUND_DEPTH),
        (BoundsConfig(max_children=1), Outcome.BOUND_CHILDREN),
    ],
)
def test_hitting_a_bound_is_an_outcome(bounds: BoundsConfig, outcome: Outcome) -> None:
    """Contract 5."""
    tree, _ = run(Script(*HAPPY), bounds)
    assert tree.outcome is outcome
    assert tree.total_tokens <= bounds.max_tree_tokens


@pytest.mark.parametrize("limit", [150, 200, 400, 900])
def test_endless_children_side_by_side_never_break_the_trees_bound(limit: int) -> None:
    endless = Reply(ids("\n")[:1], endless=True)
    many = spawn(*["#0,0", "#0,1"] * 4)
    script = Script((root, Reply(ids(OPEN + many))), (lambda t: not t.startswith(ROOT), endless), (resumed(1), endless))
    used = []
    for chunk in (1, 7, 64):
        engine = ScriptedEngine(script, 10**6, chunk)
        bounds = BoundsConfig(max_call_tokens=10**6, max_tree_tokens=limit)
        tree = asyncio.run(run_tree(engine, CountdownProtocol(TOKENIZER), TreeRequest(PROBLEM), bounds, tree_id="t"))
        assert tree.total_tokens <= limit
        used.append([(c.path, c.segment, c.sampled_tokens) for c in tree.calls])
    assert used[0] == used[1] == used[2], "who was cut depends on the schedule"


@pytest.mark.parametrize("limit", [2000, 3000, 5000])
def test_a_cancelled_child_whose_children_sampled_does_not_break_the_trees_bound(limit: int) -> None:
    """What its children used counts, though it never took their shares back."""
    endless = Reply(ids("\n")[:1], endless=True)
    inner = "\nExploring Operation: 7+8=15, Resulting Numbers: [15]\nGenerated Node #0,1,0: 22:[15] Operation: 7+8=15\n"
    script = Script(
        (root, Reply(ids(OPEN + spawn("#0,0", "#0,1")))),
        (child("#0,1,0"), endless),
        (child("#0,1"), Reply(ids(inner + spawn("#0,1,0", level=2)))),
        (child("#0,0"), Reply([*TOKENIZER.encode("\n" * 200), *ids(SOLVED[1:])])),
        (resumed(1), endless),
    )
    bounds = BoundsConfig(max_depth=2, max_call_tokens=10**6, max_tree_tokens=limit, cancel_on_success=True)
    events: list[ThreadEvent] = []
    tree, _ = run(script, bounds, max_depth=2, context_tokens=10**6, events=events)
    assert tree.joins[0].outcomes == (JoinOutcome.SOLVED, JoinOutcome.CANCELLED)
    assert {c.finish for c in tree.calls if c.path == (1, 0)} == {FinishReason.ABORTED}
    assert tree.total_tokens <= limit
    ended = {(e.path, e.segment) for e in events if isinstance(e, CallEnded)}
    assert ended == {(c.path, c.segment) for c in tree.calls}, "a call began and was never said to end"


def test_a_full_context_is_an_outcome() -> None:
    tree, _ = run(Script(*HAPPY), context_tokens=60)
    assert tree.outcome is Outcome.CONTEXT_FULL


def test_a_child_that_never_ends_is_cut_and_joins_as_no_solution() -> None:
    endless = Reply(ids("\n")[:1], endless=True)
    tree, _ = run(Script(HAPPY[0], (child("#0,0"), endless), *HAPPY[2:]), BoundsConfig(max_call_tokens=300))
    assert tree.joins[0].outcomes == (JoinOutcome.NO_SOLUTION, JoinOutcome.NO_SOLUTION)
    assert tree.joins[0].reasons == ("", "truncated")


def test_the_clock_ends_a_tree_and_its_children() -> None:
    endless = Reply(ids("\n")[:1], endless=True)
    bounds = BoundsConfig(max_call_tokens=10**9, max_tree_tokens=10**9, max_seconds=0.2)
    tree, _ = run(Script(HAPPY[0], (child("#0,0"), endless), *HAPPY[2:]), bounds, context_tokens=10**9)
    assert tree.outcome is Outcome.BOUND_TIME
    aborted = [c for c in tree.calls if c.finish is FinishReason.ABORTED]
    assert [c.path for c in aborted] == [(1,)]
    assert tree.dispositions()[Disposition.ABORTED] == aborted[0].sampled_tokens


def test_the_models_own_join_tag_is_replaced_by_a_spawn() -> None:
    """The same call goes on after the forced token, and the sampled one is trained with its own logprob."""
    open_join = TOKENIZER.tag_ids["<Sub Searches>"]
    open_spawn = TOKENIZER.tag_ids["<Calling Sub Searches>"]
    rest = spawn("#0,1", "#0,0").removeprefix("<Calling Sub Searches>")

    def forced(text: str) -> bool:
        return text == ROOT + OPEN + "<Calling Sub Searches>"

    tree, engine = run(
        Script((root, Reply([*TOKENIZER.encode(OPEN), open_join])), (forced, Reply(ids(rest))), *HAPPY[1:])
    )
    assert tree.outcome is Outcome.ANSWERED
    call = tree.calls[0]
    assert call.segment == 0
    (replaced,) = call.replaced
    assert call.forced == (replaced.position,)
    assert replaced.token_id == open_join
    assert call.sampled_ids[replaced.position] == open_spawn
    assert call.logprobs[replaced.position] == 0.0
    assert list(call.trained_positions()) == list(range(len(call.sampled_ids)))
    ids_drawn, logprobs_drawn = call.as_sampled()
    assert (ids_drawn[replaced.position], logprobs_drawn[replaced.position]) == (open_join, replaced.logprob)
    assert call.dispositions() == {Disposition.TRAINED: call.sampled_tokens}
    assert len({r.sampling.seed for r in engine.requests}) == len(engine.requests)


def test_siblings_of_a_solver_are_cancelled_where_asked() -> None:
    endless = Reply(ids("\n")[:1], endless=True)
    bounds = BoundsConfig(max_call_tokens=10**6, max_tree_tokens=10**6, cancel_on_success=True)
    script = Script(HAPPY[0], HAPPY[1], (child("#0,1"), endless), HAPPY[3])
    tree, _ = run(script, bounds, context_tokens=10**6)
    assert tree.joins[0].outcomes == (JoinOutcome.CANCELLED, JoinOutcome.SOLVED)
    assert "<Cancelled Sub Search 0 at level 1 at Node #0,1>" in tree.final_text
    assert tree.outcome is Outcome.ANSWERED


def test_seeds_come_from_the_thread_never_from_the_schedule() -> None:
    """Contract 7: with chunks of another size children interleave differently; seeds and tree are the same."""
    trees = []
    for chunk in (1, 3, 1000):
        engine = ScriptedEngine(Script(*HAPPY), chunk_tokens=chunk)
        tree = asyncio.run(
            run_tree(engine, CountdownProtocol(TOKENIZER), TreeRequest(PROBLEM, seed=9), BoundsConfig(), tree_id="t")
        )
        trees.append([(c.path, c.segment, c.seed, c.sampled_ids) for c in tree.calls])
    assert trees[0] == trees[1] == trees[2]
    assert len({seed for _, _, seed, _ in trees[0]}) == 4


def test_cancelling_at_every_point_leaves_nothing_in_the_engine() -> None:
    async def turns() -> int:
        engine = ScriptedEngine(Script(*HAPPY))
        task = asyncio.create_task(
            run_tree(engine, CountdownProtocol(TOKENIZER), TreeRequest(PROBLEM), BoundsConfig(), tree_id="t")
        )
        count = 0
        while not task.done():
            await asyncio.sleep(0)
            count += 1
        return count

    async def cancel_after(count: int) -> None:
        engine = ScriptedEngine(Script(*HAPPY))
        task = asyncio.create_task(
            run_tree(engine, CountdownProtocol(TOKENIZER), TreeRequest(PROBLEM), BoundsConfig(), tree_id="t")
        )
        for _ in range(count):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert engine.active == {}

    total = asyncio.run(turns())
    assert total > 20
    for count in range(total - 1):
        asyncio.run(cancel_after(count))


def test_listening_changes_nothing() -> None:
    quiet, _ = run(Script(*HAPPY))
    heard, _ = run(Script(*HAPPY), events=[])

    def timeless(tree: ThreadTree) -> ThreadTree:
        zero = {"start_s": 0.0, "end_s": 0.0, "first_token_s": 0.0}
        return replace(tree, calls=tuple(replace(c, **zero) for c in tree.calls))

    assert timeless(quiet) == timeless(heard)
