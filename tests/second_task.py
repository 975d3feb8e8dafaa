"""A second task in one file, nothing like Countdown: the largest digit, by giving the first and the rest to children.

M314=[3][14]     the parent spawns          m3=3.   m14=4.     the children
M314={3}{4}4.    their answers in place of the spawn, then the parent's

It has 50 lines of code: imports, docstrings and blank lines not counted (a test counts them).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import JoinOutcome, Outcome
from apr_ray.core.task import (
    ChildResult,
    ChildSpec,
    DataclassProblem,
    Demonstration,
    DemonstrationSet,
    SpawnJoinProtocol,
    SpawnRequest,
    Task,
    ThreadEnd,
    Verdict,
)

ALPHABET = "123456789Mm=[]{}."


class Characters:
    """A token is a character."""

    pad_id, eos_id, vocab_size = 0, 1, 2 + len(ALPHABET)

    def encode(self, text: str) -> list[int]:
        return [2 + ALPHABET.index(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(ALPHABET[i - 2] for i in ids if i >= 2)

    def save(self, directory: str) -> None:
        (Path(directory) / "alphabet.json").write_text(json.dumps(ALPHABET))


@dataclass(frozen=True, slots=True)
class Digits(DataclassProblem):
    digits: Annotated[str, StringConstraints(pattern="^[1-9]{2,}$")]


class LargestProtocol(SpawnJoinProtocol):
    def root_prompt(self, problem: Any, budget: int | None = None) -> tuple[int, ...]:
        return self.encode(f"M{problem.digits}=")

    def read_call(self, context: Sequence[int], sampled: Sequence[int], depth: int) -> SpawnRequest | ThreadEnd:
        text = self.text(sampled)
        if parts := re.fullmatch(r"\[(\d)\]\[(\d+)\]", text):
            return SpawnRequest(tuple(ChildSpec(self.encode(f"m{part}="), part) for part in parts.groups()), 0)
        if "[" in text:
            return ThreadEnd(Outcome.INVALID_SPAWN, "not_two_parts")
        return ThreadEnd(Outcome.ANSWERED if re.fullmatch(r"\d\.", text) else Outcome.NO_ANSWER)

    def read_child(self, context: Sequence[int], sampled: Sequence[int]) -> ChildResult:
        found = re.fullmatch(r"(\d)\.", self.text(sampled))
        return ChildResult(JoinOutcome.SOLVED, found[1]) if found else ChildResult(JoinOutcome.NO_SOLUTION)

    def join_ids(self, request: SpawnRequest, results: Sequence[ChildResult], depth: int) -> tuple[int, ...]:
        return self.encode("".join(f"{{{result.message}}}" for result in results))


@dataclass(frozen=True, slots=True)
class LargestOptions:
    length: int = 4


class LargestTask(Task):
    name, options_type, problem_type = "largest", LargestOptions, Digits

    def problems(self, split: str, count: int, seed: int) -> list[Any]:
        every = map("".join, product("123456789", repeat=self.options.length))
        ours = [Digits(digits) for digits in every if (int(digits) % 7 == 0) == (split != "train")]
        if count > len(ours):
            raise AprError(f"split {split!r} holds {len(ours)} problems, {count} were asked for", "Raise the length")
        return random.Random(f"{split}{seed}").sample(ours, count)

    def tokenizer(self) -> Characters:
        return Characters()

    def protocol(self, tokenizer: Any) -> LargestProtocol:
        return LargestProtocol(tokenizer)

    def demonstrate(self, problem: Any, solver_seed: int) -> DemonstrationSet:
        root, first, rest = f"M{problem.digits}=", problem.digits[:1], problem.digits[1:]
        children = [Demonstration(f"m{part}=", f"{max(part)}.", path=(i,)) for i, part in enumerate((first, rest))]
        answers = Demonstration(f"{root}{{{first}}}{{{max(rest)}}}", f"{max(first, *rest)}.", segment=1, given=root)
        return DemonstrationSet(True, (Demonstration(root, f"[{first}][{rest}]"), *children, answers))

    def verify(self, problem: Any, text: str) -> Verdict:
        solved = re.search(rf"[=}}]{max(problem.digits)}\.$", text)
        return Verdict(True, "solved") if solved else Verdict(False, "wrong_digit")
