"""The strict check of a solution: replay it, line by line. Nothing that a model wrote is evaluated."""

from __future__ import annotations

from apr_ray.core.task import Verdict
from apr_ray.tasks.countdown.arithmetic import remaining_after
from apr_ray.tasks.countdown.grammar import (
    EQUAL,
    MAX_TEXT_CHARS,
    ROOT,
    Compare,
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
    """What follows the second last `x,y equal: Goal Reached` line; None where there are fewer than two.

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
    """Replay an answer from the root: every line must follow from the ones before it.

    Reasons: solved, answer_too_long, malformed, not_from_root, wrong_state, bad_arithmetic, wrong_numbers, wrong_node,
    wrong_target, unfinished, trailing_text.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict(False, "answer_too_long")
    try:
        events = list(parse_trace(answer).events)
    except TraceError:
        return Verdict(False, "malformed")
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
            return Verdict(False, "not_from_root" if first else "unfinished")
        move, state, explore, result = step
        if not isinstance(move, Move) or not isinstance(state, State) or not isinstance(explore, Explore):
            return Verdict(False, "malformed")
        if move.node != node:
            return Verdict(False, "not_from_root" if first else "wrong_node")
        same = sorted(state.numbers) == sorted(numbers) if first else state.numbers == numbers
        if not same or state.operations != done:
            return Verdict(False, "wrong_state")
        if state.target != problem.target:
            return Verdict(False, "wrong_target")
        numbers, first = state.numbers, False
        if not explore.operation.is_valid():
            return Verdict(False, "bad_arithmetic")
        left = remaining_after(numbers, explore.operation)
        if left is None or sorted(explore.numbers) != sorted(left):
            return Verdict(False, "wrong_numbers")
        numbers, done = explore.numbers, (*done, explore.operation)
        position += 4
        if isinstance(result, Compare):
            break
        if not isinstance(result, Generate) or result.operation != explore.operation:
            return Verdict(False, "malformed")
        if result.numbers != numbers or result.target != problem.target or result.node[:-1] != node:
            return Verdict(False, "wrong_node")
        node = result.node
    if not result.equal or numbers != (result.value,) or result.value != problem.target:
        return Verdict(False, "wrong_target")
    if result.target != problem.target:
        return Verdict(False, "wrong_target")
    if position != len(events):
        return Verdict(False, "trailing_text")
    return Verdict(True, "solved")
