"""Advantages, losses, batches and plans against slow, obvious references, and as properties."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_ray.config import OptimizerConfig, RewardConfig
from apr_ray.core.batch import TrainSequence, lay_out
from apr_ray.core.engine import FinishReason, VersionSpan
from apr_ray.core.ledger import SOLVED, Call, Disposition, Group, Outcome, Replaced, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.rl.advantages import group_advantages, leave_one_out_advantages
from apr_ray.rl.batches import LossMean, SftRow, grpo_batch, plan_micro_batches, sft_batch
from apr_ray.rl.losses import grpo_loss, k3, sft_loss, token_entropy, token_logit_scale, token_logprobs
from apr_ray.rl.rewards import price_of, priced
from apr_ray.rl.schedules import learning_rate

V0 = WeightVersion(0, 0)
rewards = st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=2, max_size=8)


@given(rewards)
def test_advantages_are_z_scores(values: list[float]) -> None:
    found = group_advantages(values)
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    if deviation == 0:
        assert found == [0.0] * len(values)
        return
    assert found == pytest.approx([(v - mean) / deviation for v in values], abs=1e-4)
    assert sum(found) == pytest.approx(0, abs=1e-5)


def test_losses_equal_a_token_by_token_float64_reference() -> None:
    rng = np.random.default_rng(0)
    b, t, v = 3, 7, 11
    logits = rng.normal(size=(b, t, v)) * 2
    tokens = rng.integers(0, v, (b, t))
    advantages, old = rng.normal(size=(b, t)), -rng.random((b, t)) * 3
    reference = -rng.random((b, t)) * 3
    importance = rng.random((b, t)) * 2
    weights = rng.random((b, t)) * (rng.random((b, t)) < 0.7)
    weights[:, 0] = 0
    clip, beta, temperature = 0.2, 0.05, 0.7

    loss = kl_sum = entropy_sum = sft = 0.0
    clipped_count = 0
    for i in range(b):
        for j in range(1, t):
            scores = logits[i, j - 1] / temperature
            log_z = math.log(sum(math.exp(s) for s in scores))
            lp = scores[tokens[i, j]] - log_z
            ratio = math.exp(lp - old[i, j])
            surrogate = min(ratio * advantages[i, j], min(max(ratio, 1 - clip), 1 + clip) * advantages[i, j])
            clipped_count += weights[i, j] != 0 and surrogate < ratio * advantages[i, j]
            d = reference[i, j] - lp
            kl = math.exp(d) - 1 - d
            loss += weights[i, j] * (-importance[i, j] * surrogate + beta * kl)
            kl_sum += weights[i, j] * kl
            entropy_sum += weights[i, j] * -sum(math.exp(s - log_z) * (s - log_z) for s in scores)
            sft -= weights[i, j] * lp

    as_tensor = torch.tensor
    logprobs = token_logprobs(as_tensor(logits), as_tensor(tokens), temperature)
    result = grpo_loss(
        logprobs,
        as_tensor(old, dtype=torch.float32),
        as_tensor(advantages, dtype=torch.float32),
        as_tensor(weights, dtype=torch.float32),
        token_entropy(as_tensor(logits), temperature),
        clip=clip,
        kl_coefficient=beta,
        reference_logprobs=as_tensor(reference, dtype=torch.float32),
        importance_weights=as_tensor(importance, dtype=torch.float32),
    )
    assert float(result.loss) == pytest.approx(loss, rel=1e-5)
    assert result.kl == pytest.approx(kl_sum, rel=1e-5)
    assert result.entropy == pytest.approx(entropy_sum, rel=1e-5)
    assert result.clipped == clipped_count
    assert result.tokens == int((weights != 0).sum())
    assert float(sft_loss(logprobs, as_tensor(weights, dtype=torch.float32))) == pytest.approx(sft, rel=1e-5)


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    """At the behaviour policy the clipped objective's gradient is that of -weight * advantage * logprob."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 6, (2, 5))
    weights, advantages = torch.rand(2, 5).double(), torch.randn(2, 5).double()
    weights[:, 0] = 0
    logprobs = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
    logprobs = torch.nn.functional.pad(logprobs, (1, 0))
    result = grpo_loss(
        logprobs, logprobs.detach(), advantages, weights, torch.zeros(2, 5), clip=0.2, kl_coefficient=0.0
    )
    (got,) = torch.autograd.grad(result.loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(weights * advantages * logprobs).sum(), logits)
    torch.testing.assert_close(got, expected)


