"""Engine and learner apart: importance weights and measures of a batch, against token-by-token references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apr_ray.core.batch import TrainBatch, TrainSequence, lay_out
from apr_ray.metrics.mismatch import mismatch_metrics
from apr_ray.metrics.names import is_known
from apr_ray.rl.mismatch import Apart, Correction, importance_weights, measure_mismatch, tree_sums

Drawn = list[tuple[int, list[tuple[float, bool, int]]]]
"""Per call its tree, and per token Δ, whether it is trained, and the weight version that drew it."""
drawn_calls = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.lists(st.tuples(st.floats(-2, 2, width=32), st.booleans(), st.integers(0, 2)), min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=7,
).filter(lambda calls: any(trained for _, tokens in calls for _, trained, _ in tokens))


def lay_out_drawn(calls: Drawn) -> tuple[TrainBatch, np.ndarray]:
    """As a batch, with a prompt of one token each; and Δ."""
    batch = lay_out(
        [
            TrainSequence(
                [1] * (len(tokens) + 1),
                [0.0, *(float(trained) for _, trained, _ in tokens)],
                versions=[0, *(version for *_, version in tokens)],
                tree=tree,
            )
            for tree, tokens in calls
        ]
    )
    delta = [d * trained for _, tokens in calls for d, trained in ((0.0, False), *((d, t) for d, t, _ in tokens))]
    return batch, np.array(delta, dtype=np.float32)


@given(
    drawn_calls, st.sampled_from(["truncate", "mask"]), st.sampled_from(["token", "call", "tree"]), st.floats(1.1, 9)
)
def test_importance_weights_equal_a_product_over_tokens(calls: Drawn, kind: str, level: str, cap: float) -> None:
    batch, delta = lay_out_drawn(calls)
    how = Correction(kind, level, cap)  # type: ignore[arg-type]
    sums = torch.from_numpy(tree_sums(delta, batch)[batch.trees])
    rows = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(part) for part in np.split(delta, batch.offsets[1:-1])], batch_first=True
    )
    found = importance_weights(rows, how, sums)
    values, cut = found.values.expand(rows.shape), found.cut.expand(rows.shape)
    for i, (tree, tokens) in enumerate(calls):
        together = [ts for other, ts in calls if other == tree] if level == "tree" else [tokens]
        for j, (d, trained, _) in enumerate(tokens):
            of = [d * trained] if level == "token" else [d * t for ts in together for d, t, _ in ts]
            weight = math.prod(math.exp(x) for x in of)
            if abs(weight - cap) < 1e-4 * cap or abs(weight - 1 / cap) < 1e-4 / cap:
                continue  # on the edge
            outside = weight > cap or (kind == "mask" and weight < 1 / cap)
            assert bool(cut[i, j + 1]) == outside
            exact = {"truncate": min(weight, cap), "mask": 0.0 if outside else weight}[kind]
            assert float(values[i, j + 1]) == pytest.approx(exact, rel=1e-5)


def test_a_tree_level_without_its_sums_is_refused() -> None:
    with pytest.raises(ValueError, match="sums over trees"):
        importance_weights(torch.zeros(1, 3), Correction("mask", "tree", 2.0))


@given(drawn_calls)
def test_the_mismatch_of_a_batch_equals_a_token_by_token_reference(calls: Drawn) -> None:
    batch, delta = lay_out_drawn(calls)
    found = measure_mismatch(delta, batch)
    trained = [(d, tree, version) for tree, tokens in calls for d, t, version in tokens if t]

    def check(apart: Apart, deltas: list[float]) -> None:
        assert apart.tokens == len(deltas)
        assert apart.delta_mean == pytest.approx(sum(map(abs, deltas)) / len(deltas))
        assert apart.delta_max == max(map(abs, deltas))
        assert apart.ratio_outside == sum(not 0.5 <= math.exp(d) <= 2 for d in deltas) / len(deltas)
        ratios = sorted(math.exp(d) for d in deltas)
        assert ratios[-2:][0] <= apart.ratio_p999 * (1 + 1e-9)
        assert apart.ratio_p999 <= ratios[-1] * (1 + 1e-9)

    check(found.whole, [d for d, *_ in trained])
    sums = [sum(d for d, tree, _ in trained if tree == number) for number in range(4)]
    assert found.tree_max == pytest.approx(max(map(abs, sums)), abs=1e-9)
    for version in range(3):
        of = [d for d, _, v in trained if v == version]
        assert (version in found.versions) == bool(of)
        if of:
            check(found.versions[version], of)


def test_mismatch_metrics_tell_versions_apart() -> None:
    batch, delta = lay_out_drawn([(0, [(0.1, True, 2), (-0.2, True, 0), (-0.8, True, 0)])])
    found = mismatch_metrics(measure_mismatch(delta, batch), 2)
    ages = {name: value for name, value in found.items() if "age" in name}
    assert ages == pytest.approx(
        {
            "train/mismatch/age_0/tokens": 1 / 3,
            "train/mismatch/age_0/delta_logprob_mean": 0.1,
            "train/mismatch/age_0/delta_logprob_max": 0.1,
            "train/mismatch/age_0/ratio_outside": 0.0,
            "train/mismatch/age_0/ratio_p999": math.exp(0.1),
            "train/mismatch/age_2/tokens": 2 / 3,
            "train/mismatch/age_2/delta_logprob_mean": 0.5,
            "train/mismatch/age_2/delta_logprob_max": 0.8,
            "train/mismatch/age_2/ratio_outside": 0.5,
            "train/mismatch/age_2/ratio_p999": math.exp(-0.2 - 0.6 / 1000),
        },
        rel=1e-6,
    )
    assert all(map(is_known, found))
    assert not is_known("train/mismatch/age_x/tokens")
