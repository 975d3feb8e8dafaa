"""Every objective's expected gradient, by full enumeration through the real code, against the exact one.

A policy small enough to enumerate: a softmax table in float64, one row per context, over three tokens. Its threads:
a root call of at most two tokens (0 ends, 1 spawns, 2 goes on); one child that may write two tokens, or two children
that write one each; a resumed parent that writes one. 45 trees, 1,035 groups of two.

Two paths that share nothing but the list of trees: the estimator's, through `grpo_batch`, `group_advantages`,
`token_logprobs`, `importance_weights`, `grpo_loss` and autograd; and the formulas' of docs/objectives.md, in numpy,
where the gradient of a softmax's logprob is written out by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
import pytest
import torch

from apr_ray.core.batch import TrainBatch
from apr_ray.core.engine import FinishReason, VersionSpan
from apr_ray.core.ledger import SOLVED, Call, Group, Join, JoinOutcome, Outcome, Replaced, Spawn, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.rl.advantages import Z_SCORE_EPS, AdvantageKind
from apr_ray.rl.batches import Credit, LossMean, SftRow, grpo_batch, sft_batch
from apr_ray.rl.losses import grpo_loss, log_ratio, sft_loss, token_entropy, token_logprobs
from apr_ray.rl.mismatch import Correction, importance_weights, measure_mismatch, tree_sums

END, SPAWN, ON = range(3)
VOCAB = 3
CLIP = 0.2
Ids = tuple[int, ...]
Array = np.ndarray[Any, np.dtype[np.float64]]
ROOT, CHILD = (0, 0), (0, 1)
TOLERANCE = 1e-6
"""Batches hold weights, advantages and logprobs as float32: each is off by at most 6e-8 of itself."""


# --- the distribution -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Toy:
    """A tree as (prompt, written) per call, in the order root, children, resumed; its reward; and the token that the
    root sampled first, where the runtime forced what is written there in its place."""

    calls: tuple[tuple[Ids, Ids], ...]
    reward: float
    taken_back: int | None = None


def texts(limit: int) -> list[Ids]:
    """All that a call of at most `limit` tokens can write: END and SPAWN end it."""
    if limit == 1:
        return [(t,) for t in range(VOCAB)]
    return [(END,), (SPAWN,)] + [(ON, *rest) for rest in texts(limit - 1)]


def grow(root: Ids) -> list[Toy]:
    """Every tree with this root call. Solved: END at once; or a child ended with END, and the resumed parent too."""
    if root[-1] != SPAWN:
        return [Toy(((ROOT, root),), float(root == (END,)))]
    children = list(product(texts(1), repeat=2)) if len(root) == 1 else [(text,) for text in texts(2)]
    return [
        Toy(
            ((ROOT, root), *((CHILD, text) for text in texts_), ((0, 2, *(t[-1] for t in texts_)), last)),
            float(last == (END,) and any(text[-1] == END for text in texts_)),
        )
        for texts_ in children
        for last in texts(1)
    ]


TREES = tuple(tree for root in texts(2) for tree in grow(root))
BANDIT = tuple(Toy(((ROOT, (t,)),), float(t == END)) for t in range(VOCAB))
"""One call of one token: no lengths, no threads."""


@cache
def rows() -> dict[Ids, int]:
    """One row of the table per context in which a token is drawn; the last row serves positions inside prompts."""
    contexts = {(*p, *w[:i]) for tree in (*TREES, *BANDIT) for p, w in tree.calls for i in range(len(w))}
    return {context: index for index, context in enumerate(sorted(contexts))}


def table(seed: int, scale: float = 0.7) -> Array:
    return np.random.default_rng(seed).normal(size=(len(rows()) + 1, VOCAB)) * scale


POLICY, OLD, REFERENCE = table(0), table(0) + table(1), 2 * table(2)
PROXIMAL = POLICY + table(3, 0.4)
"""The learner's at the start of a batch that OLD drew, where POLICY is what later inner steps made of it."""


# --- the formulas, in numpy -------------------------------------------------------------------------------------------


def probabilities(logits: Array) -> Array:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    out: Array = e / e.sum(axis=1, keepdims=True)
    return out


def drawn(tree: Toy) -> list[list[tuple[int, int]]]:
    """(row, token) of everything a tree drew, per call."""
    steps = [
        [(rows()[(*prompt, *written[:i])], token) for i, token in enumerate(written)] for prompt, written in tree.calls
    ]
    if tree.taken_back is not None:
        steps[0][0] = steps[0][0][0], tree.taken_back
    return steps


def likelihood(tree: Toy, p: Array) -> float:
    return math.prod(p[row, token] for call in drawn(tree) for row, token in call)


