"""Writes the two generated pages, configuration.md and metrics.md, from the code: `python docs/reference.py`."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from apr_ray.config import Config
from apr_ray.metrics.names import METRICS
from apr_ray.tasks.countdown.problem import ProblemSpace
from apr_ray.tasks.countdown.solver import APR_PAPER, SolverOptions
from apr_ray.tasks.countdown.task import CountdownOptions

HERE = Path(__file__).parent


def cell(text: str) -> str:
    """For a table: a bar would end it."""
    return " ".join(text.split()).replace("|", "\\|")


def values(annotation: Any, metadata: typing.Iterable[Any] = ()) -> str:
    """What a key takes, for people: `drain, pause or in_flight`, `a whole number, at least 1`."""
    if typing.get_origin(annotation) is typing.Literal:
        *some, last = map(str, typing.get_args(annotation))
        return f"{', '.join(some)} or {last}" if some else last
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return (
            " or ".join(values(a, metadata) for a in typing.get_args(annotation) if a is not type(None)) + ", or none"
        )
    if typing.get_origin(annotation) is typing.Annotated:
        kind, *inner = typing.get_args(annotation)
        return values(kind, [*metadata, *inner])
    if typing.get_origin(annotation) in (list, tuple):
        return f"a list, each {values(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict:
        return "a mapping"
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(annotation, "")
    signs = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
    for bound in (b for m in metadata for b in (m.metadata if hasattr(m, "metadata") else [m])):
        if type(bound) in signs:
            attribute, words = signs[type(bound)]
            name += f", {words} {getattr(bound, attribute)}"
    return name


def configuration() -> str:
    """Every key with its default, what it takes, and its meaning; one table a section."""
    lines = [
        "# Configuration",
        "",
        "Every key, with its default. YAML files are given with `-c`, single keys as `a.b=c`; `apr-ray config show`",
        "prints the whole tree as it will be used. This page is generated from `apr_ray/config/` and the",
        "options of the task Countdown.",
    ]

    def section(defaults: BaseModel, path: str) -> None:
        nested: list[tuple[BaseModel, str]] = []
        rows = []
        for name, field in type(defaults).model_fields.items():
            where, default = f"{path}.{name}" if path else name, getattr(defaults, name)
            if isinstance(default, BaseModel):
                nested.append((default, where))
            else:
                takes = values(field.annotation, field.metadata)
                rows.append(f"| `{where}` | `{default!r}` | {cell(takes)} | {cell(field.description or '')} |")
        if rows:
            title = f"## `{path}`" if path else "## Top level"
            about = (defaults.__doc__ or "").split("\n")[0]
            lines.extend(["", title, "", about, "", "| key | default | values | meaning |", "|---|---|---|---|", *rows])
        for sub, where in nested:
            section(sub, where)

    section(Config(), "")
    for options, where, about in (
        (CountdownOptions(), "task.options", "Of Countdown; see `apr_ray/tasks/countdown/task.py`."),
        (ProblemSpace(), "task.options.space", "Which problems there are, and how they are split."),
        (
            APR_PAPER,
            "task.options.solver",
            "What the solver's demonstrations look like: ranges that each run draws from.",
        ),
    ):
        lines += ["", f"## `{where}`", "", about, "", "| key | default | values | meaning |", "|---|---|---|---|"]
        lines += option_rows(options, where)
    return "\n".join(lines) + "\n"


def option_rows(options: Any, where: str) -> list[str]:
    """A row for each field of a dataclass that is no section of its own; the meaning is that of its docstring."""
    hints, about = typing.get_type_hints(type(options), include_extras=True), documented(type(options))
    rows = []
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(hints[field.name]) or hints[field.name] == SolverOptions | None:
            continue
        default = getattr(options, field.name)
        takes, meaning = values(hints[field.name]), about.get(field.name, "")
        meaning = meaning[:1].upper() + meaning[1:]
        rows.append(f"| `{where}.{field.name}` | `{default!r}` | {cell(takes)} | {cell(meaning)} |")
    return rows


def documented(kind: type) -> dict[str, str]:
    """What a dataclass's docstring says of each attribute."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (kind.__doc__ or "").partition("Attributes:")[2].splitlines():
        text = line.strip()
        if line.startswith(" " * 8) and not line.startswith(" " * 9) and ":" in text:
            listed, _, text = text.partition(":")
            names = [name.strip() for name in listed.split(",")]
        for name in names:
            found[name] = f"{found.get(name, '')} {text}".strip()
    return found


def metrics() -> str:
    """Every metric with its unit and meaning."""
    rows = [f"| `{m.name}` | {m.unit} | {cell(m.meaning)} |" for m in METRICS]
    head = [
        "# Metrics",
        "",
        "Every metric that a run writes, to `metrics.jsonl` and to the tracker. `{mode}` is `greedy`, `t1.0` for",
        "temperature 1, `greedy-targets` for problems whose targets are never trained on, or `quick` for an evaluation",
        "in training (greedy, on validation problems); `{reason}` names a failure or what became of a token, `{age}`",
        "counts weight versions. This page is generated from `apr_ray/metrics/names.py`; [why a tree",
        "failed](threads.md#why-a-tree-failed) says what the reasons mean.",
        "",
        "| name | unit | meaning |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    (HERE / "configuration.md").write_text(configuration(), encoding="utf-8")
    (HERE / "metrics.md").write_text(metrics(), encoding="utf-8")
