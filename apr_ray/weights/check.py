"""The check after every sync: do the engines run the learners' policy?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apr_ray.config import WeightsConfig
from apr_ray.core.errors import MismatchError
from apr_ray.core.weights import WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.rollout.pool import RolloutPool

CHECK_TOKENS = 24


def check_engines(
    learners: LearnerGroup,
    pool: RolloutPool,
    prompts: Sequence[tuple[int, ...]],
    temperature: float,
    config: WeightsConfig,
    version: WeightVersion,
) -> float:
    """Sample a little on every worker and compare its logprobs with the learner's at the same weights.

    Returns:
        The mean |Δ logprob| per token.

    Raises:
        MismatchError: it is above `weights.mismatch_tolerance`: the engines do not run the learners' policy.
    """
    made = pool.sample_for_check(prompts, CHECK_TOKENS, temperature)
    ours = learners.logprobs([(*prompt, *ids) for prompt, ids, _ in made], temperature)
    deltas = np.concatenate(
        [
            np.abs(reference[len(prompt) :] - np.asarray(logprobs))
            for (prompt, _, logprobs), reference in zip(made, ours, strict=True)
        ]
    )
    mean = float(deltas.mean())
    if not mean <= config.mismatch_tolerance:
        raise MismatchError(
            f"after sync {version} engines and learners differ by {mean:.2e} in logprob per token"
            f" (max {deltas.max():.2e}), tolerance {config.mismatch_tolerance:.0e}",
            "The engines do not run the learners' weights; raise weights.mismatch_tolerance only for other precisions",
        )
    return mean
