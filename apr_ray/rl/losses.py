"""Per-token losses, and their one reduction: the sum of weight times loss.

All denominators are in the weights (see `rl.batches`), so no function here divides by anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Weighted sums over one micro-batch; `loss` carries the gradient, the rest are plain numbers.

    Attributes:
        loss: scalar; policy loss plus KL term.
        kl: weighted k3 estimate of KL(policy || reference); 0 where there is no reference.
        entropy: weighted.
        clipped, tokens: trained tokens, and those of them whose ratio was clipped with effect.
        delta_sum, delta_max: of |logprob - behaviour logprob| over trained tokens.
    """

    loss: torch.Tensor
    kl: float
    entropy: float
    clipped: int
    tokens: int
    delta_sum: float
    delta_max: float


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Logprob of each token given those before it: [b, t] from logits [b, t, v]; 0 at the first position.

    Computed in float32, or in float64 where the logits are.
    """
    scaled = _precise(logits[:, :-1]) / temperature
    picked = scaled.gather(-1, tokens[:, 1:, None])[..., 0] - scaled.logsumexp(dim=-1)
    return torch.nn.functional.pad(picked, (1, 0))


def token_entropy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Entropy in nats of the distribution that each token was drawn from: [b, t]; 0 at the first position."""
    logprobs = torch.log_softmax(_precise(logits[:, :-1]) / temperature, dim=-1)
    return torch.nn.functional.pad(-(logprobs.exp() * logprobs).sum(dim=-1), (1, 0))


def _precise(logits: torch.Tensor) -> torch.Tensor:
    """In float32 at least: a bfloat16 logprob has three digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sft_loss(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted negative log-likelihood: scalar from [b, t] and [b, t]."""
    return -(weights * logprobs).sum()


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token: exp(d) - 1 - d with d = reference - policy."""
    delta = reference - logprobs
    return torch.expm1(delta) - delta


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    entropy: torch.Tensor,
    *,
    clip: float,
    kl_coefficient: float,
    reference_logprobs: torch.Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped objective with GRPO advantages and a k3 penalty (paper section 3.3); every tensor is [b, t].

    Args:
        old_logprobs: those of the engine that drew the tokens (the behaviour policy).
        weights: 0 where a token carries no loss.
    """
    trained = weights != 0
    delta = torch.where(trained, logprobs - old_logprobs, 0.0)
    ratio = delta.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    per_token = -torch.minimum(unclipped, clipped)
    kl = torch.zeros_like(logprobs)
    if reference_logprobs is not None:
        kl = torch.where(trained, k3(logprobs, reference_logprobs), 0.0)
        per_token = per_token + kl_coefficient * kl
    loss = (weights * per_token).sum()
    with torch.no_grad():
        size = delta.detach().abs()
        return PolicyLoss(
            loss=loss,
            kl=float((weights * kl).sum()),
            entropy=float((weights * entropy).sum()),
            clipped=int((trained & (clipped < unclipped)).sum()),
            tokens=int(trained.sum()),
            delta_sum=float(size.sum()),
            delta_max=float(size.max()),
        )