@given(st.floats(-8, 0), st.floats(-8, 0))
def test_k3_is_never_negative_and_zero_only_where_policies_agree(a: float, b: float) -> None:
    value = float(k3(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)))
    assert value >= -1e-12
    d = b - a
    assert value == pytest.approx(math.exp(d) - 1 - d, abs=1e-9)
    if abs(d) > 1e-3:
        assert value > d * d / 20  # it grows with the distance, on both sides


# --- batches ----------------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn, segment: int) -> Call:
    size = draw(st.integers(0, 9))
    forced = tuple(sorted(draw(st.sets(st.integers(0, size - 1), max_size=2)))) if size else ()
    return Call(
        path=(),
        segment=segment,
        prompt_ids=tuple(draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))),
        sampled_ids=tuple(range(size)),
        logprobs=(-0.5,) * size,
        forced=forced,
        replaced=tuple(Replaced(p, 1, -1.0) for p in forced[:1]),
        finish=draw(st.sampled_from(FinishReason)),
        versions=(VersionSpan(V0, 0, size),),
        kv_version=V0,
        seed=0,
        cached_tokens=0,
        start_s=0.0,
        first_token_s=0.0,
        end_s=0.0,
        engine_id="e",
    )


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    out = []
    for number in range(draw(st.integers(1, 4))):
        trees = []
        for sample in range(3):
            made = tuple(draw(calls(segment)) for segment in range(draw(st.integers(1, 4))))
            reward = draw(st.sampled_from([0.0, 1.0]))
            trees.append(ThreadTree(f"p{number}", sample, made, (), (), "", Outcome.ANSWERED, reward=reward))
        out.append(Group(f"p{number}", tuple(trees)))
    return out


@settings(max_examples=300)
@given(groups(), st.booleans(), st.sampled_from(["call", "tree", "token"]))
def test_weights_and_dispositions_of_a_batch(made: list[Group], skip: bool, loss_mean: LossMean) -> None:
    """Paper section 3.3: mean over a call's tokens, mean over a tree's calls, mean over trees; or over a tree's tokens;
    or over all. Trees that are left out stay in the denominators. Contract 4: dispositions add up to all that was
    sampled."""
    found = grpo_batch(made, skip_zero_advantage=skip, loss_mean=loss_mean)
    trees = [tree for group in made for tree in group.trees]
    advantages = [a for group in made for a in group_advantages([t.reward or 0.0 for t in group.trees])]
    assert sum(found.dispositions.values()) == sum(t.total_tokens for t in trees)
    assert found.dispositions[Disposition.TRAINED] == found.batch.trained_tokens

    expected: Counter[tuple[int, float, float]] = Counter()
    in_all = sum(len(list(c.trained_positions())) for tree in trees for c in tree.calls)
    for number, (tree, advantage) in enumerate(zip(trees, advantages, strict=True)):
        if skip and advantage == 0:
            continue
        trained = [n for n in (len(list(c.trained_positions())) for c in tree.calls) if n]
        for tokens in trained:
            weight = {
                "call": 1 / (tokens * len(trained) * len(trees)),
                "tree": 1 / (sum(trained) * len(trees)),
                "token": 1 / in_all,
            }[loss_mean]
            expected[(number, float(np.float32(weight)), float(np.float32(advantage)))] += tokens
    batch = found.batch
    used = batch.loss_weights != 0
    tree_of = np.repeat(batch.trees, batch.lengths)
    columns = (tree_of, batch.loss_weights, batch.advantages)
    assert Counter(zip(*(c[used].tolist() for c in columns), strict=True)) == expected


