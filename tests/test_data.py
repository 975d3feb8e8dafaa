"""Demonstrations through Ray Data and Parquet."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_demonstrations import toy_demonstrations

from apr_ray.config import DataConfig, TaskConfig
from apr_ray.core.errors import AprError
from apr_ray.data import demonstrations
from apr_ray.data.demonstrations import Demonstrations, _require_parts, solve_rows, write_demonstrations
from apr_ray.tasks.countdown.task import CountdownTask


def test_other_demonstrations_have_another_fingerprint() -> None:
    assert toy_demonstrations().fingerprint() == toy_demonstrations().fingerprint()
    changed = toy_demonstrations()
    changed.ids[5] += 1
    prints = (toy_demonstrations(), toy_demonstrations(301), changed)
    assert len({one.fingerprint() for one in prints}) == 3


def test_rows_hold_the_solvers_text_and_long_trees_are_dropped_whole(task: CountdownTask) -> None:
    tokenizer = task.tokenizer()
    problems = task.problems("train", 20, 0)
    items = [{"index": i, "solver_seed": 0, "problem": json.dumps(dict(p.to_json()))} for i, p in enumerate(problems)]
    rows = solve_rows(task, tokenizer, items, 10_000, 0)
    made = [s for p in problems for s in task.demonstrate(p, 0).sequences]
    assert [tokenizer.decode(r["ids"]) for r in rows] == [s.prompt + s.completion for s in made]
    assert all(r["ids"][-1] == tokenizer.eos_id for r in rows)
    given = [tokenizer.decode(r["ids"][: r["given_tokens"]]) for r in rows]
    roots = {r["index"]: text for r, text in zip(rows, given, strict=True) if r["order"] == 0}
    for row, text in zip(rows, given, strict=True):
        prompt = tokenizer.decode(row["ids"][: row["prompt_tokens"]])
        assert text == (roots[row["index"]] if row["kind"] == "parent" else prompt)
        assert prompt.startswith(text)
    assert [tokenizer.decode(r["ids"][: r["prompt_tokens"]]) for r in rows] == [s.prompt for s in made]
    short = solve_rows(task, tokenizer, items, 150, 0)
    kept = {r["index"] for r in short}
    assert 0 < len(kept) < 20
    assert [r for r in rows if r["index"] in kept] == short


def test_parquet_does_not_depend_on_the_number_of_workers(
    ray_local: None, task: CountdownTask, task_config: TaskConfig, tmp_path: Path
) -> None:
    problems = task.problems("train", 40, 0)
    sets = []
    for workers in (1, 2):
        out = tmp_path / f"d{workers}"
        summary = write_demonstrations(problems, task_config, DataConfig(workers=workers, solver_seeds=2), 5, out)
        sets.append((summary, Demonstrations.load(out)))
    assert sets[0][0] == sets[1][0]
    assert sets[0][0].trees + sets[0][0].dropped == 80
    for name in ("ids", "offsets", "prompts", "child"):
        np.testing.assert_array_equal(getattr(sets[0][1], name), getattr(sets[1][1], name))
    assert len(sets[0][1]) == sets[0][0].sequences


def test_demonstrations_none_of_which_fits_are_an_error(
    ray_local: None, task: CountdownTask, task_config: TaskConfig, tmp_path: Path
) -> None:
    data = DataConfig(workers=1, max_sequence_tokens=20)
    with pytest.raises(AprError, match=r"no demonstration of 3 fits into data\.max_sequence_tokens=20"):
        write_demonstrations(task.problems("train", 3, 0), task_config, data, 5, tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AprError, match="no Parquet files"):
        Demonstrations.load(tmp_path)


def test_a_part_that_another_machine_kept_is_an_error(
    ray_local: None, task: CountdownTask, task_config: TaskConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults 2: what other nodes wrote was counted as too long, and training went on with the rest."""

    def elsewhere(folder: Path, parts: Any, *others: Any) -> None:
        next(folder.glob("*.parquet")).unlink()
        _require_parts(folder, parts, *others)

    monkeypatch.setattr(demonstrations, "_require_parts", elsewhere)
    with pytest.raises(AprError, match=r"1 of \d+ files of demonstrations are not in .*storage that all nodes share"):
        write_demonstrations(task.problems("train", 30, 0), task_config, DataConfig(workers=2), 5, tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_command_left_is_removed_by_the_next(
    ray_local: None, task: CountdownTask, task_config: TaskConfig, tmp_path: Path
) -> None:
    """Faults 26c."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = tmp_path / f".d.partial-{demonstrations.HOST}-{ended.pid}"
    lives = tmp_path / f".d.partial-{demonstrations.HOST}-{os.getppid()}"
    for folder in (left, lives):
        folder.mkdir()
    write_demonstrations(task.problems("train", 3, 0), task_config, DataConfig(workers=1), 5, tmp_path / "d")
    assert not left.exists()
    assert lives.exists(), "another command may be writing there"
