"""Remedies are true: a command that a message tells to type exists, with its options, and so does every config key."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from apr_ray.cli import app
from apr_ray.config import Config
from apr_ray.config.text import field_type
from apr_ray.tasks.countdown.problem import ProblemSpace
from apr_ray.tasks.countdown.solver import SolverOptions
from apr_ray.tasks.countdown.task import CountdownOptions

PACKAGE = Path(__file__).parents[1] / "apr_ray"
COMMANDS: Any = typer.main.get_command(app)
TYPED = re.compile(r"\bapr-ray ((?:config )?[a-z]+)((?: --?[a-z-]+| [A-Z]+| [^\s`.,;:)\"']+)*)")
"""`apr-ray eval RUN --json FILE` in a sentence."""
KEY = re.compile(rf"(?<![\w./-])((?:{'|'.join(Config.model_fields)})(?:\.[a-z][a-z0-9_]*)+)(?![\w(])")
OF_THE_TASK = {**CountdownOptions.__annotations__, "space": ProblemSpace, "solver": SolverOptions}
NO_KEYS = {"model.safetensors", "run.path", "rollout.worker", "rollout.pool", "ray.data", "ray.init"}
"""Modules and files whose names read like keys."""


def texts() -> Iterator[tuple[str, str]]:
    """Where it stands, and text that a person may read: all of the package's, but for docstrings and comments."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        described = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "X" for v in node.values]
                yield f"{path.name}:{node.lineno}", "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
                yield f"{path.name}:{node.lineno}", node.value


def test_every_command_that_is_to_be_typed_exists() -> None:
    found = 0
    for place, text in texts():
        for name, rest in TYPED.findall(text):
            group, _, sub = name.partition(" ")
            command = COMMANDS.commands.get(group)
            if command is None and "-" not in rest:
                continue  # "apr-ray trains on Linux": prose, and no option beside it
            assert command is not None, f"{place}: apr-ray {name}"
            command = command.commands[sub] if sub else command
            options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h", "--debug"}
            for option in re.findall(r"(?<= )--?[a-z][a-z-]*", rest):
                assert option in options, f"{place}: apr-ray {name} has no {option}"
            found += 1
    assert found > 15


def is_key(name: str) -> bool:
    """Whether a dotted name is a section or a value of the settings, or one of the task's own options."""
    kind: Any = Config
    parts = name.split(".")
    if parts[:2] == ["task", "options"]:
        return parts[2] in OF_THE_TASK if len(parts) > 2 else True
    for number, part in enumerate(parts):
        if part not in getattr(kind, "model_fields", {}):
            return number > 0 and str(kind).startswith("dict")
        kind = field_type(kind, part)
    return True


def test_every_config_key_in_a_message_exists() -> None:
    found = 0
    for place, text in texts():
        for name in KEY.findall(text):
            if " " not in text.strip() or name in NO_KEYS or name.endswith((".py", ".yaml", ".json", ".md")):
                continue
            assert is_key(name), f"{place}: {name}"
            found += 1
    assert found > 60


@pytest.mark.parametrize("name", ["grpo.stepz", "engine.nam", "run.rooot", "task.options.spaces"])
def test_a_key_that_is_none_is_noticed(name: str) -> None:
    assert not is_key(name)
