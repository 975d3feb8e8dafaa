"""Which engine a config names; engines are imported only when asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from apr_ray.config import EngineConfig
from apr_ray.core.engine import Engine
from apr_ray.core.errors import AprError

PACKAGES = {
    "torch": ("torch", "torch"),
    "sglang": ("sglang", "'apr-ray[sglang]'"),
    "sglang_server": ("aiohttp", "aiohttp"),
    "vllm": ("vllm", "'apr-ray[vllm]'"),
}
"""The engines of this version, the package that each is built on, and what pip installs it by."""


def require_engine(config: EngineConfig) -> None:
    """Raise AprError where the configured engine is not there to be built; imports nothing."""
    package, install = PACKAGES[config.name]
    if importlib.util.find_spec(package) is None:
        raise AprError(
            f"engine.name is {config.name}, but {package} is not installed",
            f"pip install {install}, or use engine.name=torch",
        )


def build_engine(
    config: EngineConfig,
    checkpoint: str,
    on_death: Callable[[str], None] | None = None,
    *,
    sleeps: bool = False,
    place: int = 0,
) -> Engine:
    """The configured engine over a checkpoint. Raises AprError where it is not there to be built.

    `on_death` is called, from any thread, if the engine fails or loses one of its processes; it is told why.
    `sleeps` says that it will be asked to; whether it then can, its capabilities say. `place` counts the pool's
    workers: which of `engine.server_urls` is this one's.
    """
    require_engine(config)
    if config.name == "torch":
        from apr_ray.engines.torch_engine import TorchEngine

        return TorchEngine.from_checkpoint(
            checkpoint,
            max_sequences=config.max_sequences,
            cache_slots=config.cache_slots,
            context_tokens=config.context_tokens,
            stream_interval=config.stream_interval,
            device=config.device or "cpu",
            dtype=config.dtype,
            deterministic=config.deterministic,
            on_death=on_death,
        )
    if config.name == "sglang_server":
        from apr_ray.engines.sglang_server import SGLangServer

        return SGLangServer(
            config.server_urls[place], checkpoint, context_tokens=config.context_tokens, on_death=on_death
        )
    options: dict[str, Any] = {
        "max_sequences": config.max_sequences,
        "context_tokens": config.context_tokens,
        "stream_interval": config.stream_interval,
        "kv_tokens": config.kv_tokens,
        "device": config.device,
        "dtype": config.dtype,
        "server_args": config.server_args,
        "sleeps": sleeps,
        "on_death": on_death,
    }
    if config.name == "sglang":
        from apr_ray.engines.sglang_engine import SGLangEngine

        return SGLangEngine(checkpoint, **options)
    from apr_ray.engines.vllm_engine import VLLMEngine

    return VLLMEngine(checkpoint, **options)
