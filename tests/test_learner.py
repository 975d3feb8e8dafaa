"""DeepSpeed learners: contract 3, checkpoints, and the engine's agreement. Real processes, real gloo."""

from __future__ import annotations

import copy
import queue
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from apr_ray.config import LearnerConfig, ModelConfig, OptimizerConfig
from apr_ray.core.batch import TrainBatch, TrainSequence, lay_out
from apr_ray.core.errors import AprError
from apr_ray.core.weights import WeightVersion
from apr_ray.learner.device import init_process_group, multiplies_bf16
from apr_ray.learner.trainer import GrpoStep, StepStats, Trainer, merge
from apr_ray.model.llama import load_policy, new_policy
from apr_ray.model.state import pack_weights, trainable_parameters
from apr_ray.rl.losses import token_entropy, token_logprobs
from apr_ray.rl.mismatch import Correction
from apr_ray.tasks.countdown.tokenizer import build_tokenizer

MODEL = ModelConfig(hidden_size=32, layers=2, heads=2, ffn_size=48, context_tokens=128)
STEP = GrpoStep(clip=0.2, kl_coefficient=0.01, temperature=1.0, inner_steps=2)
CORRECTED = [
    GrpoStep(0.2, 0.01, 1.0, 1, "proximal", Correction("truncate", "token", 1.1)),
    GrpoStep(0.2, 0.01, 1.0, 2, "proximal", Correction("mask", "call", 1.5, from_delta=1e-6)),
    GrpoStep(0.2, 0.01, 1.0, 2, "proximal", Correction("mask", "tree", 2.0)),
    GrpoStep(0.2, 0.01, 1.0, 2, "proximal", Correction("truncate", "token", 1.1, from_delta=100.0)),
]
"""Ratios against the start of the batch, with importance weights; in the last one Δ is too small for them."""
RATE = 1e-3


def drawn_nearby() -> TrainBatch:
    """Seven trees of three calls, drawn by a policy not far from a new one, which is nearly uniform."""
    rng = np.random.default_rng(1)
    return lay_out(
        [
            TrainSequence(
                rng.integers(0, 57, n).tolist(),
                (rng.random(n) / 500).tolist(),
                rng.normal(size=n).tolist(),
                (0.1 * rng.normal(size=n) - np.log(57)).tolist(),
                rng.integers(0, 2, n).tolist(),
                number // 3,
            )
            for number, n in enumerate(rng.integers(3, 80, 21))
        ]
    )


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


@dataclass(frozen=True, slots=True)
class Case:
    """One way to take the same steps. `shuffled`: the sequences of every batch in another order. `sleeps`: before and
    after every step."""

    zero: int
    budget: int
    shuffled: bool = False
    sleeps: bool = False


@dataclass(frozen=True, slots=True)
class Learned:
    """What one rank came to: its stats, the weights after all steps, those of the last step taken again after a load,
    and how far its logprobs and its reference are from a plain module with the same weights. `forwards`: forward passes
    per micro-batch in each step of `CORRECTED`."""

    stats: list[StepStats]
    forwards: list[float]
    weights: np.ndarray[Any, Any]
    again: np.ndarray[Any, Any]
    logprobs_off: float
    saved_off: float


def shuffle(batch: TrainBatch) -> TrainBatch:
    spans = list(pairwise(batch.offsets))
    order = np.random.default_rng(5).permutation(len(spans))
    return lay_out(
        [
            TrainSequence(*(c[spans[i][0] : spans[i][1]].tolist() for c in (
                batch.tokens, batch.loss_weights, batch.advantages, batch.behaviour_logprobs, batch.versions
            )), tree=int(batch.trees[i]))
            for i in order
        ]
    )  # fmt: skip


