"""The sampler: which demonstrations come together, in which order, with what trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_demonstrations import toy_demonstrations

from apr_ray.core.batch import TrainBatch
from apr_ray.core.errors import ConfigError
from apr_ray.data.demonstrations import Demonstrations
from apr_ray.data.sampler import SftSampler, cut_into_bins
from apr_ray.rl.batches import plan_micro_batches

PADDING_GOAL = 0.05


def sampler(data: Demonstrations, **options: Any) -> SftSampler:
    usual = {"mask": "none", "targets": {}, "batch_bins": 4, "bin_tokens": 200, "seed": 0}
    return SftSampler(data, **(usual | options))


def firsts(batch: TrainBatch) -> list[int]:
    """The first id of every sequence: unique in the toy data, so it names the sequence."""
    return batch.tokens[batch.offsets[:-1]].tolist()


def test_an_epoch_shows_every_sequence_once() -> None:
    data = toy_demonstrations()
    starts = data.offsets[:-1]
    source = sampler(data, batch_bins=1)
    seen: dict[bool, list[int]] = {True: [], False: []}
    want = {kind: sorted(starts[data.child == kind].tolist()) for kind in seen}
    for _ in range(400):
        shown = firsts(source.next(1.0, 0.0))
        kind = bool(data.child[np.searchsorted(starts, shown[0])])
        if len(seen[kind]) < len(want[kind]):
            seen[kind] += shown
    assert {kind: sorted(shown) for kind, shown in seen.items()} == want


def test_a_sampler_goes_on_where_another_stopped() -> None:
    data = toy_demonstrations()
    whole = sampler(data, seed=3)
    progress = np.linspace(0, 1, 50)
    first = [firsts(whole.next(p, 0.4)) for p in progress[:20]]
    position = dict(whole.position)
    rest = [firsts(whole.next(p, 0.4)) for p in progress[20:]]
    resumed = sampler(data, seed=3, position=position)
    assert [firsts(resumed.next(p, 0.4)) for p in progress[20:]] == rest
    other = sampler(data, seed=4)
    assert [firsts(other.next(p, 0.4)) for p in progress[:20]] != first


def test_the_place_of_an_older_sampler_is_refused() -> None:
    with pytest.raises(ConfigError, match="an older version took them otherwise"):
        sampler(toy_demonstrations(), position={"child": 3, "all": 7})


def test_the_childrens_share_falls_linearly_to_the_usual_one() -> None:
    data = toy_demonstrations(2000)
    source = sampler(data, child_share=0.5)
    tokens = data.lengths[data.child].sum() / 2, data.lengths[~data.child].sum()
    usual = tokens[0] / sum(tokens)
    assert source.child_share_at(0.0, 0.2) == 1.0
    assert source.child_share_at(0.1, 0.2) == pytest.approx((1 + usual) / 2)
    assert source.child_share_at(0.2, 0.2) == source.child_share_at(0.9, 0.0) == pytest.approx(usual)

    def shown(progress: float) -> float:
        of_children = whole = 0
        for _ in range(60):
            batch = source.next(progress, 0.2)
            kinds = data.child[np.searchsorted(data.offsets[:-1], firsts(batch))]
            of_children += int(batch.lengths[kinds].sum())
            whole += int(batch.lengths.sum())
        return of_children / whole

    assert shown(0.0) == 1.0
    assert shown(0.1) == pytest.approx((1 + usual) / 2, abs=0.04)
    assert shown(0.5) == pytest.approx(usual, abs=0.04)


def test_a_batch_mixes_lengths_and_kinds_at_little_padding() -> None:
    """One length class a batch would let Adam see steps of parents only, then of children only."""
    data = toy_demonstrations(3000)
    source = sampler(data, bin_tokens=400)
    mixed = padded = real = 0
    for _ in range(100):
        batch = source.next(1.0, 0.0)
        lengths = batch.lengths.tolist()
        kinds = data.child[np.searchsorted(data.offsets[:-1], firsts(batch))]
        mixed += max(lengths) > 1.5 * min(lengths) and 0 < kinds.sum() < len(kinds)
        plan = plan_micro_batches(lengths, 400 * 4 // 3, 2)
        padded += sum(len(rows) * max(lengths[i] for i in rows) for part in plan for rows in part if rows)
        real += sum(lengths)
    assert mixed > 80
    assert 1 - real / padded < PADDING_GOAL


@settings(max_examples=100)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(1, 200))
def test_bins_hold_every_sequence_once_at_about_the_size(sizes: list[int], limit: int) -> None:
    lengths = np.array(sorted(sizes, reverse=True))
    bins = cut_into_bins(np.arange(len(lengths)), lengths, limit)
    assert np.concatenate(bins).tolist() == list(range(len(lengths)))
    for one in bins:
        assert len(one) == 1 or len(one) * lengths[one].max() <= limit * 4 / 3


@pytest.mark.parametrize(("mask", "part"), [("none", 0.0), ("given", 0.25), ("prompt", 0.5)])
def test_a_mask_takes_the_loss_off_the_beginning_of_a_sequence(mask: str, part: float) -> None:
    batch = sampler(toy_demonstrations(), mask=mask).next(1.0, 0.0)
    for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        skipped = max(1, int(part * (end - start)))
        assert (batch.loss_weights[start : start + skipped] == 0).all()
        assert (batch.loss_weights[start + skipped : end] > 0).all()


def test_targets_are_the_tokens_but_for_those_that_are_mapped() -> None:
    data = toy_demonstrations()
    put_there = int(data.ids[7])
    source = sampler(data, targets={put_there: 2})
    changed = 0
    for _ in range(30):
        batch = source.next(1.0, 0.0)
        assert (batch.targets[batch.tokens != put_there] == batch.tokens[batch.tokens != put_there]).all()
        assert (batch.targets[batch.tokens == put_there] == 2).all()
        changed += int((batch.tokens == put_there).sum())
    assert changed
