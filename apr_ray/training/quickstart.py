"""The main job end to end: demonstrations, supervised training, GRPO, evaluation, a report."""

from __future__ import annotations

from pathlib import Path

from apr_ray.config import Config
from apr_ray.data.demonstrations import write_demonstrations
from apr_ray.placement import training_needs
from apr_ray.tasks.registry import load_task
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.grpo import run_grpo
from apr_ray.training.run_dir import RunDir
from apr_ray.training.session import ray_session
from apr_ray.training.sft import run_sft


def run_quickstart(config: Config, run: RunDir, bars: ProgressBars) -> Path:
    """Every phase in order, each in its own folder under the run; phases that are complete are not run again. With
    `init_from` GRPO begins with that policy, and there is no supervised phase.

    Returns:
        The folder of the GRPO run, whose `eval/` holds the trees before and after.
    """
    task = load_task(config.task)
    data, sft, grpo = run.path / "data", run.path / "sft", run.path / "grpo"
    if config.init_from:
        with ray_session(config, training_needs(config)):
            if not (grpo / "final").exists():
                policy = Path(config.init_from)
                run_grpo(config, _phase(run, "grpo", policy), policy, bars)
        return grpo
    if not data.exists():
        # A Ray of its own: what Ray Data leaves running would take its share of the cores from all that follows.
        with ray_session(config, training_needs(config)), bars.bar("demonstrations", 1.0) as bar:
            problems = task.problems("train", config.data.train_problems, config.run.seed)
            summary = write_demonstrations(problems, config.task, config.data, config.run.seed, data)
            bar.update(1.0, f"{summary.trees:,} trees, {summary.tokens / 1e6:.1f} M tokens, {summary.solved:,} solved")
    with ray_session(config, training_needs(config)):
        policy = sft / "final"
        if not policy.exists():
            policy = run_sft(config, _phase(run, "sft"), data, bars)
        if not (grpo / "final").exists():
            run_grpo(config, _phase(run, "grpo", policy), policy, bars)
    return grpo


def _phase(run: RunDir, name: str, policy: Path | None = None) -> RunDir:
    """A phase is a run of its own, in a folder of the quickstart's; `policy` is what it begins with."""
    if (run.path / name / "config.yaml").exists():
        return RunDir.resume(run.path / name)
    section = run.config.run.model_copy(update={"root": str(run.path.parent), "name": f"{run.path.name}/{name}"})
    init_from = str(policy) if policy else run.config.init_from
    return RunDir.create(run.config.model_copy(update={"run": section, "init_from": init_from}), name)
