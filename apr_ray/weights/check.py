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
    exact: bool,
) -> float:
    """Sample a little on every worker: does it say that it runs `version`, and are its logprobs the learner's?

    Args:
        exact: engines compute in float32; see `WeightsConfig.tolerance`.

    Returns:
        The mean |Δ logprob| per token.

    Raises:
        SyncFailed: a worker does not answer within `weights.timeout_s`.
        MismatchError: a worker samples nothing, or under other weights, or the mean |Δ logprob| of its tokens is above
            the tolerance: it does not run the learners' policy.
    """
    made = pool.sample_for_check(prompts, CHECK_TOKENS, temperature, config.timeout_s)
    for sample in made:
        said = ", ".join(map(str, sample.versions)) or "none: it sampled no token"
        if sample.versions != (version,):
            raise MismatchError(
                f"after sync {version} {sample.worker} decodes with weights {said}",
                "The update did not reach that engine: see its log, and weights.transport",
            )

    tolerance = config.tolerance(exact)
    ours = learners.logprobs([(*sample.prompt, *sample.ids) for sample in made], temperature)
    deltas: dict[str, list[float]] = {}
    for sample, reference in zip(made, ours, strict=True):
        apart = np.abs(reference[len(sample.prompt) :] - np.asarray(sample.logprobs))
        deltas.setdefault(sample.worker, []).extend(apart.tolist())
    for worker, own in deltas.items():
        mean = float(np.mean(own))
        if not mean <= tolerance:
            raise MismatchError(
                f"after sync {version} engines and learners differ by {mean:.2e} in logprob per token on {worker}"
                f" (max {max(own):.2e}), tolerance {tolerance:.0e}",
                "That engine does not run the learners' weights. Raise weights.mismatch_tolerance only where its"
                " arithmetic is known to be another",
            )
    return float(np.mean([delta for own in deltas.values() for delta in own]))
