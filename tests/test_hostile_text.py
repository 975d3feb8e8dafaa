"""Contract 6: whatever a model writes has a named outcome, never an exception, in time linear in its size.

Valid traces of both solvers are mutated: lines dropped, doubled and swapped, wrong ids, huge numbers, tags nested, out
of place or unclosed, the runtime's own words inside messages, unicode, cuts at any character. Each text goes through
grammar, verifier, spawn and join; as token ids, with foreign ids mixed in, through the protocol and whole trees.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable
from timeit import timeit

import pytest
from hostile_texts import PROBLEM, REOPENED, SPAWN_REASONS, TOKENIZER, check_all, check_text, check_tree, pool
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_ray.config import BoundsConfig
from apr_ray.core.engine import GenerateRequest
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Disposition, JoinOutcome, Outcome, ThreadTree
from apr_ray.engines.scripted_engine import Reply, ScriptedEngine
from apr_ray.tasks.countdown import grammar, spawn_join
from apr_ray.tasks.countdown.grammar import JOIN_OPEN, SPAWN_CLOSE, SPAWN_OPEN, TraceError, parse_trace
from apr_ray.tasks.countdown.protocol import CountdownProtocol
from apr_ray.tasks.countdown.spawn_join import SpawnError
from apr_ray.tasks.countdown.verifier import verify_solution
from apr_ray.threads.runtime import TreeRequest, run_tree


def test_the_unharmed_texts_parse() -> None:
    assert len(pool()) > 60
    for text in pool():
        assert parse_trace(text).text() == text


def test_the_fuzzer_comes_everywhere() -> None:
    """Else it would prove nothing: whole trees with joins of every kind, and every way a call can end."""
    trees = [check_tree(random.Random(seed), 4) for seed in range(1500)]
    details = {tree.detail for tree in trees if tree.outcome is Outcome.INVALID_SPAWN}
    joined = {(o, r) for t in trees for j in t.joins for o, r in zip(j.outcomes, j.reasons, strict=True)}
    assert details == {*SPAWN_REASONS, REOPENED}
    assert (JoinOutcome.SOLVED, "") in joined
    assert {"", "bad_message", "invalid_spawn", "truncated"} <= {reason for _, reason in joined}
    assert {Outcome.ANSWERED, Outcome.NO_ANSWER, Outcome.TRUNCATED, Outcome.BOUND_CHILDREN} <= {
        tree.outcome for tree in trees
    }
    assert max(tree.depth for tree in trees) == 2
    assert any(call.replaced for tree in trees for call in tree.calls)
    assert sum(bool(tree.joins) for tree in trees) > 60


@settings(max_examples=2000)
@given(st.integers(0, 2**32), st.integers(0, 8))
def test_hostile_text_has_a_named_outcome(seed: int, mutations: int) -> None:
    check_all(seed, mutations)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(10))
def test_100_000_hostile_texts_have_named_outcomes(part: int) -> None:
    for seed in range(10_000):
        check_all(1_000_000 * (part + 1) + seed, seed % 9)


@settings(max_examples=500)
@given(st.text(max_size=400))
def test_any_unicode_has_a_named_outcome(text: str) -> None:
    check_text(text)


FAMILIES: dict[str, Callable[[int], str]] = {
    "goals": lambda n: "22,22 equal: Goal Reached\n" * n,
    "moves": lambda n: "Moving to Node #0\n" * n,
    "nodes": lambda n: (
        "Current State: 22:[3, 5, 7], Operations: []\n"
        + "".join(f"Generated Node #0,{i % 99999}: 22:[7, 15] Operation: 3*5=15\n" for i in range(n))
    ),
    "spawns": lambda n: (
        "Current State: 22:[3, 5, 7], Operations: []\nGenerated Node #0,0: 22:[7, 15] Operation: 3*5=15\n"
        + "\n".join(
            [
                SPAWN_OPEN,
                *(f"<Start Sub Search {i} at level 1> Moving to Node #0,0" for i in range(n)),
                SPAWN_CLOSE,
            ]
        )
    ),
    "openings": lambda n: (SPAWN_OPEN + "\n") * n,
    "joins": lambda n: (JOIN_OPEN + "\n") * n,
    "nested searches": lambda n: "".join(
        f"Start Sub Search at level {i % 99999}: Moving to Node #0\n" for i in range(n)
    ),
    "one number": lambda n: "Moving to Node #" + "1" * (20 * n),
    "one list": lambda n: "Current State: 22:[" + "3, " * (7 * n) + "3], Operations: []",
    "operations": lambda n: "Current State: 22:[3], Operations: [" + "'3*5=15', " * (2 * n) + "'3*5=15']",
    "one line": lambda n: "22,22 equal" * (2 * n),
    "empty lines": lambda n: "\n" * (20 * n),
    "answers": lambda n: (
        "22,22 equal: Goal Reached\n"
        + "Moving to Node #0\nCurrent State: 22:[3, 5, 7], Operations: []\n" * (n // 4)
        + "22,22 equal: Goal Reached\n"
    ),
    "budgets": lambda n: "Token Budget: 2048 " * n,
}


SMALL_CHARS = 8_000
TIMES = 8
MOST_GROWTH = 2.0
LEAST_S = 0.005


def readers(text: str) -> dict[str, Callable[[], object]]:
    """Everything that reads a text, each to be timed alone: a slow one would hide the others."""
    own, opening, block = text.partition(SPAWN_OPEN)
    protocol = CountdownProtocol(TOKENIZER)
    found: dict[str, Callable[[], object]] = {
        "encode": refusing(lambda: TOKENIZER.encode(text)),
        "parse_trace": refusing(lambda: parse_trace(text)),
        "verify_solution": lambda: verify_solution(PROBLEM, text),
        "child_result": lambda: spawn_join.child_result(text),
        "generated_states": lambda: spawn_join.generated_states(text),
        "read_spawn_block": refusing(lambda: spawn_join.read_spawn_block(opening + block, own, 1)),
    }
    with contextlib.suppress(AprError):
        ids = TOKENIZER.encode(text)
        found["read_call"] = lambda: protocol.read_call((), ids, 0)
        found["read_child"] = lambda: protocol.read_child((), ids)
    return found


def refusing(read: Callable[[], object]) -> Callable[[], None]:
    def reader() -> None:
        with contextlib.suppress(AprError, TraceError, SpawnError):
            read()

    return reader


def calls_in(work: Callable[[], object], least_s: float) -> int:
    """How many calls take at least so many CPU seconds."""
    calls = 1
    while timeit(work, number=calls, timer=time.process_time) < least_s:
        calls *= 2
    return calls


def growth(small: Callable[[], object], large: Callable[[], object], times: float) -> float:
    """CPU time of `large`, over that of `small` and `times` its size: 1 if time is linear, `times` if it is quadratic.

    Both are timed in turn, for at least `LEAST_S`; the least of two rounds counts, of more where that looks too much.
    """
    best: dict[Callable[[], object], float] = {small: math.inf, large: math.inf}
    calls = {work: calls_in(work, LEAST_S) for work in best}
    for round_number in range(8):
        for work in best:
            took = timeit(work, number=calls[work], timer=time.process_time) / calls[work]
            best[work] = min(best[work], took)
        found = best[large] / best[small] / times
        if round_number > 0 and found < MOST_GROWTH:
            break
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_takes_time_linear_in_the_text(family: str) -> None:
    """Eight times the text may take twice the time per character; a quadratic reader would take eight times."""
    build = FAMILIES[family]
    n = SMALL_CHARS * 100 // len(build(100))
    small, large = build(n), build(TIMES * n)
    assert len(large) <= grammar.MAX_TEXT_CHARS, "it would be refused unread"
    for (name, read_small), read_large in zip(readers(small).items(), readers(large).values(), strict=True):
        found = growth(read_small, read_large, len(large) / len(small))
        assert found < MOST_GROWTH, f"{name}: {found:.1f} times the time per character"


def join_tags(tokens: int) -> Callable[[], ThreadTree]:
    """A tree whose root writes that many tokens, and after them nothing but the tag that only the runtime may write."""
    newline, tag = TOKENIZER.encode("\n")[0], TOKENIZER.tag_ids[JOIN_OPEN]
    protocol = CountdownProtocol(TOKENIZER)
    bounds = BoundsConfig(max_call_tokens=2 * tokens, max_tree_tokens=2 * tokens)
    root = protocol.root_prompt(PROBLEM)

    def work() -> ThreadTree:
        def script(request: GenerateRequest) -> Reply:
            engine.requests.clear()  # a quadratic runtime would fill the memory before it has taken its time
            return Reply([newline] * tokens + [tag] if request.prompt_ids == root else [tag])

        engine = ScriptedEngine(script, context_tokens=4 * tokens)
        return asyncio.run(run_tree(engine, protocol, TreeRequest(PROBLEM), bounds, tree_id="t"))

    return work


def test_running_takes_time_linear_in_the_tokens() -> None:
    """Regression: each tag was a new request with the whole prefix, without end."""
    found = growth(join_tags(4000), join_tags(TIMES * 4000), TIMES)
    assert found < MOST_GROWTH, f"{found:.1f} times the time per token"


def test_a_call_goes_on_after_one_forced_token_and_ends_at_the_second() -> None:
    tag = TOKENIZER.tag_ids[JOIN_OPEN]
    engine = ScriptedEngine(lambda request: Reply([tag]))
    protocol = CountdownProtocol(TOKENIZER)
    tree = asyncio.run(run_tree(engine, protocol, TreeRequest(PROBLEM), BoundsConfig(), tree_id="t"))
    assert (tree.outcome, tree.detail, tree.invalid_spawns) == (Outcome.INVALID_SPAWN, REOPENED, 1)
    (call,) = tree.calls
    assert call.sampled_ids == (protocol.spawn_open,) * 2
    assert call.forced == (0, 1)
    assert [(one.position, one.token_id) for one in call.replaced] == [(0, tag), (1, tag)]
    assert len(engine.requests) == 2
    assert tree.dispositions() == {Disposition.TRAINED: 2}
    assert tree.total_tokens == engine.sampled == 2


def test_a_text_beyond_the_cap_is_refused_unread() -> None:
    text = "Moving to Node #0\n" * (grammar.MAX_TEXT_CHARS // 18 + 1)
    with pytest.raises(TraceError, match="at most"):
        parse_trace(text)
    assert verify_solution(PROBLEM, text).reason == "text_too_long"
