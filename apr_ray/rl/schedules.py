"""Learning-rate schedules as pure functions of step and progress."""

from __future__ import annotations

import math

from apr_ray.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """The rate at optimiser step `step` (from 0) when `progress` in [0, 1] of training is done.

    Linear warm-up counts steps, the decay follows progress, so that training bounded by tokens, steps or a clock shares
    one schedule.
    """
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    left = 1.0 - min(max(progress, 0.0), 1.0)
    if config.schedule == "constant":
        decay = 1.0
    elif config.schedule == "linear":
        decay = left
    else:
        decay = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return config.learning_rate * warm * (config.final_fraction + (1 - config.final_fraction) * decay)