def score(row: int, token: int, p: Array) -> Array:
    """Gradient of log p[row, token] with respect to the table: one-hot minus p, in that row."""
    out = np.zeros_like(p)
    out[row] = -p[row]
    out[row, token] += 1
    return out


def weighted(tree: Toy, p: Array, factor: Callable[[int, int], float] = lambda row, token: 1.0) -> Array:
    """S(tree): the mean over calls of the mean over tokens of `factor` times the score."""
    calls = drawn(tree)
    return sum(factor(r, t) * score(r, t, p) / (len(call) * len(calls)) for call in calls for r, t in call)  # type: ignore[return-value]


def plain(tree: Toy, p: Array) -> Array:
    """The score of the whole tree."""
    return sum(score(r, t, p) for call in drawn(tree) for r, t in call)  # type: ignore[return-value]


def mean_over(trees: Sequence[Toy], p: Array, value: Callable[[Toy], Any]) -> Any:
    return sum(likelihood(tree, p) * value(tree) for tree in trees)


def pair_advantage(a: Toy, b: Toy) -> float:
    """z-score of the first of two trees with rewards 0 or 1: half their difference over half of it (plus epsilon)."""
    return (a.reward - b.reward) / 2 / (0.5 + Z_SCORE_EPS)


# --- the estimator, through the real code -----------------------------------------------------------------------------


def ledger(tree: Toy, behaviour: Array) -> ThreadTree:
    """The tree as the runtime would have recorded it under a behaviour policy."""
    logp = np.log(behaviour)
    version = WeightVersion(0, 0)
    children = len(tree.calls) - 2
    paths = [((), 0)] if len(tree.calls) == 1 else [((), 0), *(((i,), 0) for i in range(children)), ((), 1)]
    calls = tuple(
        Call(
            path=path,
            segment=segment,
            prompt_ids=prompt,
            sampled_ids=written,
            logprobs=tuple(float(logp[row, token]) for row, token in steps),
            forced=(),
            replaced=(),
            finish=FinishReason.STOP if written[-1] != ON else FinishReason.LENGTH,
            versions=(VersionSpan(version, 0, len(written)),),
            kv_version=version,
            seed=0,
            cached_tokens=0,
            start_s=0.0,
            first_token_s=0.0,
            end_s=0.0,
            engine_id="table",
        )
        for (path, segment), (prompt, written), steps in zip(paths, tree.calls, drawn(tree), strict=True)
    )
    if tree.taken_back is not None:
        first = calls[0]
        taken = Replaced(0, tree.taken_back, first.logprobs[0])
        calls = (replace(first, forced=(0,), replaced=(taken,), logprobs=(0.0, *first.logprobs[1:])), *calls[1:])
    spawned = tuple((i,) for i in range(children))
    spawns = (Spawn((), 0, spawned, ("",) * children),) if children > 0 else ()
    verdict = SOLVED if tree.reward else "wrong_value"
    joins = ()
    if spawns:
        brought = [written[-1] for _, written in tree.calls[1:-1]]
        outcomes = tuple(JoinOutcome.SOLVED if token == END else JoinOutcome.NO_SOLUTION for token in brought)
        reasons, messages = ("",) * children, tuple(map(str, brought))
        joins = (Join((), 0, outcomes, reasons, tuple(brought), 1, messages),)
    return ThreadTree("p", 0, calls, spawns, joins, "", Outcome.ANSWERED, reward=tree.reward, verdict=verdict)


def padded(batch: TrainBatch, column: Any) -> torch.Tensor:
    width = int(batch.lengths.max())
    out = np.zeros((len(batch), width), dtype=column.dtype)
    for i, (a, b) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
        out[i, : b - a] = column[a:b]
    return torch.from_numpy(out)


