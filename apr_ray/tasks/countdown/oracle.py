"""Ground truth by exhaustive search over non-negative integers with exact division."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def is_solvable(numbers: Sequence[int], target: int) -> bool:
    """Whether some expression that uses every number exactly once equals the target."""
    return target in reachable_targets(numbers)


def reachable_targets(numbers: Sequence[int]) -> frozenset[int]:
    """Every value an expression over all the numbers can take."""
    return _all_reachable(tuple(sorted(numbers)))


TABLE_NUMBERS = 4
_ROWS_AT_ONCE = 256


def reachable_table(numbers: np.ndarray[Any, Any], low: int, high: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """`reachable_targets` of many multisets at once, for targets low..high: several times as fast as one by one.

    Args:
        numbers: int [n, k], non-negative; k up to TABLE_NUMBERS.
        low, high: both included; low is at least 0.

    Returns:
        bool [n, high - low + 1].

    Raises:
        ValueError: more numbers, or so large that floats would not be exact.
    """
    rows, k = numbers.shape
    largest = max(int(numbers.max(initial=0)), 2)
    if k > TABLE_NUMBERS or max(largest * (k - 1), largest ** max(1, k - 1), high) >= 2**53:
        raise ValueError(f"{k} numbers up to {largest}: use reachable_targets")
    # Exact in floats: below 2**24 (or 2**53) a quotient of integers rounds to an integer only if it is one. Results of
    # the last operation may be rounded where they are far above `high`.
    dtype = np.float32 if max(largest * (k - 1), largest ** max(1, k - 1), high) < 2**24 else np.float64
    table = np.zeros((rows, high - low + 1), dtype=np.bool_)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = np.ascontiguousarray(numbers[start : start + _ROWS_AT_ONCE].T, dtype=dtype)
        for values in _all_values(part):
            where, row = np.nonzero((values >= low) & (values <= high))
            table[start + row, values[where, row].astype(np.intp) - low] = True
    return table


def _all_values(numbers: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Every value of expressions over all of k numbers, from [k, n]: arrays [some, n] with NaN where there is none."""
    k = len(numbers)
    values: dict[int, np.ndarray[Any, Any]] = {1 << i: numbers[i : i + 1] for i in range(k)}
    whole = (1 << k) - 1
    for mask in range(1, whole + 1):
        if mask in values:
            continue
        made = [_combine_all(values[left], values[mask ^ left]) for left in _left_parts(mask)]
        if mask == whole:
            yield from made
            return
        values[mask] = np.concatenate(made)
    yield values[whole]


def _left_parts(mask: int) -> list[int]:
    """Each split of a set into two non-empty parts once: the part without the highest member."""
    rest = mask ^ (1 << (mask.bit_length() - 1))
    return [part for part in range(1, rest + 1) if part & rest == part]


def _combine_all(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Results of all four operations on every pair: [4 * p * q, n] from [p, n] and [q, n]."""
    a, b = a[:, None], b[None]
    out = np.empty((4, a.shape[0], b.shape[1], a.shape[2]), dtype=a.dtype)
    np.add(a, b, out=out[0])
    np.multiply(a, b, out=out[1])
    np.abs(np.subtract(a, b, out=out[2]), out=out[2])
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.minimum(a, b)
        quotient = np.divide(np.maximum(a, b), low, out=out[3])
        quotient[(low == 0) | (quotient != np.floor(quotient))] = np.nan
    return out.reshape(-1, a.shape[2])


def _all_reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    """All values of `numbers` (sorted): split into two non-empty parts, combine what each can reach."""
    if len(numbers) == 1:
        return frozenset(numbers)
    out: set[int] = set()
    size = len(numbers)
    seen: set[tuple[int, ...]] = set()
    for mask in range(1, 1 << (size - 1)):  # the last number always stays right: each split is seen once
        left = tuple(numbers[i] for i in range(size) if mask >> i & 1)
        if left in seen:
            continue
        seen.add(left)
        right = tuple(numbers[i] for i in range(size) if not mask >> i & 1)
        rights = _PARTS[right]
        for a in _PARTS[left]:
            for b in rights:
                out.add(a + b)
                out.add(a * b)
                if a >= b:
                    out.add(a - b)
                    if b and a % b == 0:
                        out.add(a // b)
                else:
                    out.add(b - a)
                if a and b % a == 0:
                    out.add(b // a)
    return frozenset(out)


MOST_VALUES = 3_000_000
"""Values in all cached sets: 200 MB, if a value of a set takes 70 bytes."""


class _Parts(dict[tuple[int, ...], frozenset[int]]):
    """The values of parts of problems, as far as they fit; whole problems are many and seldom asked for twice.

    By hand, because functools' cache counts entries, of which one may hold three values or fifty thousand, and
    cachetools', which can count values, is Python code at every look-up of the innermost loop.
    """

    values_held = 0

    def __missing__(self, numbers: tuple[int, ...]) -> frozenset[int]:
        found = _all_reachable(numbers)
        self.values_held += len(found)
        if self.values_held > MOST_VALUES:
            self.clear()
            self.values_held = len(found)
        self[numbers] = found
        return found


_PARTS = _Parts()
