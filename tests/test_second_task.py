"""`Task` is an interface: a task that is nothing like Countdown runs the whole pipeline from its own file alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import apr_ray
from apr_ray.config import TaskConfig, parse_config
from apr_ray.core.errors import ConfigError
from apr_ray.core.trees_io import read_trees
from apr_ray.evaluation.audit import audit_batch
from apr_ray.evaluation.kept_batch import find_batch, read_batch
from apr_ray.evaluation.report import write_report
from apr_ray.evaluation.show import describe_tree
from apr_ray.tasks.registry import load_task
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.quickstart import run_quickstart
from apr_ray.training.run_dir import RunDir

SUM = TaskConfig(name="second_task:SumTask", options={"length": 3})


def test_a_task_is_found_by_module_and_class() -> None:
    assert load_task(SUM).name == "sum"
    with pytest.raises(ConfigError, match=r"task.options.lenght.*length"):
        load_task(TaskConfig(name=SUM.name, options={"lenght": 4}))
    for name, what in (
        ("no_such_module:Task", "no module 'no_such_module'"),
        ("second_task:NoTask", "no class 'NoTask'"),
        ("second_task:ALPHABET", "options_type"),
        ("nothing", "unknown task 'nothing'"),
    ):
        with pytest.raises(ConfigError, match=what):
            load_task(TaskConfig(name=name))


def test_the_whole_pipeline_runs_on_another_task(ray_local: None, tmp_path: Path) -> None:
    """Demonstrations, supervised training, GRPO, evaluation, report, trace, audit and `solve`."""
    config = parse_config(
        {
            "run": {"root": str(tmp_path), "name": "sums"},
            "task": SUM.model_dump(),
            "model": {"hidden_size": 32, "layers": 2, "heads": 2, "ffn_size": 64, "context_tokens": 64},
            "data": {"train_problems": 400, "max_sequence_tokens": 64},
            "sft": {
                "optimizer": {"learning_rate": 1e-2, "warmup_steps": 10, "schedule": "linear"},
                "tokens": 300_000,
                "batch_tokens": 1000,
                "child_first_fraction": 0.0,
                "mask": "prompt",  # else it learns to write the join itself, which is part of a resumed prompt
            },
            "grpo": {"steps": 2, "problems_per_step": 3, "group_size": 4, "save_every": 1, "eval_every": 5},
            "bounds": {"max_call_tokens": 16, "max_tree_tokens": 200},
            "rollout": {"workers": 1, "concurrent_trees": 8},
            "evaluation": {"problems": 20, "during_training_problems": 5, "traced_trees": 1},
            "tracking": {"tracker": "none"},
        }
    )
    run = RunDir.create(config, "quickstart")
    grpo = run_quickstart(config, run, ProgressBars(quiet=True))
    (greedy,) = grpo.glob("eval/step-000002-greedy.jsonl")
    trees = list(read_trees(greedy))
    assert len(trees) == 20
    spawned = [tree for tree in trees if tree.children]
    assert len(spawned) > 5, [(tree.outcome, tree.final_text) for tree in trees]
    assert all(tree.children == 2 and tree.joins for tree in spawned)
    assert write_report(run.path, run.path / "sft", grpo).is_file()
    assert "child 0" in describe_tree(spawned[0], grpo / "final", text=True)
    report = audit_batch(read_batch(find_batch(run.path, 2)))
    assert report.agrees, report.rows()
    solution = apr_ray.solve("123", grpo / "final")
    assert solution.text.startswith("S123=")
