"""A second task in one file, nothing like Countdown: add digits by giving each half to a child.

S3141=[31][41]     the parent spawns          A31=4.   A41=5.     the children
S3141={4}{5}9.     their sums in place of the spawn, then the parent's answer
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import JoinOutcome, Outcome
from apr_ray.core.task import ChildResult, ChildSpec, Demonstration, DemonstrationSet, SpawnRequest, ThreadEnd, Verdict

ALPHABET = "0123456789SA=[]{}."


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
class Sum:
    digits: str

    @property
    def key(self) -> str:
        return self.digits

    def to_json(self) -> Mapping[str, Any]:
        return {"digits": self.digits}


def total(digits: str) -> int:
    return sum(map(int, digits))


class SumProtocol:
    stop_ids, max_depth = frozenset({Characters.eos_id}), 1

    def __init__(self, characters: Characters) -> None:
        self.encode, self.text = characters.encode, characters.decode

    def root_prompt(self, problem: Any, budget: int | None = None) -> tuple[int, ...]:
        return tuple(self.encode(f"S{problem.digits}="))

    def forced_replacement(self, token_id: int) -> int | None:
        return None

    def read_call(self, context: Sequence[int], sampled: Sequence[int], depth: int) -> SpawnRequest | ThreadEnd:
        text = self.text(sampled)
        if "[" not in text:
            return ThreadEnd(Outcome.ANSWERED if re.fullmatch(r"\d+\.", text) else Outcome.NO_ANSWER)
        halves = re.fullmatch(r"\[(\d+)\]\[(\d+)\]", text)
        if halves is None:
            return ThreadEnd(Outcome.INVALID_SPAWN, "not_two_halves")
        return SpawnRequest(tuple(ChildSpec(tuple(self.encode(f"A{h}=")), h) for h in halves.groups()), 0)

    def read_child(self, context: Sequence[int], sampled: Sequence[int]) -> ChildResult:
        found = re.fullmatch(r"(\d+)\.", self.text(sampled))
        return ChildResult(JoinOutcome.SOLVED, found[1]) if found else ChildResult(JoinOutcome.NO_SOLUTION)

    def join_ids(self, request: SpawnRequest, results: Sequence[ChildResult], depth: int) -> tuple[int, ...]:
        return tuple(self.encode("".join(f"{{{result.message}}}" for result in results)))


@dataclass(frozen=True, slots=True)
class SumOptions:
    length: int = 4


class SumTask:
    name, options_type = "sum", SumOptions

    def __init__(self, options: SumOptions) -> None:
        self.length = options.length

    def problems(self, split: str, count: int, seed: int) -> list[Any]:
        rng, found = random.Random(f"{split}{seed}"), dict[str, Sum]()
        while len(found) < count:
            digits = "".join(rng.choices("123456789", k=self.length))
            if (total(digits) % 5 == 0) == (split != "train"):
                found[digits] = Sum(digits)
        return list(found.values())

    def problem_from_json(self, data: Mapping[str, Any]) -> Sum:
        return Sum(data["digits"])

    def tokenizer(self) -> Characters:
        return Characters()

    def load_tokenizer(self, directory: str) -> Characters:
        if json.loads((Path(directory) / "alphabet.json").read_text()) != ALPHABET:
            raise AprError("another alphabet", "Train with this one")
        return Characters()

    def protocol(self, tokenizer: Any) -> SumProtocol:
        return SumProtocol(tokenizer)

    def demonstrate(self, problem: Any, solver_seed: int) -> DemonstrationSet:
        digits = problem.digits
        halves = [digits[: len(digits) // 2], digits[len(digits) // 2 :]]
        joined = "".join(f"{{{total(half)}}}" for half in halves)
        root, calls = f"S{digits}=", [(f"A{half}=", f"{total(half)}.") for half in halves]
        sequences = [Demonstration(root, "".join(f"[{half}]" for half in halves), "parent", (), 0, root)]
        sequences += [Demonstration(p, text, "child", (i,), 0, p) for i, (p, text) in enumerate(calls)]
        sequences.append(Demonstration(root + joined, f"{total(digits)}.", "parent", (), 1, root))
        return DemonstrationSet(problem, solver_seed, True, tuple(sequences))

    def verify(self, problem: Any, text: str) -> Verdict:
        solved = re.split("[=}]", text)[-1] == f"{total(problem.digits)}."
        return Verdict(solved, "solved" if solved else "wrong_sum")

    def describe(self, problem: Any) -> str:
        return str(problem.digits)

    def problem_from_text(self, text: str) -> Sum:
        return Sum(text.strip())

    def require_solvable(self, problem: Any) -> None:
        """Every sum has an answer."""
