"""Engines that fail under a tree, and errors of a protocol: outcomes with names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest
from scripted_trees import HAPPY, PROBLEM, TOKENIZER, Script, child, ids, root, run

from apr_ray.config import BoundsConfig
from apr_ray.core.engine import Chunk, GenerateRequest
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Disposition, JoinOutcome, Outcome, ThreadTree
from apr_ray.core.task import ChildResult
from apr_ray.engines.scripted_engine import Reply, ScriptedEngine
from apr_ray.tasks.countdown.protocol import CountdownProtocol
from apr_ray.threads.runtime import TreeRequest, run_tree


def test_a_failing_engine_is_an_outcome_for_the_root_and_no_solution_for_a_child() -> None:
    fails = Reply(ids("\nNo solution found.\n")[:2], fails=True)
    tree, _ = run(Script((root, fails)))
    assert (tree.outcome, tree.detail) == (Outcome.ENGINE_ERROR, "scripted failure")
    assert tree.dispositions() == {Disposition.ERROR: 2}
    tree, _ = run(Script(HAPPY[0], (child("#0,0"), fails), *HAPPY[2:]))
    assert tree.joins[0].reasons == ("", "engine_error")


class Raising(ScriptedEngine):
    """Raises for one thread, after its first chunk."""

    def __init__(self, script: Callable[[GenerateRequest], Reply], thread: tuple[int, ...], error: Exception) -> None:
        super().__init__(script)
        self.thread, self.error = thread, error

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        async with aclosing(super().generate(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield replace(chunk, finish=None) if request.thread == self.thread else chunk
                if request.thread == self.thread:
                    raise self.error


def run_on(engine: ScriptedEngine) -> ThreadTree:
    protocol = CountdownProtocol(TOKENIZER)
    return asyncio.run(run_tree(engine, protocol, TreeRequest(PROBLEM), BoundsConfig(), tree_id="t"))


@pytest.mark.parametrize("error", [TimeoutError("no answer"), RuntimeError("CUDA error"), KeyError("rid"), OSError(5)])
def test_whatever_an_engine_raises_is_an_outcome_and_no_time_limit(error: Exception) -> None:
    """Faults 5: its own TimeoutError became `bound_time` after 0 s, anything else in a child an ExceptionGroup."""
    tree = run_on(Raising(Script(*HAPPY), (), error))
    assert (tree.outcome, tree.detail) == (Outcome.ENGINE_ERROR, repr(error))
    tree = run_on(Raising(Script(*HAPPY), (0,), error))
    assert tree.joins[0].reasons == ("engine_error", "")
    assert tree.outcome is Outcome.ANSWERED


def test_a_stream_that_ends_without_saying_why_is_a_failed_engine() -> None:
    class Mute(ScriptedEngine):
        async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
            async with aclosing(super().generate(request)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield replace(chunk, finish=None)

    tree = run_on(Mute(Script(*HAPPY)))
    assert (tree.outcome, tree.detail) == (Outcome.ENGINE_ERROR, "the engine's stream ended without a finish reason")


def test_a_protocols_error_in_a_child_reads_as_the_roots_would() -> None:
    class Broken(CountdownProtocol):
        def read_child(self, context: Sequence[int], sampled: Sequence[int]) -> ChildResult:
            raise AprError("a task's own error", "")

    with pytest.raises(AprError, match="a task's own error"):
        asyncio.run(
            run_tree(
                ScriptedEngine(Script(*HAPPY)), Broken(TOKENIZER), TreeRequest(PROBLEM), BoundsConfig(), tree_id="t"
            )
        )


def test_a_child_that_is_aborted_joins_as_cancelled() -> None:
    """Faults 12: it joined as "No Solution", which its parent may believe."""
    endless = Reply(ids("\n")[:1], endless=True)
    engine = ScriptedEngine(Script(HAPPY[0], (child("#0,0"), endless), *HAPPY[2:]), context_tokens=10**6)
    bounds = BoundsConfig(max_call_tokens=10**6, max_tree_tokens=10**7)

    async def main() -> ThreadTree:
        whole = asyncio.create_task(
            run_tree(engine, CountdownProtocol(TOKENIZER), TreeRequest(PROBLEM), bounds, tree_id="t")
        )
        while not [name for name in engine.active if name.startswith("t/001/")]:  # noqa: ASYNC110  its own state
            await asyncio.sleep(0)
        await engine.abort("t/001/")
        return await whole

    tree = asyncio.run(main())
    assert (tree.joins[0].outcomes[1], tree.joins[0].reasons[1]) == (JoinOutcome.CANCELLED, "aborted")
    assert "<Cancelled Sub Search 1 at level 1 at Node #0,0>" in tree.final_text
