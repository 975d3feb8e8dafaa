"""Adaptive Parallel Reasoning on Ray: language models that learn to spawn and join threads.

`solve` runs a trained model in this process; everything else is reached through the `apr-ray` command.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apr_ray.local import Solution, solve

__all__ = ["Solution", "__version__", "solve"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import torch only when `solve` is asked for: `import apr_ray` stays instant."""
    if name in ("solve", "Solution"):
        from apr_ray import local

        return getattr(local, name)
    raise AttributeError(f"module 'apr_ray' has no attribute {name!r}")
