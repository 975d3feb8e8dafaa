"""Finding tasks: by entry point, so that a second task is a new package and no change here; or, while it is being
written, as `module:Class`."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any, cast

from pydantic import TypeAdapter

from apr_ray.config import TaskConfig, parse_options
from apr_ray.core.errors import ConfigError
from apr_ray.core.task import Task

GROUP = "apr_ray.tasks"


def load_task(config: TaskConfig) -> Task:
    """The configured task. Raises ConfigError for an unknown name (naming the known ones) or a bad option.

    A task class has `options_type`, a dataclass, and is built from an instance of it.
    """
    task_class = _task_class(config.name)
    return cast(Task, task_class(parse_options(task_class.options_type, config.options, "task.options")))


def all_options(config: TaskConfig) -> dict[str, Any]:
    """The task's options with their defaults. Raises as `load_task` does."""
    parsed = parse_options(_task_class(config.name).options_type, config.options, "task.options")
    options: dict[str, Any] = TypeAdapter(type(parsed)).dump_python(parsed, mode="json")
    return options


def _task_class(name: str) -> Any:
    found = _import(name) if ":" in name else _installed(name)
    if not hasattr(found, "options_type"):
        raise ConfigError(f"{name!r} is no task class: it has no options_type", "Give it a dataclass of options")
    return found


def _installed(name: str) -> Any:
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise ConfigError(
            f"unknown task {name!r}",
            f"Installed tasks: {', '.join(sorted(found)) or 'none'}; a package adds one by an entry point {GROUP!r},"
            " a module on PYTHONPATH is named as module:Class",
        )
    return found[name].load()


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"task {name!r}: no module {error.name!r}", "Put its folder on PYTHONPATH") from error
    if not hasattr(found, attribute):
        raise ConfigError(f"task {name!r}: {module} has no class {attribute!r}", "Check the spelling")
    return getattr(found, attribute)
