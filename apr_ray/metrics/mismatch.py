"""Engine and learner apart, as metrics."""

from __future__ import annotations

from apr_ray.rl.mismatch import Mismatch


def mismatch_metrics(found: Mismatch, learner: int) -> dict[str, float]:
    """A batch's mismatch by its names in `metrics.names`; `learner` is the counter of the learner's weight version."""
    out = {
        "train/delta_logprob_mean": found.whole.delta_mean,
        "train/delta_logprob_max": found.whole.delta_max,
        "train/mismatch/ratio_outside": found.whole.ratio_outside,
        "train/mismatch/ratio_p999": found.whole.ratio_p999,
        "train/mismatch/tree_max": found.tree_max,
    }
    for counter, apart in found.versions.items():
        age = f"train/mismatch/age_{learner - counter}"
        out |= {
            f"{age}/tokens": apart.tokens / found.whole.tokens,
            f"{age}/delta_logprob_mean": apart.delta_mean,
            f"{age}/delta_logprob_max": apart.delta_max,
            f"{age}/ratio_outside": apart.ratio_outside,
            f"{age}/ratio_p999": apart.ratio_p999,
        }
    return out
