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
import re
import time
from collections.abc import Callable
from functools import cache
from timeit import timeit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_ray.config import BoundsConfig
from apr_ray.core.engine import GenerateRequest
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Disposition, JoinOutcome, Outcome, ThreadTree
from apr_ray.core.task import ChildResult, SpawnRequest, ThreadEnd
from apr_ray.engines.scripted_engine import Reply, ScriptedEngine
from apr_ray.tasks.countdown import grammar, spawn_join
from apr_ray.tasks.countdown.grammar import JOIN_CLOSE, JOIN_OPEN, SPAWN_CLOSE, SPAWN_OPEN, TraceError, parse_trace
from apr_ray.tasks.countdown.problem import CountdownProblem
from apr_ray.tasks.countdown.protocol import CountdownProtocol
from apr_ray.tasks.countdown.solver import SolverOptions, solve_apr, solve_sosp
from apr_ray.tasks.countdown.spawn_join import SpawnError
from apr_ray.tasks.countdown.tokenizer import PHRASES, build_tokenizer
from apr_ray.tasks.countdown.verifier import extract_answer, verify_solution
from apr_ray.threads.runtime import TreeRequest, run_tree

PROBLEM = CountdownProblem((3, 5, 7), 22)
TOKENIZER = build_tokenizer()
TAGS = (SPAWN_OPEN, SPAWN_CLOSE, JOIN_OPEN, JOIN_CLOSE)
VERDICTS = {
    "solved", "text_too_long", "no_answer", "answer_too_long", "no_operation",
    "bad_arithmetic", "wrong_numbers", "wrong_target", "unfinished",
}  # fmt: skip
SPAWN_REASONS = {"spawn_unclosed", "spawn_malformed", "spawn_empty", "spawn_unknown_node"}
REOPENED = "spawn_reopened"  # named by the runtime, the others by the protocol
CHILD_REASONS = {"", "bad_message", "text_too_long"}


# --- the fuzzer -------------------------------------------------------------------------------------------------------


@cache
def pool() -> tuple[str, ...]:
    """Valid texts: whole segments and children of APR runs, and SoS+ runs."""
    options = SolverOptions(beam_low=1, beam_high=3, child_beam_high=4, promising=0.7)
    texts: list[str] = []
    for seed in range(25):
        problem = CountdownProblem(((3, 5, 7), (2, 9, 4), (6, 6, 1))[seed % 3], (22, 34, 12)[seed % 3])
        trace = solve_apr(problem, seed, options)
        pairs = [*trace.segments, *(pair for spawned in trace.children for pair in spawned)]
        pairs.append(solve_sosp(problem, seed, options)[:2])
        texts += [prompt + completion for prompt, completion in pairs]
    return tuple(texts)


def lines_of(change: Callable[[list[str], random.Random], None]) -> Callable[[str, random.Random], str]:
    def mutate(text: str, rng: random.Random) -> str:
        lines = text.split("\n")
        change(lines, rng)
        return "\n".join(lines)

    return mutate


def swap(lines: list[str], rng: random.Random) -> None:
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]


def double(lines: list[str], rng: random.Random) -> None:
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))


def steal(lines: list[str], rng: random.Random) -> None:
    """A line of another trace, or one that only the runtime writes."""
    own = [*TAGS, "<Goal Reached in Sub Search 0 at level 1 at Node #0,0>", "22,22 equal: Goal Reached"]
    own += ["<Start Sub Search 0 at level 1> Moving to Node #0,0", "<Cancelled Sub Search 1 at level 1 at Node #0,9>"]
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(own + rng.choice(pool()).split("\n")))


def number(text: str, rng: random.Random) -> str:
    """One number becomes another: huge, negative, fractional, padded, in other digits."""
    found = list(re.finditer(r"\d+", text))
    if not found:
        return text
    at = rng.choice(found)
    new = rng.choice(["0", "00", "-1", "1.5", "9" * 18, "9" * 19, "9" * 5000, "٣", "²", "1e9", "", "7", "22", "65536"])
    return text[: at.start()] + new + text[at.end() :]


def insert(text: str, rng: random.Random) -> str:
    what = rng.choice(
        [*PHRASES, "\u2028", "\r", "\x00", "\ud800", "é", "😀", "\x85", " ", "\n\n", "{}", "%s", "__import__"]
    )
    at = rng.randrange(len(text) + 1)
    return text[:at] + what + text[at:]


def spawn(text: str, rng: random.Random, level: int = 1) -> str:
    """A spawn block at the end: mostly of nodes that are there, mostly closed, at times after another."""
    text = text if rng.random() < 0.2 else text.partition(SPAWN_OPEN)[0]
    nodes = re.findall(r"Generated Node (#[\d,]+)", text) or ["#0,0"]
    odd = ["#0,7", "#0", "#" + "0," * 40 + "0"]
    chosen = [rng.choice(odd if rng.random() < 0.1 else nodes) for _ in range(rng.randrange(5))]
    level += rng.random() < 0.1
    lines = [f"<Start Sub Search {i} at level {level}> Moving to Node {n}" for i, n in enumerate(chosen)]
    block = "\n".join([SPAWN_OPEN, *lines, *[SPAWN_CLOSE] * rng.choice([1] * 8 + [0, 2])])
    return text.rstrip("\n") + "\n" + block + "\n" * rng.choice([0, 1, 1, 1, 1, 1, 2])


