"""The trace grammar: one typed event a line, byte-exact from text to events and back.

Invariants (tested on the authors' traces): `parse_trace(text).text() == text` for every text that parses, and every
text the solvers write parses. Parsing is linear in the text, and a text over `MAX_TEXT_CHARS` is refused unread.
Format: paper appendix; docs/format.md lists the lines of the paper's method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apr_ray.tasks.countdown.arithmetic import MAX_DIGITS, Operation

MAX_TEXT_CHARS = 1_000_000
Node = tuple[int, ...]
ROOT: Node = (0,)

SPAWN_OPEN = "<Calling Sub Searches>"
SPAWN_CLOSE = "<End Calling Sub Searches>"
JOIN_OPEN = "<Sub Searches>"
JOIN_CLOSE = "<End Sub Searches>"
NO_SOLUTION = "No solution found."
SUB_NO_SOLUTION = "No solution found in sub search"
EQUAL = " equal: Goal Reached"
UNEQUAL = " unequal: No Solution"


class TraceError(ValueError):
    """A text is not a trace: which line (counted from 1) and why."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


def node_text(node: Node) -> str:
    """`#0,2,1`."""
    return "#" + ",".join(map(str, node))


def numbers_text(numbers: Sequence[int]) -> str:
    """`[22, 31, 27]`."""
    return str(list(numbers))


def move_line(node: str) -> str:
    """A `Move` from its parts' texts, as the next ones: the solvers write most lines, and make no events of them."""
    return f"Moving to Node {node}"


def state_line(target: int, numbers: str, operations: str) -> str:
    """A `State`; operations are quoted, with commas between."""
    return f"Current State: {target}:{numbers}, Operations: [{operations}]"


def explore_line(operation: str, numbers: str) -> str:
    """An `Explore`."""
    return f"Exploring Operation: {operation}, Resulting Numbers: {numbers}"


