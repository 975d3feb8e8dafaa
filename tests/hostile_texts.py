"""A fuzzer of traces, and what must hold of whatever it writes (contract 6)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import Callable
from functools import cache

from apr_ray.config import BoundsConfig
from apr_ray.core.engine import GenerateRequest
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import JoinOutcome, Outcome, ThreadTree
from apr_ray.core.task import ChildResult, SpawnRequest, ThreadEnd
from apr_ray.engines.scripted_engine import Reply, ScriptedEngine
from apr_ray.tasks.countdown import spawn_join
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
