"""The learner group at the quickstart's size against the loop that anyone would write first.

plain   transformers' Llama, AdamW and a gradient clip, one process a rank, each on rows of its own: no DeepSpeed, no
        Ray between steps, no reduction
sft     as many ranks of the learner group, on the same rows and by AdamW too: one optimiser step over all of them
preset  the same by the preset's optimiser, Muon
grpo    a GRPO step of the group on as many tokens as the quickstart's has, by AdamW

They take turns on the same processors; ratios are medians over neighbouring turns.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from apr_ray.bench.recording import bench_config
from apr_ray.bench.sync import private_ray
from apr_ray.bench.timing import Result, all_in_turn, median_ratio
from apr_ray.config import Config
from apr_ray.core.batch import TrainBatch, TrainSequence, lay_out
from apr_ray.learner.group import LearnerGroup
from apr_ray.learner.steps import GrpoStep
from apr_ray.training.feed import IN_FLIGHT

ROWS, WIDTH = 8, 256
"""Of a rank's optimiser step."""
STEPS = 10
"""Optimiser steps of a turn; the GRPO side takes as many tokens in one step."""
RATE = 1e-4
GRPO = GrpoStep(clip=0.2, kl_coefficient=0.0, temperature=1.0, inner_steps=1)


def run(repeats: int = 5, overrides: Sequence[str] = ()) -> Result:
    """`ratio`: the supervised step to the plain loop, in tokens/s over all ranks; `preset_ratio`, `grpo_ratio`: the
    others to it."""
    import ray

    config = bench_config(overrides)
    ranks = config.learner.ranks
    small, large = rows_of_noise(ranks * ROWS, config), rows_of_noise(STEPS * ranks * ROWS, config)
    with private_ray():
        adamw = LearnerGroup.start(config, config.sft.optimizer.model_copy(update={"muon_rate": None}))
        preset = LearnerGroup.start(config, config.sft.optimizer)
        loops: Any = ray.remote(PlainLoop).options(num_cpus=0)
        plain = [loops.remote(config, rank) for rank in range(ranks)]

        def supervised(learners: LearnerGroup) -> None:
            pending: deque[list[Any]] = deque()
            for _ in range(STEPS):
                pending.append(learners.submit_sft_step(small, RATE))
                if len(pending) == IN_FLIGHT:
                    learners.finish_sft_step(pending.popleft())
            while pending:
                learners.finish_sft_step(pending.popleft())

        taken = all_in_turn(
            {
                "plain": lambda: ray.get([loop.steps.remote(STEPS) for loop in plain]),
                "sft": lambda: supervised(adamw),
                "preset": lambda: supervised(preset),
                "grpo": lambda: adamw.grpo_step(large, GRPO, RATE),
            },
            repeats,
        )
        adamw.stop()
        preset.stop()

    tokens = len(large.tokens)
    return {
        "ratio": median_ratio(taken["plain"], taken["sft"]),
        "preset_ratio": median_ratio(taken["plain"], taken["preset"]),
        "grpo_ratio": median_ratio(taken["plain"], taken["grpo"]),
        **{f"{side}_tokens_per_s": tokens / statistics.median(seconds) for side, seconds in taken.items()},
        "tokens": float(tokens),
        "ranks": float(ranks),
        "turns": float(repeats),
    }


def rows_of_noise(rows: int, config: Config) -> TrainBatch:
    """Rows of random ids, all of which carry loss; every other row has a positive advantage."""
    rng = np.random.default_rng(0)
    weights = np.full(WIDTH, 1.0 / (rows * WIDTH), dtype=np.float32)
    logprobs = np.full(WIDTH, -1.0, dtype=np.float32)
    sequences = []
    for row in range(rows):
        ids: Any = rng.integers(2, vocabulary(config), WIDTH)
        advantages: Any = np.full(WIDTH, 1.0 - 2 * (row % 2), dtype=np.float32)
        sequences.append(TrainSequence(ids, weights, advantages, logprobs))  # type: ignore[arg-type]
    return lay_out(sequences)


def vocabulary(config: Config) -> int:
    """Ids of the task's tokenizer."""
    from apr_ray.tasks.registry import load_task

    return load_task(config.task).tokenizer().vocab_size


class PlainLoop:
    """A Ray actor only so that it runs beside the others under the same conditions."""

    def __init__(self, config: Config, rank: int) -> None:
        import torch

        from apr_ray.model.llama import new_policy
        from apr_ray.tasks.registry import load_task

        torch.set_num_threads(1)
        tokenizer = load_task(config.task).tokenizer()
        self.model: Any = new_policy(config.model, tokenizer, config.run.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)
        generator = torch.Generator().manual_seed(rank)
        self.rows = torch.randint(2, tokenizer.vocab_size, (ROWS, WIDTH), generator=generator)

    def steps(self, count: int) -> None:
        """Take `count` optimiser steps."""
        import torch

        for _ in range(count):
            logits = self.model(input_ids=self.rows, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.rows[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
