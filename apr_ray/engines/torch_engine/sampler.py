"""Drawing tokens: one uniform number per (seed, position), so a request's draws do not depend on its neighbours'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from apr_ray.core.engine import SamplingParams

_U64 = np.uint64


def uniforms(seeds: np.ndarray[Any, Any], counters: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Counter-based uniforms in [0, 1): splitmix64 of seed and counter. Both uint64 [n], or one of them [1].

    Written by hand because a number must depend on its seed and its counter alone, wherever a request begins: numpy's
    counter-based generators give blocks of their own size, from an object per seed.
    """
    with np.errstate(over="ignore"):
        x = _mix(seeds + _U64(0x9E3779B97F4A7C15))
        x = _mix(x ^ (counters * _U64(0xD1342543DE82EF95) + _U64(0x2545F4914F6CDD1D)))
    out: np.ndarray[Any, np.dtype[np.float64]] = (x >> _U64(11)).astype(np.float64) / float(1 << 53)
    return out


def _mix(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    out: np.ndarray[Any, Any] = x ^ (x >> _U64(31))
    return out


@dataclass(frozen=True, slots=True)
class Sampling:
    """How n rows draw. What they all leave alone is None, and costs nothing.

    Attributes:
        temperatures: float32 [n, 1], 1 where greedy; None: all are 1.
        greedy: int64, the rows that are; None: none is.
        top_k, top_p: of each row [n]; None: neither narrows any.
    """

    temperatures: torch.Tensor | None
    greedy: torch.Tensor | None
    top_k: np.ndarray[Any, Any] | None
    top_p: np.ndarray[Any, Any] | None

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> Sampling:
        """One row for each."""
        greedy = [row for row, one in enumerate(params) if one.temperature == 0]
        tempered = any(one.temperature not in (0, 1) for one in params)
        narrow = any(one.top_k or one.top_p < 1 for one in params)
        return cls(
            torch.tensor([[one.temperature or 1.0] for one in params], device=device) if tempered else None,
            torch.tensor(greedy, device=device) if greedy else None,
            np.array([one.top_k for one in params]) if narrow else None,
            np.array([one.top_p for one in params]) if narrow else None,
        )


def sample(logits: torch.Tensor, how: Sampling, draws: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row, and the logprobs it was drawn from.

    Args:
        logits: float32 [n, vocab].
        how: of n rows.
        draws: float64 [n] in [0, 1); rows at temperature 0 ignore theirs.

    Returns:
        Token ids [n], and logprobs [n, vocab] at the row's temperature (1 when greedy): top-k and top-p narrow what may
        be drawn, not what is reported.
    """
    logprobs = torch.log_softmax(logits if how.temperatures is None else logits / how.temperatures, dim=-1)
    probabilities = logprobs.double().exp_()
    if how.top_k is not None:
        probabilities = _narrow(probabilities, how)
    cumulative = probabilities.cumsum_(dim=-1)
    targets = torch.from_numpy(draws).to(logits.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    if how.greedy is not None:
        tokens[how.greedy] = logits[how.greedy].argmax(dim=-1)
    return tokens, logprobs


def _narrow(probabilities: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Zero the probabilities outside each row's top-k and top-p."""
    ranked, order = probabilities.sort(dim=-1, descending=True)
    vocab, device = probabilities.shape[1], probabilities.device
    assert how.top_k is not None
    assert how.top_p is not None
    top_k = torch.from_numpy(np.where(how.top_k, how.top_k, vocab)).to(device)
    top_p = torch.from_numpy(how.top_p).to(device)
    before = ranked.cumsum(dim=-1) - ranked  # probability of the likelier tokens
    # By rounding `before` may reach 1 ahead of the last token: a row that keeps all must not lose it to its neighbours.
    within = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep = (torch.arange(vocab, device=device) < top_k[:, None]) & within
    return torch.zeros_like(probabilities).scatter_(1, order, ranked * keep)
