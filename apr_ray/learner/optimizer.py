"""The optimiser of a policy: AdamW, or Muon for the hidden matrices beside it."""

from __future__ import annotations

from typing import Any

import torch

from apr_ray.config import OptimizerConfig
from apr_ray.learner.muon import MuonAdamW


def build_optimizer(policy: Any, optimizer: OptimizerConfig, rank: int = 0, world: int = 1) -> torch.optim.Optimizer:
    """AdamW, or Muon beside it, over the policy's parameters."""
    groups = parameter_groups(policy, optimizer)
    options: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "betas": (optimizer.beta1, optimizer.beta2),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    if optimizer.muon_rate is None:
        return torch.optim.AdamW(groups, fused=True, **options)
    return MuonAdamW(groups, rank=rank, world=world, **options)


def parameter_groups(policy: Any, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """All parameters, the hidden matrices apart from the rest where `muon_rate` is given, with their rate as a `scale`
    of the others'; or the last normalisation's gains alone."""
    if optimizer.parameters == "final_norm":
        return [{"params": [policy.model.norm.weight]}]
    matrices, others = [], []
    for name, parameter in policy.named_parameters():
        if optimizer.muon_rate is not None and parameter.ndim == 2 and ".layers." in name:
            matrices.append(parameter)
        else:
            others.append(parameter)

    groups: list[dict[str, Any]] = [{"params": others}]
    if optimizer.muon_rate is not None:
        scale = optimizer.muon_rate / optimizer.learning_rate
        groups.append({"params": matrices, "scale": scale, "muon": True})
    return groups
