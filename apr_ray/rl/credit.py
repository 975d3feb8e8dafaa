"""Which call of a tree is answerable for its reward: one advantage per call.

`tree`, as in the paper (section 3.3): every call has its tree's. A child without a solution in its state says so,
rightly, and is praised or blamed for what its siblings found.

`causal` leaves such calls out and the expectation as it is, because threads meet in one place only: a tree's
reward depends on a thread through the message that it joins with (contract 1). So, among the trees of a group:

- a thread is compared with the threads that were given the same prompt. Its reward is the mean over those of them that
  joined with the same message, its baseline the mean over all of them. Where all brought the same message, nothing that
  any of them wrote mattered, and the advantage is exactly 0;
- a root's later calls are compared with those that went on in the same round with the same news: a solution among the
  joined messages, or none. What its children failed to find is no fault of these calls;
- a root's first call is compared with the other first calls.

All are leave-one-out: n / (n - 1) times the difference from a mean of n that holds the call itself. A call that has
nothing to be compared with takes its tree's advantage. The expectation is that of `tree` credit without length
normalisation, the gradient of the mean reward (`tests/test_exact_gradients.py` enumerates it).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from apr_ray.core.ledger import Call, JoinOutcome, Path, ThreadTree
from apr_ray.rl.advantages import leave_one_out_advantages

ROUNDING = 1e-12
"""Two means of the same rewards differ by less."""


def tree_credit(advantages: Sequence[float], trees: Sequence[ThreadTree]) -> list[list[float]]:
    """By tree and call, the tree's advantage."""
    return [[advantage] * len(tree.calls) for advantage, tree in zip(advantages, trees, strict=True)]


def causal_credit(trees: Sequence[ThreadTree]) -> list[list[float]]:
    """By tree and call, the advantages of one group's trees. Every tree must have its reward."""
    rewards = [float(tree.reward) for tree in trees if tree.reward is not None]
    of_trees = leave_one_out_advantages(rewards)
    keys = [_keys(tree) for tree in trees]

    # At most one call of a tree has a key, so the rewards under one key are independent of each other.
    by_key: dict[Hashable, list[tuple[Hashable, float]]] = defaultdict(list)
    for of_tree, reward in zip(keys, rewards, strict=True):
        for key, message in of_tree.values():
            by_key[key].append((message, reward))

    out = []
    for tree, of_tree, own in zip(trees, keys, of_trees, strict=True):
        by_thread = {place: _advantage(by_key[key], message, own) for place, (key, message) in of_tree.items()}
        out.append([by_thread[_place(call)] for call in tree.calls])
    return out


def _advantage(compared: Sequence[tuple[Hashable, float]], message: Hashable, own: float) -> float:
    count = len(compared)
    if count == 1:
        return own
    baseline = math.fsum(reward for _, reward in compared) / count
    alike = [reward for other, reward in compared if other == message]
    difference = math.fsum(alike) / len(alike) - baseline
    return 0.0 if abs(difference) < ROUNDING else difference * count / (count - 1)


Place = tuple[Path, int]
"""A root's calls are compared one by one, a child's all together: (path, segment), or (path, 0) of a child."""


def _place(call: Call) -> Place:
    return (call.path, 0 if call.path else call.segment)


def _keys(tree: ThreadTree) -> dict[Place, tuple[Hashable, Hashable]]:
    """For each place: what it is compared by, and what it brought. A root's calls bring the reward itself: no other
    call stands in for one of them."""
    messages = _messages(tree)
    news = {join.segment + 1: JoinOutcome.SOLVED in join.outcomes for join in tree.joins if not join.path}
    given: Counter[Hashable] = Counter()
    out: dict[Place, tuple[Hashable, Hashable]] = {}
    for call in tree.calls:
        if not call.path:
            out[_place(call)] = ("root", call.segment, news.get(call.segment)), object()
        elif call.segment == 0:
            given[call.prompt_ids] += 1  # a repeated child is compared with the repeated ones of other trees
            out[_place(call)] = (call.prompt_ids, given[call.prompt_ids]), messages.get(call.path)
    return out


def _messages(tree: ThreadTree) -> dict[Path, Hashable]:
    """The message and outcome that each child joined with; none where the tree ended before."""
    joins = {(join.path, join.segment): join for join in tree.joins}
    out: dict[Path, Hashable] = {}
    for spawn in tree.spawns:
        join = joins.get((spawn.path, spawn.segment))
        if join is not None:
            out.update(zip(spawn.children, zip(join.outcomes, join.messages, strict=True), strict=True))
    return out
