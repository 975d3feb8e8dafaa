"""One step of a training loop: its number and rate, its phases by name, and what is due when it ends."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from apr_ray.config import OptimizerConfig
from apr_ray.core.weights import WeightVersion
from apr_ray.learner.steps import StepStats
from apr_ray.rl.schedules import learning_rate
from apr_ray.training.run_dir import LoopState


class Clock:
    """Seconds of training, over all incarnations of a run."""

    def __init__(self, before_s: float) -> None:
        self.start = time.monotonic() - before_s

    def elapsed_s(self) -> float:
        """Since the run's first start, pauses left out."""
        return time.monotonic() - self.start

    def share_of(self, minutes: float | None) -> float:
        """Elapsed share of a time limit; 0 where there is none."""
        return self.elapsed_s() / (60 * minutes) if minutes else 0.0


@dataclass(slots=True)
class Step:
    """One step.

    Attributes:
        number: from 1.
        rate: learning rate.
        evaluates, saves: due when it ends.
        seconds: of each phase so far, by its name.
    """

    number: int
    rate: float
    evaluates: bool
    saves: bool
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step; the same name again adds to it."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begun


class Pace:
    """How far a loop is: by steps, tokens or the clock, whichever is furthest.

    Args:
        state: of the loop; it goes on from there.
        tokens: `state`'s that count, over those that end the loop; None without such an end.
        minutes: that end the loop; None without such an end.
    """

    def __init__(
        self,
        state: LoopState,
        optimizer: OptimizerConfig,
        *,
        steps: int,
        tokens: int | None,
        minutes: float | None,
        eval_every: int,
        save_every: int,
    ) -> None:
        self.state = state
        self.optimizer = optimizer
        self.limits = steps, tokens, minutes
        self.eval_every, self.save_every = eval_every, save_every
        self.clock = Clock(state.elapsed_s)
        self.ended = self.share() >= 1

    def share(self) -> float:
        """Of the whole, from 0; 1 and more at the end."""
        steps, tokens, minutes = self.limits
        sampled = self.state.sampled_tokens / tokens if tokens else 0.0
        return max(self.state.step / steps, sampled, self.clock.share_of(minutes))

    def steps(self) -> Iterator[Step]:
        """Every step that is left; `advance` ends each."""
        while not self.ended:
            number = self.state.step + 1
            rate = learning_rate(self.optimizer, self.state.step, self.share())
            yield Step(number, rate, number % self.eval_every == 0, number % self.save_every == 0)

    def advance(self, sampled_tokens: int, stats: Sequence[StepStats], version: WeightVersion) -> None:
        """A step is done. Whether it was the last is decided here: an evaluation that follows is not training."""
        self.state.step += 1
        self.state.version = str(version)
        self.state.idle_steps = 0 if stats else self.state.idle_steps + 1
        self.state.tokens += sum(s.tokens for s in stats)
        self.state.sampled_tokens += sampled_tokens
        self.state.elapsed_s = self.clock.elapsed_s()
        self.ended = self.share() >= 1