def table_logits(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[b, t, v]: the row of each position's prefix; positions whose next token nobody drew read the spare row."""
    index = [[rows().get(tuple(line[: i + 1]), len(rows())) for i in range(len(line))] for line in tokens.tolist()]
    return logits[torch.tensor(index)]


def estimate(
    groups: Sequence[Sequence[Toy]],
    policy: Array,
    behaviour: Array,
    kl: float = 0.0,
    clip: float = CLIP,
    change: Callable[[ThreadTree], ThreadTree] = lambda tree: tree,
    loss_mean: LossMean = "call",
    proximal: Array | None = None,
    correction: Correction | None = None,
    advantage_kind: AdvantageKind = "group",
    credit: Credit = "tree",
    temperature: float = 1.0,
    skip: bool = False,
) -> tuple[Array, Any]:
    """Minus the gradient of the loss of a batch of groups, by the real code, and the loss. With a proximal policy the
    ratio is against it; with `skip` trees without advantage are left out of the batch."""
    drawn_groups = [
        Group("p", tuple(change(ledger(tree, probabilities(behaviour))) for tree in group)) for group in groups
    ]
    made = grpo_batch(
        drawn_groups, skip_zero_advantage=skip, loss_mean=loss_mean, advantage_kind=advantage_kind, credit=credit
    )
    batch = made.batch
    if not len(batch):
        return np.zeros_like(policy), None
    logits = torch.tensor(policy, requires_grad=True)
    tokens, targets = padded(batch, batch.tokens), padded(batch, batch.targets)
    seen = table_logits(logits, tokens)
    reference = token_logprobs(table_logits(torch.tensor(REFERENCE), tokens), targets)
    weights = padded(batch, batch.loss_weights)
    old, importance = padded(batch, batch.behaviour_logprobs), None
    if proximal is not None:
        start = token_logprobs(table_logits(torch.tensor(proximal), tokens), targets)
        delta = log_ratio(start, old, weights != 0)
        old = start
        flat = np.concatenate([row[:n] for row, n in zip(delta.numpy(), batch.lengths, strict=True)])
        if correction is not None and correction.applies(measure_mismatch(flat, batch).whole.delta_mean):
            sums = torch.from_numpy(tree_sums(flat, batch)[batch.trees])
            importance = importance_weights(delta, correction, sums).values
    result = grpo_loss(
        token_logprobs(seen, targets, temperature),
        old,
        padded(batch, batch.advantages),
        weights,
        token_entropy(seen.detach()),
        clip=clip,
        kl_coefficient=kl,
        reference_logprobs=reference if kl else None,
        importance_weights=importance,
    )
    (gradient,) = torch.autograd.grad(result.loss, logits)
    return -gradient.numpy(), result


def expected(trees: Sequence[Toy], size: int, policy: Array, behaviour: Array, **options: Any) -> Array:
    """The estimator's expectation over every group that the behaviour policy can draw."""
    total = np.zeros_like(policy)
    mass = 0.0
    b = probabilities(behaviour)
    for group in combinations_with_replacement(trees, size):
        repeats = math.factorial(size) / math.prod(math.factorial(group.count(t)) for t in set(group))
        weight = repeats * math.prod(likelihood(tree, b) for tree in group)
        mass += weight
        total += weight * estimate([group], policy, behaviour, **options)[0]
    assert mass == pytest.approx(1, abs=1e-12), "not every group was enumerated"
    return total


@cache
def on_policy() -> Array:
    """Without a KL term, over the trees."""
    return expected(TREES, 2, POLICY, POLICY)


def sine(found: Array, true: Array) -> float:
    """Of the angle between two directions."""
    cosine = float((found * true).sum() / np.linalg.norm(found) / np.linalg.norm(true))
    return math.sqrt(1 - cosine**2)


def close(found: Array, exact: Array) -> None:
    assert np.abs(exact).max() > 1e-3, "nothing to compare"
    np.testing.assert_allclose(found, exact, rtol=0, atol=TOLERANCE)


# --- the tests --------------------------------------------------------------------------------------------------------


def test_the_trees_are_all_there_is() -> None:
    assert len(TREES) == 45
    assert mean_over(TREES, probabilities(POLICY), lambda tree: 1.0) == pytest.approx(1, abs=1e-12)
    assert {len(tree.calls) for tree in TREES} == {1, 3, 4}


@pytest.mark.parametrize("size", [2, 3, 5])
def test_z_scores_give_the_gradient_of_the_success_rate_times_a_known_factor(size: int) -> None:
    """Dividing by the group's deviation scales the gradient by c_G(p); for groups of two c is 1 (but for epsilon)."""
    p = probabilities(POLICY)
    rate = mean_over(BANDIT, p, lambda tree: tree.reward)
    gradient = mean_over(BANDIT, p, lambda tree: tree.reward * plain(tree, p))
    factor = 0.0
    for k in range(1, size):
        deviation = math.sqrt(k * (size - k)) / size
        factor += math.comb(size, k) * rate**k * (1 - rate) ** (size - k) * deviation**2 / (deviation + Z_SCORE_EPS)
    factor /= rate * (1 - rate)
    assert factor == pytest.approx(1, abs=1e-5) if size == 2 else factor > 1.2
    close(expected(BANDIT, size, POLICY, POLICY), factor * gradient)


def test_on_policy_over_trees_it_is_the_covariance_of_reward_and_weighted_score() -> None:
    p = probabilities(POLICY)
    rate = mean_over(TREES, p, lambda tree: tree.reward)
    exact = mean_over(TREES, p, lambda tree: (tree.reward - rate) * weighted(tree, p)) / (1 + 2 * Z_SCORE_EPS)
    close(on_policy(), exact)


@pytest.mark.parametrize("loss_mean", ["call", "tree", "token"])
def test_trees_without_advantage_may_be_left_out(loss_mean: LossMean) -> None:
    """As they are where there is no KL term: their share of every mean stays, group by group."""
    groups = list(combinations_with_replacement(TREES, 2))[::11]
    batch = [group for group in groups if len({tree.reward for tree in group}) == 2][:3] + groups[:2]
    assert any(len({tree.reward for tree in group}) == 1 for group in batch)
    whole, without = (estimate(batch, POLICY, POLICY, loss_mean=loss_mean, skip=skip)[0] for skip in (False, True))
    close(without, whole)
    for group in groups:
        whole, without = (
            estimate([group], POLICY, POLICY, loss_mean=loss_mean, skip=skip)[0] for skip in (False, True)
        )
        np.testing.assert_allclose(without, whole, rtol=0, atol=TOLERANCE)


def test_at_another_temperature_it_is_the_same_of_the_policy_that_is_sampled() -> None:
    temperature = 1.7
    p = probabilities(POLICY / temperature)
    rate = mean_over(TREES, p, lambda tree: tree.reward)
    exact = mean_over(TREES, p, lambda tree: (tree.reward - rate) * weighted(tree, p)) / temperature
    found = expected(TREES, 2, POLICY, POLICY / temperature, temperature=temperature)
    close(found, exact / (1 + 2 * Z_SCORE_EPS))


def test_length_normalisation_is_a_bias_and_its_size_is_that_of_the_formula() -> None:
    """The means over tokens and calls change the direction, not only the length, of the true gradient; where every tree
    is one token there is no bias."""
    p = probabilities(POLICY)
    found = on_policy()
    true = mean_over(TREES, p, lambda tree: tree.reward * plain(tree, p))
    rate = mean_over(TREES, p, lambda tree: tree.reward)

    def missing(tree: Toy) -> Array:
        return (tree.reward - rate) * (weighted(tree, p) - plain(tree, p))

    close(found - true, mean_over(TREES, p, missing))
    assert 0.1 < sine(found, true) < 0.5
    close(expected(BANDIT, 2, POLICY, POLICY), mean_over(BANDIT, p, lambda tree: tree.reward * plain(tree, p)))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_leaving_one_out_gives_the_gradient_of_the_mean_reward(size: int) -> None:
    """For groups of any size, without a factor: the mean of the others is a baseline that does not know the tree."""
    p = probabilities(POLICY)
    gradient = mean_over(BANDIT, p, lambda tree: tree.reward * plain(tree, p))
    close(expected(BANDIT, size, POLICY, POLICY, advantage_kind="leave_one_out"), gradient)


def of_summed_scores(credit: Credit, policy: Array, size: int) -> Array:
    """The expectation of a group's estimate with its tokens summed, not averaged."""
    b = probabilities(policy)
    mean = np.zeros_like(POLICY)
    possible = [tree for tree in TREES if likelihood(tree, b) > 1e-12]
    for group in combinations_with_replacement(possible, size):
        repeats = math.factorial(size) / math.prod(math.factorial(group.count(t)) for t in set(group))
        weight = repeats * math.prod(likelihood(tree, b) for tree in group)
        found, _ = estimate(
            [group], policy, policy, loss_mean="token", advantage_kind="leave_one_out", credit=credit, skip=True
        )
        mean += weight * found * sum(map(tokens_of, group)) / size
    return mean


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_causal_credit_has_the_same_expectation(size: int) -> None:
    """The gradient of the mean reward, whichever way a tree's advantage is shared out: in a group of two already, of a
    policy that always spawns two children at once or none (a child alone may write more, so is no equal of theirs)."""
    policy = POLICY.copy()
    policy[rows()[(*ROOT, ON)], SPAWN] = -60
    p = probabilities(policy)
    gradient = mean_over(TREES, p, lambda tree: tree.reward * plain(tree, p))
    close(of_summed_scores("tree", policy, size), gradient)
    close(of_summed_scores("causal", policy, size), gradient)


def test_rejection_sampling_is_the_mean_over_solved_trees_alone() -> None:
    """Of a group of two: the mean over those that are solved, where one is. Nothing is compared."""
    found = expected(TREES, 2, POLICY, POLICY, advantage_kind="success")
    p = probabilities(POLICY)
    rate = mean_over(TREES, p, lambda tree: tree.reward)
    given_solved = mean_over(TREES, p, lambda tree: tree.reward * weighted(tree, p)) / rate
    close(found, (1 - (1 - rate) ** 2) * given_solved)


def test_rejection_sampling_weighs_every_token_of_solved_trees_alike() -> None:
    """The control: supervised training on them. A tree's first call weighs the same whether it spawned or not, and
    trees that are not solved change nothing."""
    p = probabilities(POLICY)
    solved = [tree for tree in TREES if tree.reward][:3]
    failed = [tree for tree in TREES if not tree.reward][:4]
    assert len({len(tree.calls) for tree in solved}) > 1
    expected_gradient = sum(plain(tree, p) for tree in solved) / sum(map(tokens_of, solved))
    for batch in ([solved], [solved + failed], [solved[:1] + failed, solved[1:]]):
        found, _ = estimate(batch, POLICY, POLICY, advantage_kind="success", loss_mean="token", skip=True)
        close(found, expected_gradient)


def tokens_of(tree: Toy) -> int:
    return sum(len(written) for _, written in tree.calls)


def test_the_mean_over_a_trees_tokens_is_a_covariance_too() -> None:
    """Threads and segments no longer matter to a token's weight, the tree's whole length still does."""
    p = probabilities(POLICY)
    rate = mean_over(TREES, p, lambda tree: tree.reward)
    exact = mean_over(TREES, p, lambda tree: (tree.reward - rate) * plain(tree, p) / tokens_of(tree))
    found = expected(TREES, 2, POLICY, POLICY, loss_mean="tree")
    close(found, exact / (1 + 2 * Z_SCORE_EPS))
    true = mean_over(TREES, p, lambda tree: tree.reward * plain(tree, p))
    assert 0.1 < sine(found, true) < 0.5


def test_the_mean_over_a_batchs_tokens_couples_its_trees_through_their_lengths() -> None:
    p = probabilities(POLICY)

    def pair(a: Toy, b: Toy) -> Array:
        return 2 * pair_advantage(a, b) * plain(a, p) / (tokens_of(a) + tokens_of(b))

    exact = mean_over(TREES, p, lambda a: mean_over(TREES, p, lambda b: pair(a, b)))
    close(expected(TREES, 2, POLICY, POLICY, loss_mean="token"), exact)


def test_the_mean_over_a_batchs_tokens_loses_its_bias_as_the_batch_grows() -> None:
    """The other means keep theirs: it is in every tree."""
    p = probabilities(POLICY)
    trees = tuple(Toy(((ROOT, text),), float(text[-1] == END)) for text in texts(2))
    pairs = list(product(trees, repeat=2))
    true = mean_over(trees, p, lambda tree: tree.reward * plain(tree, p))

    def by_formula(groups: int) -> Array:
        total = np.zeros_like(p)
        for batch in product(pairs, repeat=groups):
            weight = math.prod(likelihood(tree, p) for pair in batch for tree in pair)
            length = sum(tokens_of(tree) for pair in batch for tree in pair)
            total += weight / length * sum(2 * pair_advantage(a, b) * plain(a, p) for a, b in batch)
        return total

    def by_estimator(groups: int) -> Array:
        total = np.zeros_like(p)
        for batch in product(combinations_with_replacement(trees, 2), repeat=groups):
            weight = math.prod((1 + (a != b)) * likelihood(a, p) * likelihood(b, p) for a, b in batch)
            total += weight * estimate(batch, POLICY, POLICY, loss_mean="token")[0]
        return total

    one, two = by_estimator(1), by_estimator(2)
    close(two, by_formula(2))
    assert sine(two, true) < 0.7 * sine(one, true)
    calls = expected(trees, 2, POLICY, POLICY)
    assert sine(one, true) < sine(calls, true)


def test_length_normalisation_follows_no_objective_at_all() -> None:
    """A gradient's Jacobian is symmetric; the true one's is, the normalised one's is not."""

    def jacobian(direction: Callable[[Toy, Array], Array]) -> Array:
        def field(logits: Array) -> Array:
            p = probabilities(logits)
            rate = mean_over(TREES, p, lambda tree: tree.reward)
            out: Array = mean_over(TREES, p, lambda tree: (tree.reward - rate) * direction(tree, p))
            return out.ravel()

        step = 1e-5
        columns = []
        for i in range(POLICY.size):
            bump = np.zeros(POLICY.size)
            bump[i] = step
            bump = bump.reshape(POLICY.shape)
            columns.append((field(POLICY + bump) - field(POLICY - bump)) / (2 * step))
        return np.stack(columns, axis=1)

    true, normalised = jacobian(plain), jacobian(weighted)
    assert np.abs(true - true.T).max() < 1e-8
    assert np.abs(normalised - normalised.T).max() > 1e-3


def test_k3_on_policy_is_the_value_of_one_divergence_and_the_gradient_of_the_other() -> None:
    """Its mean is KL(policy || reference); its mean gradient is that of KL(reference || policy)."""
    p, q = probabilities(POLICY), probabilities(REFERENCE)
    beta = 0.3
    row = rows()[ROOT]
    without, with_kl = (expected(BANDIT, 2, POLICY, POLICY, kl=b) for b in (0.0, beta))
    forward = np.zeros_like(p)
    forward[row] = p[row] - q[row]  # gradient of KL(reference || policy) over a softmax's logits
    close(with_kl - without, -beta * forward)
    reverse = np.zeros_like(p)
    logs = np.log(p[row] / q[row])
    reverse[row] = p[row] * (logs - (p[row] * logs).sum())
    assert np.abs(reverse - forward).max() > 0.02
    value = sum(
        likelihood(a, p) * likelihood(b, p) * estimate([(a, b)], POLICY, POLICY, kl=beta)[1].kl
        for a, b in product(BANDIT, repeat=2)
    )
    assert value == pytest.approx(float((p[row] * logs).sum()), abs=TOLERANCE)


def test_the_kl_term_over_trees_is_weighted_as_the_reward_term() -> None:
    p, q = probabilities(POLICY), probabilities(REFERENCE)
    beta = 0.3

    def pull(row: int, token: int) -> float:
        return float(q[row, token] / p[row, token] - 1)

    close(
        expected(TREES, 2, POLICY, POLICY, kl=beta) - on_policy(),
        mean_over(TREES, p, lambda tree: beta * weighted(tree, p, pull)),
    )


def off_policy(clip: float) -> Array:
    """The exact gradient of the clipped surrogate, where OLD drew the trees and POLICY is trained."""
    p, old = probabilities(POLICY), probabilities(OLD)
    total = np.zeros_like(p)
    for a, b in product(TREES, repeat=2):
        advantage = pair_advantage(a, b)

        def pull(row: int, token: int, advantage: float = advantage) -> float:
            ratio = p[row, token] / old[row, token]
            clipped = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
            return 0.0 if clipped else float(advantage * ratio)

        if advantage:
            total += likelihood(a, old) * likelihood(b, old) * weighted(a, p, pull)
    return total


def test_off_policy_it_is_the_gradient_of_the_clipped_surrogate() -> None:
    """The second inner step: trees of the old policy, ratios away from 1, some of them clipped."""
    exact, unclipped = off_policy(CLIP), off_policy(1e9)
    close(expected(TREES, 2, POLICY, OLD), exact)
    close(expected(TREES, 2, POLICY, OLD, clip=1e9), unclipped)
    assert np.abs(exact - unclipped).max() > 0.01, "nothing was clipped"


def test_off_policy_the_kl_gradient_is_left_as_the_old_policy_weighs_it() -> None:
    """The k3 term has no ratio: away from the old policy its mean gradient is that of neither divergence."""
    p, q, old = probabilities(POLICY), probabilities(REFERENCE), probabilities(OLD)
    beta = 0.3
    row = rows()[ROOT]
    without, with_kl = (expected(BANDIT, 2, POLICY, OLD, kl=b) for b in (0.0, beta))
    exact = sum(
        old[row, token] * beta * (q[row, token] / p[row, token] - 1) * score(row, token, p) for token in range(VOCAB)
    )
    close(with_kl - without, exact)  # type: ignore[arg-type]
    assert np.abs(exact[row] - beta * (q[row] - p[row])).max() > 0.003  # type: ignore[index]


def test_unclipped_off_policy_steps_of_one_token_still_follow_the_success_rate() -> None:
    """With one token a tree the ratio of the token is that of the tree: importance sampling is exact."""
    p = probabilities(POLICY)
    gradient = mean_over(BANDIT, p, lambda tree: tree.reward * plain(tree, p))
    close(expected(BANDIT, 2, POLICY, OLD, clip=1e9), gradient)


# --- ratio against the learner's own start, importance weights for the engine ----------------------------------------


def weights_of(tree: Toy, how: Correction | None) -> list[list[float]]:
    """Importance weights PROXIMAL / OLD of everything a tree drew, per call."""
    start, old = probabilities(PROXIMAL), probabilities(OLD)
    ratios = [[float(start[s] / old[s]) for s in call] for call in drawn(tree)]
    if how is None:
        return [[1.0] * len(call) for call in ratios]
    if how.level == "call":
        ratios = [[math.prod(call)] * len(call) for call in ratios]
    if how.level == "tree":
        ratios = [[math.prod(map(math.prod, ratios))] * len(call) for call in ratios]

    def cut(weight: float) -> float:
        if how.kind == "truncate":
            return min(weight, how.cap)
        return weight if 1 / how.cap <= weight <= how.cap else 0.0

    return [[cut(weight) for weight in call] for call in ratios]


def surrogate(tree: Toy, how: Correction | None, policy: Array, clip: float) -> Array:
    """Gradient of a tree's clipped surrogate beside a tree of the other reward: the ratio is against PROXIMAL, each
    token's part is multiplied by its importance weight."""
    p, start = probabilities(policy), probabilities(PROXIMAL)
    advantage = (1 if tree.reward else -1) / 2 / (0.5 + Z_SCORE_EPS)
    total = np.zeros_like(p)
    for call, weights in zip(drawn(tree), weights_of(tree, how), strict=True):
        for (row, token), weight in zip(call, weights, strict=True):
            ratio = p[row, token] / start[row, token]
            if not (ratio > 1 + clip if advantage > 0 else ratio < 1 - clip):
                total += weight * ratio * advantage * score(row, token, p) / (len(call) * len(tree.calls))
    return total


def decoupled(how: Correction | None, policy: Array, clip: float = CLIP) -> Array:
    """The exact gradient, where OLD drew the trees."""
    old = probabilities(OLD)
    rate = mean_over(TREES, old, lambda tree: tree.reward)
    exact: Array = mean_over(
        TREES, old, lambda tree: (1 - rate if tree.reward else rate) * surrogate(tree, how, policy, clip)
    )
    return exact


LEVELS = ("token", "call", "tree")
CORRECTIONS = [Correction(kind, level, 1.5) for kind in ("truncate", "mask") for level in LEVELS]  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [None, *CORRECTIONS], ids=str)
def test_with_importance_weights_it_is_the_gradient_of_the_weighed_surrogate(how: Correction | None) -> None:
    """A later inner step: some ratios are clipped, some weights are cut."""
    exact = decoupled(how, POLICY)
    close(expected(TREES, 2, POLICY, OLD, proximal=PROXIMAL, correction=how), exact)
    assert np.abs(exact - decoupled(how, POLICY, clip=1e9)).max() > 1e-3, "nothing was clipped"
    if how is not None:
        uncut = Correction(how.kind, how.level, 1e9)
        assert np.abs(exact - decoupled(uncut, POLICY)).max() > 1e-3, "no weight was cut"


