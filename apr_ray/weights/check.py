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
        SyncFailed: a worker does not answer within `weights.timeout_s`.
        MismatchError: a worker's mean is above `weights.mismatch_tolerance`: it does not run the learners' policy.
    """
    made = pool.sample_for_check(prompts, CHECK_TOKENS, temperature, config.timeout_s)
    ours = learners.logprobs([(*sample.prompt, *sample.ids) for sample in made], temperature)
    deltas: dict[str, list[float]] = {}
    for sample, reference in zip(made, ours, strict=True):
        apart = np.abs(reference[len(sample.prompt) :] - np.asarray(sample.logprobs))
        deltas.setdefault(sample.worker, []).extend(apart.tolist())
    for worker, own in deltas.items():
        mean = float(np.mean(own))
        if not mean <= config.mismatch_tolerance:
            raise MismatchError(
                f"after sync {version} engines and learners differ by {mean:.2e} in logprob per token on {worker}"
                f" (max {max(own):.2e}), tolerance {config.mismatch_tolerance:.0e}",
                "That engine does not run the learners' weights; raise weights.mismatch_tolerance only for other"
                " precisions",
            )
    return float(np.mean([delta for own in deltas.values() for delta in own]))
