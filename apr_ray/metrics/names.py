"""Every metric, once: name, unit, meaning (contract 10). Trackers take no other name.

Names of evaluations carry their mode in place of `{mode}`: `greedy`, or `t1.0` for temperature 1; `greedy-targets` on
problems whose targets are never trained on; `quick` for those in training, greedy on
`evaluation.during_training_problems` validation problems.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's name, unit and meaning."""

    name: str
    unit: str
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric("sft/loss", "nats", "mean negative log-likelihood per trained token"),
    Metric("sft/grad_norm", "1", "gradient norm before clipping"),
    Metric("sft/learning_rate", "1", "learning rate of the step"),
    Metric("sft/tokens", "tokens", "tokens shown since the start, those without loss (`sft.mask`) included"),
    Metric(
        "sft/tokens_per_s",
        "tokens/s",
        "tokens shown per second since the last row, over all ranks; evaluations and saves in between count as time",
    ),
    Metric("sft/padding", "fraction", "share of computed tokens that were padding"),
    Metric("sft/p_spawn", "fraction", "mean probability to spawn at first decisions of validation demonstrations"),
    Metric("train/loss", "1", "GRPO loss of the first inner step"),
    Metric("train/grad_norm", "1", "gradient norm before clipping, mean over inner steps"),
    Metric("train/learning_rate", "1", "learning rate of the step"),
    Metric(
        "train/kl",
        "nats",
        "k3 estimate of KL(policy || reference) at the first inner step, weighted as the loss is; only with a KL term",
    ),
    Metric("train/entropy", "nats", "policy entropy over the trained tokens, mean by their weights in the loss"),
    Metric(
        "train/logit_scale",
        "1",
        "standard deviation of the logits over the vocabulary, before any temperature, mean over tokens as above",
    ),
    Metric("train/update_norm", "1", "norm of what an optimiser step changed, mean over inner steps; not at ZeRO 3"),
    Metric("train/clip_fraction", "fraction", "trained tokens whose ratio was clipped with effect, last inner step"),
    Metric("train/tokens", "tokens", "trained tokens of the step"),
    Metric("train/tokens_per_s", "tokens/s", "trained tokens times inner steps per second of learning"),
    Metric(
        "train/delta_logprob_mean", "nats", "mean |Δ|, Δ = logprob learner - logprob engine at the first inner step"
    ),
    Metric("train/delta_logprob_max", "nats", "largest of the same"),
    Metric("train/mismatch/ratio_outside", "fraction", "trained tokens whose ratio exp Δ is outside [1/2, 2]"),
    Metric("train/mismatch/ratio_p999", "1", "99.9th percentile of that ratio"),
    Metric("train/mismatch/tree_max", "nats", "largest |Σ Δ| over a tree's trained tokens"),
    Metric("train/mismatch/cut", "fraction", "trained tokens whose importance weight was truncated or masked"),
    Metric(
        "train/mismatch/age_{age}/tokens",
        "fraction",
        "trained tokens drawn under weights so many versions old: 0, the learner's own",
    ),
    Metric("train/mismatch/age_{age}/delta_logprob_mean", "nats", "mean |Δ| over those"),
    Metric("train/mismatch/age_{age}/delta_logprob_max", "nats", "largest |Δ| of those"),
    Metric("train/mismatch/age_{age}/ratio_outside", "fraction", "those whose ratio exp Δ is outside [1/2, 2]"),
    Metric("train/mismatch/age_{age}/ratio_p999", "1", "99.9th percentile of their ratio"),
    Metric("rollout/reward", "1", "mean reward of the step's trees, by `grpo.reward`"),
    Metric("rollout/accuracy", "fraction", "verified solutions over all trees of the step"),
    Metric("rollout/zero_variance_groups", "fraction", "groups whose trees all had the same reward, of those used"),
    Metric(
        "rollout/staleness",
        "versions",
        "mean over trees of the age of the oldest weights that drew its tokens; each tree's is in samples.jsonl",
    ),
    Metric(
        "rollout/tokens/{reason}", "tokens", "sampled tokens of the step by what becomes of them (docs/architecture)"
    ),
    Metric("rollout/total_tokens", "tokens", "mean tokens per tree, all threads"),
    Metric("rollout/sequential_tokens", "tokens", "mean tokens per tree on the critical path"),
    Metric("rollout/children", "threads", "mean children per tree"),
    Metric("rollout/spawned", "percent", "trees that spawn at least once"),
    Metric("rollout/children_given_spawn", "threads", "mean children of trees that spawn"),
    Metric("rollout/accuracy_given_spawn", "fraction", "verified solutions over trees that spawn"),
    Metric("rollout/depth", "levels", "mean depth of trees"),
    Metric("rollout/truncated", "percent", "trees cut off by a bound or a full context"),
    Metric("rollout/invalid_spawns", "percent", "spawns refused as malformed, of all spawns tried"),
    Metric("rollout/false_claims", "percent", "trees that claim an answer which is not verified"),
    Metric("rollout/faulty_form", "percent", "trees with a right answer in whose text something else is wrong"),
    Metric("rollout/replaced_spawns", "percent", "spawns whose tag the runtime had to put right, of all tried"),
    Metric("rollout/p_spawn", "fraction", "trees that spawned at their first decision, of those with one"),
    Metric("rollout/tokens_per_s", "tokens/s", "sampled tokens per second, over all workers"),
    Metric("rollout/cached_tokens", "fraction", "prompt tokens that needed no prefill"),
    Metric("rollout/restarts", "workers", "rollout workers that died and were replaced, since the driver started"),
    Metric("time/rollout_s", "s", "seconds that sampling the step's trees took, beside learning where they overlap"),
    Metric("time/wait_s", "s", "seconds of the step spent waiting for its trees"),
    Metric("time/reward_s", "s", "seconds of the step spent on rewards"),
    Metric("time/learn_s", "s", "seconds of the step spent learning"),
    Metric("time/keep_s", "s", "seconds of the step spent keeping its batch for the audit"),
    Metric("time/sync_s", "s", "seconds of the step spent sending weights and checking engines"),
    Metric("time/step_s", "s", "seconds of the whole step, without evaluation and checkpoints"),
    Metric("sync/delta_logprob_mean", "nats", "mean |logprob learner - logprob engine| of the check after a sync"),
    Metric("eval/{mode}/accuracy", "fraction", "verified solutions over all trees"),
    Metric(
        "eval/{mode}/pass_at_n", "fraction", "problems with a verified solution among `evaluation.samples`, if several"
    ),
    Metric("eval/{mode}/accuracy_low", "fraction", "lower end of its 95 % Wilson interval over problems"),
    Metric("eval/{mode}/accuracy_high", "fraction", "upper end of the same"),
    Metric("eval/{mode}/total_tokens", "tokens", "mean tokens per tree, all threads"),
    Metric("eval/{mode}/sequential_tokens", "tokens", "mean tokens per tree on the critical path"),
    Metric("eval/{mode}/children", "threads", "mean children per tree"),
    Metric("eval/{mode}/spawned", "percent", "trees that spawn at least once"),
    Metric("eval/{mode}/children_given_spawn", "threads", "mean children of trees that spawn"),
    Metric("eval/{mode}/accuracy_given_spawn", "fraction", "verified solutions over trees that spawn"),
    Metric("eval/{mode}/depth", "levels", "mean depth of trees"),
    Metric("eval/{mode}/truncated", "percent", "trees cut off by a bound or a full context"),
    Metric("eval/{mode}/invalid_spawns", "percent", "spawns refused as malformed, of all spawns tried"),
    Metric("eval/{mode}/false_claims", "percent", "trees that claim an answer which is not verified"),
    Metric("eval/{mode}/faulty_form", "percent", "trees with a right answer in whose text something else is wrong"),
    Metric("eval/{mode}/replaced_spawns", "percent", "spawns whose tag the runtime had to put right, of all tried"),
    Metric("eval/{mode}/latency_s", "s", "mean wall time of a tree, all trees running side by side"),
    Metric("eval/decision/p_spawn", "fraction", "mean P(spawn | decision) at first decisions of demonstrations"),
    Metric("eval/decision/replaced", "fraction", "share of that probability on tags that only the runtime may write"),
    Metric(
        "eval/decision/margin_median", "nats", "logprob of the spawn tag less the next choice's, where it is likeliest"
    ),
    Metric("eval/decision/margin_p10", "nats", "10th percentile of the same"),
    Metric("rollout/failure/{reason}", "percent", "trees that failed for this reason"),
    Metric("eval/{mode}/failure/{reason}", "percent", "trees that failed for this reason"),
    Metric("eval/{mode}/cause/{reason}", "percent", "trees whose failure has this cause: the task's own diagnosis"),
)

