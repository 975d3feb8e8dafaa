"""Which engine a config names; engines are imported only when asked for."""

from __future__ import annotations

from apr_ray.config import EngineConfig
from apr_ray.core.engine import Engine
from apr_ray.core.errors import AprError


def build_engine(config: EngineConfig, checkpoint: str) -> Engine:
    """The configured engine over a checkpoint. Raises AprError where it is not there to be built."""
    if config.name == "torch":
        from apr_ray.engines.torch_engine import TorchEngine

        return TorchEngine.from_checkpoint(
            checkpoint,
            max_sequences=config.max_sequences,
            cache_slots=config.cache_slots,
            context_tokens=config.context_tokens,
            stream_interval=config.stream_interval,
            deterministic=config.deterministic,
        )
    raise AprError(f"engine {config.name!r} is not part of this version", "Use engine.name=torch, the embedded engine")
