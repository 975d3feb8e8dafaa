"""Spawn and join on token ids: the parent's ids before the spawn tag are kept as the engine gave them."""

from __future__ import annotations

from collections.abc import Sequence

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import JoinOutcome, Outcome, Problem
from apr_ray.core.task import ChildResult, ChildSpec, SpawnJoinProtocol, SpawnRequest, ThreadEnd
from apr_ray.tasks.countdown.grammar import (
    JOIN_OPEN,
    MAX_TEXT_CHARS,
    ROOT,
    SPAWN_OPEN,
    Budget,
    Move,
    node_text,
)
from apr_ray.tasks.countdown.problem import CountdownProblem
from apr_ray.tasks.countdown.solver import root_state
from apr_ray.tasks.countdown.spawn_join import (
    SpawnError,
    child_prompt,
    child_result,
    join_block,
    read_spawn_block,
)
from apr_ray.tasks.countdown.tokenizer import CountdownTokenizer
from apr_ray.tasks.countdown.verifier import extract_answer


class CountdownProtocol(SpawnJoinProtocol):
    """APR's protocol (`method="apr"`), or SoS+'s, where nothing ever spawns (`method="sosp"`)."""

    def __init__(self, tokenizer: CountdownTokenizer, method: str = "apr", max_depth: int = 1) -> None:
        if method not in ("apr", "sosp"):
            raise AprError(f"unknown method {method!r}", "Use apr or sosp")
        super().__init__(tokenizer)
        self.method = method
        self.max_depth = max_depth if method == "apr" else 0
        self.spawn_open = tokenizer.tag_ids[SPAWN_OPEN]
        self.join_open = tokenizer.tag_ids[JOIN_OPEN]
        self.move = self.encode(Move(ROOT).text())[0]
        self.stop_ids = frozenset({tokenizer.eos_id, self.join_open})

    def root_prompt(self, problem: Problem, budget: int | None = None) -> tuple[int, ...]:
        """APR: two lines; SoS+: the state alone. A budget stands before the first line."""
        assert isinstance(problem, CountdownProblem)
        state = root_state(problem)
        text = child_prompt(ROOT, state) if self.method == "apr" else state.text()
        if budget is not None:
            kind = "Sub Call Budget" if self.method == "apr" else "Token Budget"
            text = Budget(kind, budget).text() + text
        return self.encode(text)

    def forced_replacement(self, token_id: int) -> int | None:
        """A model must not open a join itself: a spawn is forced in its place (released code, kept)."""
        return self.spawn_open if token_id == self.join_open else None

    def chooses_to_spawn(self, token_id: int) -> bool | None:
        """The two opening tags spawn (the second is replaced by the first); moving to a node goes on alone."""
        return {self.spawn_open: True, self.join_open: True, self.move: False}.get(token_id)

    def read_call(self, context: Sequence[int], sampled: Sequence[int], depth: int) -> SpawnRequest | ThreadEnd:
        """Spawn, answer or none, from how the call ended."""
        sampled = list(sampled)
        if self.spawn_open in sampled:
            keep = sampled.index(self.spawn_open)
            own_text = self.text([*context, *sampled[:keep]])
            block = self.text(sampled[keep:])
            if len(own_text) + len(block) > MAX_TEXT_CHARS:
                return ThreadEnd(Outcome.INVALID_SPAWN, "text_too_long")
            try:
                children = read_spawn_block(block, own_text, depth + 1)
            except SpawnError as error:
                return ThreadEnd(Outcome.INVALID_SPAWN, error.reason)
            return SpawnRequest(tuple(ChildSpec(self.encode(c.prompt), node_text(c.node)) for c in children), keep)
        text = self.text([*context, *sampled])
        return ThreadEnd(Outcome.NO_ANSWER if extract_answer(text) is None else Outcome.ANSWERED)

    def read_child(self, context: Sequence[int], sampled: Sequence[int]) -> ChildResult:
        """The child's restated path, or "no solution"."""
        text = self.text([*context, *sampled])
        if len(text) > MAX_TEXT_CHARS:
            return ChildResult(JoinOutcome.NO_SOLUTION, reason="text_too_long")
        return child_result(text)

    def join_ids(self, request: SpawnRequest, results: Sequence[ChildResult], depth: int) -> tuple[int, ...]:
        """The join block; its text is the runtime's, so it is tokenised here, for the first time in this context."""
        nodes = [tuple(map(int, child.label[1:].split(","))) for child in request.children]
        return self.encode(join_block(nodes, results, depth))
