"""Checking a folder of vectors: traces, joins and verdicts made by another implementation."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apr_ray.core.errors import AprError
from apr_ray.tasks.countdown.grammar import SPAWN_OPEN, State, TraceError, parse_trace
from apr_ray.tasks.countdown.problem import CountdownProblem
from apr_ray.tasks.countdown.spawn_join import SpawnError, child_result, join_block, read_spawn_block
from apr_ray.tasks.countdown.tokenizer import CountdownTokenizer, build_tokenizer
from apr_ray.tasks.countdown.verifier import verify_answer


@dataclass
class VectorReport:
    """How many checks agree, and what the first ones that do not look like."""

    agree: Counter[str] = field(default_factory=Counter)
    differ: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def check(self, name: str, ours: object, theirs: object, where: str) -> None:
        """Count one comparison."""
        if ours == theirs:
            self.agree[name] += 1
            return
        self.differ[name] += 1
        if len(self.differences) < 20:
            self.differences.append(
                f"{where}: {name} differs\n  ours   {_first(ours, theirs)}\n  theirs {_first(theirs, ours)}"
            )

    def rows(self) -> list[tuple[str, str, str]]:
        """(check, agree, differ) for a table."""
        return [(n, str(self.agree[n]), str(self.differ[n])) for n in sorted(self.agree | self.differ)]


def check_folder(folder: Path) -> VectorReport:
    """Check every file of a folder. Raises AprError where it is no such folder or a line is malformed."""
    report = VectorReport()
    tokenizer = build_tokenizer()
    checks = {
        "apr_traces": _check_apr,
        "sosp_traces": _check_sosp,
        "joins": _check_joins,
        "verdicts": _check_verdicts,
    }
    for name, check in checks.items():
        path = folder / f"{name}.jsonl.gz"
        if not path.is_file():
            raise AprError(f"{path} is missing", f"A folder of vectors holds {', '.join(checks)} as .jsonl.gz")
        rows = list(_read(path))
        try:
            check(report, tokenizer, rows, name)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise AprError(f"{path} is not of the expected form: {error!r}", "See the folder's README") from error
    return report


def _read(path: Path) -> Iterator[Any]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, json.JSONDecodeError, EOFError) as error:
        raise AprError(f"cannot read {path}: {error}", "It must be gzipped JSON lines") from error


def _check_text(report: VectorReport, tokenizer: CountdownTokenizer, text: str, where: str) -> None:
    try:
        report.check("grammar", parse_trace(text).text(), text, where)
    except TraceError as error:
        report.check("grammar", str(error), text, where)
    try:
        report.check("tokenizer", tokenizer.decode(tokenizer.encode(text)), text, where)
    except AprError as error:
        report.check("tokenizer", str(error), text, where)


def _texts(trace: Any) -> Iterator[str]:
    yield from trace["main_calls"]
    for spawned in trace["sub_calls"]:
        for child in spawned:
            yield from _texts(child)


def _check_apr(report: VectorReport, tokenizer: CountdownTokenizer, rows: list[Any], name: str) -> None:
    for number, row in enumerate(rows):
        for index, text in enumerate(_texts(row["trace"])):
            _check_text(report, tokenizer, text, f"{name}:{number + 1} text {index}")


def _check_sosp(report: VectorReport, tokenizer: CountdownTokenizer, rows: list[Any], name: str) -> None:
    for number, row in enumerate(rows):
        _check_text(report, tokenizer, row["text"], f"{name}:{number + 1}")


def _check_joins(report: VectorReport, tokenizer: CountdownTokenizer, rows: list[Any], name: str) -> None:
    for number, row in enumerate(rows):
        where = f"{name}:{number + 1}"
        cut = row["parent"].index(SPAWN_OPEN)
        try:
            children = read_spawn_block(row["parent"][cut:], row["parent"][:cut], 1)
        except SpawnError as error:
            report.check("child prompts", str(error), row["child_prompts"], where)
            continue
        report.check("child prompts", [c.prompt for c in children], row["child_prompts"], where)
        results = [child_result(text) for text in row["children"]]
        report.check("join messages", [r.message or None for r in results], row["messages"], where)
        resumed = row["parent"][:cut] + join_block([c.node for c in children], results, 1)
        report.check("resumed contexts", resumed, row["resumed"], where)


def _check_verdicts(report: VectorReport, tokenizer: CountdownTokenizer, rows: list[Any], name: str) -> None:
    """Both verifiers accept the same answers."""
    for number, row in enumerate(rows):
        states = [e for e in parse_trace(row["prefix"]).events if isinstance(e, State)]
        problem = CountdownProblem(states[0].numbers, states[0].target)
        verdict = verify_answer(problem, row["solution"])
        report.check("verdicts", verdict.solved, row["valid"], f"{name}:{number + 1} ({verdict.reason})")


def _first(value: object, other: object) -> str:
    """The neighbourhood of the first difference of two texts, or the value."""
    if isinstance(value, str) and isinstance(other, str):
        at = next(
            (i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other))
        )
        return f"at character {at}: {value[max(0, at - 20) : at + 40]!r}"
    return repr(value)[:200]