MUTATIONS: tuple[Callable[[str, random.Random], str], ...] = (
    lines_of(lambda lines, rng: lines.pop(rng.randrange(len(lines))) and None),
    lines_of(double),
    lines_of(swap),
    lines_of(steal),
    number,
    insert,
    spawn,
    lambda text, rng: text[: rng.randrange(len(text) + 1)],
    lambda text, rng: text[rng.randrange(len(text) + 1) :],
    lambda text, rng: text + rng.choice(pool()),
    lambda text, rng: text.replace(rng.choice([*TAGS, "\n", " equal", "#0"]), rng.choice(["", "\n", *TAGS])),
)


def hostile(rng: random.Random, mutations: int) -> str:
    text = rng.choice(pool())
    for _ in range(mutations):
        text = rng.choice(MUTATIONS)(text, rng)
    return text


def token_ids(text: str, rng: random.Random) -> list[int]:
    """The text as a model could write it: what no token says becomes random tokens, and some are thrown in anywhere."""
    try:
        ids = TOKENIZER.encode(text)
    except AprError:
        kept = [piece for piece in re.split("([^\x20-\x7e\n]+)", text[:3000])]
        ids = []
        for piece in kept:
            try:
                ids += TOKENIZER.encode(piece)
            except AprError:
                ids += [rng.randrange(TOKENIZER.vocab_size) for _ in range(3)]
    for _ in range(rng.choice([0] * 6 + [1, 5])):
        ids.insert(rng.randrange(len(ids) + 1), rng.randrange(TOKENIZER.vocab_size))
    return ids


# --- what must hold ---------------------------------------------------------------------------------------------------


def check_text(text: str) -> None:
    with contextlib.suppress(TraceError):
        assert parse_trace(text).text() == text
    assert verify_solution(PROBLEM, text).reason in VERDICTS
    answer = extract_answer(text)
    assert answer is None or text.endswith(answer)
    result = spawn_join.child_result(text)
    assert result.reason in CHILD_REASONS
    if result.outcome is JoinOutcome.SOLVED:
        assert not any(tag in result.message for tag in TAGS), "a message holds the runtime's words"
        block = spawn_join.join_block([(0, 0)], [result], 1)
        assert TOKENIZER.decode(TOKENIZER.encode(block)) == block
    own, opening, block = text.partition(SPAWN_OPEN)
    refused = ""
    try:
        for child in spawn_join.read_spawn_block(opening + block, own, 1):
            parse_trace(child.prompt)
            assert TOKENIZER.decode(TOKENIZER.encode(child.prompt)) == child.prompt
    except SpawnError as error:
        refused = error.reason
    assert refused in {"", *SPAWN_REASONS}
    with contextlib.suppress(AprError):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def check_protocol(ids: list[int]) -> None:
    protocol = CountdownProtocol(TOKENIZER)
    context = protocol.root_prompt(PROBLEM)
    asked = protocol.read_call(context, ids, 0)
    result = protocol.read_child(context, ids)
    assert result.reason in CHILD_REASONS
    if isinstance(asked, ThreadEnd):
        assert asked.outcome in (Outcome.ANSWERED, Outcome.NO_ANSWER, Outcome.INVALID_SPAWN)
        assert asked.detail in ({*SPAWN_REASONS, "text_too_long"} if asked.outcome is Outcome.INVALID_SPAWN else {""})
        return
    assert isinstance(asked, SpawnRequest)
    results = [result, *[ChildResult(JoinOutcome.CANCELLED)] * (len(asked.children) - 1)]
    joined = protocol.text(protocol.join_ids(asked, results, 1))
    assert joined.count(JOIN_OPEN) == joined.count(JOIN_CLOSE) == 1


def reply_to(request: GenerateRequest, rng: random.Random, mutations: int) -> Reply:
    """What a hostile model writes: a mutated trace after its root state, often with a spawn, at times endless."""
    if rng.random() < 0.3:  # what solves nothing joins as nothing
        text = rng.choice([one for one in pool() if extract_answer(one)])
    else:
        text = hostile(rng, rng.randrange(mutations + 1))
    text = "\n" + (text.partition("]\n")[2] or text)
    thread = request.request_id.split("/")[1]
    level = len(thread.split(".")) + 1 if thread else 1
    text = spawn(text, rng, level) if rng.random() < 0.6 else text
    ids = [*token_ids(text, rng), TOKENIZER.eos_id]
    return Reply(ids[: rng.choice([None] * 7 + [50])], endless=rng.random() < 0.05)


def check_tree(rng: random.Random, mutations: int) -> ThreadTree:
    """A whole tree whose every call writes hostile tokens."""
    bounds = BoundsConfig(max_depth=2, max_children=3, max_rounds=2, max_call_tokens=1500, max_tree_tokens=8000)
    engine = ScriptedEngine(lambda request: reply_to(request, rng, mutations), context_tokens=2500, chunk_tokens=256)
    protocol = CountdownProtocol(TOKENIZER, max_depth=2)
    tree = asyncio.run(run_tree(engine, protocol, TreeRequest(PROBLEM), bounds, tree_id="t"))
    assert tree.outcome in Outcome
    assert tree.outcome is not Outcome.ENGINE_ERROR
    assert engine.active == {}
    assert sum(tree.dispositions().values()) == tree.total_tokens == engine.sampled <= bounds.max_tree_tokens
    assert tree.depth <= 2
    assert all(len(s.children) <= 3 for s in tree.spawns)
    reasons = {reason for join in tree.joins for reason in join.reasons}
    assert reasons <= CHILD_REASONS | {outcome.value for outcome in Outcome}
    assert verify_solution(PROBLEM, tree.final_text).reason in VERDICTS
    return tree


def check_all(seed: int, mutations: int) -> None:
    rng = random.Random(f"{seed}/{mutations}")
    text = hostile(rng, mutations)
    check_text(text)
    check_protocol(token_ids(text, rng))
    check_tree(rng, mutations)


# --- the tests --------------------------------------------------------------------------------------------------------


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