def test_a_threshold_chooses_batch_by_batch() -> None:
    """The mean is over batches that are corrected and batches that are not, each as often as it is drawn."""
    how = Correction("truncate", "tree", 1.5, from_delta=0.4)
    start, old = probabilities(PROXIMAL), probabilities(OLD)

    def deltas(tree: Toy) -> list[float]:
        return [abs(math.log(start[s] / old[s])) for call in drawn(tree) for s in call]

    parts = [
        (tree, likelihood(tree, old), deltas(tree), *(surrogate(tree, w, POLICY, CLIP) for w in (how, None)))
        for tree in TREES
    ]
    exact, corrected = np.zeros_like(start), 0.0
    for (a, chance, da, weighed, plain_), (b, other, db, *_) in product(parts, repeat=2):
        far = sum(da + db) / len(da + db) > how.from_delta
        corrected += chance * other * far
        if a.reward != b.reward:
            exact += chance * other * (weighed if far else plain_)
    assert 0.2 < corrected < 0.8
    close(expected(TREES, 2, POLICY, OLD, proximal=PROXIMAL, correction=how), exact)


def test_uncut_weights_of_tokens_give_the_unclipped_ratio_against_the_engine() -> None:
    """Correcting token by token is what the behaviour ratio does; only the clip is about another ratio."""
    uncut = Correction("truncate", "token", 1e9)
    close(expected(TREES, 2, POLICY, OLD, proximal=PROXIMAL, correction=uncut, clip=1e9), off_policy(1e9))


