"""What a task gives the rest of the system, and how its threads spawn and join."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import JoinOutcome, Outcome, Problem

REASON = re.compile("[a-z0-9_-]+")


class Tokenizer(Protocol):
    """The part of a tokenizer that the system needs; `transformers` fast tokenizers satisfy it through an adapter."""

    vocab_size: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises AprError on text outside the vocabulary."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        ...

    def save(self, directory: str) -> None:
        """Write Hugging Face tokenizer files into a checkpoint directory."""
        ...


SOLVED = "solved"
"""What a solved tree's verdict is called, by every task."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Truthy iff solved; otherwise `reason` names why not, in a-z, digits, _ and -: it is part of metrics' names."""

    solved: bool
    reason: str

    def __post_init__(self) -> None:
        if not REASON.fullmatch(self.reason):
            raise AprError(f"a verdict's reason is {self.reason[:80]!r}", "Use letters a-z, digits, _ and -")

    def __bool__(self) -> bool:
        return self.solved


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A child to start: its whole prompt, and the label that its parent knows it by."""

    prompt_ids: tuple[int, ...]
    label: str


@dataclass(frozen=True, slots=True)
class SpawnRequest:
    """A call ended in a valid spawn block.

    Attributes:
        children: in the order of the block.
        keep_tokens: sampled tokens of the call that stay in the parent's context; the block after them is replaced.
    """

    children: tuple[ChildSpec, ...]
    keep_tokens: int


@dataclass(frozen=True, slots=True)
class ThreadEnd:
    """A call ended its thread."""

    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ChildResult:
    """What a child brought back: `message` is what it joins with, "" unless solved."""

    outcome: JoinOutcome
    message: str = ""
    reason: str = ""


class SpawnJoinProtocol(Protocol):
    """How a task's threads spawn and join, on token ids.

    The runtime never looks at text: it hands ids to the protocol and gets ids back.
    """

    stop_ids: frozenset[int]
    """A call stops when one of these is sampled: EOS, and the tag that only the runtime may write."""
    max_depth: int

    def root_prompt(self, problem: Problem, budget: int | None = None) -> tuple[int, ...]:
        """The root parent's prompt, with a budget prefix where given."""
        ...

    def forced_replacement(self, token_id: int) -> int | None:
        """The id to force in place of a sampled one that only the runtime may write; None for every other id."""
        ...

    def read_call(self, context: Sequence[int], sampled: Sequence[int], depth: int) -> SpawnRequest | ThreadEnd:
        """What the end of a finished call asks for; `context` is its prompt. Never raises on what a model wrote."""
        ...

    def read_child(self, context: Sequence[int], sampled: Sequence[int]) -> ChildResult:
        """What a child that ended by itself joins with."""
        ...

    def join_ids(self, request: SpawnRequest, results: Sequence[ChildResult], depth: int) -> tuple[int, ...]:
        """The block that takes the spawn block's place in the parent's context. `depth` is the children's."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text without special tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One supervised sequence: `completion` is what the thread should write after `prompt`, then EOS.

    `given` is the beginning of `prompt` that no thread wrote: all of it in a thread's first call, its first call's
    prompt in later ones.
    """

    prompt: str
    completion: str
    kind: str
    """"parent" or "child"."""
    path: tuple[int, ...]
    segment: int
    given: str


@dataclass(frozen=True, slots=True)
class DemonstrationSet:
    """All sequences of one solver run on one problem, and what the run came to."""

    problem: Problem
    solver_seed: int
    solved: bool
    sequences: tuple[Demonstration, ...]


class Task(Protocol):
    """A task: problems, how they are put, demonstrated and checked."""

    name: str

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """`count` distinct problems of a split ("train", "heldout", "heldout_targets"); the same on any machine.

        Raises AprError where the split holds fewer.
        """
        ...

    def problem_from_json(self, data: Mapping[str, Any]) -> Problem:
        """Inverse of `Problem.to_json`; raises AprError on anything else."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The task's own tokenizer."""
        ...

    def load_tokenizer(self, directory: str) -> Tokenizer:
        """A checkpoint's tokenizer. Raises AprError where it cannot carry this task's protocol."""
        ...

    def protocol(self, tokenizer: Tokenizer) -> SpawnJoinProtocol:
        """The protocol over a tokenizer. Raises AprError where the tokenizer cannot carry it."""
        ...

    def demonstrate(self, problem: Problem, solver_seed: int) -> DemonstrationSet:
        """One run of the symbolic solver."""
        ...

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Check a root parent's final text."""
        ...

    def describe(self, problem: Problem) -> str:
        """A short line for people; `problem_from_text` reads it back."""
        ...

    def problem_from_text(self, text: str) -> Problem:
        """A problem as a person writes it; raises AprError with an example of the form."""
        ...

    def require_solvable(self, problem: Problem) -> None:
        """Raise AprError where no answer exists."""
        ...
