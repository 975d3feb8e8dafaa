"""Only a replayed solution is one; what a model wrote is never evaluated."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_ray.tasks.countdown.problem import CountdownProblem
from apr_ray.tasks.countdown.solver import SolverOptions, solve_apr, solve_sosp
from apr_ray.tasks.countdown.verifier import extract_answer, verify_answer, verify_solution

PROBLEM = CountdownProblem((3, 5, 7), 22)
ANSWER = """Moving to Node #0
Current State: 22:[3, 5, 7], Operations: []
Exploring Operation: 3*5=15, Resulting Numbers: [7, 15]
Generated Node #0,0: 22:[7, 15] Operation: 3*5=15
Moving to Node #0,0
Current State: 22:[7, 15], Operations: ['3*5=15']
Exploring Operation: 7+15=22, Resulting Numbers: [22]
22,22 equal: Goal Reached
"""
GOAL = "22,22 equal: Goal Reached\n"


def test_a_whole_text_is_solved_by_what_follows_its_second_last_goal_line() -> None:
    text = "Moving to Node #0\n" + GOAL + ANSWER
    assert extract_answer(text) == ANSWER
    assert verify_solution(PROBLEM, text)


def test_one_goal_line_is_no_answer() -> None:
    assert verify_solution(PROBLEM, ANSWER).reason == "no_answer"


def test_the_words_of_a_join_tag_are_no_goal_line() -> None:
    """Regression: the released code counts "Goal Reached" anywhere."""
    text = "<Goal Reached in Sub Search 0 at level 1 at Node #0,0>\n" + ANSWER
    assert verify_solution(PROBLEM, text).reason == "no_answer"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("3*5=15, Res", "3*5=16, Res", "bad_arithmetic"),
        ("3*5=15, Res", "3*7=21, Res", "wrong_numbers"),
        ("Resulting Numbers: [7, 15]", "Resulting Numbers: [5, 15]", "wrong_numbers"),
        ("3*5=15, Res", "4*5=20, Res", "wrong_numbers"),
        ("Exploring Operation: 7+15=22, Resulting Numbers: [22]\n", "", "unfinished"),
        (
            "Exploring Operation: 7+15=22, Resulting Numbers: [22]",
            "Exploring Operation: 15-7=8, Resulting Numbers: [8]",
            "wrong_target",
        ),
        ("Exploring Operation", "Exploring operation", "no_operation"),
        (GOAL, "", "unfinished"),
        (GOAL, "Exploring Operation: 22+0=22, Resulting Numbers: [22]\n" + GOAL, "wrong_numbers"),
    ],
)
def test_operations_that_do_not_solve_are_refused_for_a_named_reason(old: str, new: str, reason: str) -> None:
    assert old in ANSWER
    verdict = verify_answer(PROBLEM, ANSWER.replace(old, new))
    assert not verdict
    assert (verdict.reason, verdict.form) == (reason, "")


@pytest.mark.parametrize(
    ("old", "new", "form"),
    [
        ("22:[3, 5, 7], Op", "22:[3, 5, 22], Op", "wrong_state"),
        ("Operations: ['3*5=15']", "Operations: []", "wrong_state"),
        ("Moving to Node #0,0", "Moving to Node #0,1", "wrong_node"),
        ("Moving to Node #0\n", "Moving to Node #0,3\n", "not_from_root"),
        ("Current State: 22:[3", "Current State: 23:[3", "wrong_target"),
        ("22,22 equal", "22,22 unequal: No Solution\n22,22 equal", "wrong_target"),
        ("Generated Node #0,0", "Generated Node #1,0", "wrong_node"),
        (ANSWER, ANSWER + "Moving to Node #0\n", "trailing_text"),
        ("Moving to Node #0\n", "so I think\nMoving to Node #0\n", "malformed"),
    ],
)
def test_a_fault_of_form_has_a_name_and_leaves_the_answer_right(old: str, new: str, form: str) -> None:
    """Faults 14b: the operations decide, as in the paper's released code."""
    assert old in ANSWER
    verdict = verify_answer(PROBLEM, ANSWER.replace(old, new, 1))
    assert verdict
    assert (verdict.reason, verdict.form) == ("solved", form)


def test_a_right_answer_has_no_fault_of_form() -> None:
    assert verify_answer(PROBLEM, ANSWER).form == ""


def test_reused_and_unused_numbers_are_refused() -> None:
    """Regression: the released SoS+ verifier accepts both."""
    unused = """Moving to Node #0
Current State: 22:[3, 5, 7], Operations: []
Exploring Operation: 15+7=22, Resulting Numbers: [22]
22,22 equal: Goal Reached
"""
    assert not verify_answer(PROBLEM, unused)
    assert not verify_answer(CountdownProblem((3, 5, 7, 7), 22), ANSWER)


def test_another_problems_answer_is_refused() -> None:
    assert not verify_answer(CountdownProblem((3, 5, 8), 22), ANSWER)
    assert not verify_answer(CountdownProblem((3, 5, 7), 23), ANSWER)


def test_code_is_text_to_the_verifier(tmp_path: object) -> None:
    """Regression: the released code calls eval() on model output."""
    bomb = GOAL + ANSWER.replace("3*5=15, Res", "__import__('os').abort()=15, Res")
    assert verify_solution(PROBLEM, bomb).reason == "wrong_numbers"


def test_an_endless_answer_is_refused_by_its_size() -> None:
    assert verify_answer(PROBLEM, ANSWER + "x" * 20_000).reason == "answer_too_long"
    assert verify_answer(PROBLEM, "x" * 20_001).reason == "answer_too_long"
    assert verify_solution(PROBLEM, "x" * 1_000_001).reason == "text_too_long"


@settings(max_examples=200)
@given(st.integers(0, len(ANSWER) - 1), st.sampled_from("0123456789+-*/=[],#:' \nx"))
def test_one_changed_character_is_a_fault_of_form_or_makes_the_answer_wrong(at: int, character: str) -> None:
    altered = ANSWER[:at] + character + ANSWER[at + 1 :]
    verdict = verify_answer(PROBLEM, altered)
    explored = re.findall("^Exploring Operation: .*", altered, re.MULTILINE)
    same = explored == re.findall("^Exploring Operation: .*", ANSWER, re.MULTILINE)
    if altered == ANSWER:
        assert (verdict.reason, verdict.form) == ("solved", "")
    elif verdict:
        assert verdict.form
        assert same
    else:
        assert not same or not altered.endswith(GOAL)


@pytest.mark.parametrize("seed", range(40))
def test_solvers_and_verifier_agree(seed: int) -> None:
    problem = CountdownProblem((seed % 9 + 1, 7, seed % 13 + 2, 11), 10 + seed)
    options = SolverOptions(1, 6, 8, 0.6)
    trace = solve_apr(problem, seed, options)
    prompt, completion = trace.segments[-1]
    assert bool(verify_solution(problem, prompt + completion)) == trace.solved
    prompt, completion, solved = solve_sosp(problem, seed, options)
    assert bool(verify_solution(problem, prompt + completion)) == solved
