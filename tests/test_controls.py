"""What the controls refuse, and their intervals; `test_pipeline.py` trains them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr_ray.core.errors import AprError
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.controls import run_controls, two_level_interval


def test_an_unknown_arm_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    where = [f"run.root={tmp_path}"]
    with pytest.raises(AprError, match=r"no arm grp0.*Choose of grpo, continued-sft"):
        run_controls([], where, tmp_path, tmp_path, minutes=1, seeds=1, arms=["grp0"], bars=ProgressBars())
    assert not list(tmp_path.iterdir())


def test_a_gain_has_an_interval_over_seeds_and_problems() -> None:
    rng = np.random.default_rng(1)
    alike = [rng.choice([0.0, 1.0], 400) for _ in range(3)]
    low, high = two_level_interval(alike)
    mean = float(np.mean(alike))
    assert mean - 0.06 < low < mean < high < mean + 0.06
    apart = [np.full(400, value) for value in (0.0, 0.1, 0.2)]  # seeds differ, problems do not
    assert two_level_interval(apart) == pytest.approx((0.0, 0.2), abs=0.04)
