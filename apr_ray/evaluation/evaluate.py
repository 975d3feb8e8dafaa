"""Accuracy and cost of a policy on held-out problems."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from apr_ray.config import EvalConfig
from apr_ray.core.ledger import Problem, ThreadTree
from apr_ray.core.task import Task
from apr_ray.metrics.intervals import wilson
from apr_ray.metrics.names import mode_name, targets_mode
from apr_ray.metrics.trees import failure_reasons, tree_metrics
from apr_ray.reward.actor import RewardClient
from apr_ray.rollout.pool import RolloutPool
from apr_ray.threads.runtime import TreeRequest
from apr_ray.tracking.progress import Bar


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One evaluation: the policy at one temperature.

    Attributes:
        accuracy: mean over problems of the share of their samples that were verified.
        low, high: its 95 % Wilson interval over problems.
        trees: in the order (problem, sample), scored.
    """

    temperature: float
    problems: int
    samples: int
    accuracy: float
    low: float
    high: float
    trees: tuple[ThreadTree, ...]

    @property
    def passed(self) -> int:
        """Problems of which at least one sample was verified (the paper's pass@n; n is `samples`)."""
        return len({tree.problem_key for tree in self.trees if tree.solved})

    def metrics(self, mode: str = "") -> dict[str, float]:
        """By the names in `metrics.names`; of another mode than the temperature's where one is given."""
        at = f"eval/{mode or mode_name(self.temperature)}/"
        out = {"accuracy": self.accuracy, "accuracy_low": self.low, "accuracy_high": self.high}
        if self.samples > 1:
            out["pass_at_n"] = self.passed / self.problems
        out |= tree_metrics(self.trees)
        out["latency_s"] = sum(t.latency_s for t in self.trees) / len(self.trees)
        out |= {f"failure/{reason}": share for reason, share in failure_reasons(self.trees).items()}
        return {at + name: value for name, value in out.items()}


@dataclass(frozen=True, slots=True)
class EvalPart:
    """One part of a full evaluation; `mode` is its name in metrics and files."""

    mode: str
    temperature: float
    problems: Sequence[Problem]
    samples: int


def eval_parts(settings: EvalConfig, task: Task) -> list[EvalPart]:
    """A full evaluation: every temperature on the configured split, and problems with held-out targets greedily."""
    problems = task.problems(settings.split, settings.problems, settings.seed)
    parts = [EvalPart(mode_name(t), t, problems, 1 if t == 0 else settings.samples) for t in settings.temperatures]
    if settings.targets_problems:
        targets = task.problems("heldout_targets", settings.targets_problems, settings.seed)
        parts.append(EvalPart(targets_mode(0.0), 0.0, targets, 1))
    return parts


def tree_seed(run_seed: int, purpose: str, problem_key: str, sample: int) -> int:
    """A tree's seed from what it is, never from when or where it runs (contract 7)."""
    text = f"{run_seed}/{purpose}/{problem_key}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def evaluate(
    pool: RolloutPool,
    reward: RewardClient,
    problems: Sequence[Problem],
    *,
    temperature: float,
    samples: int = 1,
    seed: int = 0,
    budget: int | None = None,
    bar: Bar | None = None,
) -> EvalResult:
    """Run every problem `samples` times (once when greedy) and check the answers; `budget` conditions every root."""
    samples = 1 if temperature == 0 else samples
    asked = [(problem, sample) for problem in problems for sample in range(samples)]
    requests = [
        TreeRequest(p, s, tree_seed(seed, f"eval-{temperature}", p.key, s), temperature, budget=budget)
        for p, s in asked
    ]
    trees: list[ThreadTree | None] = [None] * len(asked)
    for done, (index, tree) in enumerate(pool.run(requests), start=1):
        trees[index] = tree
        if bar is not None:
            bar.update(done)
    scored = reward.score([p for p, _ in asked], [t for t in trees if t is not None])
    solved: dict[str, float] = defaultdict(float)
    for tree in scored:
        solved[tree.problem_key] += tree.solved / samples
    low, high = wilson(sum(solved.values()), len(problems))
    return EvalResult(
        temperature, len(problems), samples, sum(solved.values()) / len(problems), low, high, tuple(scored)
    )
