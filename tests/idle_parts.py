"""Ray actors that take a part's place and do nothing: for tests of where parts run, not of what they do.

A module of its own because Ray imports it in every actor: a rank that imports DeepSpeed takes ten times as long.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def require_folder(path: str | None) -> None:
    """As a real part fails that is given a checkpoint which is not there."""
    if path is not None and not Path(path).is_dir():
        raise FileNotFoundError(path)


class IdleRank:
    """Answers what is asked of a rank before its first step."""

    def __init__(self, config: Any, optimizer: Any, init_from: str | None, rank: int) -> None:
        self.init_from = init_from

    def log(self) -> str:
        return ""

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def start(self, address: str, port: int) -> int:
        require_folder(self.init_from)
        return 0

    def freeze_reference(self, checkpoint: str | None) -> None:
        return None


class IdleWorker:
    """Answers what `RolloutPool.start` asks."""

    def __init__(self, config: Any, checkpoint: str, worker_id: str, place: int = 0) -> None:
        require_folder(checkpoint)

    async def join(self, source: Any) -> str:
        return ""