def test_prompts_have_no_weight_and_a_replaced_token_is_trained_as_it_was_sampled() -> None:
    spans = (VersionSpan(WeightVersion(0, 6), 0, 1), VersionSpan(WeightVersion(0, 7), 1, 4))
    call = Call(
        (), 0, (7, 8, 9), (1, 2, 3, 4), (-0.1, 0.0, -0.3, -0.4), (1,), (Replaced(1, 5, -2.0),), FinishReason.STOP,
        spans, V0, 0, 0, 0.0, 0.0, 0.0, "e",
    )  # fmt: skip
    trees = tuple(ThreadTree("p", i, (call,), (), (), "", Outcome.ANSWERED, reward=float(i)) for i in range(2))
    batch = grpo_batch([Group("p", trees)], skip_zero_advantage=False).batch
    np.testing.assert_allclose(batch.loss_weights[:7], [0, 0, 0, 1 / 8, 1 / 8, 1 / 8, 1 / 8], rtol=1e-6)
    np.testing.assert_array_equal(batch.tokens[:7], [7, 8, 9, 1, 2, 3, 4])
    np.testing.assert_array_equal(batch.targets[:7], [7, 8, 9, 1, 5, 3, 4])
    np.testing.assert_allclose(batch.behaviour_logprobs[:7], [0, 0, 0, -0.1, -2.0, -0.3, -0.4], rtol=1e-6)
    np.testing.assert_array_equal(batch.versions[:7], [0, 0, 0, 6, 7, 7, 7])
    np.testing.assert_array_equal(batch.trees, [0, 1])


@pytest.mark.parametrize("outcome", [Outcome.ENGINE_ERROR, Outcome.BOUND_TIME, Outcome.CANCELLED])
def test_a_tree_that_the_machine_ended_says_nothing_of_the_policy(outcome: Outcome) -> None:
    """Seven trees that solved and one whose engine died, or was slow: nothing to learn from, whatever it wrote."""

    def tree(sample: int, outcome: Outcome, reward: float) -> ThreadTree:
        call = Call(
            (), 0, (7,), (1, 2), (-0.1, -0.2), (), (), FinishReason.STOP,
            (VersionSpan(V0, 0, 2),), V0, 0, 0, 0.0, 0.0, 0.0, "e",
        )  # fmt: skip
        return ThreadTree("p", sample, (call,), (), (), "", outcome, reward=reward)

    solved = [tree(i, Outcome.ANSWERED, 1.0) for i in range(7)]
    failed = tree(7, outcome, 0.0)
    found = grpo_batch([Group("p", (*solved, failed)), Group("q", (failed,))], skip_zero_advantage=True)
    assert len(found.batch) == 0
    assert found.dispositions == {Disposition.ZERO_ADVANTAGE: 14, Disposition.ERROR: 4}
    assert (found.zero_variance_groups, found.groups) == (1, 1)
    two = [tree(0, Outcome.ANSWERED, 1.0), tree(1, Outcome.ANSWERED, 0.0)]
    without = grpo_batch([Group("p", tuple(two))], skip_zero_advantage=True)
    beside = grpo_batch([Group("p", (failed, *two))], skip_zero_advantage=True)
    np.testing.assert_array_equal(without.batch.loss_weights, beside.batch.loss_weights)
    np.testing.assert_array_equal(without.batch.advantages, beside.batch.advantages)


def test_groups_of_one_reward_are_counted_whatever_the_advantage_is() -> None:
    for verdict in (SOLVED, "wrong_value"):
        trees = tuple(
            ThreadTree("p", i, (), (), (), "", Outcome.ANSWERED, reward=1.0, verdict=verdict) for i in range(2)
        )
        for kind in ("group", "leave_one_out", "success"):
            found = grpo_batch([Group("p", trees)], skip_zero_advantage=True, advantage_kind=kind)  # type: ignore[arg-type]
            assert found.zero_variance_groups == 1


