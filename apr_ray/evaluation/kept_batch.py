"""A training batch on disk, with all that is needed to check what the learner made of it.

RUN/batches/step-000011/trees.jsonl   the step's trees, scored, `group_size` to a group, in order
                        policy/       the weights that the learner held before the step
                        step.json     what the learner was told and what it reported, with a format version
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.trees_io import read_trees, write_trees
from apr_ray.core.weights import WeightVersion
from apr_ray.model.llama import replace_directory

FORMAT_VERSION = 6
READABLE = (1, 2, 3, 4, 5, 6)
"""Format 1 had no options of the loss: the defaults of `KeptStep` and `Reported` are what it did. Formats 1 and 2 had
no slope. Up to format 3 replaced tokens carried no loss: a batch that holds one is refused. Up to format 4 rewards had
no prices, and `success` counted the trees that were not solved: such a batch is refused. Up to format 5 trees that
the clock ended counted as failures of the policy: a batch that holds one is refused."""
LAST_WITHOUT_REPLACED = 3
LAST_WITHOUT_PRICES = 4
LAST_WITH_SLOW_TREES = 5


@dataclass(frozen=True, slots=True)
class Reported:
    """The learner's report of its first inner step; `delta_*` over trained tokens, in nats; `cut` counts those
    whose importance weight was truncated or masked; `slope` is `StepStats.slope`, None where it was not kept."""

    loss: float
    kl: float
    grad_norm: float
    tokens: int
    delta_mean: float
    delta_max: float
    cut: int = 0
    slope: float | None = None


@dataclass(frozen=True, slots=True)
class KeptStep:
    """One step as it was asked for; see `config.GrpoConfig`.

    Attributes:
        step: from 1, as in the metrics.
        version: the weights that the learner held.
        reference: the checkpoint that the KL term pulls towards; "" without a KL term.
        dispositions: sampled tokens by what became of them.
        reported: None where no tree had anything to learn from.
        prices: of each ending, by its name; empty where a coin drew the rewards, and up to format 4.
        problems: of each group, as JSON; none up to format 5.
    """

    step: int
    version: str
    group_size: int
    clip: float
    kl_coefficient: float
    temperature: float
    max_staleness: int
    reference: str
    dispositions: dict[str, int]
    reported: Reported | None
    advantage: str = "group"
    loss_mean: str = "call"
    ratio: str = "behaviour"
    correction: str = "none"
    correction_level: str = "token"
    correction_cap: float = 2.0
    correction_from: float = 0.0
    credit: str = "tree"
    prices: dict[str, float] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class KeptBatch:
    """A step, its trees, and where its policy lies."""

    step: KeptStep
    trees: tuple[ThreadTree, ...]
    policy: Path

    @property
    def version(self) -> WeightVersion:
        return WeightVersion.parse(self.step.version)


def keep_batch(run: Path, step: KeptStep, trees: Sequence[ThreadTree], policy: Path, *, only_newest: bool) -> Path:
    """Write a batch under a run's folder, whole or not at all; with `only_newest` older ones are removed."""
    folder = run / "batches"
    final = folder / f"step-{step.step:06d}"
    partial = folder / f".{final.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_trees(partial / "trees.jsonl", trees)
    shutil.copytree(policy, partial / "policy")
    (partial / "step.json").write_text(json.dumps({"format": FORMAT_VERSION, **asdict(step)}, indent=1))
    replace_directory(partial, final)
    if only_newest:
        for old in folder.glob("step-*"):
            if old != final:
                shutil.rmtree(old)
    return final


def find_batch(run: Path, step: int) -> Path:
    """The folder of a kept batch of a run (or of a quickstart's GRPO phase). Raises AprError naming the kept steps."""
    if not run.is_dir():
        raise AprError(f"there is no folder {run}", "Give a GRPO run's folder, or a quickstart's")
    places = [run / "batches", run / "grpo" / "batches"]
    for place in places:
        if (place / f"step-{step:06d}").is_dir():
            return place / f"step-{step:06d}"
    kept = sorted(int(path.name.removeprefix("step-")) for place in places for path in place.glob("step-*"))
    known = f"kept are steps {', '.join(map(str, kept))}" if kept else "none is kept: see grpo.keep_batches"
    raise AprError(f"no batch of step {step} in {run}", known[0].upper() + known[1:])


def read_batch(folder: Path) -> KeptBatch:
    """Read what `keep_batch` wrote. Raises AprError where a part is missing, cut off, or of another format."""
    for name in ("step.json", "trees.jsonl", "policy/config.json"):
        if not (folder / name).is_file():
            raise AprError(f"{folder} has no {name}", "Give a folder that training wrote, whole")
    try:
        data = json.loads((folder / "step.json").read_text())
        found = data.pop("format")
        if found not in READABLE:
            raise AprError(
                f"{folder}/step.json has format {found!r}, this version reads {READABLE}",
                "Audit it with the apr-ray version that wrote it",
            )
        if found <= LAST_WITHOUT_REPLACED and data["dispositions"].pop("replaced", 0):
            raise AprError(
                f"{folder}/step.json has format {found}: its replaced tokens carried no loss",
                "Audit it with the apr-ray version that wrote it",
            )
        if found <= LAST_WITHOUT_PRICES and data.get("advantage") == "success":
            raise AprError(
                f"{folder}/step.json has format {found}: its unsolved trees were in the denominators",
                "Audit it with the apr-ray version that wrote it",
            )
        reported = data.pop("reported")
        step = KeptStep(**data, reported=Reported(**reported) if reported else None)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise AprError(f"{folder}/step.json is malformed: {error!r}", "The file may be cut off or edited") from error
    trees = tuple(read_trees(folder / "trees.jsonl"))
    if not trees or len(trees) % step.group_size:
        raise AprError(
            f"{folder}/trees.jsonl holds {len(trees)} trees, not whole groups of {step.group_size}",
            "The file may be cut off",
        )
    if found <= LAST_WITH_SLOW_TREES and any(tree.outcome.value in ("bound_time", "cancelled") for tree in trees):
        raise AprError(
            f"{folder}/step.json has format {found}: trees that the clock ended counted as the policy's failures",
            "Audit it with the apr-ray version that wrote it",
        )
    if step.problems and len(step.problems) * step.group_size != len(trees):
        raise AprError(
            f"{folder}/step.json holds {len(step.problems)} problems for {len(trees)} trees",
            "The file may be cut off or edited",
        )
    if any(tree.reward is None for tree in trees):
        raise AprError(f"{folder}/trees.jsonl holds a tree without a reward", "The file may have been edited")
    return KeptBatch(step, trees, folder / "policy")
