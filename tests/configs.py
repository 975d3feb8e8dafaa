"""Configurations made from others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apr_ray.config import Config


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    return config.model_copy(update={k: getattr(config, k).model_copy(update=v) for k, v in sections.items()})
