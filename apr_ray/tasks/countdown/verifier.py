"""The check of a solution: its operations, replayed on the numbers, decide. Nothing that a model wrote is evaluated.

What else is wrong in its text (a state line, a node, a stray line) does not make it wrong, and has a name of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from apr_ray.core.task import Verdict
from apr_ray.tasks.countdown.arithmetic import remaining_after
from apr_ray.tasks.countdown.grammar import (
    EQUAL,
    MAX_TEXT_CHARS,
    ROOT,
    Compare,
    Event,
    ExitSubSearch,
    Explore,
    Generate,
    Move,
    State,
    TraceError,
    parse_line,
    parse_trace,
)
from apr_ray.tasks.countdown.problem import CountdownProblem

MAX_ANSWER_CHARS = 20_000


def verify_solution(problem: CountdownProblem, text: str) -> Verdict:
    """Whether a whole text solves the problem; see `extract_answer` and `verify_answer`.

    Reasons: solved, text_too_long, no_answer, and those of `verify_answer`.
    """
    if len(text) > MAX_TEXT_CHARS:
        return Verdict(False, "text_too_long")
    answer = extract_answer(text)
    return Verdict(False, "no_answer") if answer is None else verify_answer(problem, answer)


def extract_answer(text: str) -> str | None:
    """The text after the second last `x,y equal: Goal Reached` line; None where there are fewer than two.

    Only whole lines of that form count: the words inside a join tag do not.
    """
    ends = []
    position = 0
    for line in text.split("\n"):
        position += len(line) + 1
        if line.endswith(EQUAL) and isinstance(parse_line(line), Compare):
            ends.append(position)
    return text[ends[-2] :] if len(ends) >= 2 else None


def verify_answer(problem: CountdownProblem, answer: str) -> Verdict:
    """Replay the "Exploring Operation" lines of an answer, in their order, on the problem's numbers; a "Goal Reached"
    line must follow the last. The authors' released code accepts the same of its altered solutions.

    Reasons: solved, answer_too_long, no_operation, bad_arithmetic, wrong_numbers, wrong_target, unfinished (numbers are
    left, or it does not say that it is done). The `form` of a right answer is its first `fault_of_form`.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict(False, "answer_too_long")
    events = [event for line in answer.split("\n") if (event := parse_line(line)) is not None]
    reason = _replay(problem, events)
    return Verdict(False, reason) if reason else Verdict(True, "solved", fault_of_form(problem, answer))


def _replay(problem: CountdownProblem, events: Sequence[Event]) -> str:
    """Why these lines do not solve the problem; "" where they do."""
    numbers: tuple[int, ...] = problem.numbers
    explored = ended = False
    for event in events:
        if isinstance(event, Explore):
            if not event.operation.is_valid():
                return "bad_arithmetic"
            left = remaining_after(numbers, event.operation)
            if left is None or sorted(left) != sorted(event.numbers):
                return "wrong_numbers"
            numbers, explored, ended = left, True, False
        elif isinstance(event, Compare) and event.equal:
            ended = True

    if not explored:
        return "no_operation"
    if len(numbers) == 1 and numbers[0] != problem.target:
        return "wrong_target"
    return "" if numbers == (problem.target,) and ended else "unfinished"


def fault_of_form(problem: CountdownProblem, answer: str) -> str:
    """The first line of a right answer that does not follow from the ones before it, by name; "" where all do.

    Names: malformed, not_from_root, wrong_state, wrong_numbers, wrong_node, wrong_target, unfinished, trailing_text.
    """
    try:
        events = list(parse_trace(answer).events)
    except TraceError:
        return "malformed"
    while events and isinstance(events[-1], ExitSubSearch):  # SoS+ leaves its nested searches after the answer
        events.pop()

    numbers: tuple[int, ...] = problem.numbers
    done: tuple[object, ...] = ()
    node = ROOT
    first = True
    position = 0
    while True:
        step = events[position : position + 4]
        if len(step) < 4:
            return "not_from_root" if first else "unfinished"
        move, state, explore, result = step
        if not isinstance(move, Move) or not isinstance(state, State) or not isinstance(explore, Explore):
            return "malformed"
        if move.node != node:
            return "not_from_root" if first else "wrong_node"
        same = sorted(state.numbers) == sorted(numbers) if first else state.numbers == numbers
        if not same or state.operations != done:
            return "wrong_state"
        if state.target != problem.target:
            return "wrong_target"
        numbers, first = state.numbers, False
        left = remaining_after(numbers, explore.operation)
        if left is None or sorted(explore.numbers) != sorted(left):
            return "wrong_numbers"
        numbers, done = explore.numbers, (*done, explore.operation)
        position += 4
        if isinstance(result, Compare):
            break
        if not isinstance(result, Generate) or result.operation != explore.operation:
            return "malformed"
        if result.numbers != numbers or result.target != problem.target or result.node[:-1] != node:
            return "wrong_node"
        node = result.node
    if not result.equal or numbers != (result.value,) or result.value != problem.target:
        return "wrong_target"
    if result.target != problem.target:
        return "wrong_target"
    if position != len(events):
        return "trailing_text"
    return ""
