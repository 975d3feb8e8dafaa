"""Errors a user can act on: what is wrong, the value seen, and what to do."""

from __future__ import annotations

from collections.abc import Mapping


class AprError(Exception):
    """An error with a remedy; the command line prints it in one line.

    Args:
        what: what is wrong, with the value seen.
        remedy: what the user should do about it.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}" if self.remedy else self.what


class ConfigError(AprError):
    """The configuration cannot be run as written."""


class EngineAsleep(AprError):
    """An engine that gave its memory back was asked for tokens or given weights."""

    def __init__(
        self, what: str = "the engine is asleep: its memory is given back", remedy: str = "Wake it first"
    ) -> None:
        super().__init__(what, remedy)


class WeightsRejected(AprError):
    """A weight update was refused whole; nothing of it was applied."""


class SyncFailed(AprError):
    """A weight broadcast did not reach everyone; the message names who is missing.

    Args:
        dead: why each part died that died, by name.
        others: whether parts failed that did not die.
    """

    def __init__(
        self, what: str, remedy: str = "", dead: Mapping[str, Exception] | None = None, others: bool = False
    ) -> None:
        super().__init__(what, remedy)
        self.args = (what, remedy, dead, others)
        self.dead = dead or {}
        self.others = others


class MismatchError(AprError):
    """Engine and learner disagree on logprobs by more than the tolerance."""


class PartDied(AprError):
    """An actor died; the message names which one."""