def generate_line(node: str, target: int, numbers: str, operation: str) -> str:
    """A `Generate`."""
    return f"Generated Node {node}: {target}:{numbers} Operation: {operation}"


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget prefix, on the same line before the first event: "Sub Call Budget" (APR) or "Token Budget" (SoS+)."""

    kind: str
    amount: int

    def text(self) -> str:
        return f"{self.kind}: {self.amount} "


@dataclass(frozen=True, slots=True)
class Move:
    """`Moving to Node #0,1`."""

    node: Node

    def text(self) -> str:
        return move_line(node_text(self.node))


@dataclass(frozen=True, slots=True)
class State:
    """`Current State: 27:[22, 31, 27], Operations: ['53-26=27']`."""

    target: int
    numbers: tuple[int, ...]
    operations: tuple[Operation, ...]

    def text(self) -> str:
        operations = ", ".join(f"'{operation}'" for operation in self.operations)
        return state_line(self.target, numbers_text(self.numbers), operations)


@dataclass(frozen=True, slots=True)
class Explore:
    """`Exploring Operation: 53-26=27, Resulting Numbers: [22, 31, 27]`."""

    operation: Operation
    numbers: tuple[int, ...]

    def text(self) -> str:
        return explore_line(str(self.operation), numbers_text(self.numbers))


@dataclass(frozen=True, slots=True)
class Generate:
    """`Generated Node #0,0: 27:[22, 31, 27] Operation: 53-26=27`."""

    node: Node
    target: int
    numbers: tuple[int, ...]
    operation: Operation

    def text(self) -> str:
        return generate_line(node_text(self.node), self.target, numbers_text(self.numbers), str(self.operation))


@dataclass(frozen=True, slots=True)
class Compare:
    """`27,27 equal: Goal Reached` or `3,27 unequal: No Solution`, as the line says, true or not."""

    value: int
    target: int
    equal: bool

    def text(self) -> str:
        return f"{self.value},{self.target}{EQUAL if self.equal else UNEQUAL}"


@dataclass(frozen=True, slots=True)
class Fixed:
    """A line without parameters: a tag, or one of the two "No solution" lines."""

    line: str

    def text(self) -> str:
        return self.line


@dataclass(frozen=True, slots=True)
class SpawnChild:
    """`<Start Sub Search 0 at level 1> Moving to Node #0,0`."""

    index: int
    level: int
    node: Node

    def text(self) -> str:
        return f"<Start Sub Search {self.index} at level {self.level}> Moving to Node {node_text(self.node)}"


@dataclass(frozen=True, slots=True)
class JoinChild:
    """`<Goal Reached in Sub Search 1 at level 1 at Node #0,1>`, or "No Solution in", or "Cancelled"."""

    how: str
    index: int
    level: int
    node: Node

    def text(self) -> str:
        return f"<{self.how} Sub Search {self.index} at level {self.level} at Node {node_text(self.node)}>"


@dataclass(frozen=True, slots=True)
class SubSearch:
    """SoS+: `Start Sub Search at level 1: Moving to Node #0,0`."""

    level: int
    node: Node

    def text(self) -> str:
        return f"Start Sub Search at level {self.level}: Moving to Node {node_text(self.node)}"


@dataclass(frozen=True, slots=True)
class ExitSubSearch:
    """SoS+: `Exit Sub Search at level 1`."""

    level: int

    def text(self) -> str:
        return f"Exit Sub Search at level {self.level}"


Event = Move | State | Explore | Generate | Compare | Fixed | SpawnChild | JoinChild | SubSearch | ExitSubSearch


@dataclass(frozen=True, slots=True)
class Trace:
    """A parsed text: an optional budget, then one event a line."""

    budget: Budget | None
    events: tuple[Event, ...]
    final_newline: bool

    def text(self) -> str:
        """The text it was parsed from, byte for byte."""
        head = self.budget.text() if self.budget else ""
        return head + "\n".join(event.text() for event in self.events) + ("\n" if self.final_newline else "")


# Every alternative is anchored by its own literal words and every repetition is bounded or over disjoint characters, so
# that matching never backtracks over more than one line.
_INT = rf"(?:0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})"
_NODE = r"#((?:0|[1-9][0-9]{0,4})(?:,(?:0|[1-9][0-9]{0,4})){0,15})"
_NUMBERS = rf"\[({_INT}(?:, {_INT}){{0,15}})\]"
_OPERATION = rf"({_INT})([-+*/])({_INT})=({_INT})"
_OPERATION_LIST = rf"\[((?:'{_INT}[-+*/]{_INT}={_INT}'(?:, '{_INT}[-+*/]{_INT}={_INT}'){{0,15}})?)\]"
_SMALL = r"(0|[1-9][0-9]{0,4})"
BUDGET_KINDS = ("Sub Call Budget", "Token Budget")
_BUDGET = re.compile(rf"({'|'.join(BUDGET_KINDS)}): ([1-9][0-9]{{0,5}}) ")
_ONE_OPERATION = re.compile(_OPERATION)
_FIXED = frozenset({SPAWN_OPEN, SPAWN_CLOSE, JOIN_OPEN, JOIN_CLOSE, NO_SOLUTION, SUB_NO_SOLUTION})


def _node(text: str) -> Node:
    return tuple(map(int, text.split(",")))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(", ")))


def _operation(a: str, op: str, b: str, result: str) -> Operation:
    return Operation(int(a), op, int(b), int(result))


def _operations(text: str) -> tuple[Operation, ...]:
    return tuple(_operation(*found) for found in _ONE_OPERATION.findall(text))


_LINES: tuple[tuple[str, re.Pattern[str], Callable[..., Event]], ...] = (
    (
        "Exploring Operation: ",
        re.compile(rf"Exploring Operation: {_OPERATION}, Resulting Numbers: {_NUMBERS}"),
        lambda a, o, b, r, n: Explore(_operation(a, o, b, r), _ints(n)),
    ),
    (
        "Generated Node ",
        re.compile(rf"Generated Node {_NODE}: ({_INT}):{_NUMBERS} Operation: {_OPERATION}"),
        lambda x, t, n, a, o, b, r: Generate(_node(x), int(t), _ints(n), _operation(a, o, b, r)),
    ),
    ("Moving to Node ", re.compile(rf"Moving to Node {_NODE}"), lambda x: Move(_node(x))),
    (
        "Current State: ",
        re.compile(rf"Current State: ({_INT}):{_NUMBERS}, Operations: {_OPERATION_LIST}"),
        lambda t, n, ops: State(int(t), _ints(n), _operations(ops)),
    ),
    (
        "<Start Sub Search ",
        re.compile(rf"<Start Sub Search {_SMALL} at level {_SMALL}> Moving to Node {_NODE}"),
        lambda i, level, x: SpawnChild(int(i), int(level), _node(x)),
    ),
    (
        "<",
        re.compile(
            rf"<(No Solution in|Goal Reached in|Cancelled) Sub Search {_SMALL} at level {_SMALL} at Node {_NODE}>"
        ),
        lambda how, i, level, x: JoinChild(how, int(i), int(level), _node(x)),
    ),
    (
        "Start Sub Search at level ",
        re.compile(rf"Start Sub Search at level {_SMALL}: Moving to Node {_NODE}"),
        lambda level, x: SubSearch(int(level), _node(x)),
    ),
    (
        "Exit Sub Search at level ",
        re.compile(rf"Exit Sub Search at level {_SMALL}"),
        lambda level: ExitSubSearch(int(level)),
    ),
)
_COMPARE = re.compile(rf"({_INT}),({_INT}) (equal: Goal Reached|unequal: No Solution)")


def parse_line(line: str) -> Event | None:
    """One line (without its newline) as an event, or None if it is none."""
    if line in _FIXED:
        return Fixed(line)
    for start, pattern, build in _LINES:
        if line.startswith(start):
            match = pattern.fullmatch(line)
            return build(*match.groups()) if match else None
    match = _COMPARE.fullmatch(line)
    return Compare(int(match[1]), int(match[2]), match[3][0] == "e") if match else None


def split_budget(text: str) -> tuple[Budget | None, str]:
    """The budget prefix of a text, if it has one, and the rest."""
    match = _BUDGET.match(text)
    return (Budget(match[1], int(match[2])), text[match.end() :]) if match else (None, text)


def parse_trace(text: str) -> Trace:
    """A text as typed events. Raises TraceError naming the first line that is none, and why."""
    if len(text) > MAX_TEXT_CHARS:
        raise TraceError(1, f"text of {len(text)} characters, at most {MAX_TEXT_CHARS} are read")
    budget, body = split_budget(text)
    final_newline = body.endswith("\n")
    events: list[Event] = []
    for number, line in enumerate(body.removesuffix("\n").split("\n"), start=1):
        event = parse_line(line)
        if event is None:
            raise TraceError(number, f"not a line of the grammar: {line[:80]!r}")
        if events and isinstance(events[-1], Explore) and not isinstance(event, Generate | Compare):
            raise TraceError(number, "an explored operation must be followed by a generated node or a comparison")
        events.append(event)
    return Trace(budget, tuple(events), final_newline)
