"""What a stranger's disk may hold: damaged checkpoints, trees and settings are one line that names file and remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import apr_ray
from apr_ray.cli.common import find_config, require_writable, user_path
from apr_ray.config import load_config
from apr_ray.core.errors import AprError, ConfigError
from apr_ray.core.trees_io import read_trees
from apr_ray.evaluation.card import write_policy_folder
from apr_ray.evaluation.comparison import read_evaluation
from apr_ray.evaluation.show import recorded_tree
from apr_ray.model.shipped import SHIPPED
from apr_ray.training import session

PROBLEM = "4 8 18 -> 36"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED / "apr-sft", tmp_path / "p")
    return tmp_path / "p"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"", "model.safetensors is damaged"),
        ("model.safetensors", LFS, "no Git LFS pointer"),
        ("model.safetensors", slice(-1000), "model.safetensors is damaged"),
        ("config.json", b"hello", "config.json is damaged"),
        ("config.json", b"", "config.json is damaged"),
        ("config.json", b"[]", "config.json holds no JSON object"),
        ("config.json", b"\xff\xfe\x00", "config.json is damaged"),
        ("tokenizer.json", b"{", "the tokenizer in .* is damaged"),
        ("tokenizer.json", b"{}", "the tokenizer in .* is damaged"),
        ("apr_ray.json", b"{", "apr_ray.json is damaged"),
        ("apr_ray.json", b"[]", "apr_ray.json holds no JSON object"),
        ("apr_ray.json", b'{"name": "countdown", "more": 1}', "apr_ray.json: more: Extra inputs"),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_named(policy: Path, name: str, content: Any, message: str) -> None:
    file = policy / "final" / name
    file.write_bytes(file.read_bytes()[content] if isinstance(content, slice) else content)
    with pytest.raises(AprError, match=message):
        apr_ray.solve(PROBLEM, policy)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
@pytest.mark.parametrize("value", [None, "three", 0])
def test_a_size_that_is_none_is_named(policy: Path, key: str, value: Any) -> None:
    file = policy / "final" / "config.json"
    data = json.loads(file.read_text())
    data[key] = value
    file.write_text(json.dumps(data))
    with pytest.raises(AprError, match=f"{key} is {value!r}"):
        apr_ray.solve(PROBLEM, policy)


def test_weights_that_are_no_numbers_are_refused(policy: Path) -> None:
    file = policy / "final" / "model.safetensors"
    state = {name: np.array(values) for name, values in load_file(file).items()}
    state["model.norm.weight"][3] = np.nan
    save_file(state, file)
    with pytest.raises(AprError, match=r"model\.norm\.weight holds a number that is not finite"):
        apr_ray.solve(PROBLEM, policy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "model is None"),
        ({"model": b"apr-sft"}, "model is b'apr-sft'"),
        ({"temperature": "0"}, "temperature is '0'"),
        ({"temperature": None}, "temperature is None"),
        ({"bounds": {"max_depth": 1}}, r"bounds are .*BoundsConfig\(max_depth=1\)"),
    ],
)
def test_an_argument_of_solve_that_is_none_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AprError, match=message):
        apr_ray.solve(**({"problem": PROBLEM, "model": "apr-sft"} | arguments))


def test_numpys_numbers_and_an_arrow_are_read() -> None:
    numbers = {"numbers": [np.int64(4), np.int32(8), 18], "target": np.uint8(36)}
    assert apr_ray.solve(numbers, "apr-sft").problem.key == "4,8,18->36"
    assert apr_ray.solve("4 8 18 \u2192 36", "apr-sft").problem.key == "4,8,18->36"


def test_results_of_other_weights_go_on_no_card(tmp_path: Path) -> None:
    results = tmp_path / "r.json"
    data = {"metrics": {}, "split": "heldout", "problems": 1, "targets_problems": 0, "policy": "other"}
    results.write_text(json.dumps(data))
    with pytest.raises(AprError, match=r"is of other weights \(other, the run's are \w+\)"):
        write_policy_folder(SHIPPED / "apr-sft" / "final", SHIPPED / "apr-sft", results, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trees_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "greedy.jsonl").write_bytes(b"")
    with pytest.raises(AprError, match=r"greedy\.jsonl holds no tree"):
        read_evaluation(tmp_path)
    (tmp_path / "greedy.jsonl").write_bytes(b"\xff\xfe\0\1")
    with pytest.raises(AprError, match=r"greedy\.jsonl:1 is not JSON"):
        list(read_trees(tmp_path / "greedy.jsonl"))
    with pytest.raises(AprError, match=r"greedy\.jsonl:1 is not JSON"):
        recorded_tree(tmp_path)


# --- settings and paths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["? [a, b]\n: 1\n", "? {a: b}\n: 1\n", "run: &a\n  x: *a\n", "run: " + "[" * 3000, "1: 2\n"]
)
def test_yaml_that_is_no_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml|unknown config key '1'"):
        load_config([tmp_path / "c.yaml"])


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: 1\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: config run: Input should be"):
        load_config([tmp_path / "c.yaml"])


@pytest.mark.parametrize(
    "override",
    ["run.seed=true", "grpo.clip=true", "evaluation.temperatures=[true]", "run.root=null", "run.name=.",
     "run.name=../x", "run.name=/x", "run.name=a/../b", "run.name=a\nb", "run.name=a\0b", "run.name=" + "x" * 201],
)  # fmt: skip
def test_a_value_that_would_be_misread_or_lie_elsewhere_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        load_config([], [override])


def test_a_config_may_be_a_pipe_or_lie_at_home_and_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "h.yaml").write_text("run: {seed: 5}\n")
    assert load_config([find_config("~/h.yaml")]).run.seed == 5
    with pytest.raises(ConfigError, match="is a folder"):
        find_config(str(tmp_path))
    assert str(user_path("~nobody-of-that-name/x")) == "~nobody-of-that-name/x"


@pytest.mark.parametrize("folder", ["/proc", "/none/such"])
def test_a_folder_where_nothing_can_be_written_is_found_out_by_writing(folder: str) -> None:
    """Root may write anywhere, says the system; not in /proc."""
    with pytest.raises(AprError, match=f"--out: cannot write in {folder}"):
        require_writable(Path(folder), "--out")


def test_a_tmpdir_too_long_for_rays_sockets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.tempfile, "gettempdir", lambda: "/tmp/" + "x" * 60)
    with (
        pytest.raises(AprError, match=r"sockets there leave 40\. Set a shorter one: TMPDIR=/tmp"),
        session._private_ray(load_config()),
    ):
        pass
