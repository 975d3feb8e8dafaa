"""Writes the two generated pages, configuration.md and metrics.md, from the code: `python docs/reference.py`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from apr_ray.config import Config
from apr_ray.metrics.names import METRICS

HERE = Path(__file__).parent


def configuration() -> str:
    """Every key with its type, default and meaning; one table a section."""
    lines = [
        "# Configuration",
        "",
        "Every key, with its default. YAML files are given with `-c`, single keys as `a.b=c`; `apr-ray config show`",
        "prints the whole tree as it will be used. This page is generated from `apr_ray/config/settings.py`.",
    ]

    def section(defaults: BaseModel, path: str) -> None:
        nested: list[tuple[BaseModel, str]] = []
        rows = []
        for name, field in type(defaults).model_fields.items():
            where, default = f"{path}.{name}" if path else name, getattr(defaults, name)
            if isinstance(default, BaseModel):
                nested.append((default, where))
            else:
                rows.append(f"| `{where}` | `{default!r}` | {' '.join((field.description or '').split())} |")
        if rows:
            title = f"## `{path}`" if path else "## Top level"
            about = (defaults.__doc__ or "").split("\n")[0]
            lines.extend(["", title, "", about, "", "| key | default | meaning |", "|---|---|---|", *rows])
        for sub, where in nested:
            section(sub, where)

    section(Config(), "")
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """Every metric with its unit and meaning."""
    rows = [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in METRICS]
    head = [
        "# Metrics",
        "",
        "Every metric that a run writes, to `metrics.jsonl` and to the tracker. `{mode}` is `greedy`, or `t1.0` for",
        "temperature 1; `{reason}` names a failure or what became of a token, `{age}` counts weight versions. This",
        "page is generated from `apr_ray/metrics/names.py`.",
        "",
        "| name | unit | meaning |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    (HERE / "configuration.md").write_text(configuration(), encoding="utf-8")
    (HERE / "metrics.md").write_text(metrics(), encoding="utf-8")
