"""Configuration: what is wrong is named before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from apr_ray.config import Config, RewardConfig, differences, load_config, parse_options, to_yaml
from apr_ray.core.errors import ConfigError
from apr_ray.tasks.countdown.task import CountdownOptions
from apr_ray.tasks.registry import load_task

PRESETS = sorted((Path(__file__).parents[1] / "apr_ray" / "presets").glob("*.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.stepz=3", "unknown config key 'grpo.stepz'. Did you mean 'steps'?"),
        ("grop.steps=3", "unknown config key 'grop'. Did you mean 'grpo'?"),
        ("rollout.workers=0", "rollout.workers: Input should be greater than or equal to 1 (got 0)"),
        ("grpo.group_size=1", "greater than or equal to 2 (got 1)"),
        ("sft.optimizer.learning_rate=-1", "sft.optimizer.learning_rate"),
        ("engine.name=trt", "engine.name"),
        ("model.heads=3", "hidden_size 128 over 3 heads"),
        ("engine.context_tokens=5000", "engine.context_tokens 5000 is above model.context_tokens 1024"),
        ("learner.zero_stage=7", "learner.zero_stage"),
        ("grpo.correction=mask", "correction mask needs ratio proximal; ratio behaviour divides by"),
        ("grpo.correction_cap=1", "greater than 1 (got 1)"),
        ("engine.kv_tokens=4096", "kv_tokens is 4096, which engine torch knows nothing of"),
        ("engine={name: vllm, deterministic: true}", "deterministic is True, which engine vllm knows nothing of"),
        ("sft.optimizer.beta2=1.0", "less than 1 (got 1.0)"),
        ("run.seed=-1", "greater than or equal to 0 (got -1)"),
        ("evaluation.temperatures=1", "Input should be a list"),
        ("grpo.steps", "not of the form a.b=value"),
        ("grpo..steps=1", "not of the form"),
    ],
)
def test_a_bad_value_is_named_with_its_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    assert message in str(caught.value)


def test_an_override_keeps_the_other_defaults_of_its_section() -> None:
    config = load_config([], ["sft.optimizer.final_fraction=0.1", "grpo.clip=1e-1"])
    assert config.sft.optimizer.warmup_steps == Config().sft.optimizer.warmup_steps
    assert config.grpo.clip == 0.1


def test_drained_workers_do_not_lend_their_engines_to_other_trees() -> None:
    overlap = ["grpo.overlap=true", "grpo.max_staleness=1", "rollout.fan_out=spread"]
    with pytest.raises(ConfigError, match=r"use weights\.mode=pause, or rollout\.fan_out=local"):
        load_config([], [*overlap, "weights.mode=drain"])
    load_config([], overlap)


def test_yaml_survives_a_round_trip(tmp_path: Path) -> None:
    config = load_config(PRESETS[:1], ["run.seed=5"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "c.yaml"]) == config
    assert differences(config, load_config([tmp_path / "c.yaml"], ["grpo.steps=9"])) == [
        f"grpo.steps: {config.grpo.steps} -> 9"
    ]


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "grpo: 5\n"])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config([tmp_path / "c.yaml"])
    with pytest.raises(ConfigError, match="cannot read"):
        load_config([tmp_path / "missing.yaml"])


def test_every_preset_is_valid_with_its_task() -> None:
    base = {"quickstart-fast": "quickstart", "quickstart-long": "quickstart", "paper-sosp": "paper-apr"}
    assert len(PRESETS) >= 5
    for preset in PRESETS:
        files = [preset.with_stem(base[preset.stem])] if preset.stem in base else []
        load_task(load_config([*files, preset]).task)


def test_task_options_are_checked_like_the_rest() -> None:
    with pytest.raises(ConfigError, match=r"unknown config key 'task.options.space.cont'. Did you mean 'count'\?"):
        parse_options(CountdownOptions, {"space": {"cont": 3}}, "task.options")
    with pytest.raises(ConfigError, match="method"):
        parse_options(CountdownOptions, {"method": "sos"}, "task.options")
    with pytest.raises(ConfigError, match="unknown task 'chess'"):
        load_task(load_config([], ["task.name=chess"]).task)


def test_the_papers_model_has_the_papers_size() -> None:
    """228 M non-embedding parameters (paper section 4.1), counted from the preset without building it."""
    model = load_config([PRESETS[0].with_stem("paper-apr")]).model
    attention = 4 * model.hidden_size**2
    mlp = 3 * model.hidden_size * model.ffn_size
    norms = 2 * model.hidden_size
    total = model.layers * (attention + mlp + norms) + model.hidden_size
    assert round(total / 1e6) == 228


@pytest.mark.parametrize(
    ("prices", "said"),
    [
        (["false_claim=-0.2"], r"cut_off 0 is not below no_answer 0.*escape.*price it too"),
        (["false_claim=-0.2", "cut_off=-0.2"], r"invalid_spawn 0 is not below no_answer"),
        (["no_answer=1"], r"no_answer 1 is not below solved 1"),
        (["cut_off=2"], r"cut_off 2 is not below solved 1"),
    ],
)
def test_no_ending_is_an_unpriced_escape(prices: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(overrides=[f"grpo.reward.{price}" for price in prices])


@pytest.mark.parametrize(("price", "threshold"), [(0.0, 0.0), (-0.2, 0.2 / 1.2), (-1.0, 0.5)])
def test_prices_imply_when_a_claim_pays(price: float, threshold: float) -> None:
    """P(right) > c / (1 + c), for a solution worth 1, no answer 0 and a false claim -c."""
    endings = {"false_claim": price, "cut_off": price, "invalid_spawn": price}
    assert RewardConfig(**endings).claim_threshold == pytest.approx(threshold)


@pytest.mark.parametrize("preset", ["paper-apr", "paper-sosp"])
def test_the_papers_objective_is_that_of_its_presets(preset: str) -> None:
    grpo = load_config([PRESETS[0].with_name(f"{preset}.yaml")]).grpo
    assert grpo.reward == RewardConfig()
    assert (grpo.advantage, grpo.loss_mean, grpo.temperature) == ("group", "call", 1.0)
