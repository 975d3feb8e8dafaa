"""Weight transports by name."""

from __future__ import annotations

from apr_ray.config import WeightsConfig
from apr_ray.core.weights import SyncReport, WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.rollout.pool import Membership, RolloutPool
from apr_ray.weights.transport import Sending, Transport


class NoTransport(Transport):
    """Sends nothing. A control: engines that do not follow the learners must be noticed."""

    def send(self, learners: LearnerGroup, members: Membership, version: WeightVersion) -> Sending:
        """Nothing."""
        return Sending({}, lambda _: None)

    def broadcast(self, learners: LearnerGroup, pool: RolloutPool, version: WeightVersion) -> SyncReport:
        """Nothing either."""
        return SyncReport(version, 0.0, 0.0, 0.0, 0)


def build_transport(config: WeightsConfig) -> Transport:
    """The configured transport. Modules are imported when they are asked for."""
    if config.transport == "collective":
        from apr_ray.weights.collective import CollectiveTransport

        return CollectiveTransport(config)
    if config.transport == "shared_memory":
        from apr_ray.weights.shared_memory import SharedMemoryTransport

        return SharedMemoryTransport(config)
    if config.transport == "cuda_ipc":
        from apr_ray.weights.cuda_ipc import CudaIpcTransport

        return CudaIpcTransport(config)
    if config.transport == "none":
        return NoTransport(config)
    if config.transport == "disk":
        from apr_ray.weights.disk import DiskTransport

        return DiskTransport(config)
    from apr_ray.weights.object_store import ObjectStoreTransport

    return ObjectStoreTransport(config)
