"""The learner on recorded trees: against right-padded micro-batches in sampling order, and against plain torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from apr_ray.bench.recording import bench_config, fresh_policy, record
from apr_ray.bench.timing import Result, in_fresh_process, in_turn
from apr_ray.config import Config, OptimizerConfig
from apr_ray.core.batch import TrainBatch
from apr_ray.core.ledger import Group, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.learner.device import init_process_group
from apr_ray.learner.trainer import GrpoStep, Trainer
from apr_ray.model.state import pack_weights, trainable_parameters
from apr_ray.rl.batches import grpo_batch, plan_micro_batches
from apr_ray.rl.losses import grpo_loss, token_entropy, token_logprobs

STEP = GrpoStep(clip=0.2, kl_coefficient=0.0, temperature=1.0, inner_steps=1)
RATE = 1e-4
TEN_MILLION = ("model.hidden_size=384", "model.layers=6", "model.heads=12", "model.ffn_size=1024")


def run(trees: int = 64, overrides: Sequence[str] = TEN_MILLION, repeats: int = 3) -> Result:
    """`ratio`: to right-padded micro-batches in sampling order, in tokens/s. One thread, one rank, a 10 M model."""
    result: Result = in_fresh_process(_measure, trees, tuple(overrides), repeats)
    return result


def _measure(trees: int, overrides: Sequence[str], repeats: int) -> Result:
    torch.set_num_threads(1)
    config = bench_config(overrides)
    batch = batch_of(record(trees, config).trees)
    init_process_group(0, 1, "127.0.0.1", free_port())
    optimizer = OptimizerConfig(learning_rate=RATE)
    learner = config.learner.model_copy(update={"ranks": 1})
    trainers = {
        "learner": Trainer(fresh_policy(config), learner, optimizer),
        "sampling_order": SamplingOrder(fresh_policy(config), learner, optimizer),
    }
    plain = PlainTorch(fresh_policy(config), config)
    padded = {name: trainer.grpo_step(batch, STEP, RATE)[0].padded_tokens for name, trainer in trainers.items()}
    plain(batch)
    weights = {name: _flat(trainer.policy) for name, trainer in trainers.items()} | {"plain": _flat(plain.policy)}
    times = in_turn(
        {name: lambda t=trainer: t.grpo_step(batch, STEP, RATE) for name, trainer in trainers.items()}
        | {"plain": lambda: plain(batch)},
        repeats,
    )
    tokens = len(batch.tokens)
    peak = matmul_peak()
    rate = step_flops(batch, config, plain.policy) / times["learner"]
    return {
        "ratio": times["sampling_order"] / times["learner"],
        "length_sorted_ratio": times["plain"] / times["learner"],
        "deepspeed_overhead": times["learner"] / times["plain"] - 1,
        "peak_share": rate / peak,
        "learner_tokens_per_s": tokens / times["learner"],
        "sampling_order_tokens_per_s": tokens / times["sampling_order"],
        "plain_torch_length_sorted_tokens_per_s": tokens / times["plain"],
        "padding_share": 1 - tokens / padded["learner"],
        "sampling_order_padding_share": 1 - tokens / padded["sampling_order"],
        "learner_gflops": rate / 1e9,
        "matmul_peak_gflops": peak / 1e9,
        "parameters": float(weights["plain"].size),
        "max_delta_weight": max(float(np.abs(w - weights["plain"]).max()) for w in weights.values()),
    }


class SamplingOrder(Trainer):
    """The learner, but with `in_sampling_order`'s micro-batches."""

    def plan(self, batch: TrainBatch) -> list[list[int]]:
        return in_sampling_order(batch.lengths.tolist(), self.learner.micro_batch_tokens)


def in_sampling_order(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Sequences as they were sampled, as many together as the longest of them lets into the budget."""
    groups: list[list[int]] = []
    longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if groups and (len(groups[-1]) + 1) * longest <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = length
    return groups


class PlainTorch:
    """The same step without DeepSpeed: AdamW, gradients accumulated over length-sorted micro-batches."""

    def __init__(self, policy: Any, config: Config) -> None:
        self.policy = policy
        self.budget = config.learner.micro_batch_tokens
        defaults = OptimizerConfig(learning_rate=RATE)
        self.grad_clip = defaults.grad_clip
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=RATE,
            betas=(defaults.beta1, defaults.beta2),
            weight_decay=defaults.weight_decay,
            fused=True,
        )

    def __call__(self, batch: TrainBatch) -> None:
        """One optimiser step."""
        columns = (batch.tokens, batch.loss_weights, batch.advantages, batch.behaviour_logprobs)
        for indices in plan_micro_batches(batch.lengths.tolist(), self.budget, 1)[0]:
            tokens, weights, advantages, behaviour = (_pad(column, batch, indices) for column in columns)
            logits = self.policy(input_ids=tokens, use_cache=False).logits
            logprobs = token_logprobs(logits, tokens)
            with torch.no_grad():
                entropy = token_entropy(logits)
            loss = grpo_loss(logprobs, behaviour, advantages, weights, entropy, clip=STEP.clip, kl_coefficient=0.0).loss
            torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _pad(column: np.ndarray[Any, Any], batch: TrainBatch, indices: Sequence[int]) -> torch.Tensor:
    parts = [torch.from_numpy(column[batch.offsets[i] : batch.offsets[i + 1]]) for i in indices]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def batch_of(trees: Sequence[ThreadTree]) -> TrainBatch:
    """Recorded trees as a GRPO batch, in the order they were sampled; every other one has reward 1."""
    rewarded = [replace(tree, reward=float(i % 2)) for i, tree in enumerate(trees)]
    groups = [Group(rewarded[i].problem_key, tuple(rewarded[i : i + 2])) for i in range(0, len(rewarded) - 1, 2)]
    return grpo_batch(groups, skip_zero_advantage=True).batch


def step_flops(batch: TrainBatch, config: Config, policy: Any) -> float:
    """Floating-point operations of one step on real tokens: 6 per parameter and token, and causal attention's share."""
    parameters = sum(p.numel() for p in policy.parameters())
    lengths = batch.lengths.astype(np.float64)
    attention = 6 * config.model.layers * config.model.hidden_size * float((lengths**2).sum())
    return float(6.0 * parameters * lengths.sum() + attention)


def matmul_peak(size: int = 1024, seconds: float = 1.0) -> float:
    """Floating-point operations per second of a square float32 product: the best of many."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _flat(policy: Any) -> np.ndarray[Any, Any]:
    packed: np.ndarray[Any, Any] = pack_weights(trainable_parameters(policy), WeightVersion(0, 0)).flat
    return packed


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
