"""Configuration: what is wrong is named before anything starts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_ray.cli.common import user_path
from apr_ray.config import Config, RewardConfig, config_of, differences, load_config, parse_options, to_yaml
from apr_ray.core.errors import ConfigError
from apr_ray.model.shipped import resolve_policy
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
    ahead = ["grpo.ahead=1", "grpo.max_staleness=1", "rollout.fan_out=spread"]
    with pytest.raises(ConfigError, match=r"use weights\.mode=pause, or rollout\.fan_out=local"):
        load_config([], [*ahead, "weights.mode=drain"])
    load_config([], ahead)


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


# --- text -------------------------------------------------------------------------------------------------------------

NAMES = [
    "1e3", "010", "#x", "12:30", "2026-08-22", "7e5", "no", "off", "true", "12e4567", "x #1", "a: b", "[a", "{", "'",
    '"',     "~", "0x10", "1_000", ".5", "- a", "*a", "&a", "!a", "%a", "@a", " a", "a ", "é", "?", "=", "a=b",
]  # fmt: skip


@pytest.mark.parametrize("text", NAMES)
def test_a_text_field_takes_the_text_as_it_stands(text: str, tmp_path: Path) -> None:
    """Faults 16: a name could become a number, a date, false or nothing, and no quoting helped."""
    config = load_config([], [f"run.name={text}", f"tracking.experiment={text}"])
    assert (config.run.name, config.tracking.experiment) == (text, text)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "c.yaml"]) == config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("grpo.keep_batches=off", "off"),
        ("run.seed=010", 10),
        ("sft.tokens=7e5", 700_000),
        ("grpo.clip=1e-1", 0.1),
        ("grpo.max_minutes=null", None),
        ("run.name=null", None),
        ("grpo.initial_evaluation=no", False),
        ("engine.server_args={mem_fraction_static: 0.8, quantization: off}", None),
        ("evaluation.temperatures=[0, 1e0]", (0.0, 1.0)),
    ],
)
def test_other_fields_read_numbers_as_people_write_them(override: str, value: object) -> None:
    key, _, _ = override.partition("=")
    options = ["engine.name=sglang"] if key == "engine.server_args" else []
    found: object = load_config([], [*options, override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == ({"mem_fraction_static": 0.8, "quantization": "off"} if value is None and options else value)


def test_a_file_is_read_by_the_same_rules(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: {name: 1e3, seed: 010}\ngrpo: {keep_batches: off}\n")
    config = load_config([tmp_path / "c.yaml"], [])
    assert (config.run.name, config.run.seed, config.grpo.keep_batches) == ("1e3", 10, "off")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: {seed: 1}\nrun: {seed: 2}\n", "key 'run' stands twice"),
        (b"run:\n  seed: 1\n  seed: 2\n", "key 'seed' stands twice"),
        (b"\x89PNG\r\n\xff\xfe", "is not YAML"),
        (b"run: {name: a\x00b}", "is not YAML"),
        (b"grpo: {clip: .nan}", "grpo.clip"),
        (b"grpo: {clip: .inf}", "grpo.clip"),
        (b"run: {seed: 12:30}", "run.seed"),
    ],
)
def test_a_file_that_would_be_misread_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config([tmp_path / "c.yaml"])


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_a_seed_is_what_all_generators_take(seed: int) -> None:
    with pytest.raises(ConfigError, match=r"run\.seed"):
        load_config([], [f"run.seed={seed}"])


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        elif value != {}:
            yield prefix + key, value


def as_override(key: str, value: Any) -> str:
    """As a person would copy it from `config show`."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


@given(st.data())
def test_what_config_show_prints_is_read_back_as_overrides_and_as_a_file(data: st.DataObject) -> None:
    """All keys of the config, some of their texts drawn."""
    texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
    drawn = {
        key: data.draw(texts.filter(lambda text: text not in ("null", ".", "..") and "/" not in text))
        for key in ("run.name", "tracking.experiment")
    }
    numbers = {"run.seed": data.draw(st.integers(0, 2**32 - 1)), "grpo.clip": data.draw(st.floats(1e-9, 1e9))}
    preset = data.draw(st.sampled_from([None, *(p for p in PRESETS if p.stem in ("quickstart", "paper-apr"))]))
    config = load_config([preset] if preset else [], [as_override(k, v) for k, v in {**drawn, **numbers}.items()])
    assert config.run.name == drawn["run.name"]

    shown = config.model_dump(mode="json")
    assert load_config([], [as_override(key, value) for key, value in leaves(shown)]) == config
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        assert load_config([file]) == config


def test_home_is_expanded_wherever_a_path_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Faults 17: `run.root=~/x` made a folder named ~, which a user then removed with rm -r ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("run: {root: ~/runs}\nweights: {folder: ~/w}\n")
    config = load_config([tmp_path / "c.yaml"], ["init_from=~/p"])
    assert (config.run.root, config.weights.folder, config.init_from) == (
        f"{tmp_path}/runs", f"{tmp_path}/w", f"{tmp_path}/p",
    )  # fmt: skip
    assert resolve_policy("~/p") == tmp_path / "p"
    assert user_path("~/p") == tmp_path / "p"
    with pytest.raises(ConfigError, match="a path is empty"):
        load_config([], ["run.root="])


def test_another_programs_config_file_is_no_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Faults 19: any config.yaml up to three folders above a policy made it unusable."""
    caplog.set_level("WARNING", logger="apr_ray")
    policy = tmp_path / "run" / "final"
    policy.mkdir(parents=True)
    for text in ("foo: 1\n", "- a\n", "a: [", ""):
        (tmp_path / "config.yaml").write_text(text)
        assert config_of(policy) is None
        assert "is no run's config" in caplog.text
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(Config()))
    assert config_of(policy) == tmp_path / "run" / "config.yaml"
