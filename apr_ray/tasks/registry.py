"""Finding tasks: by entry point, so that a second task is a new package and no change here."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import cast

from apr_ray.config import TaskConfig, parse_options
from apr_ray.core.errors import ConfigError
from apr_ray.core.task import Task

GROUP = "apr_ray.tasks"


def load_task(config: TaskConfig) -> Task:
    """The configured task. Raises ConfigError for an unknown name (naming the known ones) or a bad option.

    A task class has `options_type`, a dataclass, and is built from an instance of it.
    """
    found = {point.name: point for point in entry_points(group=GROUP)}
    if config.name not in found:
        raise ConfigError(
            f"unknown task {config.name!r}",
            f"Installed tasks: {', '.join(sorted(found)) or 'none'}; a package adds one by an entry point {GROUP!r}",
        )
    task_class = found[config.name].load()
    return cast(Task, task_class(parse_options(task_class.options_type, config.options, "task.options")))
