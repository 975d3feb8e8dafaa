"""Every command survives its own results: all solved or none, no spawn, one step; and odd terminals and paths."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from apr_ray.cli import app, explain
from apr_ray.cli.common import begun, final_table, print_table, short
from apr_ray.config import Config, parse_config
from apr_ray.core.engine import FinishReason, VersionSpan
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import SOLVED, Call, Join, JoinOutcome, Outcome, Spawn, ThreadTree
from apr_ray.core.trees_io import write_trees
from apr_ray.core.weights import WeightVersion
from apr_ray.evaluation.comparison import COMPARISON_HEAD, compare, comparison_rows, read_evaluation
from apr_ray.evaluation.evaluate import EvalResult
from apr_ray.evaluation.lanes import ASCII, render_lanes
from apr_ray.evaluation.report import write_report
from apr_ray.metrics.intervals import wilson
from apr_ray.training.run_dir import RunDir

V0 = WeightVersion(0, 0)


def a_call(path: tuple[int, ...], segment: int, tokens: int = 3) -> Call:
    return Call(
        path, segment, (7,), tuple(range(tokens)), (-0.1,) * tokens, (), (), FinishReason.STOP,
        (VersionSpan(V0, 0, tokens),), V0, 0, 0, 0.0, 0.1, 0.2, "e",
    )  # fmt: skip


def alone(number: int, verdict: str = SOLVED) -> ThreadTree:
    """A tree of one thread."""
    outcome = Outcome.ANSWERED if verdict in (SOLVED, "wrong_target") else Outcome.NO_ANSWER
    return ThreadTree(f"p{number}", 0, (a_call((), 0),), (), (), "text", outcome, verdict=verdict)


def spawning(number: int, verdict: str = SOLVED) -> ThreadTree:
    spawn = Spawn((), 0, ((0,), (1,)), ("#0,0", "#0,1"))
    join = Join((), 0, (JoinOutcome.SOLVED, JoinOutcome.NO_SOLUTION), ("", ""), (9,), 1, ("m", ""))
    calls = (a_call((), 0), a_call((), 1), a_call((0,), 0), a_call((1,), 0, 5))
    return replace(alone(number, verdict), calls=calls, spawns=(spawn,), joins=(join,))


def empty(number: int) -> ThreadTree:
    """A tree that was ended before its first token."""
    return ThreadTree(f"p{number}", 0, (), (), (), "", Outcome.BOUND_TIME, verdict="bound_time")


CASES: dict[str, Callable[[int], ThreadTree]] = {
    "all solved": spawning,
    "none solved": lambda i: spawning(i, "no_answer"),
    "all false claims": lambda i: spawning(i, "wrong_target"),
    "no spawn": lambda i: alone(i, SOLVED if i % 2 else "no_answer"),
    "no token": empty,
}


def a_run(root: Path, made: Callable[[int], ThreadTree], count: int, steps: Sequence[int]) -> tuple[Config, Path]:
    """What a GRPO run of these trees leaves."""
    config = parse_config({"run": {"root": str(root), "name": "q"}, "evaluation": {"temperatures": [0.0, 1.0]}})
    run = RunDir.create(config, "train")
    (run.path / "eval").mkdir()
    trees = [made(i) for i in range(count)]
    for step in steps:
        for temperature, mode in ((0.0, "greedy"), (1.0, "t1.0")):
            solved = sum(tree.solved for tree in trees)
            low, high = wilson(solved, count)
            result = EvalResult(temperature, count, 1, solved / count, low, high, tuple(trees))
            run.log(result.metrics(), step)
            write_trees(run.path / "eval" / f"step-{step:06d}-{mode}.jsonl", trees)
    return config, run.path


@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("steps", [(0, 3), (1,)], ids=["before and after", "one step"])
@pytest.mark.parametrize("case", CASES)
def test_tables_report_and_lanes_survive(
    case: str,
    steps: tuple[int, ...],
    count: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Faults 1: a quickstart that solved all or none ended in a traceback before its table."""
    monkeypatch.setenv("COLUMNS", "200")
    _, run = a_run(tmp_path, CASES[case], count, steps)
    final_table(run)
    assert "accuracy" in capsys.readouterr().out
    page = write_report(run, tmp_path / "none", run)
    assert page.stat().st_size > 1000
    assert (run / "accuracy.png").stat().st_size > 1000

    after = read_evaluation(run, steps[-1])
    _, changes = compare(after, after)
    print_table("against itself", COMPARISON_HEAD, comparison_rows(changes))
    traced = CliRunner().invoke(app, ["trace", str(run)])
    assert traced.exit_code == 0, traced.output


