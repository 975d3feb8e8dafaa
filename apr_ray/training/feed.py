"""Supervised steps, some of them submitted before the one before is done, so that no rank waits for the next batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from apr_ray.config import SftConfig
from apr_ray.data.sampler import SftSampler
from apr_ray.learner.group import LearnerGroup
from apr_ray.learner.steps import StepStats
from apr_ray.rl.schedules import learning_rate
from apr_ray.training.run_dir import LoopState
from apr_ray.training.step import Clock

IN_FLIGHT = 2
"""Steps submitted and not done, at most."""


@dataclass(frozen=True, slots=True)
class Done:
    """A supervised step that is done.

    Attributes:
        tokens: of its batch; `shown` of all batches up to it.
        evaluates, saves: due now; no step is in flight then.
        last: no step follows.
    """

    number: int
    stats: StepStats
    tokens: int
    shown: int
    evaluates: bool
    saves: bool
    last: bool


class Feed:
    """Batches into the learners, until `sft.tokens` or `sft.max_minutes`.

    Args:
        state: of the loop; it counts steps that are done, and tokens that are submitted.
        bf16: whether steps run in bfloat16.
    """

    def __init__(
        self, sft: SftConfig, learners: LearnerGroup, sampler: SftSampler, state: LoopState, bf16: bool
    ) -> None:
        self.sft, self.learners, self.sampler, self.state = sft, learners, sampler, state
        self.bf16 = bf16
        self.clock = Clock(state.elapsed_s)

    def share(self) -> float:
        """Of the whole training, from 0; 1 and more at the end."""
        return max(self.state.tokens / self.sft.tokens, self.clock.share_of(self.sft.max_minutes))

    def steps(self) -> Iterator[Done]:
        """Every step that is left, as it gets done."""
        pending: deque[tuple[list[object], int]] = deque()
        submitted = self.state.step
        while pending or self.share() < 1:
            while self.share() < 1 and len(pending) < IN_FLIGHT and not (pending and self._stops_after(submitted)):
                batch = self.sampler.next(self.share(), self.sft.child_first_fraction)
                rate = learning_rate(self.sft.optimizer, submitted, self.share())
                pending.append((self.learners.submit_sft_step(batch, rate, self.bf16), len(batch.tokens)))
                submitted += 1
                self.state.tokens += len(batch.tokens)

            submission, tokens = pending.popleft()
            stats = self.learners.finish_sft_step(submission)
            number = self.state.step = self.state.step + 1
            self.state.elapsed_s, self.state.position = self.clock.elapsed_s(), dict(self.sampler.position)
            shown = self.state.tokens - sum(waiting for _, waiting in pending)
            last = not pending and self.share() >= 1
            evaluates = not pending and not last and number % self.sft.eval_every == 0
            saves = not pending and (last or evaluates or number % self.sft.save_every == 0)
            yield Done(number, stats, tokens, shown, evaluates, saves, last)

    def _stops_after(self, step: int) -> bool:
        """Whether nothing may be in flight after this step, because the policy is saved or evaluated there."""
        return step % self.sft.save_every == 0 or step % self.sft.eval_every == 0


class Meter:
    """Tokens a second since it was last read."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.since = tokens, time.monotonic()

    def read(self, tokens: int) -> float:
        """From all tokens so far."""
        now = time.monotonic()
        speed = (tokens - self.tokens) / (now - self.since)
        self.tokens, self.since = tokens, now
        return speed