def test_uncut_weights_of_trees_give_the_gradient_as_if_the_learner_had_drawn_the_tree() -> None:
    """At the first inner step, for each tree in turn: the others of its group, its baseline, stay as the engine drew
    them. Neither weights of tokens nor of calls do that: contexts stay as the engine visited them."""
    p, old = probabilities(PROXIMAL), probabilities(OLD)
    exact = mean_over(
        TREES, p, lambda a: mean_over(TREES, old, lambda b: pair_advantage(a, b) * weighted(a, p))
    )  # fmt: skip
    uncut = Correction("mask", "tree", 1e9)
    close(expected(TREES, 2, PROXIMAL, OLD, proximal=PROXIMAL, correction=uncut), exact)
    off = {level: np.abs(decoupled(Correction("mask", level, 1e9), PROXIMAL) - exact).max() for level in LEVELS}
    off["none"] = np.abs(decoupled(None, PROXIMAL) - exact).max()
    assert off["tree"] < 1e-12
    assert min(off["token"], off["call"]) > 1e-3
    assert off["none"] > 0.01


@pytest.mark.parametrize("level", LEVELS)
def test_uncut_weights_follow_the_success_rate_where_every_tree_is_one_token(level: str) -> None:
    p = probabilities(POLICY)
    gradient = mean_over(BANDIT, p, lambda tree: tree.reward * plain(tree, p))
    uncut = Correction("truncate", level, 1e9)  # type: ignore[arg-type]
    close(expected(BANDIT, 2, POLICY, OLD, proximal=POLICY, correction=uncut), gradient)


