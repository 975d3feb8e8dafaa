"""Progress bars with rates and the time that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar(Protocol):
    """One piece of long work."""

    def update(self, done: float, note: str = "") -> None:
        """`done` out of the total, and a short note beside the bar."""
        ...


class ProgressBars:
    """Bars on a terminal; on anything else, a line every `LINE_EVERY` of the work, so that logs stay readable."""

    LINE_EVERY = 0.1

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet

    def say(self, text: str) -> None:
        """A line that stays above the bars."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """A bar for the length of a `with` block."""
        if self.quiet:
            yield _Silent()
        elif self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self.console) as progress:
                yield _Rich(progress, progress.add_task(title, total=total, note=""))
        else:
            yield _Lines(self.console, title, total, self.LINE_EVERY)


class _Silent:
    def update(self, done: float, note: str = "") -> None:
        pass


class _Rich:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress = progress
        self.task = task

    def update(self, done: float, note: str = "") -> None:
        self.progress.update(self.task, completed=done, note=note)


class _Lines:
    def __init__(self, console: Console, title: str, total: float, every: float) -> None:
        self.console = console
        self.title = title
        self.total = total
        self.every = every
        self.printed = -1

    def update(self, done: float, note: str = "") -> None:
        part = int(done / self.total / self.every + 1e-9) if self.total else 0
        if part > self.printed:
            self.printed = part
            line = f"{self.title}: {100 * done / self.total:.0f} %  {note}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
