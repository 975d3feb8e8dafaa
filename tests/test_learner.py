"""DeepSpeed learners: contract 3, checkpoints, and the engine's agreement. Real processes, real gloo."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from apr_ray.config import LearnerConfig, ModelConfig, OptimizerConfig
from apr_ray.core.batch import TrainBatch, TrainSequence, lay_out
from apr_ray.learner.trainer import GrpoStep, Trainer, init_process_group, merge
from apr_ray.model.llama import new_policy
from apr_ray.rl.losses import token_logprobs
from apr_ray.tasks.countdown.tokenizer import build_tokenizer

MODEL = ModelConfig(hidden_size=32, layers=2, heads=2, ffn_size=48, context_tokens=128)
STEP = GrpoStep(clip=0.2, kl_coefficient=0.01, temperature=1.0, inner_steps=2)
RATE = 1e-3


def batches(count: int = 3) -> list[TrainBatch]:
    rng = np.random.default_rng(0)
    return [
        lay_out(
            [
                TrainSequence(
                    rng.integers(0, 57, n).tolist(),
                    (rng.random(n) / 500).tolist(),
                    rng.normal(size=n).tolist(),
                    (-4 * rng.random(n)).tolist(),
                )
                for n in rng.integers(3, 80, 21)
            ]
        )
        for _ in range(count)
    ]


def learn(rank: int, world: int, zero: int, port: int, budget: int, results: Any, folder: str) -> None:
    """One rank: a supervised step, a GRPO step, save; then a step, load, and the same step again."""
    torch.set_num_threads(1)
    init_process_group(rank, world, "127.0.0.1", port)
    config = LearnerConfig(zero_stage=zero, micro_batch_tokens=budget, ranks=world)  # type: ignore[arg-type]
    trainer = Trainer(
        new_policy(MODEL, build_tokenizer(), 0), config, OptimizerConfig(learning_rate=RATE, grad_clip=0.5), rank, world
    )
    first, second, third = batches()
    stats = [trainer.sft_step(first, RATE)]
    trainer.freeze_reference()
    stats += trainer.grpo_step(second, STEP, RATE)
    trainer.save(Path(folder))
    stats.append(trainer.sft_step(third, RATE))
    after = trainer.weights(version()).flat.copy()
    trainer.load(Path(folder))
    trainer.sft_step(third, RATE)
    again = trainer.weights(version()).flat.copy()
    results.put((rank, stats, after, again))


def version() -> Any:
    from apr_ray.core.weights import WeightVersion

    return WeightVersion(0, 1)


def run_group(world: int, zero: int, budget: int, folder: Path) -> tuple[list[Any], np.ndarray[Any, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=learn, args=(rank, world, zero, port, budget, results, str(folder)))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = sorted((results.get(timeout=240) for _ in processes), key=lambda r: r[0])
    for process in processes:
        process.join()
    for _, _, after, again in found:
        np.testing.assert_array_equal(after, found[0][2], err_msg="ranks differ")
        np.testing.assert_allclose(again, after, rtol=1e-6, atol=1e-8, err_msg="a resumed step differs")
    return [merge([r[1][i] for r in found]) for i in range(len(found[0][1]))], found[0][2]


def plain_reference() -> np.ndarray[Any, Any]:
    """The same steps in plain torch: one sequence at a time, no DeepSpeed, no micro-batches."""
    policy: Any = new_policy(MODEL, build_tokenizer(), 0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)

    def rows(batch: TrainBatch) -> Any:
        for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
            yield [torch.from_numpy(c[a:b])[None] for c in (
                batch.tokens, batch.loss_weights, batch.advantages, batch.behaviour_logprobs
            )]  # fmt: skip

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    def supervised(batch: TrainBatch) -> None:
        for tokens, weights, _, _ in rows(batch):
            (-(weights * token_logprobs(policy(tokens).logits, tokens)).sum()).backward()
        update()

    first, second, third = batches()
    supervised(first)
    with torch.no_grad():
        references = [token_logprobs(policy(tokens).logits, tokens) for tokens, *_ in rows(second)]
    for _ in range(STEP.inner_steps):
        for (tokens, weights, advantages, old), reference in zip(rows(second), references, strict=True):
            logprobs = token_logprobs(policy(tokens).logits, tokens)
            ratio = (logprobs - old).exp()
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            delta = reference - logprobs
            kl = delta.exp() - 1 - delta
            (weights * (STEP.kl_coefficient * kl - surrogate)).sum().backward()
        update()
    supervised(third)
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()]).numpy()


@pytest.fixture(scope="module")
def reference() -> np.ndarray[Any, Any]:
    return plain_reference()


@pytest.mark.parametrize(("world", "zero", "budget"), [(1, 0, 200), (2, 0, 4096), (1, 2, 4096), (2, 2, 200)])
def test_the_loss_depends_on_neither_ranks_nor_micro_batches_nor_zero(
    world: int, zero: int, budget: int, reference: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    """Contract 3: after supervised and GRPO steps the weights are those of plain torch, one sequence at a time."""
    stats, weights = run_group(world, zero, budget, tmp_path)
    np.testing.assert_allclose(weights, reference, atol=2e-5)
    assert [s.tokens for s in stats] == [
        b.trained_tokens for b in (batches()[0], batches()[1], batches()[1], batches()[2])
    ]
    assert all(s.grad_norm > 0 for s in stats)
