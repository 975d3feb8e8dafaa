"""Weight transports by name."""

from __future__ import annotations

from apr_ray.config import WeightsConfig
from apr_ray.weights.transport import Transport


def build_transport(config: WeightsConfig) -> Transport:
    """The configured transport. Modules are imported when they are asked for."""
    if config.transport == "collective":
        from apr_ray.weights.collective import CollectiveTransport

        return CollectiveTransport(config)
    if config.transport == "shared_memory":
        from apr_ray.weights.shared_memory import SharedMemoryTransport

        return SharedMemoryTransport(config)
    if config.transport == "disk":
        from apr_ray.weights.disk import DiskTransport

        return DiskTransport(config)
    from apr_ray.weights.object_store import ObjectStoreTransport

    return ObjectStoreTransport(config)
