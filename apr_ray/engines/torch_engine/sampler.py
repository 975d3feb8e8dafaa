"""Drawing tokens: one uniform number per (seed, position), so a request's draws do not depend on its neighbours'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from apr_ray.core.engine import SamplingParams

_U64 = np.uint64


def uniforms(seeds: np.ndarray[Any, Any], counters: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Counter-based uniforms in [0, 1): splitmix64 of seed and counter. Both uint64 [n].

    Written by hand because numpy's counter-based generators take one seed per generator object: one object per row and
    step costs more than the model's forward pass.
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


class RowSampling:
    """How each row draws, by column, so that a step reads it without going through the requests."""

    def __init__(self, rows: int) -> None:
        self.temperature: np.ndarray[Any, Any] = np.ones(rows, dtype=np.float32)
        self.top_k: np.ndarray[Any, Any] = np.zeros(rows, dtype=np.int64)
        self.top_p: np.ndarray[Any, Any] = np.ones(rows, dtype=np.float64)
        self.seed: np.ndarray[Any, Any] = np.zeros(rows, dtype=np.uint64)

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> RowSampling:
        """One row for each."""
        rows = cls(len(params))
        for row, one in enumerate(params):
            rows.set(row, one)
        return rows

    def set(self, row: int, params: SamplingParams) -> None:
        """From now on a row draws like this."""
        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.seed[row] = params.seed & 0xFFFFFFFFFFFFFFFF

    def first(self, n: int) -> RowSampling:
        """A view of the first rows."""
        view = RowSampling(0)
        view.temperature, view.top_k = self.temperature[:n], self.top_k[:n]
        view.top_p, view.seed = self.top_p[:n], self.seed[:n]
        return view


def sample(logits: torch.Tensor, how: RowSampling, draws: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row, and the logprobs it was drawn from.

    Args:
        logits: float32 [n, vocab].
        how: of n rows.
        draws: float64 [n] in [0, 1); rows at temperature 0 ignore theirs.

    Returns:
        Token ids [n], and logprobs [n, vocab] at the row's temperature (1 when greedy): top-k and top-p narrow what may
        be drawn, not what is reported.
    """
    greedy = how.temperature == 0
    temperatures = torch.from_numpy(np.where(greedy, np.float32(1), how.temperature)).to(logits.device)
    logprobs = torch.log_softmax(logits / temperatures[:, None], dim=-1)
    probabilities = logprobs.double().exp_()
    if how.top_k.any() or (how.top_p < 1).any():
        probabilities = _narrow(probabilities, how)
    cumulative = probabilities.cumsum(dim=-1)
    targets = torch.from_numpy(draws).to(logits.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    if greedy.any():
        rows = torch.from_numpy(np.flatnonzero(greedy)).to(logits.device)
        tokens[rows] = logits[rows].argmax(dim=-1)
    return tokens, logprobs


def _narrow(probabilities: torch.Tensor, how: RowSampling) -> torch.Tensor:
    """Zero the probabilities outside each row's top-k and top-p."""
    ranked, order = probabilities.sort(dim=-1, descending=True)
    vocab, device = probabilities.shape[1], probabilities.device
    top_k = torch.from_numpy(np.where(how.top_k, how.top_k, vocab)).to(device)
    top_p = torch.from_numpy(how.top_p).to(device)
    before = ranked.cumsum(dim=-1) - ranked  # probability of the likelier tokens
    # By rounding `before` may reach 1 ahead of the last token: a row that keeps all must not lose it to its neighbours.
    within = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep = (torch.arange(vocab, device=device) < top_k[:, None]) & within
    return torch.zeros_like(probabilities).scatter_(1, order, ranked * keep)