@pytest.mark.parametrize(("size", "loss_mean"), [(2, "call"), (2, "tree"), (3, "call")])
def test_a_replaced_token_is_trained_as_it_was_sampled(size: int, loss_mean: LossMean) -> None:
    """The runtime turns a SPAWN at the start into ON and the call goes on. That is a fixed map of the environment, so
    the exact gradient has the score of SPAWN at the root and then of what follows ON."""
    p = probabilities(POLICY)
    trees = (
        Toy(((ROOT, (END,)),), 0.0),
        *(Toy(((ROOT, (ON, t)),), float(t == END)) for t in range(VOCAB)),
        *(Toy(((ROOT, (ON, t)),), float(t == SPAWN), taken_back=SPAWN) for t in range(VOCAB)),
    )
    assert mean_over(trees, p, lambda tree: 1.0) == pytest.approx(1, abs=1e-12)
    found = expected(trees, size, POLICY, POLICY, loss_mean=loss_mean)

    exact = np.zeros_like(p)
    for group in product(trees, repeat=size):
        rewards = np.array([tree.reward for tree in group])
        z = (rewards - rewards.mean()) / (rewards.std() + Z_SCORE_EPS)
        chance = math.prod(likelihood(tree, p) for tree in group)
        exact += chance * sum(a * weighted(tree, p) for a, tree in zip(z, group, strict=True)) / size
    close(found, exact)
    assert np.abs(found[rows()[ROOT], SPAWN]) > 1e-3, "the token that was taken back has a gradient"


