"""The interface of a task to the rest of the system, and how its threads spawn and join.

A task is a subclass of `Task`, its threads' rules one of `SpawnJoinProtocol`; what is abstract there has to be written,
the rest has a default. `tests/second_task.py` is a whole task.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Protocol

from pydantic import TypeAdapter, ValidationError

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


def _plain(value: Any) -> Any:
    """A numpy number as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is no JSON")


VALIDATION = "validation"
"""The split by which checkpoints and settings are chosen."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Truthy iff solved; otherwise `reason` names why not, in a-z, digits, _ and -: it is part of metrics' names.

    `form` names, in the same letters, what is wrong with the text of a right answer; "" for nothing.
    """

    solved: bool
    reason: str
    form: str = ""

    def __post_init__(self) -> None:
        for name in (self.reason, self.form or "none"):
            if not REASON.fullmatch(name):
                raise AprError(f"a verdict's reason is {name[:80]!r}", "Use letters a-z, digits, _ and -")

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
    """Result of a child: `message` is the text of its join, "" unless solved."""

    outcome: JoinOutcome
    message: str = ""
    reason: str = ""


class SpawnJoinProtocol(ABC):
    """How a task's threads spawn and join, on token ids.

    The runtime never looks at text: it hands ids to the protocol and gets ids back.
    """

    max_depth: int = 1
    """Levels of children that threads may start; the paper's by default. See `bounds.max_depth` too."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset({tokenizer.eos_id})
        """A call stops when one of these is sampled: EOS, and the tag that only the runtime may write, if any."""

    @abstractmethod
    def root_prompt(self, problem: Problem, budget: int | None = None) -> tuple[int, ...]:
        """The root parent's prompt, with a budget prefix where given."""

    @abstractmethod
    def read_call(self, context: Sequence[int], sampled: Sequence[int], depth: int) -> SpawnRequest | ThreadEnd:
        """The request at the end of a finished call; `context` is its prompt. No text of a model makes it raise."""

    @abstractmethod
    def read_child(self, context: Sequence[int], sampled: Sequence[int]) -> ChildResult:
        """The join of a child that ended by itself."""

    @abstractmethod
    def join_ids(self, request: SpawnRequest, results: Sequence[ChildResult], depth: int) -> tuple[int, ...]:
        """The block that takes the spawn block's place in the parent's context. `depth` is the children's."""

    def forced_replacement(self, token_id: int) -> int | None:
        """The id to force in place of a sampled one that only the runtime may write; None for every other id.

        By default the runtime writes nothing that a model may not. A call goes on after one such token; the second ends
        it as an invalid spawn.
        """
        return None

    def chooses_to_spawn(self, token_id: int) -> bool | None:
        """Where a thread may spawn: whether this token does so (True) or goes on alone (False); None for any other.

        Metrics of the decision to spawn rest on it; by default there are none.
        """
        return None

    def supervised_targets(self) -> dict[int, int]:
        """What to train where a demonstration holds a token that only the runtime writes, as {it: its target}.

        The runtime forces the target wherever a model writes the token itself. Were the token a target too, one
        decision would be learned under two names.
        """
        ids = range(self.tokenizer.vocab_size)
        return {i: forced for i in ids if (forced := self.forced_replacement(i)) is not None}

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text of the protocol's own."""
        return tuple(self.tokenizer.encode(text))

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text without special tokens."""
        return self.tokenizer.decode(ids)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One supervised sequence: `completion` is what the thread should write after `prompt`, then EOS.

    Attributes:
        path: the thread; () is the root parent.
        segment: counts the thread's calls.
        given: the beginning of `prompt` that no thread wrote: all of it in a thread's first call, which is the default
            there; its first call's prompt in later ones, which have to say so.
    """

    prompt: str
    completion: str
    path: tuple[int, ...] = ()
    segment: int = 0
    given: str = ""

    def __post_init__(self) -> None:
        if not self.given and self.segment:
            raise AprError(f"call {self.segment} of a thread has no `given`", "Give the thread's first prompt")
        object.__setattr__(self, "given", self.given or self.prompt)

    @property
    def kind(self) -> str:
        """Who writes it: "child" or "parent"."""
        return "child" if self.path else "parent"


