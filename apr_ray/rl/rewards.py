"""Rewards from verdicts: the price of each tree's ending."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from apr_ray.config import RewardConfig
from apr_ray.core.ledger import ThreadTree


def price_of(tree: ThreadTree, prices: RewardConfig) -> float:
    """The reward of a judged tree."""
    price: float = getattr(prices, tree.ending.value)
    return price


def priced(trees: Sequence[ThreadTree], prices: RewardConfig) -> list[ThreadTree]:
    """Judged trees with their rewards."""
    return [replace(tree, reward=price_of(tree, prices)) for tree in trees]
