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


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], draws: np.ndarray[Any, Any]
) -> tuple[list[int], list[float]]:
    """One token per row and its logprob.

    Args:
        logits: float32 [n, vocab].
        params: one per row.
        draws: float64 [n] in [0, 1); rows at temperature 0 ignore theirs.

    Returns:
        Token ids, and logprobs over the whole vocabulary at the row's temperature (1 when greedy): top-k and top-p
        narrow what may be drawn, not what is reported.
    """
    temperatures = torch.tensor([p.temperature or 1.0 for p in params], device=logits.device)
    logprobs = torch.log_softmax(logits / temperatures[:, None], dim=-1)
    probabilities = logprobs.double().exp_()
    if any(p.top_k or p.top_p < 1 for p in params):
        probabilities = _narrow(probabilities, params)
    cumulative = probabilities.cumsum(dim=-1)
    targets = torch.from_numpy(draws).to(logits.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    greedy = [i for i, p in enumerate(params) if p.temperature == 0]
    if greedy:
        tokens[greedy] = logits[greedy].argmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), chosen.tolist()


def _narrow(probabilities: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Zero the probabilities outside each row's top-k and top-p."""
    ranked, order = probabilities.sort(dim=-1, descending=True)
    vocab = probabilities.shape[1]
    top_k = torch.tensor([p.top_k or vocab for p in params], device=probabilities.device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=probabilities.device)
    before = ranked.cumsum(dim=-1) - ranked  # probability of the likelier tokens
    # By rounding `before` may reach 1 ahead of the last token: a row that keeps all must not lose it to its neighbours.
    within = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep = (torch.arange(vocab, device=probabilities.device) < top_k[:, None]) & within
    return torch.zeros_like(probabilities).scatter_(1, order, ranked * keep)
