"""The decision to spawn: how sure a policy is of it, at the places where demonstrations first made it.

The whole method is about one choice, to spawn or to go on alone. It is measured at the first such choice of a root
thread: there the demonstrated share is known, and it does not depend on what children found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr_ray.core.ledger import Problem, ThreadTree
from apr_ray.core.task import SpawnJoinProtocol, Task

Logprobs = Callable[[Sequence[Sequence[int]], float], Sequence[np.ndarray[Any, Any]]]
"""Logprob of every token of some sequences, at a temperature: `LearnerGroup.logprobs`, or a policy's own."""


@dataclass(frozen=True, slots=True)
class DecisionPoint:
    """A prefix after which a demonstration chose to spawn (`spawns`) or to go on alone."""

    prefix: tuple[int, ...]
    spawns: bool


@dataclass(frozen=True, slots=True)
class Decisions:
    """A policy at some decision points, all float64 [points]. What is left to 1 goes to tokens that put the decision
    off, such as one more line of an expansion.

    Attributes:
        demonstrated: share of the points at which the demonstration spawned.
        spawn: probability of the token that spawns.
        replaced: probability of the tokens that the runtime turns into it.
        alone: probability of the token that goes on alone.
    """

    demonstrated: float
    spawn: np.ndarray[Any, Any]
    replaced: np.ndarray[Any, Any]
    alone: np.ndarray[Any, Any]

    @property
    def spawning(self) -> np.ndarray[Any, Any]:
        """float64 [points]: probability to spawn, by whatever token."""
        return np.asarray(self.spawn + self.replaced)

    @property
    def p_spawn(self) -> float:
        """Mean probability to spawn, by whatever token, given that the policy decides here."""
        return float((self.spawning / (self.spawning + self.alone)).mean())

    @property
    def greedy(self) -> float:
        """Share of the points at which the token that spawns is the likeliest of the choices."""
        return float((self.spawn > np.maximum(self.alone, self.replaced)).mean())

    def margin(self, quantile: float) -> float:
        """A quantile, over the points where the token that spawns is the likeliest choice, of its logprob less that of
        the next; NaN where it never is."""
        rival = np.log(np.maximum(self.alone, self.replaced))
        margins = np.log(self.spawn) - rival
        spawning = margins[margins > 0]
        return float(np.quantile(spawning, quantile)) if len(spawning) else float("nan")


def first_choice(ids: Sequence[int], protocol: SpawnJoinProtocol) -> int | None:
    """Where a root's sampled ids first chose between spawning and going on; None where they never did."""
    return next((i for i, token in enumerate(ids) if protocol.chooses_to_spawn(token) is not None), None)


def decision_points(task: Task, problems: Sequence[Problem], seed: int) -> list[DecisionPoint]:
    """The first choice of each problem's demonstration, where there is one."""
    tokenizer = task.tokenizer()
    protocol = task.protocol(tokenizer)
    points = []
    for problem in problems:
        root = task.demonstrate(problem, seed).sequences[0]
        prompt, completion = tokenizer.encode(root.prompt), tokenizer.encode(root.completion)
        if (place := first_choice(completion, protocol)) is not None:
            spawns = bool(protocol.chooses_to_spawn(completion[place]))
            points.append(DecisionPoint((*prompt, *completion[:place]), spawns))
    return points


def decide(points: Sequence[DecisionPoint], protocol: SpawnJoinProtocol, logprobs: Logprobs) -> Decisions | None:
    """A policy's probabilities at these points; None where the task has no such choice."""
    ids = range(protocol.tokenizer.vocab_size)
    choices = {i: chosen for i in ids if (chosen := protocol.chooses_to_spawn(i)) is not None}
    if not points or not choices:
        return None

    def probability(token: int) -> np.ndarray[Any, Any]:
        rows = logprobs([[*point.prefix, token] for point in points], 1.0)
        return np.exp(np.array([row[-1] for row in rows], dtype=np.float64))

    groups: dict[str, np.ndarray[Any, Any]] = {n: np.zeros(len(points)) for n in ("spawn", "replaced", "alone")}
    for token, spawns in choices.items():
        name = "alone" if not spawns else "spawn" if protocol.forced_replacement(token) is None else "replaced"
        groups[name] = groups[name] + probability(token)
    return Decisions(sum(point.spawns for point in points) / len(points), **groups)


def decide_by_checkpoint(
    checkpoint: str | Path, task: Task, problems: Sequence[Problem], seed: int
) -> Decisions | None:
    """`decide` at the problems' demonstrated first choices, by a policy on disk in float32."""
    import torch

    from apr_ray.model.llama import load_policy
    from apr_ray.rl.losses import token_logprobs

    policy: Any = load_policy(checkpoint)

    @torch.no_grad()
    def logprobs(sequences: Sequence[Sequence[int]], temperature: float) -> list[np.ndarray[Any, Any]]:
        rows = [torch.tensor([list(ids)]) for ids in sequences]
        return [token_logprobs(policy(input_ids=row).logits, row, temperature)[0].numpy() for row in rows]

    protocol = task.protocol(task.load_tokenizer(str(checkpoint)))
    return decide(decision_points(task, problems, seed), protocol, logprobs)


def decision_metrics(decisions: Decisions) -> dict[str, float]:
    """By the names in `metrics.names`."""
    return {
        "eval/decision/p_spawn": decisions.p_spawn,
        "eval/decision/replaced": float(decisions.replaced.sum() / decisions.spawning.sum()),
        "eval/decision/margin_median": decisions.margin(0.5),
        "eval/decision/margin_p10": decisions.margin(0.1),
    }


def table_rows(decisions: Decisions) -> list[tuple[str, str]]:
    """For people: (what, value)."""
    return [
        ("demonstrations that spawn", f"{decisions.demonstrated:.3f}"),
        ("P(spawn | decision), mean", f"{decisions.p_spawn:.3f}"),
        ("of it, by a token that is replaced", f"{decisions.replaced.sum() / decisions.spawning.sum():.5f}"),
        ("P(decision), mean", f"{(decisions.spawning + decisions.alone).mean():.3f}"),
        ("the spawn token is the likeliest choice", f"{100 * decisions.greedy:.1f} %"),
        ("its greedy margin, median", f"{decisions.margin(0.5):.2f} nats"),
        ("its greedy margin, 10th percentile", f"{decisions.margin(0.1):.2f} nats"),
    ]


def sampled_p_spawn(trees: Sequence[ThreadTree], protocol: SpawnJoinProtocol) -> float | None:
    """Share of sampled trees that spawned at their root's first choice, of those that came to one."""
    chosen = []
    for tree in trees:
        drawn = tree.calls[0].as_sampled()[0] if tree.calls else ()
        if (place := first_choice(drawn, protocol)) is not None:
            chosen.append(bool(protocol.chooses_to_spawn(drawn[place])))
    return sum(chosen) / len(chosen) if chosen else None
