"""The report of a GRPO step: its metrics, its batch for the audit, and the checks that may end the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from apr_ray.config import Config
from apr_ray.core.errors import AprError, MismatchError
from apr_ray.core.ledger import Disposition, Ending, Problem
from apr_ray.core.weights import WeightVersion
from apr_ray.evaluation.kept_batch import KeptStep, Reported
from apr_ray.learner.steps import StepStats
from apr_ray.metrics.mismatch import mismatch_metrics
from apr_ray.metrics.trees import failure_reasons, staleness, tree_metrics
from apr_ray.rl.batches import GrpoBatch
from apr_ray.training.groups import Drawn
from apr_ray.training.step import Step

log = logging.getLogger(__name__)
PHASES = ("wait", "reward", "learn", "keep", "sync")
"""Of a GRPO step, in order; together they are the step."""
IDLE_STEPS = 3
"""Steps in a row without a trained token that end a run."""
WHY_IDLE = {
    Disposition.STALE: (
        "all trees were drawn under weights older than grpo.max_staleness allows",
        "Raise grpo.max_staleness, or see why the engines' weights are old",
    ),
    Disposition.ZERO_ADVANTAGE: (
        "in every group all trees have the same reward",
        "Begin with a policy that solves some problems and not all, raise grpo.problems_per_step or grpo.group_size,"
        " or set grpo.refill_rounds",
    ),
    Disposition.ERROR: ("the engines failed", "See the workers' logs"),
    Disposition.ABORTED: ("all trees were cut by the clock", "Raise bounds.max_seconds"),
}


def require_learning(number: int, made: GrpoBatch, idle_steps: int) -> None:
    """Say so where a step has nothing to train on; raise AprError after `IDLE_STEPS` of them in a row."""
    if not idle_steps:
        return
    reason, remedy = "no tree sampled a token", "Look at the failures in metrics.jsonl"
    for fate, _ in made.dispositions.most_common(1):
        reason, remedy = WHY_IDLE[fate]
    what = f"step {number} trained on nothing, and no optimiser step was taken: {reason}"
    if idle_steps >= IDLE_STEPS:
        raise AprError(f"{what}; so were the {IDLE_STEPS - 1} steps before it", remedy)
    log.warning("%s", what)


def require_match(stats: Sequence[StepStats], version: WeightVersion, tolerance: float) -> None:
    """Raise MismatchError where engines and learners differ too much on tokens said to be drawn under the learners'
    `version`: older ones differ for a reason."""
    found = stats[0].mismatch if stats else None
    own = found.versions.get(version.counter) if found else None
    if own and not own.delta_mean <= tolerance:
        raise MismatchError(
            f"weights {version}: engines and learners differ by {own.delta_mean:.2e} in logprob per token, tolerance"
            f" {tolerance:.0e}",
            "The trees were not drawn from the learners' policy; or precisions differ: match grpo.precision and"
            " engine.dtype, or raise weights.mismatch_tolerance",
        )


def kept_step(
    config: Config,
    step: int,
    version: WeightVersion,
    made: GrpoBatch,
    stats: Sequence[StepStats],
    reference: str,
    problems: Sequence[Problem],
) -> KeptStep:
    """A step as `apr-ray audit` will want to know it."""
    grpo = config.grpo
    reported = None
    if stats and (apart := stats[0].mismatch):
        first = stats[0]
        deltas = apart.whole.delta_mean, apart.whole.delta_max
        reported = Reported(first.loss, first.kl, first.grad_norm, first.tokens, *deltas, first.cut, first.slope)
    return KeptStep(
        step=step,
        version=str(version),
        group_size=grpo.group_size,
        clip=grpo.clip,
        kl_coefficient=grpo.kl_coefficient,
        temperature=grpo.temperature,
        max_staleness=grpo.max_staleness,
        reference=reference if grpo.kl_coefficient else "",
        dispositions={disposition.value: n for disposition, n in made.dispositions.items()},
        reported=reported,
        advantage=grpo.advantage,
        loss_mean=grpo.loss_mean,
        ratio=grpo.ratio,
        correction=grpo.correction,
        correction_level=grpo.correction_level,
        correction_cap=grpo.correction_cap,
        correction_from=grpo.correction_from,
        credit=grpo.credit,
        prices={} if grpo.reward.coin else {e.value: getattr(grpo.reward, e.value) for e in Ending},
        problems=[dict(problem.to_json()) for problem in problems],
    )


def step_metrics(
    step: Step,
    drawn: Drawn,
    made: GrpoBatch,
    stats: Sequence[StepStats],
    version: WeightVersion,
    with_kl: bool,
) -> dict[str, float]:
    """One step's metrics, by their names in `metrics.names`; `version` is the weights' that it began with."""
    trees = drawn.trees
    prompt = sum(len(c.prompt_ids) for t in trees for c in t.calls)
    out = {
        "rollout/reward": sum(t.reward or 0.0 for t in trees) / len(trees),
        "rollout/accuracy": sum(t.solved for t in trees) / len(trees),
        "rollout/zero_variance_groups": made.zero_variance_groups / max(1, made.groups),
        "rollout/staleness": staleness(trees, version),
        "rollout/tokens_per_s": sum(t.total_tokens for t in trees) / drawn.rollout_s,
        "rollout/cached_tokens": sum(c.cached_tokens for t in trees for c in t.calls) / max(1, prompt),
        "time/rollout_s": drawn.rollout_s,
        **{f"time/{name}_s": step.seconds[name] for name in PHASES},
        "time/step_s": sum(step.seconds.values()),
    }
    out |= {f"rollout/{name}": value for name, value in tree_metrics(trees).items()}
    out |= {f"rollout/failure/{reason}": share for reason, share in failure_reasons(trees).items()}
    out |= {f"rollout/tokens/{disposition.value}": float(n) for disposition, n in made.dispositions.items()}
    if stats:
        first, last = stats[0], stats[-1]
        weight = float(made.batch.loss_weights.sum())
        out |= {
            "train/loss": first.loss,
            "train/grad_norm": sum(s.grad_norm for s in stats) / len(stats),
            "train/learning_rate": first.learning_rate,
            "train/entropy": first.entropy / weight,
            "train/logit_scale": first.logit_scale / weight,
            "train/clip_fraction": last.clipped / max(1, last.tokens),
            "train/tokens": float(first.tokens),
            "train/tokens_per_s": sum(s.tokens for s in stats) / step.seconds["learn"],
            "train/mismatch/cut": first.cut / max(1, first.tokens),
        }
        if norms := [s.update_norm for s in stats if s.update_norm is not None]:
            out["train/update_norm"] = sum(norms) / len(norms)
        if with_kl:
            out["train/kl"] = first.kl
        if first.mismatch:
            out |= mismatch_metrics(first.mismatch, version.counter)
    return out
