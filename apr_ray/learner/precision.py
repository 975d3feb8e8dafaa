"""Which precision is faster here, found by timing it: that a processor has instructions for bfloat16 says nothing of
speed (on a Xeon with `avx512_bf16` but no AMX a step in bfloat16 took 2.3 times as long as in float32)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apr_ray.rl.losses import sft_loss, token_logprobs

WIDTH = 256
"""Tokens of a timed row, or the policy's context where that is shorter."""
TURNS = 3
CLEAR = 2.0
"""Where the first turn, which also warms up, already takes one precision so many times the other's, it decides."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a forward and backward pass of one micro-batch, in each precision."""

    fp32_s: float
    bf16_s: float

    @property
    def bf16_is_faster(self) -> bool:
        """Whether a step takes less time in bfloat16."""
        return self.bf16_s < self.fp32_s

    def __str__(self) -> str:
        chosen = "bf16" if self.bf16_is_faster else "fp32"
        return f"{chosen}: a micro-batch takes {1e3 * self.fp32_s:.0f} ms in fp32, {1e3 * self.bf16_s:.0f} ms in bf16"


def widen_head(policy: Any) -> None:
    """Compute a policy's logits in float32, whatever autocast says around it.

    Rounded to bfloat16, logits near 16 are 0.06 apart, and every logprob with them.
    """
    head = policy.lm_head

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.float(), head.weight.float(), head.bias)

    head.forward = forward


def slowest(times: Sequence[StepTimes]) -> StepTimes:
    """Of several ranks: all wait for the slowest."""
    return StepTimes(max(t.fp32_s for t in times), max(t.bf16_s for t in times))


def time_precisions(policy: Any, micro_batch_tokens: int, device: torch.device) -> StepTimes:
    """Time both precisions in turn on a new policy of the same shape; medians without the first turn.

    Args:
        policy: gives its class and config; it is not touched.
        micro_batch_tokens: padded tokens of a pass, as in training.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        twin = type(policy)(policy.config).to(device)
        widen_head(twin)
        width = min(WIDTH, policy.config.max_position_embeddings)
        tokens = torch.randint(policy.config.vocab_size, (max(1, micro_batch_tokens // width), width), device=device)
    weights = torch.full(tokens.shape, 1.0 / tokens.numel(), device=device)

    def seconds(bf16: bool) -> float:
        _wait_for(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = twin(input_ids=tokens, use_cache=False).logits
        sft_loss(token_logprobs(logits, tokens), weights).backward()  # type: ignore[no-untyped-call]
        _wait_for(device)
        return time.perf_counter() - start

    first = StepTimes(seconds(bf16=False), seconds(bf16=True))
    if device.type == "cpu" and max(first.fp32_s, first.bf16_s) > CLEAR * min(first.fp32_s, first.bf16_s):
        return first

    turns = [(seconds(bf16=False), seconds(bf16=True)) for _ in range(TURNS)]
    return StepTimes(*(statistics.median(side) for side in zip(*turns, strict=True)))


def _wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
