"""One learner rank: a policy under DeepSpeed, and the steps it can take. No Ray here.

    TrainBatch ─▶ plan (same on every rank) ─▶ this rank's micro-batches ─▶ forward, loss, backward … ─▶ one step

The loss is a sum of weighted token losses whose weights already hold the global denominators; DeepSpeed averages
gradients over ranks, so each rank's loss is multiplied by the number of ranks.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apr_ray.config import LearnerConfig, OptimizerConfig
from apr_ray.core.batch import TrainBatch
from apr_ray.core.errors import AprError
from apr_ray.core.weights import TensorSpec, WeightUpdate, WeightVersion, layout_of, pieces_of
from apr_ray.learner.optimizer import build_optimizer
from apr_ray.learner.precision import widen_head
from apr_ray.learner.rows import Rows
from apr_ray.learner.steps import GrpoStep, StepStats, merge
from apr_ray.model.llama import load_policy
from apr_ray.model.state import copy_flat, pack_weights, trainable_parameters
from apr_ray.rl.batches import plan_micro_batches
from apr_ray.rl.losses import grpo_loss, sft_loss, token_entropy, token_logit_scale, token_logprobs
from apr_ray.rl.mismatch import Correction, importance_weights, measure_mismatch, tree_sums


class Trainer:
    """A rank of the learner group.

    Args:
        policy: the Llama to train, in float32.
        learner, optimizer: see `config`.
        rank, world: of this process; `torch.distributed` must be initialised (see `init_process_group`).
    """

    def __init__(
        self, policy: Any, learner: LearnerConfig, optimizer: OptimizerConfig, rank: int = 0, world: int = 1
    ) -> None:
        import deepspeed

        self.learner = learner
        self.grad_clip = optimizer.grad_clip
        self.rank = rank
        self.world = world
        self.base_optimizer = build_optimizer(policy, optimizer, rank, world)
        self.zero = learner.zero_stage
        self._run_in_precision(policy)
        self._grad_norm = 0.0
        if self.zero == 0:
            # DeepSpeed reports no gradient norm at stage 0, so it is measured, and clipped, just before the update.
            self.base_optimizer.register_step_pre_hook(self._clip)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=policy,
            optimizer=self.base_optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "managed_gradient_accumulation": False,  # micro-batches per step vary; `step` is the boundary
                "gradient_clipping": optimizer.grad_clip if self.zero else 0.0,
                "zero_optimization": self._zero_options(),
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )
        self.reference: Any = None
        self.device = next(self.policy.parameters()).device

    def _run_in_precision(self, policy: Any) -> None:
        """Make the policy's forward pass run under autocast where `_bf16` says so, all but its head.

        Inside the policy, because DeepSpeed's engine switches off an autocast that it finds around itself on a GPU.
        """
        widen_head(policy)
        forward, self._bf16 = policy.forward, False

        def in_precision(input_ids: torch.Tensor, **options: Any) -> Any:
            with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self._bf16):
                return forward(input_ids=input_ids, **options)

        policy.forward = in_precision

    def _zero_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"stage": self.zero}
        if self.zero == 3:
            options["stage3_param_persistence_threshold"] = self.learner.zero3_whole_parameters
        return options

    @property
    def policy(self) -> Any:
        """The module that is trained. Its parameters are whole only inside `whole_policy`."""
        return self.engine.module

    @contextmanager
    def whole_policy(self) -> Iterator[Any]:
        """The policy with every parameter whole, to read. At ZeRO stage 3 ranks gather them, so all must enter."""
        if self.zero < 3:
            yield self.policy
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.policy.parameters())):
            yield self.policy

    # --- steps ------------------------------------------------------------------------------------------------------

    def sft_step(self, batch: TrainBatch, learning_rate: float, bf16: bool = False) -> StepStats:
        """One optimiser step on demonstrations; `bf16` runs its matrix products in bfloat16."""
        loss_sum, padded, tokens = 0.0, 0, 0
        for indices in self.plan(batch):
            rows = Rows(batch, indices, self.device)
            logits = self._logits(self.engine, rows.tokens, bf16)
            loss = sft_loss(token_logprobs(logits, rows.targets), rows.weights)
            self.engine.backward(loss * self.world)
            loss_sum += float(loss.detach())
            padded += rows.tokens.numel()
            tokens += int((rows.weights != 0).sum())
        self.apply(learning_rate)
        return StepStats(loss_sum, tokens, padded, self.grad_norm(), learning_rate)

    def grpo_step(self, batch: TrainBatch, step: GrpoStep, learning_rate: float) -> list[StepStats]:
        """`inner_steps` optimiser steps on one batch of trees; the first one's stats hold the mismatch of engine and
        learner at the start of the batch."""
        rows_of = [Rows(batch, indices, self.device) for indices in self.plan(batch)]
        if step.kl_coefficient:
            for rows in rows_of:
                rows.reference = self.reference_logprobs(rows, step.temperature, step.bf16)
        if step.correction and step.correction.needs_whole_batch:
            self._weigh_whole_batch(batch, rows_of, step, step.correction)
        out = []
        for _ in range(step.inner_steps):
            parts = [self._accumulate(rows, step, learning_rate) for rows in rows_of]
            update_norm = self._apply_and_measure(learning_rate)
            out.append(replace(merge(parts), grad_norm=self.grad_norm(), update_norm=update_norm))
        mismatch = measure_mismatch(self._delta(batch, rows_of), batch)
        return [replace(out[0], mismatch=mismatch), *out[1:]]

    def _accumulate(self, rows: Rows, step: GrpoStep, learning_rate: float) -> StepStats:
        """Forward and backward of one micro-batch."""
        logits = self._logits(self.engine, rows.tokens, step.bf16)
        logprobs = token_logprobs(logits, rows.targets, step.temperature)
        with torch.no_grad():
            entropy = token_entropy(logits, step.temperature)
            logit_scale = float((rows.weights * token_logit_scale(logits)).sum())
        if rows.proximal is None:  # the first inner step: the policy is still that at the start of the batch
            rows.proximal = logprobs.detach()
            if step.correction:
                rows.importance = importance_weights(rows.delta(), step.correction)
        result = grpo_loss(
            logprobs,
            rows.proximal if step.ratio == "proximal" else rows.behaviour_logprobs,
            rows.advantages,
            rows.weights,
            entropy,
            clip=step.clip,
            kl_coefficient=step.kl_coefficient,
            reference_logprobs=rows.reference,
            importance_weights=rows.importance.values if rows.importance else None,
        )
        logprobs.retain_grad()
        self.engine.backward(result.loss * self.world)
        assert logprobs.grad is not None
        return StepStats(
            float(result.loss.detach()),
            result.tokens,
            rows.tokens.numel(),
            0.0,
            learning_rate,
            result.kl,
            result.entropy,
            result.clipped,
            cut=int((rows.importance.cut & (rows.weights != 0)).sum()) if rows.importance else 0,
            slope=float((logprobs.detach().double() * logprobs.grad).sum()) / self.world,
            logit_scale=logit_scale,
        )

    def _weigh_whole_batch(self, batch: TrainBatch, rows_of: Sequence[Rows], step: GrpoStep, how: Correction) -> None:
        """Importance weights that need every proximal logprob of the batch: a pass of its own before the first step."""
        for rows in rows_of:
            with torch.no_grad():
                logits = self._logits(self.policy, rows.tokens, step.bf16)
            rows.proximal = token_logprobs(logits, rows.targets, step.temperature)
        delta = self._delta(batch, rows_of)
        if not how.applies(measure_mismatch(delta, batch).whole.delta_mean):
            return
        sums = torch.from_numpy(tree_sums(delta, batch)).to(self.device)
        for rows in rows_of:
            rows.importance = importance_weights(rows.delta(), how, sums[rows.trees])

    def _delta(self, batch: TrainBatch, rows_of: Sequence[Rows]) -> np.ndarray[Any, Any]:
        """float32 [N]: proximal less behaviour logprob of every token of the batch, from all ranks."""
        delta = torch.zeros(len(batch.tokens), device=self.device)
        for rows in rows_of:
            for (start, end), row in zip(rows.spans, rows.delta(), strict=True):
                delta[start:end] = row[: end - start]
        if self.world > 1:
            torch.distributed.all_reduce(delta)
        return delta.cpu().numpy()

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[np.ndarray[Any, Any]]:
        """Logprob of every token given those before it, 0 for the first: one float32 array per sequence.

        At ZeRO stage 3 all ranks must call it, with the same sequences.
        """
        out = []
        for ids in sequences:
            tokens = torch.tensor([list(ids)], dtype=torch.int64, device=self.device)
            logits = self._logits(self.policy, tokens)
            out.append(token_logprobs(logits, tokens, temperature)[0].cpu().numpy())
        return out

    def _logits(self, policy: Any, tokens: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        """[b, t, v] of a policy, or of DeepSpeed's engine around it, from right-padded [b, t]."""
        self._bf16 = bf16
        logits: torch.Tensor = policy(input_ids=tokens, use_cache=False).logits
        return logits

    def plan(self, batch: TrainBatch) -> list[list[int]]:
        """This rank's micro-batches; every rank derives the same plan."""
        lengths = [int(length) for length in batch.lengths]
        return plan_micro_batches(lengths, self.learner.micro_batch_tokens, self.world)[self.rank]

    def apply(self, learning_rate: float) -> None:
        """The optimiser step at the end of all micro-batches. Raises AprError, with the weights as they were, where the
        gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("scale", 1.0)
        self.engine.step()  # at ZeRO stages 1 to 3 it takes no step then, and says so by the norm
        _require_finite(self.grad_norm())

    def _apply_and_measure(self, learning_rate: float) -> float | None:
        """`apply`, and the norm of what it changed; None at ZeRO stage 3."""
        if self.zero == 3:
            self.apply(learning_rate)
            return None
        parameters = [p for _, p in trainable_parameters(self.policy)]
        before = [p.detach().clone() for p in parameters]
        self.apply(learning_rate)
        with torch.no_grad():
            changes = [torch.linalg.vector_norm(p - old) for p, old in zip(parameters, before, strict=True)]
            return float(torch.linalg.vector_norm(torch.stack(changes)))

    def grad_norm(self) -> float:
        """Of the last step, before clipping."""
        if self.zero == 0:
            return self._grad_norm
        return float(self.engine.get_global_grad_norm() or 0.0)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip))
        _require_finite(self._grad_norm)

    # --- memory -----------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Move to host memory what only a step needs: the optimiser's state and, at ZeRO stages 1 and 2, its copy of
        the weights and the gradients; and the reference. The policy stays. Nothing moves on a CPU."""
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State
        from deepspeed.runtime.zero.offload_states import offload_optimizer_states

        if self.zero in (1, 2):
            self.engine.offload_states(include=[State.optim_states, State.hp_params, State.lp_grads])
        else:  # DeepSpeed moves no state at stage 0, and only its own Adam's at stage 3
            offload_optimizer_states(self.base_optimizer, "cpu", pin_memory=True)
        if self.reference is not None:
            self.reference.to("cpu")
        if self.device.type == "cuda":  # or the allocator keeps what was freed from the engine that wakes
            gc.collect()
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Inverse of `sleep`; must come before the next step."""
        from deepspeed.runtime.zero.offload_states import reload_optimizer_states

        if self.zero in (1, 2):
            self.engine.reload_states()
        else:
            reload_optimizer_states(self.base_optimizer, self.device)
        if self.reference is not None:
            self.reference.to(self.device)

    # --- reference, weights, checkpoints ----------------------------------------------------------------------------

    def freeze_reference(self, checkpoint: str | None = None) -> None:
        """Keep a checkpoint's policy, or a copy of the present one, as the reference of the KL term.

        Every rank holds it whole, at any ZeRO stage; without a checkpoint all ranks must call it.
        """
        policy = load_policy(checkpoint) if checkpoint else self._copy()
        self._run_in_precision(policy)
        self.reference = policy.requires_grad_(False).to(self.device)

    @torch.no_grad()
    def _copy(self) -> Any:
        """A plain module with the present weights: DeepSpeed's own, with its hooks and parts, cannot be copied."""
        copy = type(self.policy)(self.policy.config)
        with self.whole_policy() as policy:
            for (_, into), (_, source) in zip(trainable_parameters(copy), trainable_parameters(policy), strict=True):
                into.copy_(source)
        return copy

    @torch.no_grad()
    def reference_logprobs(self, rows: Rows, temperature: float, bf16: bool = False) -> torch.Tensor:
        """[b, t] under the reference policy."""
        logits = self._logits(self.reference, rows.tokens, bf16)
        return token_logprobs(logits, rows.targets, temperature)

    def weights(self, version: WeightVersion, flat: np.ndarray[Any, Any] | None = None) -> WeightUpdate:
        """All parameters as one buffer: `flat`, if given. All ranks must enter `whole_policy` for it."""
        with self.whole_policy() as policy:
            return pack_weights(trainable_parameters(policy), version, flat)

    def layout(self) -> tuple[TensorSpec, ...]:
        """Where each parameter lies in the flat form of the weights."""
        named = trainable_parameters(self.policy)
        return layout_of((name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named)

    @torch.no_grad()
    def weight_pieces(
        self, numbers: int, flat: Any = None, until_sent: Callable[[], None] = lambda: None
    ) -> Iterator[Any]:
        """The flat weights piece by piece (`core.weights.pieces_of`): parts of `flat`, an array or a tensor, if given,
        else of memory for two pieces. Below ZeRO stage 3 those are two buffers by turns. At stage 3 the piece that was
        gathered takes one of them, until it is copied; `until_sent` waits until the other may be written over.

        At stage 3 all ranks must go through all pieces.
        """
        import deepspeed

        parameters = dict(trainable_parameters(self.policy))
        pieces = pieces_of(self.layout(), numbers)
        sizes = [sum(spec.size for spec in piece) for piece in pieces]
        turns = 1 if self.zero == 3 else 2
        buffers = [] if flat is not None else [np.empty(max(sizes), dtype=np.float32) for _ in sizes[:turns]]
        for number, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
            tensors = [parameters[spec.name] for spec in piece]
            start = piece[0].offset
            into = buffers[number % turns][:size] if flat is None else flat[start : start + size]
            with deepspeed.zero.GatheredParameters(tensors, enabled=self.zero == 3):
                if self.rank == 0:
                    if len(buffers) == 1:
                        until_sent()
                    copy_flat(tensors, into)
            yield into

    def save(self, directory: Path) -> None:
        """Optimiser and weights of every rank; all ranks must call it."""
        self.engine.save_checkpoint(str(directory), tag="state")

    def load(self, directory: Path) -> None:
        """Inverse of `save`; the number of ranks and the ZeRO stage must be the same."""
        path, _ = self.engine.load_checkpoint(str(directory), tag="state")
        if path is None:
            raise FileNotFoundError(f"no DeepSpeed state in {directory}")


def _require_finite(grad_norm: float) -> None:
    if not math.isfinite(grad_norm):
        raise AprError(
            f"the gradient's norm is {grad_norm}: no step was taken",
            "Lower the optimizer's learning_rate or use fp32, and go on from the last checkpoint with --resume RUN",
        )