def test_a_tree_without_a_reward_cannot_be_trained_on() -> None:
    tree = ThreadTree("p", 0, (), (), (), "", Outcome.ANSWERED)
    with pytest.raises(ValueError, match="without a reward"):
        grpo_batch([Group("p", (tree,))], skip_zero_advantage=False)


@given(st.lists(st.tuples(st.integers(2, 30), st.integers(1, 20)), min_size=1, max_size=12), st.booleans())
def test_supervised_weights_sum_to_one(sizes: list[tuple[int, int]], mask: bool) -> None:
    sequences = [(np.arange(n), min(p, n - 1)) for n, p in sizes]
    batch = sft_batch([SftRow(ids, ids, prompt if mask else 0) for ids, prompt in sequences])
    assert batch.loss_weights.sum() == pytest.approx(1, rel=1e-5)
    for (ids, prompt), start in zip(sequences, batch.offsets[:-1], strict=True):
        weights = batch.loss_weights[start : start + len(ids)]
        first = prompt if mask else 1
        assert (weights[:first] == 0).all()
        assert (weights[first:] > 0).all()


@settings(max_examples=300)
@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 500), st.integers(1, 4))
def test_a_plan_holds_every_sequence_once_within_the_budget(lengths: list[int], budget: int, ranks: int) -> None:
    plan = plan_micro_batches(lengths, budget, ranks)
    assert len(plan) == ranks
    assert len({len(part) for part in plan}) == 1
    assert sorted(i for part in plan for group in part for i in group) == list(range(len(lengths)))
    for part in plan:
        for group in part:
            width = max((lengths[i] for i in group), default=0)
            assert len(group) <= 1 or len(group) * width <= budget


def test_ranks_get_even_shares() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, 200).tolist()
    plan = plan_micro_batches(lengths, 4096, 2)
    load = [sum(len(g) * max((lengths[i] for i in g), default=0) for g in part) for part in plan]
    assert max(load) / min(load) < 1.1
    assert sum(load) / sum(lengths) < 1.15


def test_a_batch_that_fits_is_cut_once_per_rank() -> None:
    """Equal sequences that do not divide evenly: no third micro-batch, and no rank with an empty one."""
    plan = plan_micro_batches([97] * 21, 4096, 2)
    assert sorted(len(group) for part in plan for group in part) == [10, 11]


def test_lay_out_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="empty sequence"):
        lay_out([TrainSequence([], [])])
    with pytest.raises(ValueError, match="advantages has 1 entries for 2 tokens"):
        lay_out([TrainSequence([1, 2], [0.0, 1.0], [1.0])])


def test_schedules() -> None:
    def rate(schedule: str, step: int, progress: float) -> float:
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=9, schedule=schedule, final_fraction=0.1)  # type: ignore[arg-type]
        return learning_rate(config, step, progress)

    assert rate("constant", 0, 0.0) == pytest.approx(0.1)
    assert rate("constant", 9, 0.9) == 1.0
    assert rate("linear", 100, 0.5) == pytest.approx(0.55)
    assert rate("linear", 100, 2.0) == pytest.approx(0.1)
    assert rate("cosine", 100, 0.5) == pytest.approx(0.55)
    assert rate("cosine", 100, 1.0) == pytest.approx(0.1)


@given(st.lists(st.sampled_from([1.0, 0.0, -0.2]), min_size=1, max_size=9))
def test_leave_one_out_compares_with_the_others(rewards: list[float]) -> None:
    found = leave_one_out_advantages(rewards)
    for i, advantage in enumerate(found):
        others = rewards[:i] + rewards[i + 1 :]
        assert advantage == pytest.approx(rewards[i] - sum(others) / len(others) if others else 0.0, abs=1e-12)
    if len(set(rewards)) == 1:
        assert found == [0.0] * len(rewards), "trees without advantage must be exactly without"