def learn(case: Case, rank: int, world: int, folder: Path) -> Learned:
    """A job of one rank: a supervised step, GRPO steps, save; then a step, load, and the same step again."""
    config = LearnerConfig(
        zero_stage=case.zero,  # type: ignore[arg-type]
        micro_batch_tokens=case.budget,
        ranks=world,
        zero3_whole_parameters=100,  # so that all matrices of this small model are shared
    )
    trainer = Trainer(
        new_policy(MODEL, build_tokenizer(), 0), config, OptimizerConfig(learning_rate=RATE, grad_clip=0.5), rank, world
    )
    first, second, third, near = (shuffle(b) if case.shuffled else b for b in (*batches(), drawn_nearby()))

    @contextmanager
    def turn() -> Iterator[None]:
        if case.sleeps:
            trainer.wake()
        yield
        if case.sleeps:
            trainer.sleep()

    if case.sleeps:
        trainer.sleep()
    with turn():
        stats = [trainer.sft_step(first, RATE)]
    trainer.freeze_reference()
    with turn():
        stats += trainer.grpo_step(second, STEP, RATE)
    calls: list[int] = []
    trainer.policy.register_forward_hook(lambda *_: calls.append(1))
    forwards = []
    for step in CORRECTED:
        calls.clear()
        with turn():
            stats += trainer.grpo_step(near, step, RATE)
        forwards.append(len(calls) / len(trainer.plan(near)))
    trainer.save(folder)
    with turn():
        stats.append(trainer.sft_step(third, RATE))
    after = trainer.weights(version()).flat.copy()
    if case.zero == 3:
        assert any(p.numel() == 0 for p in trainer.policy.parameters()), "no parameter is shared"
    trainer.freeze_reference()
    plain = trainer.reference
    sequences = [third.tokens[a:b].tolist() for a, b in list(pairwise(third.offsets))[:3]]
    off = 0.0
    for ids, found in zip(sequences, trainer.logprobs(sequences, 0.7), strict=True):
        with torch.no_grad():
            tokens = torch.tensor([ids])
            off = max(off, float(np.abs(token_logprobs(plain(tokens).logits, tokens, 0.7)[0].numpy() - found).max()))
    with trainer.whole_policy() as policy:
        if rank == 0:
            policy.save_pretrained(folder / "policy")
    if case.sleeps:
        trainer.wake()
    trainer.load(folder)
    trainer.sft_step(third, RATE)
    again = trainer.weights(version()).flat.copy()
    saved_off = float("nan")
    if rank == 0:
        saved = pack_weights(trainable_parameters(load_policy(folder / "policy")), version()).flat
        saved_off = float(np.abs(saved - after).max())
    return Learned(stats, forwards, after, again, off, saved_off)


Job = Callable[[int, int, Path], Any]
"""What a rank does and comes to, given its number, that of all, and a folder."""


def work(rank: int, world: int, port: int, jobs: Sequence[Job], results: Any, folder: str) -> None:
    """Every job in one process group: starting one takes longer than all their steps."""
    torch.set_num_threads(1)
    init_process_group(rank, world, "127.0.0.1", port)
    for number, job in enumerate(jobs):
        results.put((number, rank, job(rank, world, Path(folder) / str(number))))


def version() -> Any:
    return WeightVersion(0, 1)


def run_group(world: int, jobs: Sequence[Job], folder: Path) -> list[list[Any]]:
    """What each rank came to, by job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, world, port, jobs, results, str(folder))) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: list[tuple[int, int, Any]] = []
    while len(found) < world * len(jobs):
        try:
            found.append(results.get(timeout=1))
        except queue.Empty:
            assert not any(process.exitcode for process in processes), "a rank failed; its traceback is above"
    for process in processes:
        process.join()
    found.sort(key=lambda r: r[:2])
    return [[f[2] for f in found if f[0] == number] for number in range(len(jobs))]


@dataclass(frozen=True, slots=True)
class Reference:
    """Where plain torch arrives, and each step's gradient norm: AdamW hides a gradient of the wrong scale. Of the steps
    in `CORRECTED`: how many tokens' weights are cut, and Σ Δ of every tree."""

    weights: np.ndarray[Any, Any]
    norms: list[float]
    cut: list[int]
    tree_sums: list[list[float]]


def plain_reference() -> Reference:
    """The same steps in plain torch: one sequence at a time, no DeepSpeed, no micro-batches."""
    norms: list[float] = []
    policy: Any = new_policy(MODEL, build_tokenizer(), 0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)

    def rows(batch: TrainBatch) -> Any:
        for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
            yield [torch.from_numpy(c[a:b])[None] for c in (
                batch.tokens, batch.loss_weights, batch.advantages, batch.behaviour_logprobs
            )]  # fmt: skip

    def update() -> None:
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()

    def supervised(batch: TrainBatch) -> None:
        for tokens, weights, _, _ in rows(batch):
            (-(weights * token_logprobs(policy(tokens).logits, tokens)).sum()).backward()
        update()

    def corrected(batch: TrainBatch, step: GrpoStep) -> None:
        """The proximal logprobs first, then the importance weights, then the steps."""
        how = step.correction
        assert how is not None
        with torch.no_grad():
            starts = [token_logprobs(policy(tokens).logits, tokens) for tokens, *_ in rows(batch)]
            anchors = [token_logprobs(frozen(tokens).logits, tokens) for tokens, *_ in rows(batch)]
        trained = [weights != 0 for _, weights, *_ in rows(batch)]
        deltas = [
            ((start - old) * used).double() for start, used, (*_, old) in zip(starts, trained, rows(batch), strict=True)
        ]
        trees = [sum(float(d.sum()) for d, t in zip(deltas, batch.trees, strict=True) if t == n) for n in range(7)]
        near = sum(float(d.abs().sum()) for d in deltas) / batch.trained_tokens <= how.from_delta
        factors = []
        cut.append(0)
        for delta, tree, used in zip(deltas, batch.trees, trained, strict=True):
            weight = {"token": delta, "call": delta.sum(), "tree": torch.tensor(trees[tree])}[how.level].exp()
            below = weight < 1 / how.cap if how.kind == "mask" else torch.tensor(False)
            outside = (weight > how.cap) | below
            weight = torch.where(outside, how.cap if how.kind == "truncate" else 0.0, weight)
            factors.append(torch.tensor(1.0) if near else weight.float())
            cut[-1] += 0 if near else int((outside & used).sum())
        tree_sums.append(trees)
        for _ in range(step.inner_steps):
            for (tokens, weights, advantages, _), start, factor, anchor in zip(
                rows(batch), starts, factors, anchors, strict=True
            ):
                logprobs = token_logprobs(policy(tokens).logits, tokens)
                ratio = (logprobs - start).exp()
                surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
                delta = anchor - logprobs
                kl = delta.exp() - 1 - delta
                (weights * (step.kl_coefficient * kl - factor * surrogate)).sum().backward()
            update()

    cut: list[int] = []
    tree_sums: list[list[float]] = []
    first, second, third = batches()
    supervised(first)
    frozen = copy.deepcopy(policy)
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
    for step in CORRECTED:
        corrected(drawn_nearby(), step)
    supervised(third)
    flat = torch.cat([p.detach().reshape(-1) for p in policy.parameters()]).numpy()
    return Reference(flat, norms, cut, tree_sums)


@pytest.fixture(scope="module")
def reference() -> Reference:
    found = plain_reference()
    *some, none = found.cut
    assert all(0.05 < cut / drawn_nearby().trained_tokens < 0.95 for cut in some), found.cut
    assert none == 0
    return found


def check(cases: Sequence[Case], found: Sequence[list[Learned]], reference: Reference) -> None:
    for case, ranks in zip(cases, found, strict=True):
        weights, again = ranks[0].weights, ranks[0].again
        for other in ranks[1:]:
            np.testing.assert_array_equal(other.weights, weights, err_msg=f"{case}: ranks differ")
        off = float(np.abs(weights - reference.weights).max() / np.abs(reference.weights).max())
        assert off < 1e-5, f"{case} with {len(ranks)} ranks: weights are off by {off:.1e} of the largest"
        np.testing.assert_allclose(again, weights, rtol=1e-6, atol=1e-8, err_msg=f"{case}: a resumed step differs")
        stats = [merge(parts) for parts in zip(*(r.stats for r in ranks), strict=True)]
        first, second, third = batches()
        near = [drawn_nearby()] * sum(step.inner_steps for step in CORRECTED)
        assert [s.tokens for s in stats] == [b.trained_tokens for b in (first, second, second, *near, third)]
        for ours in ranks:
            assert ours.forwards == [1, 3, 3, 3], "a pass too many, or one was left out"
        starts = [s for s in stats[3:] if s.mismatch is not None]
        assert [s.cut for s in starts] == reference.cut
        for start, sums in zip(starts, reference.tree_sums, strict=True):
            assert start.mismatch is not None
            assert start.mismatch.tree_max == pytest.approx(max(map(abs, sums)), rel=1e-4)
            assert sum(v.tokens for v in start.mismatch.versions.values()) == start.tokens
            assert set(start.mismatch.versions) == {0, 1}
        assert [s.grad_norm for s in stats] == pytest.approx(reference.norms, rel=1e-4), case
        assert ranks[0].logprobs_off < 1e-5
        assert ranks[0].saved_off == 0.0


CASES = [Case(0, 200, True), Case(1, 4096), Case(2, 90), Case(3, 200, True)]
ASLEEP_BETWEEN_STEPS = [Case(zero, 4096, sleeps=True) for zero in range(4)]


@dataclass(frozen=True, slots=True)
class Alone:
    """What a group of one rank came to."""

    cases: list[list[Learned]]
    asleep_between_steps: list[list[Learned]]
    in_bf16: list[tuple[Any, ...]]
    not_finite: list[tuple[Any, ...]]
    last_norm: list[np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    jobs = [
        *(partial(learn, case) for case in (*CASES, *ASLEEP_BETWEEN_STEPS)),
        steps_in_bf16,
        a_step_that_is_not_finite,
        steps_of_the_last_norm,
    ]
    found = run_group(1, jobs, tmp_path_factory.mktemp("alone"))
    return Alone(found[: len(CASES)], found[len(CASES) : -3], *(of[0] for of in found[-3:]))


@pytest.mark.timeout(1200)
def test_the_weights_depend_on_neither_micro_batches_nor_order_nor_zero(alone: Alone, reference: Reference) -> None:
    """Contract 3: after supervised and GRPO steps the weights are those of plain torch, one sequence at a time. Calls
    of one tree lie in several micro-batches; importance weights of trees are the same all the same."""
    check(CASES, alone.cases, reference)


@pytest.mark.timeout(1200)
def test_the_weights_do_not_depend_on_the_number_of_ranks(reference: Reference, tmp_path: Path) -> None:
    """Contract 3 where calls of one tree lie in several ranks."""
    check(CASES, run_group(2, [partial(learn, case) for case in CASES], tmp_path), reference)


def test_learners_that_sleep_between_their_steps_learn_the_same(alone: Alone, reference: Reference) -> None:
    """At every ZeRO stage; saved and read while they sleep. On a CPU nothing moves, but DeepSpeed goes the same way."""
    check(ASLEEP_BETWEEN_STEPS, alone.asleep_between_steps, reference)


def steps_in_bf16(rank: int, world: int, folder: Path) -> list[tuple[Any, ...]]:
    """A job: at each ZeRO stage, a GRPO step's entropy and a supervised step's loss, in float32 and in bfloat16."""
    batch, asked, found = batches()[0], torch.is_autocast_enabled, []
    for zero in range(4):
        learner = LearnerConfig(zero_stage=zero, zero3_whole_parameters=100)  # type: ignore[arg-type]
        trainer = Trainer(new_policy(MODEL, build_tokenizer(), 0), learner, OptimizerConfig(learning_rate=RATE))
        trainer.freeze_reference()
        step = replace(STEP, inner_steps=1)
        exact = trainer.grpo_step(batch, step, 0.0)[0].entropy, trainer.sft_step(batch, 0.0).loss
        # Asked without a device, torch tells of an autocast for GPUs only; DeepSpeed switches off what it is told of.
        with patch.object(torch, "is_autocast_enabled", lambda *of: asked(*(of or ("cpu",)))):
            (grpo,) = trainer.grpo_step(batch, replace(step, bf16=True), 0.0)
            rough = grpo.entropy, trainer.sft_step(batch, 0.0, bf16=True).loss
        assert abs(grpo.kl) < 1e-6, "the reference was not computed as the policy was"
        found.append((zero, exact, rough))
    return found


def test_a_step_in_bfloat16_is_one_inside_deepspeed(alone: Alone) -> None:
    policy: Any = new_policy(MODEL, build_tokenizer(), 0)
    batch, entropy, loss = batches()[0], 0.0, 0.0
    for a, b in pairwise(batch.offsets):
        tokens, weights = (torch.from_numpy(c[a:b])[None] for c in (batch.tokens, batch.loss_weights))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = policy(tokens).logits
        entropy += float((weights * token_entropy(logits)).sum())
        loss -= float((weights * token_logprobs(logits, tokens)).sum())
    for zero, exact, rough in alone.in_bf16:
        assert rough[0] != exact[0], f"ZeRO stage {zero}: computed in float32"
        assert rough[1] != exact[1], f"ZeRO stage {zero}: computed in float32"
        assert rough == pytest.approx((entropy, loss), rel=1e-4), f"ZeRO stage {zero}"


def a_step_that_is_not_finite(rank: int, world: int, folder: Path) -> list[tuple[Any, ...]]:
    """A job: at each ZeRO stage, what a step on a batch with a NaN says, and whether the weights are as they were."""
    batch, found = batches()[0], []
    broken = replace(batch, loss_weights=batch.loss_weights.copy())
    broken.loss_weights[5] = np.nan
    for zero in range(4):
        learner = LearnerConfig(zero_stage=zero, zero3_whole_parameters=100)  # type: ignore[arg-type]
        trainer = Trainer(new_policy(MODEL, build_tokenizer(), 0), learner, OptimizerConfig(learning_rate=RATE))
        before, said = trainer.weights(version()).flat.copy(), ""
        try:
            trainer.sft_step(broken, RATE)
        except AprError as error:
            said = str(error)
        found.append((zero, said, np.array_equal(before, trainer.weights(version()).flat)))
    return found


def test_a_gradient_that_is_not_finite_ends_the_run_and_changes_nothing(alone: Alone) -> None:
    for zero, said, unchanged in alone.not_finite:
        assert "no step was taken" in said, f"ZeRO stage {zero}"
        assert unchanged, f"ZeRO stage {zero}"


LAST_NORM = OptimizerConfig(learning_rate=RATE, eps=1e-4, grad_clip=0.5, final_norm_scale=80)


def steps_of_the_last_norm(rank: int, world: int, folder: Path) -> list[np.ndarray[Any, Any]]:
    """A job: the weights after two steps with `final_norm_scale`, a load before the second, by ZeRO stage."""
    found = []
    for zero in range(4):
        learner = LearnerConfig(zero_stage=zero, zero3_whole_parameters=100)  # type: ignore[arg-type]
        trainer = Trainer(new_policy(MODEL, build_tokenizer(), 0), learner, LAST_NORM)
        trainer.sft_step(batches()[0], RATE)
        trainer.save(folder / str(zero))
        trainer.load(folder / str(zero))
        trainer.sft_step(batches()[1], RATE / 2)
        found.append(trainer.weights(version()).flat.copy())
    return found


def test_the_last_norms_gains_have_a_rate_of_their_own(alone: Alone) -> None:
    policy: Any = new_policy(MODEL, build_tokenizer(), 0)
    last = policy.model.norm.weight
    groups = [
        {"params": [p for p in policy.parameters() if p is not last], "eps": 1e-4},
        {"params": [last], "eps": 1e-8},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    for batch, rate in zip(batches()[:2], (RATE, RATE / 2), strict=True):
        for group, scale in zip(optimizer.param_groups, (1, 80), strict=True):
            group["lr"] = rate * scale
        for a, b in pairwise(batch.offsets):
            tokens, weights = (torch.from_numpy(c[a:b])[None] for c in (batch.tokens, batch.loss_weights))
            (-(weights * token_logprobs(policy(tokens).logits, tokens)).sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.cat([p.detach().reshape(-1) for p in policy.parameters()]).numpy()
    for zero, found in enumerate(alone.last_norm):
        off = float(np.abs(found - expected).max() / np.abs(expected).max())
        assert off < 1e-5, f"ZeRO stage {zero}: weights are off by {off:.1e} of the largest"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [1, 2])
def test_contract_3_on_the_whole_grid(world: int, reference: Reference, tmp_path: Path) -> None:
    cases = [Case(*c) for c in product((0, 1, 2, 3), (1, 90, 200, 700, 4096), (False, True))]
    check(cases, run_group(world, [partial(learn, case) for case in cases], tmp_path), reference)


def test_a_processor_says_whether_it_multiplies_bfloat16() -> None:
    """As the kernel lists its instructions; without them a step in bf16 is several times slower."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert multiplies_bf16(torch.device("cpu")) == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
