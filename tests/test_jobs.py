"""The cluster file and the configs of jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from apr_ray.config import load_config

ROOT = Path(__file__).parents[1]


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """Filled in and validated by Ray's own launcher, without a cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled: dict[str, Any] = prepare_config(config)
    validate_config(filled)
    return filled


def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def test_the_cluster_file_is_valid_and_scales_from_nothing() -> None:
    config = checked(cluster())
    worker = config["available_node_types"]["worker"]
    assert worker["min_workers"] == 0
    assert worker["max_workers"] == config["max_workers"] > 0
    assert config["head_node_type"] in config["available_node_types"]


def test_the_check_of_the_cluster_file_can_fail() -> None:
    with pytest.raises(Exception, match="head_node_type"):
        checked({**cluster(), "head_node_type": "nowhere"})


def test_the_job_configs_fit_over_every_preset() -> None:
    for preset in sorted((ROOT / "apr_ray" / "presets").glob("*.yaml")):
        config = load_config([preset, ROOT / "jobs" / "on-cluster.yaml"])
        assert config.ray.address == "auto"
