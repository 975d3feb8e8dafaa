"""Problems and splits: disjoint, stable, solvable."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from apr_ray.cli.common import find_config
from apr_ray.config import load_config
from apr_ray.core.errors import AprError
from apr_ray.tasks.countdown.oracle import is_solvable
from apr_ray.tasks.countdown.problem import SPLITS, CountdownProblem, ProblemSpace
from apr_ray.tasks.countdown.task import CountdownTask
from apr_ray.tasks.registry import load_task

SMALL = ProblemSpace(count=3, low=1, high=15, target_low=10, target_high=60, heldout_fraction=0.1)


def test_splits_share_no_multiset_and_target_in_whatever_order() -> None:
    train = {p.split_key for p in SMALL.sample("train", 3000, seed=0)}
    heldout = {p.split_key for p in SMALL.sample("heldout", 300, seed=0)}
    validation = {p.split_key for p in SMALL.sample("validation", 40, seed=0)}
    targets = {p.target for p in SMALL.sample("heldout_targets", 50, seed=0)}
    assert not train & heldout
    assert not validation & (train | heldout)
    assert not targets & {int(key.split("->")[1]) for key in train | heldout | validation}


def test_every_pair_is_in_exactly_one_split_and_shares_are_as_asked() -> None:
    pairs = SMALL.solvable_pairs()
    counts = {name: sum(SMALL.split_of(p) == name for p in pairs) for name in SPLITS}
    assert sum(counts.values()) == len(pairs)
    assert 0.05 < counts["heldout"] / len(pairs) < 0.15
    assert 0.005 < counts["validation"] / len(pairs) < 0.02


def test_the_quickstarts_held_out_pairs_are_a_thousand_and_those_that_choose() -> None:
    space = load_task(load_config([find_config("quickstart")]).task).options.space
    counts = Counter(space.split_of(p) for p in space.solvable_pairs())
    assert (counts["heldout"], counts["validation"]) == (1000, 181)


def test_more_validation_problems_than_are_held_out_are_refused() -> None:
    with pytest.raises(AprError, match=r"validation_fraction 0\.2 is above heldout_fraction 0\.1"):
        ProblemSpace(validation_fraction=0.2)


def test_the_same_seed_gives_the_same_problems_on_any_machine() -> None:
    """These four were made once and written down: another platform or Python must make them too."""
    made = [p.key for p in SMALL.sample("heldout", 4, seed=5)]
    assert made == [p.key for p in SMALL.sample("heldout", 4, seed=5)]
    assert made == EXPECTED
    assert made != [p.key for p in SMALL.sample("heldout", 4, seed=6)]


EXPECTED = ["3,4,9->21", "13,12,9->48", "5,8,15->24", "4,8,6->24"]


def test_more_problems_begin_with_the_same_ones() -> None:
    """A longer run continues a shorter one."""
    few, many = SMALL.sample("train", 50, seed=1), SMALL.sample("train", 500, seed=1)
    assert many[:50] == few


@pytest.mark.parametrize("space", [SMALL, ProblemSpace()])
def test_sampled_problems_are_solvable_and_distinct(space: ProblemSpace) -> None:
    problems = space.sample("train", 200, seed=0)
    assert all(is_solvable(p.numbers, p.target) for p in problems)
    assert len({p.key for p in problems}) == 200


def test_a_split_that_is_too_small_says_how_many_it_has() -> None:
    with pytest.raises(AprError, match=r"holds \d+ solvable problems, 100000 were asked for"):
        SMALL.sample("heldout", 100_000, seed=0)


def test_a_sampled_split_that_is_too_small_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its problems come again and again, and there are no others."""
    monkeypatch.setattr("apr_ray.tasks.countdown.problem.ENUMERATED_MULTISETS", 0)
    monkeypatch.setattr("apr_ray.tasks.countdown.problem.MOST_MISSES", 2000)
    tiny = ProblemSpace(count=2, low=1, high=3, target_low=3, target_high=4)
    with pytest.raises(AprError, match=r"holds [1-9] solvable problems that could be found, 1000 were asked for"):
        tiny.sample("train", 1000, seed=0)


@pytest.mark.parametrize(
    ("numbers", "target", "what"),
    [((1,), 5, "1 numbers"), ((1, 2, 3, 4, 5, 6, 7), 5, "7 numbers"), ((1, -2), 5, "negative")],
)
def test_problems_that_are_none_are_refused(numbers: tuple[int, ...], target: int, what: str) -> None:
    with pytest.raises(AprError, match=what):
        CountdownProblem(numbers, target)


@pytest.mark.parametrize(
    ("problem", "strange"),
    [
        ("3 5 7 -> 22", ""),
        ("25 50 75 100 3 6 -> 952", "6 numbers, it was trained on 3"),
        ("3 5 70 -> 22", r"numbers outside 1\.\.12"),
        ("3 5 7 -> 105", r"a target outside 1\.\.60"),
    ],
)
def test_what_a_policy_has_never_seen_is_said(task: CountdownTask, problem: str, strange: str) -> None:
    """Faults 26b."""
    assert re.match(strange, task.unfamiliar(task.problem_from_text(problem)))
    assert bool(strange) == bool(task.unfamiliar(task.problem_from_text(problem)))


def test_numbers_whose_product_the_grammar_cannot_read_are_refused(task: CountdownTask) -> None:
    """Faults 26b: products of six numbers of six digits were called malformed."""
    task.problem_from_text("999 999 999 999 999 999 -> 1")
    task.problem_from_text("999999 999999 999999 -> 1")
    for text in ("9999 999 999 999 999 999 -> 1", "1 2 -> 1234567890123456789", "1 2 -> " + "9" * 5000):
        with pytest.raises(AprError, match="digits"):
            task.problem_from_text(text)
    with pytest.raises(AprError, match="have 20 digits together, 18 are read"):
        task.problem_from_json({"numbers": [10**18, 2], "target": 3})


def test_full_width_digits_are_digits(task: CountdownTask) -> None:
    """As an input method for Chinese or Japanese writes them; what the policy is given is ASCII."""
    assert task.problem_from_text("\uff13 5 7 -> \uff12\uff12").key == "3,5,7->22"


def test_an_unsolvable_problem_says_which_arithmetic_counts(task: CountdownTask) -> None:
    """Faults 21: 8 / (3 - 8 / 3) is 24."""
    with pytest.raises(AprError, match="every step gives a whole number that is not negative"):
        task.require_solvable(task.problem_from_text("3 3 8 8 -> 24"))
