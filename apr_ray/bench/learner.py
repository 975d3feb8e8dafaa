"""The learner: at the quickstart's size against the loop that anyone would write first (`bench.plain_loop`), and at
10 M parameters on recorded trees, against micro-batches in sampling order and against plain torch on its own ones.

learner         length-sorted micro-batches, through DeepSpeed               ─┐ `deepspeed_overhead`: the same
plain           the same micro-batches with the same padding, without it     ─┘ forward, loss, backward and AdamW
sampling_order  the learner, with the sequences in the order they were sampled in

They take turns; ratios are medians over neighbouring turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from apr_ray.bench import plain_loop
from apr_ray.bench.recording import bench_config, fresh_policy, record
from apr_ray.bench.timing import Result, all_in_turn, in_fresh_process, median_ratio
from apr_ray.config import Config, OptimizerConfig
from apr_ray.core.batch import TrainBatch
from apr_ray.core.ledger import Group, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.learner.device import init_process_group
from apr_ray.learner.rows import Rows
from apr_ray.learner.steps import GrpoStep
from apr_ray.learner.trainer import Trainer
from apr_ray.model.state import pack_weights, trainable_parameters
from apr_ray.rl.batches import grpo_batch
from apr_ray.rl.losses import grpo_loss, token_entropy, token_logprobs

STEP = GrpoStep(clip=0.2, kl_coefficient=0.0, temperature=1.0, inner_steps=1)
RATE = 1e-4
TEN_MILLION = ("model.hidden_size=384", "model.layers=6", "model.heads=12", "model.ffn_size=1024")
COMPARED_TREES = 4
"""Whose step all sides take first, and must take alike."""


def run(trees: int = 12, overrides: Sequence[str] = TEN_MILLION, repeats: int = 3) -> Result:
    """`ratio`: to the plain loop, at the quickstart's size on all its ranks. `of_sampling_order`: to right-padded
    micro-batches in sampling order, with one rank and the model of `overrides`. All in tokens/s; each side takes
    `repeats` turns: by default about five minutes."""
    of_trees: Result = in_fresh_process(_measure, trees, tuple(overrides), repeats)
    return plain_loop.run(repeats) | of_trees


def _measure(trees: int, overrides: Sequence[str], repeats: int) -> Result:
    torch.set_num_threads(1)
    config = bench_config(overrides)
    recorded = record(trees, config).trees
    few, batch = batch_of(recorded[:COMPARED_TREES]), batch_of(recorded)
    init_process_group(0, 1, "127.0.0.1", free_port())
    optimizer = OptimizerConfig(learning_rate=RATE)
    learner = config.learner.model_copy(update={"ranks": 1})
    trainers = {
        "sampling_order": SamplingOrder(fresh_policy(config), learner, optimizer),
        "learner": Trainer(fresh_policy(config), learner, optimizer),
    }
    plain = PlainTorch(fresh_policy(config), optimizer, trainers["learner"].plan)
    padded: dict[str, int] = {}

    def step(name: str, batch: TrainBatch) -> None:
        padded[name] = trainers[name].grpo_step(batch, STEP, RATE)[0].padded_tokens

    works = {name: partial(step, name) for name in trainers} | {"plain": plain}
    for work in works.values():  # warms up, too
        work(few)
    weights = [_flat(policy) for policy in (*(trainer.policy for trainer in trainers.values()), plain.policy)]
    taken = all_in_turn({name: partial(work, batch) for name, work in works.items()}, repeats, warm_ups=0)
    times = {name: statistics.median(seconds) for name, seconds in taken.items()}
    tokens = len(batch.tokens)
    peak = matmul_peak()
    rate = step_flops(batch, config, plain.policy) / times["learner"]
    return {
        "of_sampling_order": median_ratio(taken["sampling_order"], taken["learner"]),
        "deepspeed_overhead": median_ratio(taken["learner"], taken["plain"]) - 1,
        "peak_share": rate / peak,
        **{f"trees_{name}_tokens_per_s": tokens / seconds for name, seconds in times.items()},
        "padding_share": 1 - tokens / padded["learner"],
        "sampling_order_padding_share": 1 - tokens / padded["sampling_order"],
        "learner_gflops": rate / 1e9,
        "matmul_peak_gflops": peak / 1e9,
        "tokens_of_trees": float(tokens),
        "parameters": float(weights[-1].size),
        "max_delta_weight": max(float(np.abs(w - weights[-1]).max()) for w in weights),
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
    """The learner's step without DeepSpeed and without the learner's accounts: its micro-batches, loss and AdamW."""

    def __init__(
        self, policy: Any, optimizer: OptimizerConfig, plan: Callable[[TrainBatch], Sequence[Sequence[int]]]
    ) -> None:
        self.policy = policy
        self.plan = plan
        self.grad_clip = optimizer.grad_clip
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=RATE,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def __call__(self, batch: TrainBatch) -> None:
        """One optimiser step."""
        for indices in self.plan(batch):
            rows = Rows(batch, indices, torch.device("cpu"))
            logits = self.policy(input_ids=rows.tokens, use_cache=False).logits
            logprobs = token_logprobs(logits, rows.targets)
            with torch.no_grad():
                entropy = token_entropy(logits)
            loss = grpo_loss(
                logprobs,
                rows.behaviour_logprobs,
                rows.advantages,
                rows.weights,
                entropy,
                clip=STEP.clip,
                kl_coefficient=STEP.kl_coefficient,
            ).loss
            torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


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