@dataclass(frozen=True, slots=True)
class DemonstrationSet:
    """All sequences of one solver run on one problem, and whether it came to a solution."""

    solved: bool
    sequences: tuple[Demonstration, ...]


@dataclass(frozen=True, slots=True)
class DataclassProblem:
    """A problem that is its fields: subclasses are frozen dataclasses, of what JSON can hold."""

    @property
    def key(self) -> str:
        """Its JSON form as text, the same for equal problems."""
        return json.dumps(self.to_json(), sort_keys=True)

    def to_json(self) -> Mapping[str, Any]:
        """One key a field."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of a task that has none."""


class Task(ABC):
    """A task: problems, how they are put, demonstrated and checked. It is built from an instance of `options_type`.

    Attributes:
        options_type: a frozen dataclass: what `task.options` may hold.
        problem_type: a frozen dataclass; its fields are the JSON form that problems are read from.
    """

    name: str
    options_type: ClassVar[type[Any]] = NoOptions
    problem_type: ClassVar[type[Any]]

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """`count` distinct problems of a split ("train", "validation", "heldout", "heldout_targets"); the same on any
        machine.

        Raises AprError where the split holds fewer.
        """

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The task's own tokenizer."""

    @abstractmethod
    def protocol(self, tokenizer: Tokenizer) -> SpawnJoinProtocol:
        """The protocol over a tokenizer. Raises AprError where the tokenizer cannot carry it."""

    @abstractmethod
    def demonstrate(self, problem: Problem, solver_seed: int) -> DemonstrationSet:
        """One run of the symbolic solver."""

    @abstractmethod
    def verify(self, problem: Problem, text: str) -> Verdict:
        """Check a root parent's final text."""

    def diagnose(self, problem: Problem, texts: Sequence[str]) -> str:
        """Why a tree failed, from the texts of its threads: a name of a-z, digits, _ and -. By default it is unknown.

        For people who look at an evaluation; training never asks.
        """
        return "unknown"

    def unfamiliar(self, problem: Problem) -> str:
        """What about a problem a policy of this task has never seen, in words; "" for nothing, the default."""
        return ""

    def load_tokenizer(self, directory: str) -> Tokenizer:
        """A checkpoint's tokenizer. Raises AprError where it cannot carry this task's protocol.

        By default it must be the task's own, which would save the very same files.
        """
        own = self.tokenizer()
        with tempfile.TemporaryDirectory() as fresh:
            own.save(fresh)
            files = os.listdir(fresh)
            same, _, _ = filecmp.cmpfiles(fresh, directory, files, shallow=False)
        if not files or len(same) < len(files):
            other = ", ".join(sorted(set(files).difference(same))) or "the task's saves no file"
            raise AprError(
                f"the tokenizer in {directory} is not the task's own ({other})",
                "Give a checkpoint trained with this task's tokenizer, or let the task override load_tokenizer",
            )
        return own

    def problem_from_json(self, data: Mapping[str, Any]) -> Any:
        """Inverse of `Problem.to_json`; raises AprError on anything else.

        By default `problem_type` from its fields, each of the type that it says and none besides.
        """
        known = [field.name for field in fields(self.problem_type)]
        form = "Give {" + ", ".join(f'"{name}": ...' for name in known) + "}"
        try:
            problem = self._problem_reader.validate_json(json.dumps(data, default=_plain), strict=True)
            if unknown := set(data).difference(known):
                raise ValueError(f"{unknown.pop()!r} is unknown")
        except (TypeError, ValueError) as error:
            why = str(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                why = f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
            raise AprError(f"not a problem of this task: {repr(data)[:80]} ({why})", form) from error
        return problem

    @cached_property
    def _problem_reader(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.problem_type)

    def problem_from_text(self, text: str) -> Any:
        """A problem as a person writes it, by default its JSON; raises AprError with an example of the form."""
        try:
            data = json.loads(text)
        except ValueError:
            data = text
        return self.problem_from_json(data)

    def require_solvable(self, problem: Problem) -> None:
        """Raise AprError where no answer exists; by default every problem has one."""
        return None
