"""Colocated parts take turns: while one works, the memory of the other is given back."""

from __future__ import annotations

from apr_ray.config import Config
from apr_ray.learner.group import LearnerGroup
from apr_ray.rollout.pool import RolloutPool


class Turns:
    """Whose turn it is. Where every part has a place of its own, nothing sleeps.

    Whose memory is taken goes to sleep before the other wakes.
    """

    def __init__(self, config: Config, learners: LearnerGroup) -> None:
        self.shared = config.placement.mode == "colocated"
        self.learners = learners

    def engines(self, pool: RolloutPool | None = None) -> None:
        """The engines' turn; without a pool, before one is started."""
        if self.shared:
            self.learners.sleep()
            if pool is not None:
                pool.wake()

    def learn(self, pool: RolloutPool) -> None:
        """The learners' turn."""
        if self.shared:
            pool.sleep()
            self.learners.wake()