def test_a_price_keeps_its_size_where_nobody_solved() -> None:
    """Z-scores blow a small price up to the size of a solution; leaving one out does not."""
    rewards = [-0.2, 0.0, 0.0, 0.0]
    assert max(map(abs, group_advantages(rewards))) > 1.7
    assert max(map(abs, leave_one_out_advantages(rewards))) == pytest.approx(0.2)


@pytest.mark.parametrize("advantages", [group_advantages, leave_one_out_advantages])
@pytest.mark.parametrize("rewards", [[], [math.nan, 1.0], [math.inf, 0.0]])
def test_rewards_that_are_no_numbers_are_refused(advantages: Any, rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        advantages(rewards)


PRICES = RewardConfig(
    solved=1.0, no_answer=-0.01, false_claim=-0.2, cut_off=-0.3, invalid_spawn=-0.4, failed_engine=9.0
)


@pytest.mark.parametrize("outcome", list(Outcome))
def test_every_ending_has_its_price(outcome: Outcome) -> None:
    """Whatever a tree's outcome, it is exactly one of six endings."""
    tree = ThreadTree("p", 0, (), (), (), "", outcome, verdict="some_reason")
    expected = {
        Outcome.ANSWERED: -0.2,
        Outcome.NO_ANSWER: -0.01,
        Outcome.INVALID_SPAWN: -0.4,
        Outcome.ENGINE_ERROR: 9.0,
        Outcome.BOUND_TIME: 9.0,
        Outcome.CANCELLED: 9.0,
    }.get(outcome, -0.3)
    assert price_of(tree, PRICES) == expected
    assert price_of(replace(tree, verdict=SOLVED), PRICES) == 1.0


def test_a_tree_without_a_verdict_has_no_ending() -> None:
    tree = ThreadTree("p", 0, (), (), (), "", Outcome.ANSWERED, reward=1.0)
    with pytest.raises(ValueError, match="no verdict yet"):
        priced([tree], PRICES)


def test_the_logits_scale_is_their_deviation_and_knows_no_temperature() -> None:
    logits = torch.tensor([[[0.0, 2.0, 4.0], [1.0, 1.0, 1.0], [9.0, 0.0, 0.0]]], dtype=torch.float64)
    found = token_logit_scale(logits)
    assert found.tolist() == [[0.0, 2.0, 0.0]], "one position later, as the tokens that were drawn from them"
    np.testing.assert_allclose(token_logit_scale(3 * logits), 3 * found)


def test_a_token_without_loss_gives_no_gradient_however_far_the_reference_is() -> None:
    logprobs = torch.tensor([[-95.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[-1.0, -1.5]])
    weights = torch.tensor([[0.0, 0.5]])
    ones = torch.ones(1, 2)
    result = grpo_loss(
        logprobs, logprobs.detach(), ones, weights, ones, clip=0.2, kl_coefficient=0.1, reference_logprobs=reference
    )
    result.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0, 0] == 0
    assert logprobs.grad.isfinite().all()


def test_a_token_far_from_either_policy_ends_no_run() -> None:
    """Faults 7: exp of 89 is no float32, and one such token made loss and gradient infinite."""
    logprobs = torch.tensor([[-0.1, -95.0, -0.2]], requires_grad=True)
    far, near = torch.tensor([[-0.1, -0.5, -95.0]]), torch.tensor([[-0.3, -0.5, -0.1]])
    for old, reference in ((far, near), (near, far)):
        result = grpo_loss(
            logprobs,
            old,
            torch.tensor([[1.0, -1.0, -1.0]]),
            torch.ones(1, 3) / 3,
            torch.zeros(1, 3),
            clip=0.2,
            kl_coefficient=0.1,
            reference_logprobs=reference,
        )
        [gradient] = torch.autograd.grad(result.loss, [logprobs])
        assert torch.isfinite(result.loss)
        assert torch.isfinite(gradient).all()
