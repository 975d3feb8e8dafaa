"""Run folders: complete checkpoints or none, resumes that refuse what would change the run."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from safetensors import SafetensorError

from apr_ray.cli import explain
from apr_ray.config import Config, load_config, parse_config
from apr_ray.core.errors import AprError, ConfigError
from apr_ray.training.run_dir import LoopState, RunDir, find_policy


def run_in(tmp_path: Path, **changes: object) -> RunDir:
    return RunDir.create(load_config([], [f"run.root={tmp_path}", "run.name=r"]), "test")


def write(run: RunDir, step: int) -> None:
    with run.checkpoint(LoopState(step=step, version=f"0.{step}")) as folder:
        (folder / "policy").mkdir()
        (folder / "policy" / "config.json").write_text(str(step))
        (folder / "optimizer").mkdir()


def test_the_newest_checkpoint_is_found_with_a_new_incarnation(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert run.latest() is None
    for step in (1, 2, 3):
        write(run, step)
    found = run.latest()
    assert found is not None
    assert found[1].step == 3
    assert found[1].version == "1.3"
    assert len(list((run.path / "checkpoints").iterdir())) == 2, "old checkpoints are removed"
    run.use_incarnation(1)  # and its process dies before it saves
    again = run.latest()
    assert again is not None
    assert again[1].version == "2.3"


def test_a_checkpoint_that_was_written_elsewhere_is_an_error(tmp_path: Path) -> None:
    """As by ranks of other machines, where `run.root` is not shared."""
    run = run_in(tmp_path)
    with pytest.raises(AprError, match=r"another machine.*storage that all nodes share"), run.checkpoint(LoopState()):
        pass
    assert run.latest() is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed writer may still hold its file


def test_a_full_disk_leaves_the_last_checkpoint_whole(small_disk: Path) -> None:
    run = run_in(small_disk)
    write(run, 1)

    def fill() -> None:
        with run.checkpoint(LoopState(step=2)) as folder:
            (folder / "model.safetensors").write_bytes(bytes(2 << 20))

    with pytest.raises(OSError, match="No space left") as caught:
        fill()
    assert "the disk is full" in str(explain(caught.value))
    found = run.latest()
    assert found is not None
    assert found[1].step == 1
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-000001"], "the half checkpoint is gone"
    write(run, 2)


def fill_up(disk: Path, spare_bytes: int) -> None:
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - spare_bytes))


def with_safetensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1 << 20)}, folder / "model.safetensors")


def with_torch(folder: Path) -> None:
    import torch

    torch.save({"w": torch.zeros(1 << 20)}, folder / "optimizer.pt")


def with_arrow(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"a": os.urandom(4 << 20)[:: 1 << 20], "b": [os.urandom(1 << 20)] * 4}), folder / "a")


def with_sqlite(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        database.execute("create table a (b blob)")
        database.execute("insert into a values (zeroblob(4000000))")


@pytest.mark.parametrize("save", [with_safetensors, with_torch, with_arrow, with_sqlite])
def test_every_writer_names_a_full_disk(small_disk: Path, save: Callable[[Path], None]) -> None:
    """Each has an error of its own; one of them does not say what it is."""
    run = run_in(small_disk)
    fill_up(small_disk, 1 << 17)

    def write_too_much() -> None:
        with run.checkpoint(LoopState(step=1)) as folder:
            save(folder)

    with pytest.raises((OSError, SafetensorError, sqlite3.Error)) as caught:
        write_too_much()
    assert str(explain(caught.value)).startswith("the disk is full")
    assert run.latest() is None


def test_a_run_that_does_not_fit_leaves_no_folder(small_disk: Path) -> None:
    fill_up(small_disk, 0)
    with pytest.raises(AprError, match=r"No space left on device\. Free space"):
        run_in(small_disk)
    assert [p.name for p in small_disk.iterdir()] == ["ballast"]


def test_a_resumed_run_reaches_ray_as_it_is_told_now(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    told = load_config([run.path / "config.yaml"], ["ray.address=auto", "tracking.tracker=none"])
    assert RunDir.resume(run.path, told).config == told


def test_a_changed_config_is_refused_by_naming_the_difference(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    changed = load_config([run.path / "config.yaml"], ["grpo.group_size=7"])
    with pytest.raises(ConfigError, match=r"grpo\.group_size: 5 -> 7"):
        RunDir.resume(run.path, changed)
    with pytest.raises(ConfigError, match=r"run\.seed: 0 -> 7"):
        RunDir.resume(run.path, load_config([run.path / "config.yaml"], ["run.seed=7"]))
    for told in ("tracking.tracker=none", "run.root=elsewhere", "run.name=other"):
        assert RunDir.resume(run.path, load_config([run.path / "config.yaml"], [told])).path == run.path


def test_a_run_knows_its_place_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir.create(load_config([], ["run.root=runs", "run.name=r"]), "test")
    monkeypatch.chdir("/")
    assert RunDir.resume(run.path).config.run.root == str(tmp_path / "runs")


def test_a_taken_name_and_a_wrong_folder_are_errors(tmp_path: Path) -> None:
    run_in(tmp_path)
    with pytest.raises(AprError, match="exists"):
        run_in(tmp_path)
    with pytest.raises(AprError, match="no run folder"):
        RunDir.resume(tmp_path)
    with pytest.raises(AprError, match="no checkpoint"):
        find_policy(tmp_path)


def test_metrics_keep_only_known_names_and_survive_a_cut(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    with pytest.raises(ValueError, match="not in the table"):
        run.log({"train/los": 1.0}, 1)
    for step in (1, 2, 3):
        run.log({"train/loss": float(step), "eval/greedy/failure/no_answer": 2.0}, step)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    run.truncate_metrics(2)
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_a_checkpoint_knows_which_metrics_came_before_it(tmp_path: Path) -> None:
    """The evaluation at the end comes after the last checkpoint, under the same step."""
    run = run_in(tmp_path)
    run.log({"train/loss": 1.0}, 1)
    write(run, 1)
    run.log({"eval/greedy/accuracy": 0.5}, 1)
    found = run.latest()
    assert found is not None
    run.truncate_metrics(found[1].metrics_rows)
    assert ["train/loss" in row for row in run.metrics()] == [True]


def test_what_a_killed_run_left_half_done_is_finished_or_undone(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    write(run, 1)
    run.keep_policy(run.path / "checkpoints" / "step-000001" / "policy", "best")
    (run.path / "best").rename(run.path / ".best.old-7")  # between the two renames of a replacement
    for half in ("checkpoints/.step-000002.partial-7", ".best.partial-7", ".final.old-7", "batches/.step-1.partial-7"):
        (run.path / half).mkdir(parents=True)
    (run.path / "final").mkdir()
    (run.path / ".metrics.jsonl.partial-7").touch()
    RunDir.resume(run.path)
    assert {p.name for p in run.path.iterdir()} == {"config.yaml", "checkpoints", "best", "final", "batches"}
    assert (run.path / "best" / "config.json").is_file()
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-000001"]
    assert list((run.path / "batches").iterdir()) == []


@pytest.mark.parametrize("temperatures", ["[]", "[1.0, 1]"])
def test_an_evaluation_has_temperatures_each_once(temperatures: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.temperatures.*at least one temperature, each once"):
        load_config([], [f"evaluation.temperatures={temperatures}"])


def test_a_run_goes_on_from_its_policy_by_whatever_path(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for place in (one, other):
        shutil.copytree(checkpoint, place / "final")

    def begun_with(init_from: str) -> Config:
        place = {"root": str(tmp_path), "name": "r"}
        return parse_config({"init_from": init_from, "run": place})

    run = RunDir.create(begun_with(str(one / "final")), "train")
    monkeypatch.chdir(tmp_path)
    assert RunDir.resume(run.path, begun_with("one")).config.init_from == "one"
    with pytest.raises(ConfigError, match="was run with another config: init_from"):
        RunDir.resume(run.path, begun_with("other"))
    shutil.rmtree(one)
    assert RunDir.resume(run.path, begun_with("other")).config.init_from == "other"
