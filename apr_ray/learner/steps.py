"""Arguments and results of one optimiser step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from apr_ray.config import GrpoConfig
from apr_ray.rl.mismatch import Correction, Mismatch


@dataclass(frozen=True, slots=True)
class StepStats:
    """One rank's share of an optimiser step: sums, so that ranks add up (`merge`).

    Attributes:
        loss, kl, entropy: weighted sums over the tokens this rank saw.
        tokens: trained tokens; `clipped` of them had a clipped ratio, `cut` of them a cut importance weight.
        padded_tokens: rows times width over all micro-batches: what the forward pass had to compute.
        grad_norm: before clipping; the same on every rank.
        logit_scale: weighted sum, as `entropy`.
        update_norm: of all that the step changed, the same on every rank; None at ZeRO stage 3, where no rank holds it.
        slope: Σ logprob × ∂loss/∂logprob over the trained tokens, of GRPO. Its sign is the gradient's, where the loss
            itself is near 0 on policy, whichever way it is descended.
        mismatch: of the whole batch, the same on every rank; of the first inner step of GRPO only.
    """

    loss: float
    tokens: int
    padded_tokens: int
    grad_norm: float
    learning_rate: float
    kl: float = 0.0
    entropy: float = 0.0
    clipped: int = 0
    cut: int = 0
    slope: float = 0.0
    logit_scale: float = 0.0
    update_norm: float | None = None
    mismatch: Mismatch | None = None


def merge(parts: Sequence[StepStats]) -> StepStats:
    """Ranks' shares as one."""
    return StepStats(
        loss=sum(p.loss for p in parts),
        tokens=sum(p.tokens for p in parts),
        padded_tokens=sum(p.padded_tokens for p in parts),
        grad_norm=parts[0].grad_norm,
        learning_rate=parts[0].learning_rate,
        kl=sum(p.kl for p in parts),
        entropy=sum(p.entropy for p in parts),
        clipped=sum(p.clipped for p in parts),
        cut=sum(p.cut for p in parts),
        slope=sum(p.slope for p in parts),
        logit_scale=sum(p.logit_scale for p in parts),
        update_norm=parts[0].update_norm,
        mismatch=parts[0].mismatch,
    )


@dataclass(frozen=True, slots=True)
class GrpoStep:
    """How to take a GRPO step; see `config.GrpoConfig`."""

    clip: float
    kl_coefficient: float
    temperature: float
    inner_steps: int
    ratio: Literal["behaviour", "proximal"] = "behaviour"
    correction: Correction | None = None
    bf16: bool = False

    @classmethod
    def of(cls, grpo: GrpoConfig) -> GrpoStep:
        """As configured."""
        correction = None
        if grpo.correction != "none":
            correction = Correction(
                grpo.correction, grpo.correction_level, grpo.correction_cap, from_delta=grpo.correction_from
            )
        bf16 = grpo.precision == "bf16"
        return cls(grpo.clip, grpo.kl_coefficient, grpo.temperature, grpo.inner_steps, grpo.ratio, correction, bf16)
