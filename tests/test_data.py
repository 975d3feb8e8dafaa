"""Demonstrations through Ray Data and Parquet; the sampler's order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from apr_ray.config import DataConfig, TaskConfig
from apr_ray.core.errors import AprError
from apr_ray.data.demonstrations import Demonstrations, SftSampler, solve_rows, write_demonstrations
from apr_ray.tasks.countdown.task import CountdownTask


def toy(count: int = 300) -> Demonstrations:
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 60, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    child = rng.random(count) < 0.5
    return Demonstrations(np.arange(offsets[-1], dtype=np.int32), offsets, lengths // 4, lengths // 2, child)


def firsts(sampler: SftSampler, phase: str, count: int) -> list[list[int]]:
    """The first token of every sequence of each batch: unique in `toy`, so it names the sequence."""
    out = []
    for _ in range(count):
        batch = sampler.next(phase)
        out.append(batch.tokens[batch.offsets[:-1]].tolist())
    return out


def test_an_epoch_shows_every_sequence_once() -> None:
    data = toy()
    sampler = SftSampler(data, 400, mask="none", seed=0)
    seen: list[int] = []
    while len(seen) < len(data):
        seen += firsts(sampler, "all", 1)[0]
    assert sorted(seen) == data.offsets[:-1].tolist()


def test_a_sampler_goes_on_where_another_stopped() -> None:
    data = toy()
    whole = SftSampler(data, 400, mask="none", seed=3)
    first = firsts(whole, "child", 3) + firsts(whole, "all", 7)
    rest = firsts(whole, "all", 40)
    resumed = SftSampler(data, 400, mask="none", seed=3, position={"child": 3, "all": 7})
    assert firsts(resumed, "all", 40) == rest
    assert first != firsts(SftSampler(data, 400, mask="none", seed=4), "all", 10)


def test_the_child_phase_shows_children_only_and_batches_keep_their_size() -> None:
    data = toy()
    children = set(data.offsets[:-1][data.child].tolist())
    sampler = SftSampler(data, 400, mask="none", seed=0)
    for _ in range(20):
        batch = sampler.next("child")
        assert set(batch.tokens[batch.offsets[:-1]].tolist()) <= children
        assert len(batch.tokens) <= 1.1 * 400 + 60


def test_a_share_of_the_childrens_sequences_is_shown_anew_each_epoch() -> None:
    data = toy()
    starts, children = data.offsets[:-1], set(data.offsets[:-1][data.child].tolist())
    sampler = SftSampler(data, 400, mask="none", seed=0, child_share=0.5)
    epochs: list[set[int]] = []
    for _ in range(2):
        seen: set[int] = set()
        while not set(starts.tolist()) - children <= seen:
            seen.update(firsts(sampler, "all", 1)[0])
        epochs.append(seen & children)
    assert all(0.3 * len(children) < len(shown) < 0.7 * len(children) for shown in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("count", "batch_tokens"), [(300, 400), (3000, 4_000), (3000, 20_000), (3000, 60_000)])
def test_batches_are_of_about_the_size_that_was_asked_for(count: int, batch_tokens: int) -> None:
    """Also those that a window does not fill, at its end or at an epoch's: each is a whole optimiser step."""
    data = toy(count)
    total = int(data.lengths.sum())
    sampler = SftSampler(data, batch_tokens, mask="none", seed=0, ranks=2)
    sizes = [len(sampler.next("all").tokens) for _ in range(2 * total // batch_tokens)]
    largest = min(total, batch_tokens)
    assert min(sizes) > 0.6 * largest
    assert max(sizes) < 1.5 * largest + 2 * data.lengths.max()


def test_other_demonstrations_have_another_fingerprint() -> None:
    assert toy().fingerprint() == toy().fingerprint()
    changed = toy()
    changed.ids[5] += 1
    assert len({toy().fingerprint(), toy(301).fingerprint(), changed.fingerprint()}) == 3


def test_ranks_get_as_many_sequences_each() -> None:
    data = toy(301)
    sampler = SftSampler(data, 400, mask="none", seed=0, ranks=2)
    seen: list[int] = []
    while len(seen) < len(data):
        batch = firsts(sampler, "all", 1)[0]
        seen += batch
        if len(batch) % 2:
            assert data.lengths.max() == data.lengths[np.searchsorted(data.offsets, batch)].max()
    assert sorted(seen) == data.offsets[:-1].tolist()


@pytest.mark.parametrize(("mask", "part"), [("none", 0.0), ("given", 0.25), ("prompt", 0.5)])
def test_a_mask_takes_the_loss_off_the_beginning_of_a_sequence(mask: str, part: float) -> None:
    data = toy()
    batch = SftSampler(data, 400, mask=mask, seed=0).next("all")
    for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        skipped = max(1, int(part * (end - start)))
        assert (batch.loss_weights[start : start + skipped] == 0).all()
        assert (batch.loss_weights[start + skipped : end] > 0).all()


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
