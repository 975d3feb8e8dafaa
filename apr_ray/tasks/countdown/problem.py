"""Countdown problems: what one is, which split it belongs to, and how solvable ones are sampled."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import numpy as np

from apr_ray.core.errors import AprError
from apr_ray.core.task import VALIDATION, DataclassProblem
from apr_ray.tasks.countdown.oracle import TABLE_NUMBERS, is_solvable, reachable_table, reachable_targets

SPLITS = ("train", VALIDATION, "heldout", "heldout_targets")
MAX_NUMBERS = 6
ENUMERATED_MULTISETS = 200_000
"""Up to this many multisets a space is enumerated whole; above, it is sampled and rejected."""
MOST_MISSES = 100_000
"""Draws in a row that bring no new problem: a space that is sampled is then taken for exhausted."""


@dataclass(frozen=True, slots=True)
class CountdownProblem(DataclassProblem):
    """Combine `numbers`, each exactly once, to reach `target`."""

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        if not 2 <= len(self.numbers) <= MAX_NUMBERS:
            raise AprError(f"{len(self.numbers)} numbers given", f"Give between 2 and {MAX_NUMBERS}")
        if any(n < 0 for n in self.numbers) or self.target < 0:
            raise AprError(f"negative number in {self.numbers} -> {self.target}", "Use non-negative integers")

    @property
    def key(self) -> str:
        """Order of the numbers included: `3,5,7->22`."""
        return f"{','.join(map(str, self.numbers))}->{self.target}"

    @property
    def split_key(self) -> str:
        """Order left out, so that a permuted train problem cannot stand in the held-out split."""
        return f"{','.join(map(str, sorted(self.numbers)))}->{self.target}"


@dataclass(frozen=True, slots=True)
class ProblemSpace:
    """Which problems there are, and how they are split.

    Attributes:
        count: numbers per problem.
        low, high: range of the numbers, both ends included.
        target_low, target_high: range of the targets, both ends included.
        heldout_fraction: share of (multiset, target) pairs that are never trained on.
        validation_fraction: share of all pairs, a part of those, by which checkpoints and settings are chosen; the rest
            of `heldout_fraction` is the test set, which chooses nothing.
        heldout_targets_fraction: share of targets none of whose problems are trained on.
    """

    count: int = 4
    low: int = 1
    high: int = 99
    target_low: int = 10
    target_high: int = 100
    heldout_fraction: float = 0.1
    validation_fraction: float = field(default=0.01, repr=False)  # draws of a split are seeded by the others
    heldout_targets_fraction: float = 0.05

    def __post_init__(self) -> None:
        if not 2 <= self.count <= MAX_NUMBERS:
            raise AprError(f"task.options.space.count is {self.count}", f"Use between 2 and {MAX_NUMBERS}")
        if not 0 <= self.low <= self.high:
            raise AprError(f"task.options.space.low..high is {self.low}..{self.high}", "Use 0 <= low <= high")
        if not 0 <= self.target_low <= self.target_high:
            raise AprError(
                f"task.options.space.target_low..target_high is {self.target_low}..{self.target_high}",
                "Use 0 <= target_low <= target_high",
            )
        for name in ("heldout_fraction", "validation_fraction", "heldout_targets_fraction"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise AprError(f"task.options.space.{name} is {value}", "Use a fraction in [0, 1)")
        if self.validation_fraction > self.heldout_fraction:
            raise AprError(
                f"task.options.space.validation_fraction {self.validation_fraction} is above heldout_fraction"
                f" {self.heldout_fraction}",
                "Validation problems are a part of those held out: lower it",
            )

    def split_of(self, problem: CountdownProblem) -> str:
        """One of `SPLITS`, by stable hashes alone: the same on any machine."""
        if _unit_hash(f"target:{problem.target}") < self.heldout_targets_fraction:
            return "heldout_targets"
        place = _unit_hash(f"pair:{problem.split_key}")
        if place < self.validation_fraction:
            return VALIDATION
        return "heldout" if place < self.heldout_fraction else "train"

    def sample(self, split: str, count: int, seed: int) -> list[CountdownProblem]:
        """`count` solvable problems of a split, distinct by (multiset, target) except in "train", by order there.

        Raises AprError where the split holds fewer, naming how many it has.
        """
        if split not in SPLITS:
            raise AprError(f"unknown split {split!r}", f"Use one of {', '.join(SPLITS)}")
        rng = random.Random(f"{split}:{seed}:{self}")
        multisets = math.comb(self.high - self.low + self.count, self.count)
        enumerated = multisets <= ENUMERATED_MULTISETS
        draw = self._draw_enumerated if enumerated else self._draw_rejected
        found: dict[str, CountdownProblem] = {}
        misses = 0
        for problem in draw(split, rng):
            key = "" if problem is None else problem.key if split == "train" else problem.split_key
            if problem is None or key in found:
                misses += 1
                if misses > MOST_MISSES and not enumerated:
                    break
                continue
            misses = 0
            found[key] = problem
            if len(found) == count:
                return list(found.values())
        raise AprError(
            f"split {split!r} of {self} holds {len(found)} solvable problems"
            f"{'' if enumerated and split != 'train' else ' that could be found'}, {count} were asked for",
            "Widen the number or target range, or ask for fewer",
        )

    def solvable_pairs(self) -> list[CountdownProblem]:
        """Every solvable (multiset, target) pair, sorted; only for spaces small enough to enumerate."""
        targets = range(self.target_low, self.target_high + 1)
        multisets = list(combinations_with_replacement(range(self.low, self.high + 1), self.count))
        if self.count <= TABLE_NUMBERS:
            table = reachable_table(np.array(multisets), self.target_low, self.target_high)
            rows, columns = np.nonzero(table)
            return [CountdownProblem(multisets[i], targets[j]) for i, j in zip(rows, columns, strict=True)]
        return [
            CountdownProblem(multiset, target)
            for multiset in multisets
            for target in sorted(reachable_targets(multiset).intersection(targets))
        ]

    def _draw_enumerated(self, split: str, rng: random.Random) -> Iterator[CountdownProblem]:
        pairs = [p for p in self.solvable_pairs() if self.split_of(p) == split]
        passes = 4 * math.factorial(self.count) if split == "train" else 1  # a pair has up to count! orders
        for _ in range(passes):
            rng.shuffle(pairs)
            for pair in pairs:
                yield CountdownProblem(tuple(rng.sample(pair.numbers, self.count)), pair.target)

    def _draw_rejected(self, split: str, rng: random.Random) -> Iterator[CountdownProblem | None]:
        """Without end; None for a draw of another split, or without a solution."""
        while True:
            problem = CountdownProblem(
                tuple(rng.randint(self.low, self.high) for _ in range(self.count)),
                rng.randint(self.target_low, self.target_high),
            )
            fits = self.split_of(problem) == split and is_solvable(problem.numbers, problem.target)
            yield problem if fits else None


def _unit_hash(text: str) -> float:
    """A stable hash of a text in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
