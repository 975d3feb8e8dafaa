"""Why a search failed: every line of every thread replayed, the root's successors held against exhaustive search."""

from __future__ import annotations

from collections.abc import Sequence

from apr_ray.tasks.countdown.arithmetic import remaining_after
from apr_ray.tasks.countdown.grammar import Compare, Explore, Generate, State, parse_line
from apr_ray.tasks.countdown.oracle import is_solvable
from apr_ray.tasks.countdown.problem import CountdownProblem


def diagnose(problem: CountdownProblem, texts: Sequence[str]) -> str:
    """The cause of a failure, from the texts of all threads, the root parent's first.

    Returns:
        width: every line is right, and no state that follows from the root in one step leads to the target;
        arithmetic: one that does was written, and a result somewhere is wrong;
        width_and_arithmetic: none was written, and a result is wrong;
        copying: results are right, but numbers of a state were lost or changed;
        passed_over: all is right and one that leads to the target was written, but not followed to its end.
    """
    results_right = copies_right = True
    promising = False
    for text in texts:
        numbers: tuple[int, ...] = ()
        explored: Explore | None = None
        for event in map(parse_line, text.split("\n")):
            if isinstance(event, State):
                numbers = event.numbers
                copies_right &= _follows(problem, event)
            elif isinstance(event, Explore):
                explored = event
                left = remaining_after(numbers, event.operation)
                valid = event.operation.is_valid()
                copied = left is not None and sorted(event.numbers) == sorted(left)
                results_right &= valid
                copies_right &= copied
                at_root = sorted(numbers) == sorted(problem.numbers)
                promising |= valid and copied and at_root and is_solvable(event.numbers, problem.target)
            elif isinstance(event, Generate) and explored is not None:
                copies_right &= event.numbers == explored.numbers and event.operation == explored.operation
            elif isinstance(event, Compare) and explored is not None:
                copies_right &= (event.value,) == explored.numbers and event.target == problem.target
                copies_right &= event.equal == (event.value == event.target)

    if not results_right:
        return "arithmetic" if promising else "width_and_arithmetic"
    if not copies_right:
        return "copying"
    return "passed_over" if promising else "width"


def _follows(problem: CountdownProblem, state: State) -> bool:
    """Whether a state's numbers are what its own operations leave of the problem's."""
    numbers: tuple[int, ...] = problem.numbers
    for operation in state.operations:
        left = remaining_after(numbers, operation)
        if left is None:
            return False
        numbers = left
    return state.target == problem.target and sorted(state.numbers) == sorted(numbers)
