"""The arithmetic of Countdown: non-negative integers, exact division."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_DIGITS = 18
"""Longest integer that is parsed; 99**8 has 16 digits, so no search of up to eight numbers is cut."""


def operation_text(a: int, op: str, b: int, result: int) -> str:
    """`53-26=27`."""
    return f"{a}{op}{b}={result}"


@dataclass(frozen=True, slots=True)
class Operation:
    """`a op b = result`; whether it is true is `is_valid`."""

    a: int
    op: str
    b: int
    result: int

    def __str__(self) -> str:
        return operation_text(self.a, self.op, self.b, self.result)

    def is_valid(self) -> bool:
        """Whether it holds in non-negative integers: a >= b for minus, b > 0 and no remainder for division."""
        if self.op == "+":
            return self.a + self.b == self.result
        if self.op == "*":
            return self.a * self.b == self.result
        if self.op == "-":
            return self.a >= self.b and self.a - self.b == self.result
        if self.op == "/":
            return self.b > 0 and self.a % self.b == 0 and self.a // self.b == self.result
        return False


def combine(a: int, b: int) -> list[tuple[int, str, int, int]]:
    """All `(a, op, b, result)` of one unordered pair; + and * keep the order given."""
    high, low = (a, b) if a >= b else (b, a)
    out = [(a, "+", b, a + b), (a, "*", b, a * b), (high, "-", low, high - low)]
    if low > 0 and high % low == 0:
        out.append((high, "/", low, high // low))
    return out


def remaining_after(numbers: Sequence[int], operation: Operation) -> tuple[int, ...] | None:
    """The numbers left after an operation: the untouched ones in order, then the result; None if an operand is missing.

    Where an operand occurs more than once its first occurrences are used.
    """
    left = list(numbers)
    for operand in (operation.a, operation.b):
        if operand not in left:
            return None
        left.remove(operand)
    return (*left, operation.result)
