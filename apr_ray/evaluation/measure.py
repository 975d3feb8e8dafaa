"""The measurements of `apr-ray eval`: numbers and trees of every mode, why trees fail, the decision to spawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from apr_ray.config import Config
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.trees_io import write_trees
from apr_ray.evaluation.causes import causes
from apr_ray.evaluation.comparison import Change, Evaluation, compare
from apr_ray.evaluation.decisions import Decisions, decide_by_checkpoint, decision_metrics
from apr_ray.evaluation.evaluate import eval_parts, evaluate
from apr_ray.model.llama import policy_fingerprint
from apr_ray.reward.actor import RewardClient
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tasks.registry import load_task
from apr_ray.tracking.progress import ProgressBars

DECISIONS = 200
"""Problems whose demonstrations the decision points are taken from."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one policy.

    Attributes:
        policy: checksum of its weights, `model.llama.policy_fingerprint`.
        by_mode: metrics of each mode, by the last part of their names.
        trees: judged, by mode.
        decided: None for a task whose demonstrations never spawn.
        yardstick, changes: the best mode of the policy that it was compared with, and what became of each mode.
    """

    settings: Config
    policy: str
    by_mode: Mapping[str, Mapping[str, float]]
    trees: Mapping[str, Sequence[ThreadTree]]
    decided: Decisions | None
    yardstick: str
    changes: Sequence[Change]

    def rows(self) -> list[tuple[str, str, str]]:
        """Mode, metric, value."""
        return [(mode, name, f"{value:.4g}") for mode, found in self.by_mode.items() for name, value in found.items()]

    def write_numbers(self, file: Path) -> None:
        """As JSON: what was asked, `metrics` by their full names, and the comparison, if there was one."""
        asked = self.settings.evaluation
        numbers = {f"eval/{mode}/{name}": v for mode, found in self.by_mode.items() for name, v in found.items()}
        data: dict[str, object] = {
            "policy": self.policy,
            "split": asked.split,
            "problems": asked.problems,
            "samples": asked.samples,
            "targets_problems": asked.targets_problems,
            "seed": asked.seed,
            "metrics": numbers | (decision_metrics(self.decided) if self.decided else {}),
        }
        if self.changes:
            over = {change.mode: asdict(change.over_yardstick) for change in self.changes}
            data |= {"yardstick": self.yardstick, "over_yardstick": over}
        file.write_text(json.dumps(data, indent=1) + "\n")

    def write_trees(self, folder: Path) -> None:
        """One file a mode."""
        folder.mkdir(exist_ok=True)
        for mode, trees in self.trees.items():
            write_trees(folder / f"{mode}.jsonl", trees)


def measure_policy(settings: Config, policy: Path, before: Evaluation | None, bars: ProgressBars) -> Measurement:
    """Decode all parts of a full evaluation, and compare with `before`, if given. A Ray session must be there.

    Raises AprError, before anything is decoded, where `before` is of other problems.
    """
    task = load_task(settings.task)
    parts = eval_parts(settings.evaluation, task)
    for part in parts:
        known = {tree.problem_key for tree in (before or {}).get(part.mode, ())}
        if known and known != {problem.key for problem in part.problems}:
            raise AprError(
                f"{part.mode}: the evaluation to compare with has {len(known)} problems, and not these",
                "Evaluate both with the same task, evaluation.split, evaluation.problems and evaluation.seed",
            )

    tokenizer = task.load_tokenizer(str(policy))
    pool, reward = RolloutPool.start(settings, str(policy)), RewardClient(settings.task)
    by_mode, trees = {}, {}
    for part in parts:
        with bars.bar(f"evaluate, {part.mode}", len(part.problems) * part.samples) as bar:
            result = evaluate(
                pool,
                reward,
                part.problems,
                temperature=part.temperature,
                samples=part.samples,
                seed=settings.run.seed,
                budget=settings.rollout.budget,
                bar=bar,
            )
        of_trees = [problem for problem in part.problems for _ in range(part.samples)]
        why = causes(task, tokenizer, of_trees, result.trees)
        prefix = f"eval/{part.mode}/"
        by_mode[part.mode] = {name.removeprefix(prefix): value for name, value in result.metrics(part.mode).items()}
        by_mode[part.mode] |= {f"cause/{cause}": share for cause, share in why.items()}
        trees[part.mode] = result.trees

    decided = decide_by_checkpoint(policy, task, parts[0].problems[:DECISIONS], settings.run.seed)
    best, changes = compare(before, trees) if before is not None else ("", [])
    return Measurement(settings, policy_fingerprint(policy), by_mode, trees, decided, best, changes)
