"""A run's `metrics.jsonl`, read back."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "metrics.jsonl"


def read_rows(run: Path) -> list[dict[str, float]]:
    """Every line; none where there is no file, and a last one that was cut off is left out."""
    rows = []
    path = run / FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
