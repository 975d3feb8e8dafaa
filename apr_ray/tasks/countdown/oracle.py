"""Ground truth by exhaustive search over non-negative integers with exact division."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from apr_ray.tasks.countdown.arithmetic import Operation, combine


def is_solvable(numbers: Sequence[int], target: int) -> bool:
    """Whether some expression that uses every number exactly once equals the target."""
    return target in _reachable(tuple(sorted(numbers)))


def reachable_targets(numbers: Sequence[int]) -> frozenset[int]:
    """Every value an expression over all the numbers can take."""
    return _reachable(tuple(sorted(numbers)))


def solve(numbers: Sequence[int], target: int) -> list[Operation] | None:
    """One list of operations that reaches the target, or None if there is none."""
    return _solve(tuple(sorted(numbers)), target)


@lru_cache(maxsize=200_000)
def _reachable(numbers: tuple[int, ...]) -> frozenset[int]:
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
        rights = _reachable(right)
        for a in _reachable(left):
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


def _solve(numbers: tuple[int, ...], target: int) -> list[Operation] | None:
    if target not in _reachable(numbers):
        return None
    if len(numbers) == 1:
        return []
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
            for a, op, b, result in combine(numbers[i], numbers[j]):
                tail = _solve(tuple(sorted((*rest, result))), target)
                if tail is not None:
                    return [Operation(a, op, b, result), *tail]
    raise AssertionError(f"reachable but not solved: {numbers} -> {target}")
