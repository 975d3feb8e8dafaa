"""Why trees fail: a solver's failed search is right in every line but too narrow, and each fault put in is found."""

from __future__ import annotations

import pytest

from apr_ray.core.engine import FinishReason, VersionSpan
from apr_ray.core.ledger import SOLVED, Call, Outcome, ThreadTree
from apr_ray.core.weights import FIRST_VERSION
from apr_ray.evaluation.causes import causes, thread_texts
from apr_ray.tasks.countdown.diagnosis import diagnose
from apr_ray.tasks.countdown.problem import CountdownProblem
from apr_ray.tasks.countdown.task import CountdownTask

PROBLEM = CountdownProblem((3, 5, 7), 22)
ROOT = """Moving to Node #0
Current State: 22:[3, 5, 7], Operations: []
Exploring Operation: 5+7=12, Resulting Numbers: [3, 12]
Generated Node #0,0: 22:[3, 12] Operation: 5+7=12
Exploring Operation: 3*5=15, Resulting Numbers: [7, 15]
Generated Node #0,1: 22:[7, 15] Operation: 3*5=15
No solution found.
"""
NARROW = ROOT.replace("3*5=15", "3+5=8").replace("15]", "8]")
CHILD = """Moving to Node #0,0
Current State: 22:[3, 12], Operations: ['5+7=12']
Exploring Operation: 12-3=9, Resulting Numbers: [9]
9,22 unequal: No Solution
No solution found.
"""


@pytest.mark.parametrize(
    ("parent", "child", "cause"),
    [
        (NARROW, CHILD, "width"),
        (ROOT, CHILD, "passed_over"),
        (ROOT, CHILD.replace("12-3=9", "12-3=8").replace("[9]", "[8]").replace("9,22", "8,22"), "arithmetic"),
        (NARROW, CHILD.replace("12-3=9", "3-12=9"), "width_and_arithmetic"),
        (ROOT.replace("3*5=15", "3*5=16").replace("15]", "16]"), CHILD, "width_and_arithmetic"),
        (ROOT.replace("Numbers: [3, 12]", "Numbers: [5, 12]"), CHILD, "copying"),
        (ROOT.replace("22:[3, 12]", "22:[2, 12]"), CHILD, "copying"),
        (ROOT, CHILD.replace("[3, 12]", "[3, 11]").replace("12-3=9", "11-3=8").replace("[9]", "[8]"), "copying"),
        (ROOT, CHILD.replace("9,22 unequal: No Solution", "22,22 equal: Goal Reached"), "copying"),
        (ROOT, CHILD + "no line of the grammar\n", "passed_over"),
    ],
)
def test_a_failure_has_its_cause(parent: str, child: str, cause: str) -> None:
    assert diagnose(PROBLEM, [parent, child]) == cause


def test_the_solvers_failures_are_too_narrow_and_nothing_else(task: CountdownTask) -> None:
    """Whatever it did not solve, it wrote no wrong line, and never passed over a state that leads to the target."""
    failed = 0
    for number, problem in enumerate(task.problems("train", 60, 0)):
        shown = task.demonstrate(problem, number)
        if not shown.solved:
            failed += 1
            assert task.diagnose(problem, [one.prompt + one.completion for one in shown.sequences]) == "width"
    assert failed > 5


def test_causes_are_counted_by_ending_or_diagnosis(task: CountdownTask) -> None:
    tokenizer = task.tokenizer()

    def tree(text: str, outcome: Outcome = Outcome.NO_ANSWER, verdict: str = "no_answer") -> ThreadTree:
        ids = tuple(tokenizer.encode(text))
        calls = tuple(
            Call(
                (), segment, ids[:9], ids[9:end], (-0.1,) * len(ids[9:end]), (), (), FinishReason.STOP,
                (VersionSpan(FIRST_VERSION, 0, len(ids[9:end])),), FIRST_VERSION, 0, 0, 0.0, 0.0, 0.0, "e",
            )
            for segment, end in enumerate((20, len(ids)))
        )  # fmt: skip
        return ThreadTree("p", 0, calls, (), (), text, outcome, verdict=verdict)

    trees = [
        tree(NARROW),
        tree(ROOT),
        tree(ROOT, Outcome.INVALID_SPAWN, "invalid_spawn"),
        tree(NARROW, Outcome.ANSWERED, SOLVED),
    ]
    assert thread_texts(trees[0], tokenizer) == [NARROW], "a thread's last call holds all of it"
    found = causes(task, tokenizer, [PROBLEM] * 4, trees)
    assert found == {"invalid_spawn": 25.0, "passed_over": 25.0, "width": 25.0}
