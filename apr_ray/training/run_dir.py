"""A run's folder: its config, metrics, trees and checkpoints; all that `--resume` needs.

runs/NAME/config.yaml             the whole configuration
         metrics.jsonl            one line a step, as logged
         eval/step-000010-greedy.jsonl    the trees of an evaluation
         batches/step-000011/     a training batch, for `apr-ray audit`
         checkpoints/step-000010/{policy,optimizer,state.json}
         best/                    the policy with the best greedy accuracy on the problems of evaluations in training
         judge/                   the policy that the engines of supervised training's evaluations start on
         final/                   the policy at the end

Everything but `metrics.jsonl`, which grows line by line, is written under a hidden name first, so a killed run leaves
whole files and, at most, such hidden ones, which `resume` removes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apr_ray.config import Config, differences, load_config, to_yaml
from apr_ray.core.errors import AprError, ConfigError
from apr_ray.core.weights import WeightVersion
from apr_ray.metrics.names import is_known
from apr_ray.metrics.rows import FILE, read_rows
from apr_ray.model.llama import replace_directory
from apr_ray.model.shipped import resolve_policy, shipped_names

SAMPLES = "samples.jsonl"
KEPT_CHECKPOINTS = 2
FULL_BYTES = 1 << 16
"""A disk with less free than this is full."""


@dataclass(slots=True)
class LoopState:
    """Where a loop stands: all that it needs, beside policy and optimiser, to go on.

    Attributes:
        step: steps done.
        version: the weights after them.
        tokens: trained on so far.
        sampled_tokens: by GRPO's rollouts so far.
        precision: of supervised training, as it was chosen when the run began.
        idle_steps: the last steps in a row that trained on nothing.
        elapsed_s: of training, over all incarnations.
        position: the sampler's.
        data: of the demonstrations, `Demonstrations.fingerprint`.
        policy: of the one that GRPO began with, `model.llama.policy_fingerprint`.
        best_accuracy: of the held-out evaluations so far.
        tracker_run_id: to go on in the same tracker run.
        metrics_rows: of `metrics.jsonl`, written before it was saved.
    """

    step: int = 0
    version: str = "0.0"
    tokens: int = 0
    sampled_tokens: int = 0
    precision: str = ""
    idle_steps: int = 0
    elapsed_s: float = 0.0
    position: dict[str, int] = field(default_factory=dict)
    data: str = ""
    policy: str = ""
    best_accuracy: float = -1.0
    tracker_run_id: str = ""
    metrics_rows: int = 0


class RunDir:
    """One run's folder. Build it with `create` or `resume`."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config

    @property
    def name(self) -> str:
        """For people and trackers: the folder under `run.root`."""
        root = Path(self.config.run.root).resolve()
        return str(self.path.relative_to(root)) if self.path.is_relative_to(root) else self.path.name

    @classmethod
    def create(cls, config: Config, command: str) -> RunDir:
        """A new folder under `run.root`. Raises AprError where the name is taken."""
        root = Path(config.run.root).resolve()
        config = config.model_copy(update={"run": config.run.model_copy(update={"root": str(root)})})
        path = root / (config.run.name or f"{command}-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            path.mkdir(parents=True)
            _write(path / "config.yaml", to_yaml(config))
        except FileExistsError as error:
            raise AprError(f"run folder {path} exists", "Go on with --resume, or choose another run.name") from error
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            remedy = "Free space" if error.errno == errno.ENOSPC else "Choose another run.root or run.name"
            raise AprError(f"cannot make run folder {path}: {error.strerror}", remedy) from error
        return cls(path, config)

    @classmethod
    def resume(cls, path: Path, config: Config | None = None) -> RunDir:
        """An existing folder. Raises ConfigError naming what differs where `config` is not the one it was run with.

        Where a run lies, how Ray is reached and what watches it may differ: the last two are then `config`'s. So may
        `init_from`, where nothing lies there any more, or the same policy by another path.
        """
        saved = load_config([cls.config_file(path)])
        if config is not None:
            saved = saved.model_copy(update={"ray": config.ray, "tracking": config.tracking})
            if saved.init_from and config.init_from and _same_policy(saved.init_from, config.init_from):
                saved = saved.model_copy(update={"init_from": config.init_from})
            place = config.run.model_copy(update={"root": saved.run.root, "name": saved.run.name})
            changed = differences(saved, config.model_copy(update={"run": place}))
            if changed:
                raise ConfigError(
                    f"{path} was run with another config: {'; '.join(changed)}", "Resume without these changes"
                )
        run = cls(path.resolve(), saved)
        run._tidy()
        return run

    @staticmethod
    def config_file(path: Path) -> Path:
        """A run folder's config. Raises AprError where it has none."""
        file = path / "config.yaml"
        if not file.is_file():
            raise AprError(f"{path} is no run folder (config.yaml is missing)", "Give a folder under run.root")
        return file

    def remove_if_bare(self) -> None:
        """Remove a folder in which nothing but settings was written: its name is free again."""
        files = {path.name for path in self.path.rglob("*") if path.is_file()}
        if files <= {"config.yaml", "incarnation"} or (files <= {"config.yaml", FILE} and not self.metrics()):
            shutil.rmtree(self.path, ignore_errors=True)

    # --- metrics ----------------------------------------------------------------------------------------------------

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a line to `metrics.jsonl`. Raises ValueError on a name that is not in `metrics.names`."""
        unknown = [name for name in metrics if not is_known(name)]
        if unknown:
            raise ValueError(f"metrics that are not in the table: {unknown}")
        with (self.path / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """See `metrics.rows.read_rows`."""
        return read_rows(self.path)

    def truncate_metrics(self, rows: int) -> None:
        """Keep the first lines: a resumed run writes the others again."""
        kept = self.metrics()[:rows]
        _write(self.path / FILE, "".join(json.dumps(row) + "\n" for row in kept))

    def log_samples(self, rows: Iterable[Mapping[str, Any]], step: int) -> None:
        """Append a line per tree of a step to `samples.jsonl`; see `metrics.trees.samples`."""
        with (self.path / SAMPLES).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)

    def truncate_samples(self, step: int) -> None:
        """Keep those of the first steps, and no line that was cut off."""
        file = self.path / SAMPLES
        if file.exists():
            whole = [
                line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")
            ]
            _write(file, "".join(line for line in whole if json.loads(line)["step"] <= step))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @contextmanager
    def checkpoint(self, state: LoopState) -> Iterator[Path]:
        """A folder to write into, which becomes `checkpoints/step-N` when the block ends well; else it is removed.

        Raises AprError where it holds no policy or no optimiser's state then.
        """
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        final = folder / f"step-{state.step:06d}"
        partial = folder / f".{final.name}.partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            if not (partial / "policy" / "config.json").is_file() or not (partial / "optimizer").is_dir():
                raise AprError(
                    f"the learners' checkpoint is not in {folder}: they wrote it on another machine",
                    f"Put run.root ({self.config.run.root}) on storage that all nodes share",
                )
            state.metrics_rows = len(self.metrics())
            _write(partial / "state.json", json.dumps(asdict(state), indent=1))
            replace_directory(partial, final)
        except BaseException as error:
            is_full = shutil.disk_usage(folder).free < FULL_BYTES
            shutil.rmtree(partial, ignore_errors=True)
            if is_full:  # which torch.save does not say
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
            raise
        for old in sorted(folder.glob("step-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def latest(self) -> tuple[Path, LoopState] | None:
        """The newest complete checkpoint and its state, with a new incarnation of the weights."""
        found = sorted((self.path / "checkpoints").glob("step-*"))
        if not found:
            return None
        data = json.loads((found[-1] / "state.json").read_text())
        data.setdefault("metrics_rows", sum(row["step"] <= data["step"] for row in self.metrics()))  # older runs
        state = LoopState(**data)
        version = WeightVersion.parse(state.version)
        state.version = str(WeightVersion(self.unused_incarnation(version.incarnation), version.counter))
        return found[-1], state

    def unused_incarnation(self, saved: int = -1) -> int:
        """After `saved` and all that `use_incarnation` was told, also by a process that died before it saved."""
        told = self.path / "incarnation"
        return max(saved, int(told.read_text()) if told.exists() else -1) + 1

    def use_incarnation(self, incarnation: int) -> None:
        """Weights are made under it from now on."""
        _write(self.path / "incarnation", str(incarnation))

    def keep_policy(self, policy: Path, name: str) -> Path:
        """Copy a policy's folder to `best`, `judge` or `final`, whole."""
        partial = self.path / f".{name}.partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(policy, partial)
        replace_directory(partial, self.path / name)
        return self.path / name

    def _tidy(self) -> None:
        """Finish or undo what a killed process left half done (see `replace_directory`)."""
        for folder in (self.path, *(self.path / part for part in ("checkpoints", "batches", "eval"))):
            for old in folder.glob(".*.old-*"):
                replaced = folder / old.name[1:].rpartition(".old-")[0]
                if not replaced.exists():
                    os.replace(old, replaced)
            for left in (*folder.glob(".*.old-*"), *folder.glob(".*.partial-*")):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def find_policy(path: Path) -> Path:
    """The checkpoint that a user's path means: a policy folder, a run's `final`, `best` or newest policy, that of a
    quickstart's last phase, or by its name one that comes with the package."""
    path = resolve_policy(path)
    newest = sorted((path / "checkpoints").glob("step-*/policy"))[::-1]
    phases = [path / "grpo" / "final", path / "sft" / "final"]
    candidates = [path, path / "final", path / "best", *newest, *phases]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    shipped = ", ".join(shipped_names())
    raise AprError(
        f"no checkpoint in {path}", f"Give a run or checkpoint folder that apr-ray wrote, or one of: {shipped}"
    )


def _same_policy(saved: str, given: str) -> bool:
    """Whether two paths mean the same policy, as far as can be told: nothing may lie at the saved one any more."""
    if not Path(saved).exists():
        return True
    return find_policy(Path(saved)).resolve() == find_policy(Path(given)).resolve()


def flat_params(config: Config) -> dict[str, Any]:
    """The config as `a.b: value`, for trackers."""

    def walk(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(tree, dict):
            for key, value in tree.items():
                yield from walk(value, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, tree

    return dict(walk(config.model_dump(mode="json"), ""))


def _write(path: Path, text: str) -> None:
    """Write a small file whole: a reader sees the old text or the new."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
