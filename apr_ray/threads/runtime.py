"""`run_tree`: one reasoning on one engine, from the root prompt to the answer or to a bound.

    thread(path, prompt):  decode a call ─▶ spawn? ─▶ children in parallel ─▶ join ─▶ decode the next segment ─▶ …
                                          └▶ end ─▶ the thread's outcome

Invariants (tested):
- a child's prompt is its message; a parent's next prompt is its own tokens up to the spawn block, then the join block;
- every token that an engine returned stands in exactly one call of the ledger;
- a tree never holds more calls, tokens, depth or seconds than its bounds allow; a bound that is hit is an outcome;
- when `run_tree` returns or is cancelled, no request of the tree is left in the engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from contextlib import aclosing
from dataclasses import dataclass

from apr_ray.config import BoundsConfig
from apr_ray.core.engine import (
    Engine,
    FinishReason,
    GenerateRequest,
    SamplingParams,
)
from apr_ray.core.ledger import Call, Join, JoinOutcome, Outcome, Path, Problem, Spawn, ThreadTree
from apr_ray.core.task import ChildResult, SpawnJoinProtocol, SpawnRequest, ThreadEnd
from apr_ray.threads.events import (
    CallEnded,
    CallStarted,
    Joined,
    Listener,
    Spawned,
    ThreadEvent,
    TokensSampled,
    TreeEnded,
)
from apr_ray.threads.recorder import Recorder, chunks_of

log = logging.getLogger(__name__)
FORCED_PER_CALL = 1
"""A call goes on after so many forced tokens, and ends at the next: what is forced is a spawn, and that ends a call.
Each time the engine is given the whole prefix again: without a bound, time would be quadratic in forced tokens."""


@dataclass(frozen=True, slots=True)
class TreeRequest:
    """One tree to run.

    Attributes:
        problem: what is asked.
        sample: which attempt at it.
        seed: every call's seed derives from it, its thread path and its segment: never from scheduling.
        temperature: 0 is greedy.
        budget: conditioning, as the protocol writes it; None for none.
    """

    problem: Problem
    sample: int = 0
    seed: int = 0
    temperature: float = 1.0
    budget: int | None = None


def call_seed(tree_seed: int, path: Path, segment: int, resumption: int) -> int:
    """A 63-bit seed of one engine request."""
    text = f"{tree_seed}/{path}/{segment}/{resumption}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


async def run_tree(
    engine: Engine,
    protocol: SpawnJoinProtocol,
    request: TreeRequest,
    bounds: BoundsConfig,
    *,
    tree_id: str,
    engine_id: str = "local",
    listener: Listener | None = None,
) -> ThreadTree:
    """Run one tree. A failing engine is an outcome; cancelling this coroutine aborts every request and re-raises."""
    tree = _Tree(engine, protocol, request, bounds, tree_id, engine_id, listener)
    prompt = protocol.root_prompt(request.problem, request.budget)
    clock = asyncio.timeout(bounds.max_seconds)
    try:
        async with clock:
            end = await tree.run_thread((), prompt, _Allowance(bounds.max_tree_tokens))
    except TimeoutError:
        if not clock.expired():
            raise
        end = _ThreadEnded(ThreadEnd(Outcome.BOUND_TIME, f"{bounds.max_seconds:g} s"), tree.root_context, ())
    tree.emit(TreeEnded(end.end.outcome, tree.tokens))
    return ThreadTree(
        problem_key=request.problem.key,
        sample=request.sample,
        calls=tuple(sorted(tree.calls, key=lambda c: (c.path, c.segment))),
        spawns=tuple(sorted(tree.spawns, key=lambda s: (s.path, s.segment))),
        joins=tuple(sorted(tree.joins, key=lambda j: (j.path, j.segment))),
        final_text=protocol.text([*end.context, *end.sampled]),
        outcome=end.end.outcome,
        detail=end.end.detail,
        invalid_spawns=tree.invalid_spawns,
    )


@dataclass(frozen=True, slots=True)
class _ThreadEnded:
    """How a thread ended, and the context and tokens of its last call."""

    end: ThreadEnd
    context: tuple[int, ...]
    sampled: tuple[int, ...]


@dataclass(slots=True)
class _Allowance:
    """Tokens a thread may still sample, its descendants included.

    At a spawn each child is given an equal share, and what it leaves comes back at the join: the bound on a tree is
    strict, and which child hits it does not depend on who decodes faster.
    """

    left: int

    def share(self, children: int) -> list[_Allowance]:
        """One share per child, as large as what the parent keeps for going on."""
        return [_Allowance(self.left // (children + 1)) for _ in range(children)]

    def take_back(self, given: list[_Allowance], children: int) -> None:
        """Account for what the children used of their shares."""
        self.left -= children * (self.left // (children + 1)) - sum(a.left for a in given)


class _Tree:
    """The state that the threads of one tree share."""

    def __init__(
        self,
        engine: Engine,
        protocol: SpawnJoinProtocol,
        request: TreeRequest,
        bounds: BoundsConfig,
        tree_id: str,
        engine_id: str,
        listener: Listener | None,
    ) -> None:
        self.engine = engine
        self.protocol = protocol
        self.request = request
        self.bounds = bounds
        self.tree_id = tree_id
        self.engine_id = engine_id
        self.listener = listener
        self.deepest = min(bounds.max_depth, protocol.max_depth)  # threads there spawn no more
        self.calls: list[Call] = []
        self.spawns: list[Spawn] = []
        self.joins: list[Join] = []
        self.invalid_spawns = 0
        self.tokens = 0
        self.root_context: tuple[int, ...] = ()

    def emit(self, event: ThreadEvent) -> None:
        if self.listener is not None:
            self.listener(event)

    async def run_thread(self, path: Path, prompt: tuple[int, ...], allowance: _Allowance) -> _ThreadEnded:
        """Decode one thread to its end, running its children as it spawns them."""
        context = prompt
        children = rounds = 0
        while True:
            if path == ():
                self.root_context = context
            call = await self.run_call(path, rounds, context, allowance)
            end = self.cut_short(call, allowance)
            asked = None if end else self.protocol.read_call(context, call.sampled_ids, len(path))
            if isinstance(asked, SpawnRequest):
                end = self.refuse(asked, path, rounds)
            elif isinstance(asked, ThreadEnd):
                end = asked
            if end is not None:
                self.invalid_spawns += end.outcome is Outcome.INVALID_SPAWN
                return _ThreadEnded(end, context, call.sampled_ids)
            assert isinstance(asked, SpawnRequest)
            paths = tuple((*path, children + i) for i in range(len(asked.children)))
            self.spawns.append(Spawn(path, rounds, paths, tuple(c.label for c in asked.children)))
            self.emit(Spawned(path, paths))
            shares = allowance.share(len(paths))
            try:
                results = await self.run_children(asked, paths, shares)
            finally:  # a thread that is cancelled here has used its children's shares too
                allowance.take_back(shares, len(paths))
            joined = self.protocol.join_ids(asked, results, len(path) + 1)
            outcomes = tuple(r.outcome for r in results)
            reasons = tuple(r.reason for r in results)
            messages = tuple(r.message for r in results)
            self.joins.append(Join(path, rounds, outcomes, reasons, joined, asked.keep_tokens, messages))
            self.emit(Joined(path, outcomes))
            context = (*context, *call.sampled_ids[: asked.keep_tokens], *joined)
            children += len(paths)
            rounds += 1

    async def run_children(
        self, asked: SpawnRequest, paths: tuple[Path, ...], shares: list[_Allowance]
    ) -> list[ChildResult]:
        """All children side by side; their results in spawn order, whatever order they end in."""
        results: dict[Path, ChildResult] = {}
        tasks: dict[Path, asyncio.Task[None]] = {}

        async def run(path: Path, prompt: tuple[int, ...], share: _Allowance) -> None:
            try:
                results[path] = self.result_of(await self.run_thread(path, prompt, share))
            except asyncio.CancelledError:
                if path not in cancelled:
                    raise
                results[path] = ChildResult(JoinOutcome.CANCELLED, reason="sibling_solved")
                return
            if self.bounds.cancel_on_success and results[path].outcome is JoinOutcome.SOLVED:
                for other, task in tasks.items():
                    if other != path and other not in results:
                        cancelled.add(other)
                        task.cancel()

        cancelled: set[Path] = set()
        try:
            async with asyncio.TaskGroup() as group:
                for path, child, share in zip(paths, asked.children, shares, strict=True):
                    tasks[path] = group.create_task(run(path, child.prompt_ids, share))
        except BaseExceptionGroup as errors:  # a child's error reads as the root's would, at any depth
            raise errors.exceptions[0] from None
        for path in paths:  # a task cancelled before its first step never ran its handler
            results.setdefault(path, ChildResult(JoinOutcome.CANCELLED, reason="sibling_solved"))
        return [results[path] for path in paths]

    def result_of(self, ended: _ThreadEnded) -> ChildResult:
        """The message of a child's join: a child that failed or was cut off has no solution, and the reason is kept."""
        if ended.end.outcome in (Outcome.ANSWERED, Outcome.NO_ANSWER):
            return self.protocol.read_child(ended.context, ended.sampled)
        if ended.end.outcome is Outcome.CANCELLED:
            return ChildResult(JoinOutcome.CANCELLED, reason="aborted")
        return ChildResult(JoinOutcome.NO_SOLUTION, reason=ended.end.outcome.value)

    def cut_short(self, call: Call, allowance: _Allowance) -> ThreadEnd | None:
        """The outcome of a call that did not end by itself."""
        if len(call.forced) > FORCED_PER_CALL:
            return ThreadEnd(Outcome.INVALID_SPAWN, "spawn_reopened")
        if call.finish is FinishReason.STOP:
            return None
        if call.finish is FinishReason.ERROR:
            return ThreadEnd(Outcome.ENGINE_ERROR, call.error)
        if call.finish is FinishReason.ABORTED:
            return ThreadEnd(Outcome.CANCELLED)
        if allowance.left <= 0:
            return ThreadEnd(Outcome.BOUND_TOKENS, f"of {self.bounds.max_tree_tokens} for the tree")
        if len(call.prompt_ids) + len(call.sampled_ids) >= self.engine.context_tokens:
            return ThreadEnd(Outcome.CONTEXT_FULL, f"{self.engine.context_tokens} tokens")
        return ThreadEnd(Outcome.TRUNCATED, f"{len(call.sampled_ids)} tokens")

    def refuse(self, asked: SpawnRequest, path: Path, rounds: int) -> ThreadEnd | None:
        """The bound that a spawn would break, if any."""
        bounds = self.bounds
        if len(path) >= self.deepest:
            return ThreadEnd(Outcome.BOUND_DEPTH, f"depth {len(path) + 1}")
        if rounds >= bounds.max_rounds:
            return ThreadEnd(Outcome.BOUND_ROUNDS, f"{rounds + 1} rounds")
        if len(asked.children) > bounds.max_children:
            return ThreadEnd(Outcome.BOUND_CHILDREN, f"{len(asked.children)} children")
        return None

    async def run_call(self, path: Path, segment: int, prompt: tuple[int, ...], allowance: _Allowance) -> Call:
        """One call. Where the model writes what only the runtime may, the right token is forced and it goes on; where
        it does so again, the call is over."""
        recorder = Recorder(path, segment, prompt, self.engine_id)
        self.emit(CallStarted(path, segment, len(prompt)))
        resumption = 0
        try:
            while True:
                room = self.engine.context_tokens - len(prompt) - len(recorder.ids)
                budget = min(self.bounds.max_call_tokens - len(recorder.ids), allowance.left, room)
                if budget <= 0:
                    recorder.finish = FinishReason.LENGTH
                    break
                seed = call_seed(self.request.seed, path, segment, resumption)
                recorder.seed = recorder.seed or seed
                before = recorder.sampled
                try:
                    await self.stream(recorder, resumption, seed, budget)
                finally:
                    allowance.left -= recorder.sampled - before
                if recorder.finish is not FinishReason.STOP:
                    break
                forced = self.protocol.forced_replacement(recorder.ids[-1])
                if forced is None:
                    break
                recorder.replace_last(forced)
                if len(recorder.forced) > FORCED_PER_CALL:
                    break
                resumption += 1
        except asyncio.CancelledError:
            recorder.finish = FinishReason.ABORTED
            raise
        finally:
            call = recorder.call()
            self.calls.append(call)
            self.emit(CallEnded(path, segment, call.finish, call.sampled_tokens))
        return call

    async def stream(self, recorder: Recorder, resumption: int, seed: int, budget: int) -> None:
        """Feed one engine request into the recorder."""
        path, segment = recorder.path, recorder.segment
        sampling = SamplingParams(
            self.request.temperature,
            max_new_tokens=budget,
            stop_ids=self.protocol.stop_ids,
            seed=seed,
        )
        where = ".".join(f"{i:03d}" for i in path)
        request = GenerateRequest(
            f"{self.tree_id}/{where}/{segment:03d}-{resumption:03d}",
            (*recorder.prompt, *recorder.ids),
            sampling,
            priority=segment + resumption,
            resumes=len(path) < self.deepest,
            thread=path,
        )
        async with aclosing(chunks_of(self.engine, request)) as chunks:
            async for chunk in chunks:
                recorder.add(chunk)
                self.tokens += len(chunk.token_ids)
                if chunk.token_ids:
                    self.emit(TokensSampled(path, segment, chunk.token_ids))
                if chunk.finish is not None:
                    recorder.finish, recorder.error = chunk.finish, chunk.error
