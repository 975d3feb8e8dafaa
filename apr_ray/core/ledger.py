"""The ledger of one reasoning: calls, spawns and joins, token by token, with what becomes of each sampled token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

from apr_ray.core.engine import FinishReason, VersionSpan
from apr_ray.core.weights import WeightVersion

Path = tuple[int, ...]
"""Where a thread stands in its tree: () is the root parent, (0, 2) the third child of the root's first child.
Children are numbered over all spawn rounds of their parent."""


class Problem(Protocol):
    """A task's own frozen dataclass; others use nothing but its key and its JSON form."""

    @property
    def key(self) -> str:
        """A stable, unique text."""
        ...

    def to_json(self) -> Mapping[str, Any]:
        """A JSON object from which the task rebuilds the problem."""
        ...


class Disposition(StrEnum):
    """The fate of a sampled token in training."""

    TRAINED = "trained"
    ABORTED = "aborted"
    ERROR = "error"
    ZERO_ADVANTAGE = "zero_advantage"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Replaced:
    """A sampled token that the runtime took back and forced another in its place.

    It is trained as it was sampled. The replacement is a fixed map of the environment: the same token always becomes
    the same other one, so the policy's choice is the sampled token, and its gradient is that token's.

    Attributes:
        position: index into `Call.sampled_ids` of the forced token.
        token_id, logprob: the token that was sampled there.
    """

    position: int
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Call:
    """One decoding of one thread.

    Attributes:
        path: the thread; `segment` counts its calls (a parent has one more than its spawn rounds).
        prompt_ids: what the engine was given.
        sampled_ids: what it then held, EOS or stop token included; positions in `forced` were not sampled.
        logprobs: one per sampled id, at the sampling temperature; 0.0 at forced positions.
        kv_version: the weights under which the KV of the prompt was computed at the end of the call.
        start_s, end_s: seconds since the epoch.
        first_token_s: when the first token came back.
    """

    path: Path
    segment: int
    prompt_ids: tuple[int, ...]
    sampled_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    forced: tuple[int, ...]
    replaced: tuple[Replaced, ...]
    finish: FinishReason
    versions: tuple[VersionSpan, ...]
    kv_version: WeightVersion
    seed: int
    cached_tokens: int
    start_s: float
    first_token_s: float
    end_s: float
    engine_id: str
    error: str = ""

    @property
    def sampled_tokens(self) -> int:
        """Tokens drawn from the policy: forced ones are not, replaced ones are."""
        return len(self.sampled_ids) - len(self.forced) + len(self.replaced)

    def dispositions(self) -> Counter[Disposition]:
        """How many sampled tokens go where; the counts add up to `sampled_tokens` (contract 4).

        An aborted call was cut at a moment that depends on its siblings or on a clock, not on its own tokens: training
        on it would reward being cut. A call that failed is not trusted.
        """
        whole = {FinishReason.ABORTED: Disposition.ABORTED, FinishReason.ERROR: Disposition.ERROR}.get(self.finish)
        return Counter({whole or Disposition.TRAINED: self.sampled_tokens}) if self.sampled_tokens else Counter()

    def trained_positions(self) -> Iterator[int]:
        """Indices into `sampled_ids` that carry loss: all but forced tokens in whose place nothing was sampled."""
        if self.finish in (FinishReason.ABORTED, FinishReason.ERROR):
            return iter(())
        unchosen = set(self.forced).difference(r.position for r in self.replaced)
        return (i for i in range(len(self.sampled_ids)) if i not in unchosen)

    def as_sampled(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Ids and logprobs as the policy sampled them: those of replaced tokens in place of the forced ones."""
        ids, logprobs = list(self.sampled_ids), list(self.logprobs)
        for one in self.replaced:
            ids[one.position], logprobs[one.position] = one.token_id, one.logprob
        return tuple(ids), tuple(logprobs)


@dataclass(frozen=True, slots=True)
class Spawn:
    """One spawn round: the call `(path, segment)` ended in a block that started these children."""

    path: Path
    segment: int
    children: tuple[Path, ...]
    labels: tuple[str, ...]


class JoinOutcome(StrEnum):
    """How a child ended, as its parent is told."""

    SOLVED = "solved"
    NO_SOLUTION = "no_solution"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Join:
    """The joins of one spawn round's children.

    Attributes:
        outcomes: one per child, in spawn order.
        reasons: the named reason of each outcome ("" for a plain one; "length", "error", "bad_message", …).
        joined_ids: the tokens that took the place of the spawn block in the parent's context.
        kept_tokens: how many of the spawning call's sampled tokens stay before them.
        messages: what each child joined with, "" unless it solved: all that its parent learns of it, with its outcome.
    """

    path: Path
    segment: int
    outcomes: tuple[JoinOutcome, ...]
    reasons: tuple[str, ...]
    joined_ids: tuple[int, ...]
    kept_tokens: int
    messages: tuple[str, ...] = ()


class Outcome(StrEnum):
    """How a whole tree ended."""

    ANSWERED = "answered"
    NO_ANSWER = "no_answer"
    TRUNCATED = "truncated"
    CONTEXT_FULL = "context_full"
    INVALID_SPAWN = "invalid_spawn"
    BOUND_ROUNDS = "bound_rounds"
    BOUND_CHILDREN = "bound_children"
    BOUND_DEPTH = "bound_depth"
    BOUND_TOKENS = "bound_tokens"
    BOUND_TIME = "bound_time"
    CANCELLED = "cancelled"
    ENGINE_ERROR = "engine_error"


SOLVED = "solved"
"""The verdict on a solved tree, for every task."""


class Ending(StrEnum):
    """The six kinds of endings of a tree; training pays each a price of its own (`config.RewardConfig`)."""

    SOLVED = "solved"
    NO_ANSWER = "no_answer"
    FALSE_CLAIM = "false_claim"
    CUT_OFF = "cut_off"
    INVALID_SPAWN = "invalid_spawn"
    FAILED_ENGINE = "failed_engine"


INTERRUPTED = frozenset({Outcome.ENGINE_ERROR, Outcome.BOUND_TIME, Outcome.CANCELLED})
"""The machine ended the tree, not the policy: an engine failed, or was too slow. Such a tree says nothing of it."""

_ENDINGS = {
    Outcome.ANSWERED: Ending.FALSE_CLAIM,  # of a tree that is not solved
    Outcome.NO_ANSWER: Ending.NO_ANSWER,
    Outcome.INVALID_SPAWN: Ending.INVALID_SPAWN,
    **dict.fromkeys(INTERRUPTED, Ending.FAILED_ENGINE),
}
"""By outcome. All others are bounds: the tree was cut off."""


@dataclass(frozen=True)
class ThreadTree:
    """One reasoning: every call of every thread, in the order (path, segment), and what came of it.

    Attributes:
        problem_key: whose attempt this is; `sample` numbers the attempts at one problem.
        final_text: the root parent's whole context, joins included, without special tokens.
        outcome, detail: a named reason and, where there is one, its particulars.
        reward: a number to train on. No estimate reads it: prices and coins are rewards too.
        verdict: the verifier's judgement, `SOLVED` or a named reason; "" before it was given.
        form: what is wrong with the text of a right answer, by name; "" for nothing.
    """

    problem_key: str
    sample: int
    calls: tuple[Call, ...]
    spawns: tuple[Spawn, ...]
    joins: tuple[Join, ...]
    final_text: str
    outcome: Outcome
    detail: str = ""
    invalid_spawns: int = 0
    reward: float | None = None
    verdict: str = ""
    form: str = ""

    @property
    def solved(self) -> bool:
        """Whether the verifier found its answer right. Raises ValueError before the verdict."""
        if not self.verdict:
            raise ValueError(f"the tree of {self.problem_key!r}, sample {self.sample}, has no verdict yet")
        return self.verdict == SOLVED

    @property
    def ending(self) -> Ending:
        """How it ended. Raises ValueError before the verdict."""
        return Ending.SOLVED if self.solved else _ENDINGS.get(self.outcome, Ending.CUT_OFF)

    @cached_property
    def total_tokens(self) -> int:
        """Tokens sampled in all threads (paper section 4)."""
        return sum(call.sampled_tokens for call in self.calls)

    @cached_property
    def sequential_tokens(self) -> int:
        """Tokens on the longest causal path: a thread's own segments plus, per join, its longest child (the span)."""
        own: Counter[Path] = Counter()
        for call in self.calls:
            own[call.path] += call.sampled_tokens
        rounds: dict[Path, list[Spawn]] = {}
        for spawn in self.spawns:
            rounds.setdefault(spawn.path, []).append(spawn)

        def span(path: Path) -> int:
            return own[path] + sum(max((span(c) for c in s.children), default=0) for s in rounds.get(path, ()))

        return span(())

    @cached_property
    def children(self) -> int:
        """Child threads started, over the whole tree."""
        return sum(len(spawn.children) for spawn in self.spawns)

    @cached_property
    def depth(self) -> int:
        """0 for a tree without children."""
        return max((len(call.path) for call in self.calls), default=0)

    @cached_property
    def latency_s(self) -> float:
        """Wall seconds from the first call's start to the last call's end."""
        if not self.calls:
            return 0.0
        return max(c.end_s for c in self.calls) - min(c.start_s for c in self.calls)

    def dispositions(self) -> Counter[Disposition]:
        """Sum of its calls' dispositions."""
        total: Counter[Disposition] = Counter()
        for call in self.calls:
            total.update(call.dispositions())
        return total

    def versions(self) -> set[WeightVersion]:
        """All weight versions that any of its tokens were drawn under."""
        return {span.version for call in self.calls for span in call.versions}


@dataclass(frozen=True, slots=True)
class Group:
    """The trees sampled from one prompt: exactly `group_size` of them."""

    problem_key: str
    trees: tuple[ThreadTree, ...]
