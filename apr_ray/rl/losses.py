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
        clipped, tokens: trained tokens whose ratio was clipped with effect, and all trained tokens.
    """

    loss: torch.Tensor
    kl: float
    entropy: float
    clipped: int
    tokens: int


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Logprob of each target given the tokens before it: [b, t] from logits [b, t, v]; 0 at the first position.

    Computed in float32, or in float64 where the logits are.
    """
    scaled = _precise(logits[:, :-1]) / temperature
    picked = scaled.gather(-1, targets[:, 1:, None])[..., 0] - scaled.logsumexp(dim=-1)
    return torch.nn.functional.pad(picked, (1, 0))


def token_entropy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Entropy in nats of the distribution that each token was drawn from: [b, t]; 0 at the first position."""
    logprobs = torch.log_softmax(_precise(logits[:, :-1]) / temperature, dim=-1)
    return torch.nn.functional.pad(-(logprobs.exp() * logprobs).sum(dim=-1), (1, 0))


def token_logit_scale(logits: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the vocabulary of the logits that each token was drawn from: [b, t]; 0 at the first
    position. It tells a policy that became surer of itself from one that learned which token is right."""
    return torch.nn.functional.pad(_precise(logits[:, :-1]).std(dim=-1), (1, 0))


def _precise(logits: torch.Tensor) -> torch.Tensor:
    """In float32 at least: a bfloat16 logprob has three digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sft_loss(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted negative log-likelihood: scalar from [b, t] and [b, t]."""
    return -(weights * logprobs).sum()


LOG_LIMIT = 20.0
"""Two policies' logprobs of a token count as this far apart at most, in nats: e^89 is no float32 any more, and one such
token would end the run. The gradient of a difference beyond it is 0."""


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token: exp(d) - 1 - d with d = reference - policy."""
    delta = (reference - logprobs).clamp(-LOG_LIMIT, LOG_LIMIT)
    return torch.expm1(delta) - delta


def log_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """Log of the probability ratio per token, within `LOG_LIMIT`: [b, t]; 0 where a token carries no loss."""
    return torch.where(trained, logprobs - old_logprobs, 0.0).clamp(-LOG_LIMIT, LOG_LIMIT)


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
    importance_weights: torch.Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped objective with GRPO advantages and a k3 penalty (paper section 3.3); every tensor is [b, t].

    Args:
        old_logprobs: the ratio's denominator: those of the behaviour or of the proximal policy (see `rl.mismatch`).
        weights: 0 where a token carries no loss.
        importance_weights: [b, t] or [b, 1]; they multiply the clipped objective, not the penalty.
    """
    trained = weights != 0
    ratio = log_ratio(logprobs, old_logprobs, trained).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    per_token = -torch.minimum(unclipped, clipped)
    if importance_weights is not None:
        per_token = importance_weights * per_token
    kl = torch.zeros_like(logprobs)
    if reference_logprobs is not None:
        # Masked before and not after: what overflows under a mask has no value, but a gradient of NaN.
        kl = k3(torch.where(trained, logprobs, 0.0), torch.where(trained, reference_logprobs, 0.0))
        per_token = per_token + kl_coefficient * kl
    loss = (weights * per_token).sum()
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            kl=float((weights * kl).sum()),
            entropy=float((weights * entropy).sum()),
            clipped=int((trained & (clipped < unclipped)).sum()),
            tokens=int(trained.sum()),
        )
