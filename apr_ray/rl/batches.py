"""Trees and demonstrations become batches; batches become micro-batches for ranks.

Invariants (tested by properties):
- the weights of a GRPO batch give each tree the same mass 1/trees, each trained call of a tree an equal share of it,
  and each trained token of a call an equal share of that (paper section 3.3), unless another `loss_mean` is asked for;
- a batch's dispositions add up to the tokens sampled in its trees;
- the micro-batches of a plan hold every sequence of the batch exactly once, and every rank gets as many of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from apr_ray.core.batch import TrainBatch, TrainSequence, lay_out
from apr_ray.core.ledger import INTERRUPTED, Call, Disposition, Group, ThreadTree
from apr_ray.rl.advantages import ADVANTAGES, AdvantageKind
from apr_ray.rl.credit import causal_credit, tree_credit

Credit = Literal["tree", "causal"]
"""How the calls of a tree share its advantage; see `config.GrpoConfig.credit`."""
LossMean = Literal["call", "tree", "token"]
"""The unit that a GRPO loss is a mean of; see `config.GrpoConfig.loss_mean`."""


@dataclass(frozen=True, slots=True)
class GrpoBatch:
    """A batch with what became of every sampled token.

    Attributes:
        zero_variance_groups: of the `groups` that are used, those whose trees all have the same reward.
    """

    batch: TrainBatch
    dispositions: Counter[Disposition]
    zero_variance_groups: int
    groups: int


def grpo_batch(
    groups: Sequence[Group],
    *,
    skip_zero_advantage: bool,
    stale: Sequence[Group] = (),
    advantage_kind: AdvantageKind = "group",
    credit: Credit = "tree",
    loss_mean: LossMean = "call",
) -> GrpoBatch:
    """Trees with rewards as one batch.

    A tree whose engine failed, or was too slow for the time limit, says nothing of the policy: it is left out, of its
    group's statistics too.

    Args:
        groups: every tree must have its reward, or with `success` its verdict.
        skip_zero_advantage: leave out calls whose advantage is 0. Exact where no KL term is in the loss: their gradient
            is 0 then. Their tokens are counted, and they stay in the denominators.
        stale: groups that are not used because they are too old; their tokens are counted.
        advantage_kind: see `config.GrpoConfig.advantage`. With `success` all other trees are left out, of the
            denominators too: each trained token weighs the same, whoever else was sampled.
        credit: how a tree's calls share its advantage; see `rl.credit`.
    """
    dispositions: Counter[Disposition] = Counter()
    for group in stale:
        dispositions[Disposition.STALE] += sum(tree.total_tokens for tree in group.trees)
    rated: list[tuple[ThreadTree, list[float]]] = []  # with one advantage per call
    zero_variance = used = 0
    for group in groups:
        trees = _trusted(group, dispositions)
        if not trees:
            continue
        used += 1
        if advantage_kind == "success":
            zero_variance += len({tree.solved for tree in trees}) == 1
            rated += [(tree, [1.0] * len(tree.calls)) for tree in trees if tree.solved]
            for call in (call for tree in trees if not tree.solved for call in tree.calls):
                _count(call, dispositions, skipped=True)
            continue
        rewards = [float(tree.reward) for tree in trees if tree.reward is not None]
        if len(rewards) < len(trees):
            raise ValueError(f"group {group.problem_key} has a tree without a reward")
        zero_variance += len(set(rewards)) == 1
        causal = credit == "causal"
        shares = causal_credit(trees) if causal else tree_credit(ADVANTAGES[advantage_kind](rewards), trees)
        rated += zip(trees, shares, strict=True)

    sequences = _sequences(rated, loss_mean, skip_zero_advantage, dispositions)
    return GrpoBatch(lay_out(sequences), dispositions, zero_variance, used)


def _trusted(group: Group, dispositions: Counter[Disposition]) -> list[ThreadTree]:
    """The trees that say something of the policy; the tokens of the others are counted."""
    trees = []
    for tree in group.trees:
        if tree.outcome in INTERRUPTED:
            counts = tree.dispositions()
            dispositions[Disposition.ERROR] += counts.pop(Disposition.TRAINED, 0)
            dispositions.update(counts)
        else:
            trees.append(tree)
    return trees


def _sequences(
    rated: Sequence[tuple[ThreadTree, list[float]]],
    loss_mean: LossMean,
    skip_zero_advantage: bool,
    dispositions: Counter[Disposition],
) -> list[TrainSequence]:
    """The calls to train on, from trees with an advantage per call; all of their tokens are counted."""
    positions_of = [[list(call.trained_positions()) for call in tree.calls] for tree, _ in rated]
    divisors_of = denominators([[len(places) for places in of_tree] for of_tree in positions_of], loss_mean)
    sequences: list[TrainSequence] = []
    for number, (tree, advantages) in enumerate(rated):
        calls = zip(tree.calls, advantages, positions_of[number], divisors_of[number], strict=True)
        for call, advantage, positions, divisor in calls:
            skipped = skip_zero_advantage and advantage == 0.0
            _count(call, dispositions, skipped)
            if positions and not skipped:
                sequences.append(_call_sequence(call, positions, 1.0 / divisor, advantage, number))
    return sequences


def _count(call: Call, dispositions: Counter[Disposition], skipped: bool) -> None:
    counts = call.dispositions()
    if skipped:
        dispositions[Disposition.ZERO_ADVANTAGE] += counts.pop(Disposition.TRAINED, 0)
    dispositions.update(counts)


def denominators(tokens: Sequence[Sequence[int]], loss_mean: LossMean) -> list[list[int]]:
    """The divisor of each token's loss, by tree and call, where call c of tree t has `tokens[t][c]` of them. Calls
    without any count nowhere."""
    if loss_mean == "call":
        counts = [sum(map(bool, calls)) for calls in tokens]
        return [[n * count * len(tokens) for n in calls] for calls, count in zip(tokens, counts, strict=True)]
    if loss_mean == "tree":
        return [[sum(calls) * len(tokens)] * len(calls) for calls in tokens]
    total = sum(map(sum, tokens))
    return [[total] * len(calls) for calls in tokens]


def _call_sequence(call: Call, positions: Sequence[int], weight: float, advantage: float, tree: int) -> TrainSequence:
    """One call: its prompt has weight 0, and a replaced token is trained as it was sampled, with its own logprob."""
    start = len(call.prompt_ids)
    size = start + len(call.sampled_ids)
    weights = np.zeros(size, dtype=np.float32)
    weights[start + np.asarray(positions)] = weight
    chosen_ids, chosen_logprobs = call.as_sampled()
    logprobs = np.zeros(size, dtype=np.float32)
    logprobs[start:] = chosen_logprobs
    versions = np.zeros(size, dtype=np.int32)
    for span in call.versions:
        versions[start + span.start : start + span.end] = span.version.counter
    advantages: Any = np.full(size, advantage, dtype=np.float32)
    ids = (*call.prompt_ids, *call.sampled_ids)
    targets = (*call.prompt_ids, *chosen_ids)
    return TrainSequence(ids, weights, advantages, logprobs, versions, tree, targets)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class SftRow:
    """One demonstrated sequence: its ids, what to train at each place, and how many of the first carry no loss."""

    ids: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]
    skipped: int


def sft_batch(rows: Sequence[SftRow]) -> TrainBatch:
    """Demonstrations as one batch: the mean over all trained tokens (paper section 3.2).

    The first token of a row never carries loss: nothing precedes it.
    """
    trained = sum(len(row.ids) - max(row.skipped, 1) for row in rows)
    out = []
    for row in rows:
        weights = np.full(len(row.ids), 1.0 / trained, dtype=np.float32)
        weights[: max(row.skipped, 1)] = 0.0
        out.append(TrainSequence(row.ids, weights, targets=row.targets))  # type: ignore[arg-type]
    return lay_out(out)


def plan_micro_batches(lengths: Sequence[int], budget: int, ranks: int) -> list[list[list[int]]]:
    """Which sequences go together: `plan[rank][i]` lists sequence indices.

    Sequences are sorted by length, so that padding is small, and cut into as few micro-batches as the budget on rows
    times longest row allows, the same number for every rank (ranks reduce gradients in step) and of about the same size
    (a rank that is done early waits). A sequence longer than the budget goes alone. Where there are too few sequences,
    a rank gets an empty list.
    """
    if budget < 1 or ranks < 1:
        raise ValueError(f"budget {budget} and ranks {ranks} must be positive")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups = _cut(order, lengths, budget)
    rounds = -(-len(groups) // ranks)
    low, high = 1, budget  # the smallest limit that needs no more rounds makes the sizes most alike
    while low < high:
        middle = (low + high) // 2
        if len(_cut(order, lengths, middle)) <= rounds * ranks:
            high = middle
        else:
            low = middle + 1
    groups = _cut(order, lengths, high)
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for group in sorted(groups, key=lambda g: -len(g) * lengths[g[0]]):
        rank = min((r for r in range(ranks) if len(plan[r]) < rounds), key=lambda r: (load[r], r))
        plan[rank].append(group)
        load[rank] += len(group) * lengths[group[0]]
    for part in plan:
        part.extend([] for _ in range(rounds - len(part)))
    return plan


def _cut(order: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Neighbours in `order` (longest first) together, as many as rows times longest row within the limit."""
    groups: list[list[int]] = []
    for index in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= limit:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
