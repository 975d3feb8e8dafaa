"""`Task` is an interface: a task that is nothing like Countdown runs the whole pipeline from its own file alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import second_task
from second_task import Characters, Digits, LargestOptions, LargestTask

import apr_ray
from apr_ray.config import TaskConfig, parse_config
from apr_ray.core.errors import AprError, ConfigError
from apr_ray.core.task import Demonstration
from apr_ray.core.trees_io import read_trees
from apr_ray.evaluation.audit import audit_batch
from apr_ray.evaluation.kept_batch import find_batch, read_batch
from apr_ray.evaluation.report import write_report
from apr_ray.evaluation.show import describe_tree
from apr_ray.tasks.registry import load_task
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.quickstart import run_quickstart
from apr_ray.training.run_dir import RunDir

LARGEST = TaskConfig(name="second_task:LargestTask", options={"length": 3})


def lines_of_code(source: str) -> int:
    """Lines that are neither blank nor part of an import or a docstring."""
    lines = {number for number, line in enumerate(source.splitlines(), start=1) if line.strip()}
    for node in ast.walk(ast.parse(source)):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if text or isinstance(node, ast.Import | ast.ImportFrom):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_a_task_takes_50_lines() -> None:
    assert lines_of_code(Path(second_task.__file__).read_text()) == 50


def test_a_task_is_found_by_module_and_class() -> None:
    assert load_task(LARGEST).name == "largest"
    with pytest.raises(ConfigError, match=r"task.options.lenght.*length"):
        load_task(TaskConfig(name=LARGEST.name, options={"lenght": 4}))
    for name, what in (
        ("no_such_module:Task", "no module 'no_such_module'"),
        ("second_task:NoTask", "no class 'NoTask'"),
        ("second_task:ALPHABET", "options_type"),
        ("nothing", "unknown task 'nothing'"),
    ):
        with pytest.raises(ConfigError, match=what):
            load_task(TaskConfig(name=name))


def test_what_a_task_need_not_write(tmp_path: Path) -> None:
    """The defaults of `Task`, `DataclassProblem` and `Demonstration`: right, or refused by name."""
    task = LargestTask(LargestOptions())
    problem = Digits("314")
    assert task.problem_from_json(problem.to_json()) == problem
    assert task.problem_from_text(problem.key) == problem
    for text, what in (
        ("314", r"an object.*Give \{\"digits\": \.\.\.\}"),
        ('{"digits": 314}', "digits: Input should be a valid string"),
        ('{"digits": "31x"}', "digits: String should match"),
        ('{"digit": "314"}', "digits: Field required"),
        ('{"digits": "314", "digit": "314"}', "'digit' is unknown"),
    ):
        with pytest.raises(AprError, match=what):
            task.problem_from_text(text)
    task.require_solvable(problem)

    with pytest.raises(AprError, match="not the task's own"):
        task.load_tokenizer(str(tmp_path))
    Characters().save(str(tmp_path))
    assert isinstance(task.load_tokenizer(str(tmp_path)), Characters)
    (tmp_path / "alphabet.json").write_text('"another"')
    with pytest.raises(AprError, match=r"not the task's own \(alphabet.json\)"):
        task.load_tokenizer(str(tmp_path))

    assert Demonstration("M31=", "[3][1]").given == "M31="
    with pytest.raises(AprError, match="no `given`"):
        Demonstration("M31={3}{1}", "3.", segment=1)


def test_the_whole_pipeline_runs_on_another_task(ray_local: None, tmp_path: Path) -> None:
    """Demonstrations, supervised training, GRPO, evaluation, report, trace, audit and `solve`."""
    config = parse_config(
        {
            "run": {"root": str(tmp_path), "name": "largest"},
            "task": LARGEST.model_dump(),
            "model": {"hidden_size": 32, "layers": 2, "heads": 2, "ffn_size": 64, "context_tokens": 64},
            "data": {"train_problems": 400, "max_sequence_tokens": 64},
            "sft": {
                "optimizer": {"learning_rate": 1e-2, "warmup_steps": 10, "schedule": "linear"},
                "tokens": 150_000,  # more, and every tree is right: there would be nothing to learn, or to audit
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
    assert report.agrees, [row for row in report.rows() if row[3] != "agrees"]
    (contexts,) = [finding for finding in report.findings if finding.check == "contexts after joins"]
    good, of = contexts.found.split(" of ")
    assert int(good) == int(of) > 0
    solution = apr_ray.solve('{"digits": "314"}', grpo / "final")
    assert solution.text.startswith("M314=")
