"""What the controls refuse, and their intervals; `test_pipeline.py` trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import apr_ray
from apr_ray.cli.common import find_config
from apr_ray.config import Config, differences, load_config
from apr_ray.core.errors import AprError, ConfigError
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training import controls
from apr_ray.training.controls import ARMS, GRPO, _train, difference, run_controls
from apr_ray.training.run_dir import RunDir

PRESETS = Path(apr_ray.__file__).parent / "presets"


def test_an_unknown_arm_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    where = [f"run.root={tmp_path}"]
    with pytest.raises(AprError, match=r"no arm grp0.*Choose of grpo, continued-sft"):
        run_controls([], where, tmp_path, tmp_path, tokens=1, seeds=1, arms=["grp0"], bars=ProgressBars())
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


def test_seeds_and_problems_have_intervals_of_their_own() -> None:
    """Simulated with seeds that differ by 3 points: t over three seeds covers the true gain in 95 % of the trials, and
    the interval over problems, which takes the policies as they are, covers the gain of these policies."""
    rng = np.random.default_rng(1)
    trials, problems = 400, 100
    of_recipe = of_policies = 0
    for _ in range(trials):
        gains = 0.1 + rng.normal(0, 0.03, 3)
        rates = rng.uniform(0.2, 0.7, problems)
        before = [shares(rng.random(problems) < rates) for _ in gains]
        after = [shares(rng.random(problems) < rates + gain) for gain in gains]
        found = difference(before, after)
        assert found.seeds.mean == pytest.approx(found.problems.mean)
        of_recipe += found.seeds.low <= 0.1 <= found.seeds.high
        of_policies += found.problems.low <= gains.mean() <= found.problems.high
    assert 0.92 < of_recipe / trials < 0.98
    assert 0.92 < of_policies / trials < 0.98


def shares(solved: np.ndarray) -> dict[str, float]:
    return {f"p{i}": float(value) for i, value in enumerate(solved)}


def test_one_seed_has_no_interval_over_seeds() -> None:
    found = difference([{"a": 0.0, "b": 1.0}], [{"a": 1.0, "b": 1.0}])
    assert str(found.seeds) == "+50.0"
    assert found.problems.count == 2
    assert found.problems.low < 0.5 < found.problems.high


def test_other_problems_are_not_compared() -> None:
    with pytest.raises(AprError, match=r"of 1 and 2 problems share 1.*evaluation\.seed"):
        difference([{"a": 0.0}], [{"a": 1.0, "b": 1.0}])


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != GRPO])
def test_every_arm_is_a_preset_over_the_quickstarts(arm: str) -> None:
    """Whatever the quickstart's objective is, an arm's settings must go with it."""
    changed_by_arm = differences(
        load_config([PRESETS / "quickstart.yaml"]),
        load_config([PRESETS / f"{name}.yaml" for name in ("quickstart", f"control-{arm}")]),
    )
    assert changed_by_arm


def test_every_arms_settings_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are made as overrides are; the arms themselves train in the slow tier."""
    configs: dict[str, Any] = {}
    monkeypatch.setattr(controls, "require_demonstrations", lambda data: [])
    monkeypatch.setattr(controls, "_train", lambda arm, config, *others: configs.update({arm: config}))
    monkeypatch.setattr(controls, "_results", lambda *others: [])
    preset = find_config("quickstart")
    where = [f"run.root={tmp_path}"]
    run_controls([preset], where, tmp_path, tmp_path, tokens=7, seeds=2, arms=ARMS, bars=ProgressBars())
    assert set(configs) == set(ARMS)
    for arm, config in configs.items():
        assert (config.grpo.keep_batches, config.grpo.tokens, config.sft.tokens) == ("off", 7, 7)
        assert (config.run.name, config.run.seed) == (f"controls/{arm}-1", 1)
        assert config.init_from == str(tmp_path)
    assert configs["frozen-engine"].weights.transport == "none"
