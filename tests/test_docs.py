"""The generated pages are those of the present code."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_generated_pages_are_up_to_date() -> None:
    """If this fails: python docs/reference.py"""
    made = runpy.run_path(str(DOCS / "reference.py"))
    assert (DOCS / "configuration.md").read_text() == made["configuration"]()
    assert (DOCS / "metrics.md").read_text() == made["metrics"]()


def test_every_configuration_key_says_what_it_means() -> None:
    rows = [line for line in (DOCS / "configuration.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []
