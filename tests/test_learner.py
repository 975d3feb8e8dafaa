"""DeepSpeed learners: contract 3, checkpoints, and the engine's agreement. Real processes, real gloo."""

from __future__ import annotations

import copy
import queue
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import strategies as st

from apr_ray.config import LearnerConfig, ModelConfig, OptimizerConfig
from apr_ray.core.batch import TrainBatch, TrainSequence, lay_out
from apr_ray.core.errors import AprError
from apr_ray.core.weights import TensorSpec, WeightUpdate, WeightVersion
from apr_ray.learner.device import init_process_group
from apr_ray.learner.precision import StepTimes, slowest, time_precisions, widen_head
from apr_ray.learner.steps import GrpoStep, StepStats, merge
from apr_ray.learner.trainer import Trainer
from apr_ray.model.llama import load_policy, new_policy, read_task
from apr_ray.model.shipped import SHIPPED
from apr_ray.model.state import pack_weights, trainable_parameters
from apr_ray.rl.losses import token_entropy, token_logprobs
from apr_ray.rl.mismatch import Correction
from apr_ray.tasks.countdown.tokenizer import build_tokenizer
from apr_ray.tasks.registry import load_task

MODEL = ModelConfig(hidden_size=32, layers=2, heads=2, ffn_size=48, context_tokens=128)
STEP = GrpoStep(clip=0.2, kl_coefficient=0.5, temperature=0.8, inner_steps=2)
CORRECTED = [
    GrpoStep(0.05, 0.5, 1.0, 1, "proximal", Correction("truncate", "token", 1.1)),
    GrpoStep(0.05, 0.5, 1.0, 2, "proximal", Correction("mask", "call", 1.5, from_delta=1e-6)),
    GrpoStep(0.05, 0.5, 1.0, 2, "proximal", Correction("mask", "tree", 2.0)),
    GrpoStep(0.05, 0.5, 1.0, 2, "proximal", Correction("truncate", "token", 1.1, from_delta=100.0)),
]
"""Ratios against the start of the batch, with importance weights; in the last one Δ is too small for them."""
RATE = 1e-3
PROPORTIONAL = OptimizerConfig(learning_rate=1.5, eps=1.0, grad_clip=0.15, weight_decay=1e-3)
"""AdamW whose steps are nearly in proportion to the gradient: with a small `eps`, a gradient of the wrong scale makes
the same step, and rounding in a gradient near 0 makes a large one. It clips some of the gradients here."""


def drawn(rng: np.random.Generator, behaviour: Callable[[int], np.ndarray[Any, Any]]) -> TrainBatch:
    """Seven trees of three calls, each with a prompt; `behaviour` gives the logprobs of as many tokens."""
    sequences = []
    for number, n in enumerate(rng.integers(3, 80, 21)):
        weights = rng.random(n) / 500
        weights[: 1 + n // 4] = 0.0
        tokens, versions = rng.integers(0, 57, n), rng.integers(0, 2, n)
        fields: list[Any] = [tokens, weights, rng.normal(size=n), behaviour(n), versions, number // 3]
        sequences.append(TrainSequence(*fields))
    return lay_out(sequences)


def drawn_nearby() -> TrainBatch:
    """By a policy not far from a new one, which is nearly uniform."""
    rng = np.random.default_rng(1)
    return drawn(rng, lambda n: 0.1 * rng.normal(size=n) - np.log(57))


def batches(count: int = 3) -> list[TrainBatch]:
    rng = np.random.default_rng(0)
    return [drawn(rng, lambda n: -4 * rng.random(n)) for _ in range(count)]


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


def reordered(batch: TrainBatch, order: Sequence[int]) -> TrainBatch:
    """The same sequences, one after the other in this order."""
    columns = (batch.tokens, batch.loss_weights, batch.advantages, batch.behaviour_logprobs, batch.versions)
    spans = zip(pairwise(batch.offsets), batch.trees, strict=True)
    fields: list[list[Any]] = [[*(column[a:b] for column in columns), tree] for (a, b), tree in spans]
    return lay_out([TrainSequence(*fields[i]) for i in order])


def fresh_policy(seed: int = 0) -> Any:
    return new_policy(MODEL, build_tokenizer(), seed)


def learn(case: Case, rank: int, world: int, folder: Path) -> Learned:
    """A job of one rank: a supervised step, GRPO steps, save; then a step, load, and the same step again."""
    config = LearnerConfig(
        zero_stage=case.zero,  # type: ignore[arg-type]
        micro_batch_tokens=case.budget,
        ranks=world,
        zero3_whole_parameters=100,  # so that all matrices of this small model are shared
    )
    trainer, rate = Trainer(fresh_policy(), config, PROPORTIONAL, rank, world), PROPORTIONAL.learning_rate
    order: Sequence[int] = np.random.default_rng(5).permutation(21).tolist() if case.shuffled else range(21)
    first, second, third, near = (reordered(batch, order) for batch in (*batches(), drawn_nearby()))

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
        stats = [trainer.sft_step(first, rate)]
    trainer.freeze_reference()
    with turn():
        stats += trainer.grpo_step(second, STEP, rate)
    calls: list[int] = []
    trainer.policy.register_forward_hook(lambda *_: calls.append(1))
    forwards = []
    for step in CORRECTED:
        calls.clear()
        with turn():
            stats += trainer.grpo_step(near, step, rate)
        forwards.append(len(calls) / len(trainer.plan(near)))
    trainer.save(folder)
    with turn():
        stats.append(trainer.sft_step(third, rate))
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
    trainer.sft_step(third, rate)
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
class PlainStep:
    """What plain torch says of an inner step, as `StepStats` has it. `loss_terms`: Σ |weight × loss of a token|. Losses
    of both signs cancel, so an error of the loss is seen against that; the terms of KL and entropy have one sign."""

    loss: float
    loss_terms: float
    kl: float
    entropy: float
    clipped: float
    cut: float
    tokens: float
    grad_norm: float = float("nan")


def plain_rows(batch: TrainBatch) -> Iterator[list[torch.Tensor]]:
    columns = (batch.tokens, batch.loss_weights, batch.advantages, batch.behaviour_logprobs)
    for a, b in pairwise(batch.offsets):
        yield [torch.from_numpy(column[a:b]) for column in columns]


def plain_logprobs(policy: Any, tokens: torch.Tensor, temperature: float) -> tuple[Any, Any]:
    """Of one sequence: its tokens' logprobs, and the entropies of what they were drawn from; 0 at the first."""
    logprobs = torch.log_softmax(policy(tokens[None]).logits[0, :-1].double() / temperature, dim=-1)
    first = torch.zeros(1, dtype=torch.float64)
    picked = logprobs[torch.arange(len(tokens) - 1), tokens[1:]]
    return torch.cat([first, picked]), torch.cat([first, -(logprobs.exp() * logprobs).sum(dim=-1)])


@dataclass(frozen=True, slots=True)
class Start:
    """What is known of a sequence before the first inner step, per token; `anchor` is of the reference policy, `cut`
    says which importance weights are."""

    proximal: torch.Tensor
    anchor: torch.Tensor
    importance: torch.Tensor
    cut: torch.Tensor


class Plain:
    """The learner's steps in plain torch: one sequence at a time, in float64 from the logits on, no DeepSpeed, no
    padding, none of the learner's losses. `tree_sums`: Σ Δ of every tree, by GRPO step on `CORRECTED`."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        self.policy = fresh_policy()
        self.reference = self.policy
        self.adamw = torch.optim.AdamW(
            self.policy.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self.grad_clip = optimizer.grad_clip
        self.steps: list[PlainStep] = []
        self.tree_sums: list[list[float]] = []

    def sft_step(self, batch: TrainBatch) -> None:
        self.update(self.sft_backward(batch))

    def grpo_step(self, batch: TrainBatch, step: GrpoStep) -> None:
        starts = self.at_the_start(batch, step)
        for _ in range(step.inner_steps):
            self.update(self.grpo_backward(batch, step, starts))

    def update(self, step: PlainStep) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.grad_clip)
        self.adamw.step()
        self.adamw.zero_grad()
        self.steps.append(replace(step, grad_norm=float(norm)))

    def sft_backward(self, batch: TrainBatch) -> PlainStep:
        total = 0.0
        for tokens, weights, *_ in plain_rows(batch):
            loss = -(weights * plain_logprobs(self.policy, tokens, 1.0)[0]).sum()
            loss.backward()
            total += float(loss.detach())
        return PlainStep(total, total, 0.0, 0.0, 0, 0, int((batch.loss_weights != 0).sum()))

    @torch.no_grad()
    def at_the_start(self, batch: TrainBatch, step: GrpoStep) -> list[Start]:
        rows, how = list(plain_rows(batch)), step.correction
        proximal, anchor = (
            [plain_logprobs(policy, tokens, step.temperature)[0] for tokens, *_ in rows]
            for policy in (self.policy, self.reference)
        )
        starts = [Start(p, a, torch.ones_like(p), torch.zeros_like(p)) for p, a in zip(proximal, anchor, strict=True)]
        if how is None:
            return starts
        deltas = [(p - behaviour) * (w != 0) for p, (_, w, _, behaviour) in zip(proximal, rows, strict=True)]
        trees = [sum(d.sum() for d, t in zip(deltas, batch.trees, strict=True) if t == n) for n in range(7)]
        self.tree_sums.append([float(of) for of in trees])
        if sum(float(d.abs().sum()) for d in deltas) / batch.trained_tokens <= how.from_delta:
            return starts
        weighed = []
        for start, delta, tree in zip(starts, deltas, batch.trees, strict=True):
            weight = {"token": delta, "call": delta.sum(), "tree": trees[tree]}[how.level].exp().expand_as(delta)
            cut = weight > how.cap
            if how.kind == "mask":
                cut |= weight < 1 / how.cap
            weight = torch.where(cut, how.cap if how.kind == "truncate" else 0.0, weight)
            weighed.append(replace(start, importance=weight, cut=cut))
        return weighed

    def grpo_backward(self, batch: TrainBatch, step: GrpoStep, starts: Sequence[Start]) -> PlainStep:
        sums = torch.zeros(7, dtype=torch.float64)
        for (tokens, weights, advantages, behaviour), start in zip(plain_rows(batch), starts, strict=True):
            logprobs, entropy = plain_logprobs(self.policy, tokens, step.temperature)
            ratio = torch.exp(logprobs - (start.proximal if step.ratio == "proximal" else behaviour))
            free, clipped = ratio * advantages, ratio.clamp(1 - step.clip, 1 + step.clip) * advantages
            kl = torch.exp(start.anchor - logprobs) - 1 - (start.anchor - logprobs)
            loss = weights * (step.kl_coefficient * kl - start.importance * torch.minimum(free, clipped))
            loss.sum().backward()
            used = (weights != 0).double()
            terms = [loss, loss.abs(), weights * kl, weights * entropy, used * (clipped < free), used * start.cut, used]
            sums += torch.stack(terms).detach().sum(dim=1)
        return PlainStep(*sums.tolist())


@dataclass(frozen=True, slots=True)
class Reference:
    """Where plain torch goes. `tree_sums`: see `Plain`."""

    start: WeightUpdate
    end: WeightUpdate
    steps: list[PlainStep]
    tree_sums: list[list[float]]


def weights_of(policy: Any) -> WeightUpdate:
    return pack_weights(trainable_parameters(policy), version())


@pytest.fixture(scope="module")
def reference() -> Reference:
    """The steps of `learn`, in which everything happens that is compared."""
    plain = Plain(PROPORTIONAL)
    first, second, third = batches()
    start = weights_of(plain.policy)
    plain.sft_step(first)
    plain.reference = copy.deepcopy(plain.policy)
    plain.grpo_step(second, STEP)
    for step in CORRECTED:
        plain.grpo_step(drawn_nearby(), step)
    plain.sft_step(third)
    steps = plain.steps
    assert [n for n, step in enumerate(steps) if step.cut] == [3, 4, 5, 6, 7]
    assert all(0.05 < step.cut / step.tokens < 0.95 for step in steps if step.cut)
    assert [n for n, step in enumerate(steps) if step.clipped] == [1, 2, 5, 7, 9]
    assert all(step.kl > 1e-4 for step in steps[2:-1])
    assert min(step.grad_norm for step in steps) < plain.grad_clip < max(step.grad_norm for step in steps)
    return Reference(start, weights_of(plain.policy), steps, plain.tree_sums)


def check_step(found: StepStats, plain: PlainStep, where: str) -> None:
    """Counts exactly, sums to 1e-5 of the sum of their terms' absolute values; a KL may be 0.

    The norm is off by up to 4e-6 where calls are weighed by exp of a sum over their tree, else by 1e-6.
    """
    for name in ("tokens", "clipped", "cut"):
        assert getattr(found, name) == getattr(plain, name), f"{where}: {name}"
    sums = {"loss": plain.loss_terms, "kl": plain.kl, "entropy": plain.entropy, "grad_norm": plain.grad_norm}
    for name, size in sums.items():
        off = abs(getattr(found, name) - getattr(plain, name))
        assert off <= 1e-5 * size + 1e-12, f"{where}: {name} is off by {off:.1e} where {size:.1e} is summed"


def check_tensors(found: Any, expected: Any, specs: Sequence[TensorSpec], where: str) -> None:
    """Two flat forms of gradients or updates: every parameter to 1e-5 of the largest number in it."""
    for spec in specs:
        part = slice(spec.offset, spec.offset + spec.size)
        off = np.abs(found[part] - expected[part]).max() / np.abs(expected[part]).max()
        assert off < 1e-5, f"{where}: {spec.name} is off by {off:.1e} of its largest"


def check(cases: Sequence[Case], found: Sequence[list[Learned]], reference: Reference) -> None:
    start, end = reference.start.flat, reference.end.flat
    for case, ranks in zip(cases, found, strict=True):
        where = f"{case} with {len(ranks)} ranks"
        weights, again = ranks[0].weights, ranks[0].again
        for other in ranks[1:]:
            np.testing.assert_array_equal(other.weights, weights, err_msg=f"{where}: ranks differ")
        stats = [merge(parts) for parts in zip(*(r.stats for r in ranks), strict=True)]
        for number, (step, plain) in enumerate(zip(stats, reference.steps, strict=True)):
            check_step(step, plain, f"{where}, step {number}")
        check_tensors(weights - start, end - start, reference.end.specs, f"{where}, updates")
        np.testing.assert_allclose(again, weights, rtol=1e-6, atol=1e-8, err_msg=f"{where}: a resumed step differs")
        for ours in ranks:
            assert ours.forwards == [1, 3, 3, 3], "a pass too many, or one was left out"
        starts = [s for s in stats[3:] if s.mismatch is not None]
        for of, sums in zip(starts, reference.tree_sums, strict=True):
            assert of.mismatch is not None
            assert of.mismatch.tree_max == pytest.approx(max(map(abs, sums)), rel=1e-5)
            assert sum(v.tokens for v in of.mismatch.versions.values()) == of.tokens
            assert set(of.mismatch.versions) == {0, 1}
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
    in_any_order: str


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    jobs: list[Job] = [
        *(partial(learn, case) for case in (*CASES, *ASLEEP_BETWEEN_STEPS)),
        steps_in_bf16,
        a_step_that_is_not_finite,
        steps_of_the_last_norm,
        partial(gradients_in_any_order, hypothesis.settings().derandomize),
    ]
    found = run_group(1, jobs, tmp_path_factory.mktemp("alone"))
    return Alone(found[: len(CASES)], found[len(CASES) : -4], *(of[0] for of in found[-4:]))


@pytest.mark.timeout(1200)
def test_losses_and_weights_depend_on_neither_micro_batches_nor_order_nor_zero(
    alone: Alone, reference: Reference
) -> None:
    """Contract 3: every supervised and GRPO step has the loss, KL, entropy, clipped and cut tokens and gradient norm of
    plain torch, one sequence at a time, and all together its updates. Calls of one tree lie in several micro-batches;
    importance weights of trees are the same all the same."""
    check(CASES, alone.cases, reference)


@pytest.mark.timeout(1200)
def test_losses_and_weights_do_not_depend_on_the_number_of_ranks(reference: Reference, tmp_path: Path) -> None:
    """Contract 3 where calls of one tree lie in several ranks."""
    check(CASES, run_group(2, [partial(learn, case) for case in CASES], tmp_path), reference)


def test_learners_that_sleep_between_their_steps_learn_the_same(alone: Alone, reference: Reference) -> None:
    """At every ZeRO stage; saved and read while they sleep. On a CPU nothing moves, but DeepSpeed goes the same way."""
    check(ASLEEP_BETWEEN_STEPS, alone.asleep_between_steps, reference)


def gradients_in_any_order(same_examples: bool, rank: int, world: int, folder: Path) -> str:
    """A job: a policy at rest takes steps in micro-batches of any size, of sequences in any order. What fails and in
    which example, or ""."""
    batch, other = drawn_nearby(), fresh_policy(1)
    trainer = Trainer(fresh_policy(), LearnerConfig(), OptimizerConfig(learning_rate=RATE, grad_clip=1e9))
    plain = Plain(PROPORTIONAL)
    trainer.reference = plain.reference = other
    specs = weights_of(other).specs

    def gradient(policy: Any) -> np.ndarray[Any, Any]:
        return torch.cat([p.grad.reshape(-1) for p in policy.parameters()]).numpy()

    found: list[np.ndarray[Any, Any]] = []
    trainer.base_optimizer.register_step_pre_hook(lambda *_: found.append(gradient(trainer.policy)))
    steps = {
        "supervised": None,
        "behaviour": replace(STEP, inner_steps=1),
        "tree": replace(CORRECTED[2], inner_steps=1),
    }
    expected = {}
    for kind, step in steps.items():
        one = plain.grpo_backward(batch, step, plain.at_the_start(batch, step)) if step else plain.sft_backward(batch)
        flat = gradient(plain.policy)
        expected[kind] = replace(one, grad_norm=float(np.linalg.norm(flat))), flat
        plain.adamw.zero_grad()

    @hypothesis.settings(
        deadline=None,
        database=None,
        derandomize=same_examples,
        max_examples=12,
        phases=[hypothesis.Phase.generate],  # shrinking takes minutes, and no order is simpler than another
    )
    @hypothesis.given(st.integers(1, 2000), st.permutations(range(21)))
    def as_plain_torch(budget: int, order: list[int]) -> None:
        trainer.learner = trainer.learner.model_copy(update={"micro_batch_tokens": budget})
        mixed = reordered(batch, order)
        for kind, step in steps.items():
            stats = trainer.grpo_step(mixed, step, 0.0)[0] if step else trainer.sft_step(mixed, 0.0)
            check_step(stats, expected[kind][0], kind)
            check_tensors(found.pop(), expected[kind][1], specs, f"{kind}, gradient")

    try:
        as_plain_torch()
    except AssertionError:
        return traceback.format_exc()
    return ""


@pytest.mark.property
def test_losses_and_gradients_are_the_same_in_any_order_and_micro_batches(alone: Alone) -> None:
    """Contract 3 for many more of them, on one rank at ZeRO stage 0."""
    assert not alone.in_any_order, alone.in_any_order


def sharp_policy() -> Any:
    """A policy that is sure of itself: of a fresh one bfloat16 changes less than float32 shows."""
    return new_policy(MODEL.model_copy(update={"initializer_range": 0.3}), build_tokenizer(), seed=3)


def steps_in_bf16(rank: int, world: int, folder: Path) -> list[tuple[Any, ...]]:
    """A job: at each ZeRO stage, a GRPO step's entropy and a supervised step's loss, in float32 and in bfloat16."""
    batch, asked, found = batches()[0], torch.is_autocast_enabled, []
    for zero in range(4):
        learner = LearnerConfig(zero_stage=zero, zero3_whole_parameters=100)  # type: ignore[arg-type]
        trainer = Trainer(sharp_policy(), learner, OptimizerConfig(learning_rate=RATE))
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
    policy: Any = sharp_policy()
    widen_head(policy)
    batch, entropy, loss = batches()[0], 0.0, 0.0
    for a, b in pairwise(batch.offsets):
        tokens, weights = (torch.from_numpy(c[a:b])[None] for c in (batch.tokens, batch.loss_weights))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = policy(tokens).logits
        entropy += float((weights * token_entropy(logits, STEP.temperature)).sum())
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
        trainer = Trainer(fresh_policy(), learner, OptimizerConfig(learning_rate=RATE))
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


LAST_NORM = PROPORTIONAL.model_copy(update={"learning_rate": 0.08, "parameters": "final_norm"})
"""Two steps must be large beside the rounding of weights."""


def steps_of_the_last_norm(rank: int, world: int, folder: Path) -> list[np.ndarray[Any, Any]]:
    """A job: the weights after two steps of `parameters: final_norm`, a load before the second, by ZeRO stage."""
    found = []
    for zero in range(4):
        learner = LearnerConfig(zero_stage=zero, zero3_whole_parameters=100)  # type: ignore[arg-type]
        trainer = Trainer(fresh_policy(), learner, LAST_NORM)
        trainer.sft_step(batches()[0], LAST_NORM.learning_rate)
        trainer.save(folder / str(zero))
        trainer.load(folder / str(zero))
        trainer.sft_step(batches()[1], LAST_NORM.learning_rate / 2)
        found.append(trainer.weights(version()).flat.copy())
    return found


def test_a_control_trains_the_last_norms_gains_alone(alone: Alone) -> None:
    policy: Any = fresh_policy()
    last = policy.model.norm.weight
    policy.requires_grad_(False)
    last.requires_grad_(True)
    optimizer = torch.optim.AdamW([last], betas=(0.9, 0.95), eps=LAST_NORM.eps, weight_decay=LAST_NORM.weight_decay)
    for batch, rate in zip(batches()[:2], (LAST_NORM.learning_rate, LAST_NORM.learning_rate / 2), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for tokens, weights, *_ in plain_rows(batch):
            (-(weights * plain_logprobs(policy, tokens, 1.0)[0]).sum()).backward()
        torch.nn.utils.clip_grad_norm_([last], LAST_NORM.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    expected, start = weights_of(policy), weights_of(fresh_policy()).flat
    for zero, found in enumerate(alone.last_norm):
        moved = found != start
        assert np.count_nonzero(moved) == last.numel(), f"ZeRO stage {zero}: other weights moved too"
        np.testing.assert_allclose(found[moved], expected.flat[moved], rtol=1e-5, err_msg=f"ZeRO stage {zero}")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [1, 2])
def test_contract_3_on_the_whole_grid(world: int, reference: Reference, tmp_path: Path) -> None:
    cases = [Case(*c) for c in product((0, 1, 2, 3), (1, 90, 200, 700, 4096), (False, True))]
    check(cases, run_group(world, [partial(learn, case) for case in cases], tmp_path), reference)


def test_auto_takes_the_precision_that_a_timed_step_finds_faster() -> None:
    """The flags of a processor say little: on one with `avx512_bf16` a step in bf16 took 2.3 times as long."""
    policy = fresh_policy()
    before = weights_of(policy).flat.copy()
    state = torch.random.get_rng_state()
    found = time_precisions(policy, 256, torch.device("cpu"))
    assert min(found.fp32_s, found.bf16_s) > 0
    assert found.bf16_is_faster == (found.bf16_s < found.fp32_s)
    assert ("bf16:" if found.bf16_is_faster else "fp32:") in str(found)
    np.testing.assert_array_equal(weights_of(policy).flat, before)
    assert all(p.grad is None for p in policy.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_all_ranks_wait_for_the_slowest() -> None:
    assert slowest([StepTimes(1.0, 5.0), StepTimes(3.0, 2.0)]) == StepTimes(3.0, 5.0)
    assert slowest([StepTimes(3.0, 2.0)]).bf16_is_faster


def test_in_bfloat16_the_head_computes_in_float32() -> None:
    """Faults 6: logits were rounded before they were widened. Of the shipped policies' |Δ logprob| that was a fifth."""
    folder = SHIPPED / "apr-rl" / "final"
    task = load_task(read_task(folder))
    policy, tokenizer = load_policy(folder), task.load_tokenizer(str(folder))
    problems = task.problems("heldout", 5, 0)
    texts = [s.prompt + s.completion for problem in problems for s in task.demonstrate(problem, 1).sequences]
    sequences = [torch.tensor([tokenizer.encode(text)]) for text in texts]

    def logprobs(bf16: bool) -> torch.Tensor:
        found = []
        for ids in sequences:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = policy(input_ids=ids, use_cache=False).logits
            found.append(token_logprobs(logits, ids)[0])
        return torch.cat(found)

    exact, rounded = logprobs(False), logprobs(True)
    widen_head(policy)
    before, after = ((found - exact).abs().mean() for found in (rounded, logprobs(True)))
    assert 0.5 * before < after < 0.9 * before
