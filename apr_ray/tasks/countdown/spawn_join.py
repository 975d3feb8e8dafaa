"""Spawn and join as text: what a parent asked for, what a child is given, what it brings back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apr_ray.core.ledger import JoinOutcome
from apr_ray.core.task import ChildResult
from apr_ray.tasks.countdown.grammar import (
    JOIN_CLOSE,
    JOIN_OPEN,
    SPAWN_CLOSE,
    SPAWN_OPEN,
    Compare,
    Event,
    Explore,
    Fixed,
    Generate,
    JoinChild,
    Move,
    Node,
    SpawnChild,
    State,
    TraceError,
    node_text,
    parse_line,
    parse_trace,
    split_budget,
)
from apr_ray.tasks.countdown.verifier import extract_answer

_JOIN_WORDS = {
    JoinOutcome.SOLVED: "Goal Reached in",
    JoinOutcome.NO_SOLUTION: "No Solution in",
    JoinOutcome.CANCELLED: "Cancelled",
}


class SpawnError(ValueError):
    """A spawn block cannot be followed: `reason` is its name in the ledger, `detail` the particulars."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class SpawnedChild:
    """One child a parent asked for."""

    node: Node
    prompt: str


def child_prompt(node: Node, state: State) -> str:
    """The two lines a child begins from, without a final newline."""
    return f"{Move(node).text()}\n{state.text()}"


def generated_states(text: str) -> dict[Node, State]:
    """The state of every node that a parent's own text generated; the first definition wins.

    Lines inside a join block are its children's words, not its own, and define nothing. Lines that do not parse are
    passed over: a model may have written them.
    """
    states: dict[Node, State] = {}
    current: State | None = None
    joined = False
    _, body = split_budget(text)
    for line in body.split("\n"):
        event = parse_line(line)
        if isinstance(event, Fixed):
            joined = event.line == JOIN_OPEN or (joined and event.line != JOIN_CLOSE)
        elif joined:
            continue
        elif isinstance(event, State):
            current = event
        elif isinstance(event, Generate) and current is not None:
            operations = (*current.operations, event.operation)
            states.setdefault(event.node, State(event.target, event.numbers, operations))
    return states


def read_spawn_block(block: str, own_text: str, level: int) -> list[SpawnedChild]:
    """The children that a spawn block asks for.

    Args:
        block: from the opening tag to the end of the call.
        own_text: the parent's context before the block, where the spawned nodes must have been generated.
        level: the depth of the children, which every line must name.

    Raises:
        SpawnError: with reason spawn_unclosed, spawn_malformed, spawn_empty or spawn_unknown_node.
    """
    if own_text and not own_text.endswith("\n"):
        raise SpawnError("spawn_malformed", f"{SPAWN_OPEN} does not begin a line: {own_text[-40:]!r}")
    lines = block.removesuffix("\n").split("\n")
    if SPAWN_CLOSE not in lines:
        raise SpawnError("spawn_unclosed", f"{len(lines)} lines without {SPAWN_CLOSE}")
    if lines[0] != SPAWN_OPEN or lines[-1] != SPAWN_CLOSE:
        raise SpawnError("spawn_malformed", f"begins {lines[0][:40]!r}, ends {lines[-1][:40]!r}")
    if len(lines) == 2:
        raise SpawnError("spawn_empty", "no child")
    states = generated_states(own_text)
    children = []
    for index, line in enumerate(lines[1:-1]):
        event = parse_line(line)
        if not isinstance(event, SpawnChild) or (event.index, event.level) != (index, level):
            raise SpawnError("spawn_malformed", f"child {index}: {line[:80]!r}")
        if event.node not in states:
            raise SpawnError("spawn_unknown_node", f"child {index}: {node_text(event.node)} was not generated")
        children.append(SpawnedChild(event.node, child_prompt(event.node, states[event.node])))
    return children


def spawn_block(nodes: Sequence[Node], level: int) -> str:
    """The block that spawns these nodes, with its final newline."""
    lines = [SpawnChild(i, level, node).text() for i, node in enumerate(nodes)]
    return "\n".join([SPAWN_OPEN, *lines, SPAWN_CLOSE]) + "\n"


_MESSAGE_EVENTS: tuple[type[Event], ...] = (Move, State, Explore, Generate, Compare)


def child_result(text: str) -> ChildResult:
    """What a child's whole text joins with: its restated path if it has one that parses, else "no solution".

    A message may hold search lines only, the last without its newline: a tag or a budget in it could pass for the
    runtime's own words.
    """
    answer = extract_answer(text)
    if answer is None:
        return ChildResult(JoinOutcome.NO_SOLUTION)
    message = answer.removesuffix("\n")
    try:
        trace = parse_trace(message)
    except TraceError:
        return ChildResult(JoinOutcome.NO_SOLUTION, reason="bad_message")
    search = all(isinstance(event, _MESSAGE_EVENTS) for event in trace.events)
    if not search or trace.final_newline or trace.budget is not None:
        return ChildResult(JoinOutcome.NO_SOLUTION, reason="bad_message")
    return ChildResult(JoinOutcome.SOLVED, message)


def join_block(nodes: Sequence[Node], results: Sequence[ChildResult], level: int) -> str:
    """The block that takes the spawn block's place, with its final newline."""
    lines = [JOIN_OPEN]
    for index, (node, result) in enumerate(zip(nodes, results, strict=True)):
        lines.append(JoinChild(_JOIN_WORDS[result.outcome], index, level, node).text())
        if result.outcome is JoinOutcome.SOLVED:
            lines.append(result.message)
    lines.append(JOIN_CLOSE)
    return "\n".join(lines) + "\n"