def test_an_aborted_call_is_missing_from_the_gradient_and_from_its_trees_mean() -> None:
    """As siblings of a child that solved are with `bounds.cancel_on_success`: here the first child, in every tree."""
    p = probabilities(POLICY)

    def abort(tree: ThreadTree) -> ThreadTree:
        return replace(
            tree, calls=tuple(replace(c, finish=FinishReason.ABORTED) if c.path == (0,) else c for c in tree.calls)
        )

    def kept(tree: Toy) -> Array:
        calls = [call for i, call in enumerate(drawn(tree)) if i != 1 or len(tree.calls) == 1]
        return sum(score(r, t, p) / (len(call) * len(calls)) for call in calls for r, t in call)  # type: ignore[return-value]

    rate = mean_over(TREES, p, lambda tree: tree.reward)
    exact = mean_over(TREES, p, lambda tree: (tree.reward - rate) * kept(tree)) / (1 + 2 * Z_SCORE_EPS)
    close(expected(TREES, 2, POLICY, POLICY, change=abort), exact)


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_supervised_training_follows_the_batchs_mean_over_tokens(mask_prompt: bool) -> None:
    """Exact for the mean of each batch; against the mean of the whole population a batch of unequal lengths is biased
    by what the formula says."""
    p = probabilities(POLICY)
    demonstrations = [(ROOT, text) for text in texts(2)]
    chance = np.array([0.4, 0.1, 0.2, 0.25, 0.05])
    found = np.zeros_like(p)
    exact = np.zeros_like(p)

    def steps(prompt: Ids, text: Ids) -> list[tuple[int, int]]:
        whole = (*prompt, *text)
        first = len(prompt) if mask_prompt else 1
        return [(rows().get(whole[:i], len(rows())), whole[i]) for i in range(first, len(whole))]

    for (i, a), (j, b) in product(enumerate(demonstrations), repeat=2):
        texts_ = [(np.array([*p_, *t]), len(p_) if mask_prompt else 0) for p_, t in (a, b)]
        batch = sft_batch([SftRow(ids, ids, skipped) for ids, skipped in texts_])
        logits = torch.tensor(POLICY, requires_grad=True)
        tokens = padded(batch, batch.tokens)
        loss = sft_loss(token_logprobs(table_logits(logits, tokens), tokens), padded(batch, batch.loss_weights))
        (gradient,) = torch.autograd.grad(loss, logits)
        found -= chance[i] * chance[j] * gradient.numpy()
        both = [*steps(*a), *steps(*b)]
        exact += chance[i] * chance[j] * sum(score(r, t, p) for r, t in both) / len(both)
    close(found, exact)
    lengths = [len(steps(*d)) for d in demonstrations]
    summed = sum(c * sum(score(r, t, p) for r, t in steps(*d)) for c, d in zip(chance, demonstrations, strict=True))
    population = summed / float(chance @ lengths)
    assert 1e-3 < np.abs(exact - population).max() < 0.1