def test_an_interval_holds_its_estimate() -> None:
    """Faults 1: by rounding it did not at 129 values of n for 0 of n, and at 634 for n of n; plots then fail."""
    for trials in range(1, 2001):
        for successes in (0, 1, trials // 2, trials - 1, trials):
            low, high = wilson(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1


def test_a_run_without_an_evaluation_is_named(tmp_path: Path) -> None:
    run = RunDir.create(parse_config({"run": {"root": str(tmp_path), "name": "q"}}), "train")
    with pytest.raises(AprError, match="holds no whole evaluation"):
        write_report(run.path, run.path, run.path)


# --- terminals and paths ----------------------------------------------------------------------------------------------


def apr_ray(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "apr_ray.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
    )


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_that_knows_ascii_alone_shows_lanes(environment: dict[str, str], tmp_path: Path) -> None:
    """Faults 20."""
    _, run = a_run(tmp_path, spawning, 2, (1,))
    done = apr_ray("trace", str(run), **{"PYTHONCOERCECLOCALE": "0", **environment})
    assert done.returncode == 0, done.stderr
    assert "child #0,0 |" in done.stdout
    assert "#####" in done.stdout
    assert render_lanes(spawning(0)).translate(ASCII).isascii()


@pytest.mark.parametrize("columns", ["20", "40", "not a number", ""])
def test_a_narrow_terminal_ends_no_command(columns: str, tmp_path: Path) -> None:
    _, run = a_run(tmp_path, spawning, 2, (1,))
    for arguments in (["trace", str(run)], ["doctor"], ["config", "show"]):
        done = apr_ray(*arguments, COLUMNS=columns)
        assert done.returncode == 0, done.stderr


def test_what_goes_to_a_file_is_not_folded_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table("wide", [f"a column with a long name {i}" for i in range(5)], [["x" * 24] * 5])
    assert max(map(len, capsys.readouterr().out.splitlines())) > 120


def test_titles_cells_and_paths_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Faults 14: a path with [/b] in a table's title ended a whole evaluation in a traceback."""
    print_table("runs/a[/b]c", ("[red]", ""), [("[/x]", "[bold]y")])
    shown = capsys.readouterr().out
    for text in ("runs/a[/b]c", "[red]", "[/x]", "[bold]y"):
        assert text in shown


@pytest.mark.parametrize("name", ["a b", "q?x=1", "h#1", "50%", "it's", "$HOME", "ü"])
def test_paths_in_commands_to_type_are_quoted(name: str, tmp_path: Path) -> None:
    """Faults 18."""
    shown = subprocess.run(["bash", "-c", f"printf %s {short(tmp_path / name)}"], capture_output=True, text=True)
    assert shown.stdout == str(tmp_path / name)


def test_errors_of_the_system_are_one_line_with_the_remedy_for_them(tmp_path: Path) -> None:
    """Faults 14: "Choose another run.root" was said for any file without permission."""
    with pytest.raises(IsADirectoryError) as folder:
        tmp_path.open()
    assert explain(folder.value) == f"{tmp_path}: Is a directory. Give the name of a file"
    with pytest.raises(OSError, match="too long") as long:
        (tmp_path / ("x" * 300)).open()
    assert "Choose a shorter name" in (explain(long.value) or "")
    assert explain(PermissionError(13, "Permission denied", "/x/y")) == (
        "/x/y: Permission denied. Choose a path where you may write and read, or change its permissions"
    )
    assert explain(RuntimeError("a bug")) is None


def test_a_run_that_could_not_start_leaves_no_folder(tmp_path: Path) -> None:
    """Faults 14d: after Ray failed to start, the run's name was taken."""
    config = parse_config({"run": {"root": str(tmp_path), "name": "q"}})
    run = RunDir.create(config, "train")
    with pytest.raises(AprError), begun(run):
        raise AprError("Ray did not start")
    assert not run.path.exists()

    run = RunDir.create(config, "train")
    run.log({"train/loss": 0.1}, 1)
    with pytest.raises(KeyboardInterrupt), begun(run):
        raise KeyboardInterrupt
    assert run.path.exists(), "something was done"


INTERRUPTED = """
import os, signal, sys
import apr_ray
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from apr_ray.threads.events import TokensSampled

tokens = 0
def listener(event):
    global tokens
    if isinstance(event, TokensSampled):
        if tokens == 0:
            os.kill(os.getpid(), signal.SIGINT)
        tokens += len(event.token_ids)

def main():
    apr_ray.solve("3 5 7 -> 22", sys.argv[1], temperature=1.0, listener=listener)

async def in_a_loop():
    main()

try:
    if sys.argv[2] == "notebook":
        import asyncio
        asyncio.run(in_a_loop())
    else:
        main()
except KeyboardInterrupt:
    print("interrupted after", tokens)
"""


@pytest.mark.parametrize("where", ["script", "notebook"])
def test_ctrl_c_stops_a_tree_at_once(where: str, checkpoint: Path) -> None:
    """Faults 23: it was only heard when the tree had ended."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(checkpoint), where], capture_output=True, text=True, timeout=120
    )
    words = done.stdout.split()
    assert words[:2] == ["interrupted", "after"], done.stderr
    assert int(words[2]) < 100, "an untrained policy goes on for hundreds of tokens"
