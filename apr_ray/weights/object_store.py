"""Through Ray's object store: rank 0 packs one flat buffer, every worker reads it where it lies."""

from __future__ import annotations

from typing import Any

from apr_ray.core.weights import WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.rollout.pool import RolloutPool
from apr_ray.weights.transport import Transport


class ObjectStoreTransport(Transport):
    """Elastic: a worker needs nothing but the reference. A whole copy of the weights lies at rank 0 meanwhile, and one
    per node that has workers."""

    def send(self, learners: LearnerGroup, pool: RolloutPool, version: WeightVersion) -> dict[str, Any]:
        """See `Transport.send`."""
        return pool.receive_weights(learners.weights(version))
