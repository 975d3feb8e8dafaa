"""Demonstrations of made-up ids: each id stands once, so that a sequence's first names it."""

from __future__ import annotations

import numpy as np

from apr_ray.data.demonstrations import Demonstrations


def toy_demonstrations(count: int = 300) -> Demonstrations:
    """Sequences of 5 to 59 ids, half of them children's; the first quarter is given, the first half the prompt."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 60, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    child = rng.random(count) < 0.5
    return Demonstrations(np.arange(offsets[-1], dtype=np.int32), offsets, lengths // 4, lengths // 2, child)
