"""The oracle against known answers and a brute force that shares no code with it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_ray.tasks.countdown import oracle
from apr_ray.tasks.countdown.oracle import is_solvable, reachable_table, reachable_targets


def brute_force(numbers: Sequence[int]) -> set[int]:
    """Every value, by trying every pair, operator and order."""
    if len(numbers) == 1:
        return {numbers[0]}
    out: set[int] = set()
    for i in range(len(numbers)):
        for j in range(len(numbers)):
            if i == j:
                continue
            a, b = numbers[i], numbers[j]
            rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
            values = [a + b, a * b]
            if a >= b:
                values.append(a - b)
            if b and a % b == 0:
                values.append(a // b)
            for value in values:
                out |= brute_force([*rest, value])
    return out


@settings(max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_reachable_targets_equal_brute_force(numbers: list[int]) -> None:
    assert reachable_targets(numbers) == brute_force(numbers)


@settings(max_examples=60)
@given(st.integers(2, 4), st.data())
def test_the_table_equals_the_sets(count: int, data: st.DataObject) -> None:
    """Zeros, ones and the largest numbers included; several rows at once must not mix."""
    number = st.one_of(st.integers(0, 3), st.integers(0, 99), st.integers(95, 99))
    rows = data.draw(st.lists(st.lists(number, min_size=count, max_size=count), min_size=1, max_size=5))
    low, high = data.draw(st.sampled_from([(0, 30), (10, 100), (900, 1100)]))
    table = reachable_table(np.array(rows), low, high)
    for row, flags in zip(rows, table, strict=True):
        assert set((np.flatnonzero(flags) + low).tolist()) == {t for t in reachable_targets(row) if low <= t <= high}


def test_the_table_refuses_what_it_cannot_do_exactly() -> None:
    with pytest.raises(ValueError, match="use reachable_targets"):
        reachable_table(np.array([[10**6, 10**6, 10**6, 10**6]]), 0, 10)
    with pytest.raises(ValueError, match="use reachable_targets"):
        reachable_table(np.ones((1, 5), dtype=int), 0, 10)


def test_share_of_the_papers_space_that_is_solvable() -> None:
    """13.35 % of (multiset, target) pairs (exhaustive count); 1,500 uniform multisets give it within a percent."""
    rng = random.Random(0)
    solvable = 0
    multisets = 1500
    for _ in range(multisets):
        # uniform over multisets: stars and bars
        bars = sorted(rng.sample(range(102), 4))
        numbers = [bar - i + 1 for i, bar in enumerate(bars)]
        assert all(1 <= n <= 99 for n in numbers)
        solvable += sum(10 <= target <= 100 for target in reachable_targets(numbers))
    assert abs(solvable / (multisets * 91) - 0.1335) < 0.01


def test_24_game_without_fractions() -> None:
    """1,362 of 1,820 multisets over 1..13 make 24 with rationals; 1,346 of them need no fraction and no negative."""
    assert sum(is_solvable(m, 24) for m in combinations_with_replacement(range(1, 14), 4)) == 1346


def test_the_cache_is_bounded_by_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults 25: bounded by entries, five- and six-number spaces took gigabytes."""
    monkeypatch.setattr(oracle, "MOST_VALUES", 2000)
    parts = oracle._Parts()
    monkeypatch.setattr(oracle, "_PARTS", parts)
    rng = random.Random(0)
    for _ in range(20):
        numbers = [rng.randint(1, 30) for _ in range(4)]
        assert reachable_targets(numbers) == brute_force(numbers)
        assert sum(map(len, parts.values())) <= parts.values_held <= 2000
    assert parts
