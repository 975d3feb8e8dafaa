"""The embedded engine: a Llama decoded in process, for a laptop and for tests."""

from apr_ray.engines.torch_engine.engine import TorchEngine

__all__ = ["TorchEngine"]