HOLES = {r"\{mode\}": "[a-z0-9.-]+", r"\{reason\}": "[a-z0-9_-]+", r"\{age\}": "[0-9]+"}
"""A pattern for each place holder of a name."""

_PATTERN = re.compile(
    "|".join(
        "^" + functools.reduce(lambda text, hole: text.replace(*hole), HOLES.items(), re.escape(m.name)) + "$"
        for m in METRICS
    )
)


def is_known(name: str) -> bool:
    """Whether a metric of this name stands in the table."""
    return _PATTERN.match(name) is not None


def mode_name(temperature: float) -> str:
    """`greedy` for 0, else `t` and the temperature: `t1.0`, `t0.25`."""
    return "greedy" if temperature == 0 else f"t{float(temperature)!r}"


ON_TARGETS = "-targets"


def targets_mode(temperature: float) -> str:
    """The mode of an evaluation on problems with held-out targets: `greedy-targets`."""
    return mode_name(temperature) + ON_TARGETS


def mode_title(mode: str) -> str:
    """For people: `greedy`, `temperature 1`, `greedy, held-out targets`."""
    if mode.endswith(ON_TARGETS):
        return f"{mode_title(mode.removesuffix(ON_TARGETS))}, held-out targets"
    return f"temperature {float(mode[1:]):g}" if mode.startswith("t") else mode


QUICK = "quick"
