"""The one typed configuration: its settings, and how files and overrides become one."""

from apr_ray.config.loading import config_of, differences, load_config, parse_config, parse_options, to_yaml
from apr_ray.config.running import EngineConfig, EvalConfig, PlacementConfig, RolloutConfig, TaskConfig, WeightsConfig
from apr_ray.config.section import Section
from apr_ray.config.settings import Config
from apr_ray.config.training import (
    BoundsConfig,
    DataConfig,
    GrpoConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    SftConfig,
)

__all__ = [
    "BoundsConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "GrpoConfig",
    "LearnerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlacementConfig",
    "RewardConfig",
    "RolloutConfig",
    "Section",
    "SftConfig",
    "TaskConfig",
    "WeightsConfig",
    "config_of",
    "differences",
    "load_config",
    "parse_config",
    "parse_options",
    "to_yaml",
]
