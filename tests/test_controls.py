"""What the controls refuse, and their intervals; `test_pipeline.py` trains them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr_ray.config import Config
from apr_ray.core.errors import AprError, ConfigError
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.controls import _train, run_controls, two_level_interval
from apr_ray.training.run_dir import RunDir


def test_an_unknown_arm_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    where = [f"run.root={tmp_path}"]
    with pytest.raises(AprError, match=r"no arm grp0.*Choose of grpo, continued-sft"):
        run_controls([], where, tmp_path, tmp_path, minutes=1, seeds=1, arms=["grp0"], bars=ProgressBars())
    assert not list(tmp_path.iterdir())


def test_an_arm_of_other_settings_is_not_taken_for_that_of_these(tmp_path: Path, small_config: Config) -> None:
    run = RunDir.create(changed(small_config, tmp_path, 5.0), "controls")
    (run.path / "done").write_text("")
    parts = "grpo", run.path, tmp_path, tmp_path, ProgressBars(quiet=True)
    _train(parts[0], changed(small_config, tmp_path, 5.0), *parts[1:])
    with pytest.raises(ConfigError, match=r"was run with another config: grpo\.max_minutes"):
        _train(parts[0], changed(small_config, tmp_path, 10.0), *parts[1:])


def changed(config: Config, root: Path, minutes: float) -> Config:
    grpo = config.grpo.model_copy(update={"max_minutes": minutes})
    place = config.run.model_copy(update={"root": str(root), "name": "arm"})
    return config.model_copy(update={"grpo": grpo, "run": place})


def test_a_gain_has_an_interval_over_seeds_and_problems() -> None:
    rng = np.random.default_rng(1)
    alike = [rng.choice([0.0, 1.0], 400) for _ in range(3)]
    low, high = two_level_interval(alike)
    mean = float(np.mean(alike))
    assert mean - 0.06 < low < mean < high < mean + 0.06
    apart = [np.full(400, value) for value in (0.0, 0.1, 0.2)]  # seeds differ, problems do not
    assert two_level_interval(apart) == pytest.approx((0.0, 0.2), abs=0.04)
