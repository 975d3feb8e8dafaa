"""What a user sees: help at once, errors in one line with the remedy, a tree as lanes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import apr_ray
from apr_ray.config import load_config
from apr_ray.core.errors import AprError
from apr_ray.training.session import require_startable

COMMAND = [sys.executable, "-m", "apr_ray.cli"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
        check=False,
    )


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    done = run("--help")
    for name in (
        "quickstart",
        "data",
        "sft",
        "train",
        "eval",
        "export",
        "trace",
        "vectors",
        "bench",
        "doctor",
        "config",
    ):
        assert name in done.stdout
    code = (
        "import sys, apr_ray.cli; print([m for m in ('torch','ray','numpy','pydantic','mlflow') if m in sys.modules])"
    )
    heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert heavy.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "validate", "grpo.stepz=1"], "Did you mean 'steps'?"),
        (["config", "show", "-c", "nope"], "Presets: control-ahead, control-continued-sft"),
        (["trace", "{checkpoint}", "--problem", "1 1 1 -> 100"], "100 cannot be reached from 1, 1, 1"),
        (["trace", "{checkpoint}", "--problem", "nonsense"], 'Write it as "3 5 7 -> 22"'),
        (["trace", "{tmp}"], "no recorded trees"),
        (["eval", "{tmp}"], "no checkpoint in"),
        (["eval", "{checkpoint}", "--out", "{tmp}/none/trees"], "none is no folder. Make it first"),
        (["eval", "{checkpoint}", "--json", "{tmp}"], "is a folder. Give another name"),
        (["eval", "{checkpoint}", "--out", "{checkpoint}/config.json"], "is a file. Give another name"),
        (["eval", "{checkpoint}", "--against", "{tmp}"], "holds no evaluation"),
        (["export", "{tmp}", "--out", "{tmp}/p", "--results", "{tmp}/r.json"], "is no run folder"),
        (["quickstart", "--from", "{tmp}"], "or one of: apr-rl, apr-sft"),
        (["sft", "--data", "{tmp}", "run.root={tmp}", "tracking.tracker=none"], "no Parquet files"),
        (["quickstart", "--fast", "--long"], "exclude each other"),
        (["bench", "nope"], "Choose one of engine, gpu, learner, oracle, rollout"),
        (["vectors", "{tmp}"], "is missing"),
        (["quickstart", "--resume", "{tmp}"], "is no run folder (config.yaml is missing)"),
        (["data", "--out", "/proc/none/demos"], "cannot make /proc/none"),
        (["audit", "{tmp}/none", "5"], "there is no folder"),
        (["bench", "sync", "--engine", "trt"], "config engine.name: Input should be"),
        (["bench", "sync", "--engine", "vllm"], "vllm is not installed"),
        (["bench", "rollout", "--engine", "torch", "--checkpoint", "{tmp}"], "no checkpoint in"),
        (["bench", "rollout", "--engine", "torch"], "--checkpoint is missing"),
        (["eval", "{checkpoint}", "ray.address=127.0.0.1:1"], "no Ray cluster at ray.address 127.0.0.1:1"),
        (["config", "show", "task.options.space.count=1"], "task.options.space.count is 1. Use between 2 and 6"),
    ],
)
def test_errors_are_one_line_with_a_remedy(
    arguments: list[str], message: str, tmp_path: Path, checkpoint: Path
) -> None:
    filled = [a.format(tmp=tmp_path, checkpoint=checkpoint) for a in arguments]
    assert message in one_line_error(run(*filled))


def test_debug_shows_the_traceback() -> None:
    done = run("config", "show", "a=1", "--debug")
    assert "Traceback" in done.stderr
    assert "unknown config key 'a'" in done.stderr


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


@pytest.fixture
def of_another_vocabulary(tmp_path: Path, checkpoint: Path) -> Path:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 60}))
    return other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "ray.dashboard_port={port}"], "ray.dashboard_port {port} is in use. Choose a free port"),
        (
            ["quickstart", "engine.name=vllm"],
            "engine.name is vllm, but vllm is not installed. pip install 'apr-ray[vllm]'",
        ),
        (["train", "--init", "{other}"], "has a vocabulary of 60, the task's has 57. Give a checkpoint trained with"),
        (["eval", "{other}"], "has a vocabulary of 60, the task's has 57"),
        (["trace", "{other}", "--problem", "3 5 7 -> 22"], "has a vocabulary of 60, the task's has 57"),
        (["train"], "no policy to begin with. Give --init"),
        (["sft", "--data", "{runs}/none"], "no Parquet files in {runs}/none"),
        (["quickstart", "rollout.workers=0"], "rollout.workers: Input should be greater than or equal to 1 (got 0)"),
    ],
)
def test_what_cannot_run_is_named_before_anything_starts(
    arguments: list[str], message: str, tmp_path: Path, busy_port: int, of_another_vocabulary: Path
) -> None:
    runs = tmp_path / "runs"
    fill = {"runs": runs, "port": busy_port, "other": of_another_vocabulary}
    root = [f"run.root={runs}"] if arguments[0] != "trace" else []
    done = run(*(a.format(**fill) for a in arguments), *root)
    assert message.format(**fill) in one_line_error(done)
    assert not runs.exists(), "a run folder was made"


def test_an_engine_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(AprError, match=r"is sglang, but sglang is not installed\. pip install 'apr-ray\[sglang\]'"):
        require_startable(load_config([], ["engine.name=sglang"]))


def test_trace_prints_a_tree_as_lanes(checkpoint: Path) -> None:
    done = run("trace", str(checkpoint), "--problem", "3 5 7 -> 22", "--text")
    assert done.returncode == 0, done.stderr
    assert "parent │█" in done.stdout
    assert "--- parent, call 0" in done.stdout
    assert "Current State: 22:[3, 5, 7]" in done.stdout


def test_doctor_lists_what_is_there() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    for part in ("torch", "deepspeed", "compiler", "sglang", "apr-ray[sglang]"):
        assert part in done.stdout


def test_solve_works_without_ray(checkpoint: Path) -> None:
    code = (
        "import sys, apr_ray\n"
        f"s = apr_ray.solve({{'numbers': [3, 5, 7], 'target': 22}}, (s_model := {str(checkpoint)!r}))\n"
        "assert s.tree.calls and not s\n"
        "assert 'ray' not in sys.modules\n"
        "async def notebook(): return apr_ray.solve('3 5 7 -> 22', s_model)\n"
        "assert __import__('asyncio').run(notebook()).tree.calls\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AprError, match=r"no checkpoint|does not say"):
        apr_ray.solve("3 5 7 -> 22", checkpoint.parent)


def test_import_rules_of_the_house() -> None:
    """The layers of the design, checked by import-linter."""
    root = Path(__file__).parents[1]
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(tool)], capture_output=True, text=True, cwd=root, check=False, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout
