"""Which engine a config names; engines are imported only when asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from apr_ray.config import EngineConfig
from apr_ray.core.engine import Engine
from apr_ray.core.errors import AprError

PACKAGES = {"torch": "torch", "sglang": "sglang"}
"""The engines of this version, and the package that each is built on."""


def require_engine(config: EngineConfig) -> None:
    """Raise AprError where the configured engine is not there to be built; imports nothing."""
    package = PACKAGES.get(config.name)
    if package is None:
        known = " or ".join(f"engine.name={name}" for name in PACKAGES)
        raise AprError(f"engine {config.name!r} is not part of this version", f"Use {known}")
    if importlib.util.find_spec(package) is None:
        raise AprError(
            f"engine.name is {config.name}, but {package} is not installed",
            f"pip install 'apr-ray[{config.name}]', or use engine.name=torch",
        )


def build_engine(
    config: EngineConfig, checkpoint: str, on_death: Callable[[str], None] | None = None, *, sleeps: bool = False
) -> Engine:
    """The configured engine over a checkpoint. Raises AprError where it is not there to be built.

    `on_death` is called, from any thread, if the engine has processes of its own and loses one; it is told why.
    `sleeps` says that it will be asked to; whether it then can, its capabilities say.
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
            deterministic=config.deterministic,
        )
    if config.name == "sglang":
        from apr_ray.engines.sglang_engine import SGLangEngine

        return SGLangEngine(
            checkpoint,
            max_sequences=config.max_sequences,
            context_tokens=config.context_tokens,
            stream_interval=config.stream_interval,
            kv_tokens=config.kv_tokens,
            device=config.device,
            dtype=config.dtype,
            server_args=config.server_args,
            sleeps=sleeps,
            on_death=on_death,
        )
    raise AssertionError(f"require_engine lets {config.name!r} pass, which nothing here builds")
