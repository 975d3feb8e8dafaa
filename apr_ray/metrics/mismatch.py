"""Engine and learner apart, as metrics."""

from __future__ import annotations

from apr_ray.rl.mismatch import Mismatch


def mismatch_metrics(found: Mismatch, learner: int) -> dict[str, float]:
    """A batch's mismatch by its names in `metrics.names`; `learner` is the counter of the learner's weight version."""
    out = {
        "train/delta_logprob_mean": found.delta_mean,
        "train/delta_logprob_max": found.delta_max,
        "train/mismatch/ratio_outside": found.ratio_outside,
        "train/mismatch/ratio_p999": found.ratio_p999,
        "train/mismatch/tree_max": found.tree_max,
    }
    if set(found.versions) == {learner}:
        return out
    tokens = sum(version.tokens for version in found.versions.values())
    for counter, version in found.versions.items():
        out[f"train/mismatch/age_{learner - counter}/tokens"] = version.tokens / tokens
        out[f"train/mismatch/age_{learner - counter}/delta_logprob_mean"] = version.delta_mean
    return out
