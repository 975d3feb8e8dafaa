"""Muon: against singular values in float64, against `torch.optim.Muon`, on two ranks, and across a resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_learner import RATE, batches, fresh_policy, run_group, version, weights_of

from apr_ray.config import Config, LearnerConfig, OptimizerConfig
from apr_ray.learner.muon import NEWTON_SCHULZ_STEPS, QUINTIC, MuonAdamW, orthogonalised
from apr_ray.learner.optimizer import parameter_groups
from apr_ray.learner.trainer import Trainer

MUON = OptimizerConfig(learning_rate=RATE, muon_rate=10 * RATE, weight_decay=0.1)


def slowly_orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The polynomial on the singular values themselves, in float64."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    a, b, c = QUINTIC
    values = values / values.norm()
    for _ in range(NEWTON_SCHULZ_STEPS):
        values = a * values + b * values**3 + c * values**5
    return u @ torch.diag(values) @ v


def test_a_direction_has_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 48), (16, 16), (24, 8)]
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    for matrix, found in zip(given, orthogonalised(given), strict=True):
        assert found.shape == matrix.shape
        torch.testing.assert_close(found.double(), slowly_orthogonalised(matrix), rtol=0, atol=1e-4)
        assert 0.1 < float(torch.linalg.svdvals(found).median()) < 1.3


def test_a_step_is_that_of_torchs_own_muon_and_adamw() -> None:
    """Torch's Muon computes in bfloat16, which is why it is not used; so its directions agree to two digits."""
    policy: Any = fresh_policy()
    twin = copy.deepcopy(policy)
    names = {id(p): n for n, p in twin.named_parameters()}
    matrices = [p for p in twin.parameters() if p.ndim == 2 and ".layers." in names[id(p)]]
    others = [p for p in twin.parameters() if not any(p is m for m in matrices)]
    assert len(matrices) == 7 * policy.config.num_hidden_layers

    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    groups = parameter_groups(policy, OptimizerConfig(learning_rate=0.01, muon_rate=0.03))
    for group in groups:
        group["lr"] = 0.01 * group.get("scale", 1.0)
    ours = MuonAdamW(groups, **options)  # type: ignore[arg-type]
    theirs = torch.optim.Muon(matrices, lr=0.03, weight_decay=0.1, momentum=0.95, nesterov=True)
    adamw = torch.optim.AdamW(others, **options)  # type: ignore[arg-type]

    before = [p.detach().clone() for p in policy.parameters()]
    for turn in range(3):
        generator = torch.Generator().manual_seed(turn)
        for a, b in zip(policy.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in (ours, theirs, adamw):
            optimizer.step()
    for old, a, b in zip(before, policy.parameters(), twin.parameters(), strict=True):
        moved, expected = a.detach() - old, b.detach() - old
        off = float((moved - expected).norm() / expected.norm())
        assert off < (0.03 if any(b is m for m in matrices) else 1e-6), f"{names[id(b)]} differs by {off:.1e}"


def steps(rank: int, world: int, folder: Path) -> list[np.ndarray[Any, Any]]:
    """A job: the weights after two steps, and after the same with a checkpoint read back between them."""
    found = []
    for resumed in (False, True):
        trainer = Trainer(fresh_policy(), LearnerConfig(micro_batch_tokens=200), MUON, rank, world)
        trainer.sft_step(batches()[0], RATE)
        if resumed:
            trainer.save(folder / "state")
            trainer = Trainer(fresh_policy(), LearnerConfig(micro_batch_tokens=200), MUON, rank, world)
            trainer.load(folder / "state")
        trainer.sft_step(batches()[2], RATE)
        found.append(trainer.weights(version()).flat.copy())
    return found


@pytest.mark.timeout(600)
def test_ranks_share_the_matrices_and_a_resume_goes_on_with_the_momentum(tmp_path: Path) -> None:
    """Contract 3: one rank and two come to the same weights; contract 8: a resumed run to the same bits."""
    ((alone, resumed),) = run_group(1, [steps], tmp_path / "one")[0]
    np.testing.assert_array_equal(alone, resumed)
    start = weights_of(fresh_policy()).flat
    assert np.abs(alone - start).max() > RATE
    for together, again in run_group(2, [steps], tmp_path / "two")[0]:
        np.testing.assert_allclose(together, alone, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(together, again)


def test_muon_with_divided_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sft\.optimizer\.muon_rate 0\.02 needs learner\.zero_stage 0, it is 2"):
        Config.model_validate(
            {"learner": {"zero_stage": 2}, "sft": {"optimizer": {"learning_rate": 0.1, "muon_rate": 0.02}}}
        )
