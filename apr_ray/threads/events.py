"""Events of a running tree, for a listener: a progress lane, later a web page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from apr_ray.core.engine import FinishReason
from apr_ray.core.ledger import JoinOutcome, Outcome, Path


@dataclass(frozen=True, slots=True)
class CallStarted:
    path: Path
    segment: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokensSampled:
    path: Path
    segment: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CallEnded:
    path: Path
    segment: int
    finish: FinishReason
    sampled_tokens: int


@dataclass(frozen=True, slots=True)
class Spawned:
    path: Path
    children: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    path: Path
    outcomes: tuple[JoinOutcome, ...]


@dataclass(frozen=True, slots=True)
class TreeEnded:
    outcome: Outcome
    total_tokens: int


ThreadEvent = CallStarted | TokensSampled | CallEnded | Spawned | Joined | TreeEnded
Listener = Callable[[ThreadEvent], None]
"""Called from the runtime's loop: it must be quick and must not raise."""
