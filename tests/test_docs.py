"""The generated pages are those of the present code; all pages can be read, followed and typed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from test_remedies import COMMANDS, TYPED

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "jobs" / "README.md"]
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


def paragraphs(text: str) -> list[str]:
    """Of a page without its fenced code: items of lists and rows of tables are paragraphs of their own."""
    return re.split(r"\n\s*\n|\n(?=[-|])", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_long_paragraph_no_dead_link_and_no_wrong_command(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [p[:60] for p in paragraphs(text) if len(p.split()) > 90] == []
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for name, rest in TYPED.findall(text):
        group, _, sub = name.partition(" ")
        command = COMMANDS.commands.get(group)
        if command is None and " -" not in rest:
            continue  # prose
        assert command is not None, name
        command = command.commands[sub] if sub else command
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h", "--debug"}
        assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", rest)) <= options, f"apr-ray {name}{rest}"


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.sub(r"```.*?```", "", text, flags=re.DOTALL).split()) <= 700


def test_the_afternoons_path_is_eight_files_that_one_reads_in_an_afternoon() -> None:
    path = re.findall(r"^\| \d \| `([^`]+)` \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    assert len(path) == 8
    lines = sum(len((ROOT / "apr_ray" / name).read_text().splitlines()) for name in path)
    assert abs(lines - 1900) < 100, "say so in the page"
    assert lines <= 3000
