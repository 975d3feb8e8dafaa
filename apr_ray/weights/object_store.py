"""Through Ray's object store: rank 0 packs one flat buffer, every worker reads it where it lies."""

from __future__ import annotations

from apr_ray.core.weights import WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.rollout.pool import Membership
from apr_ray.weights.transport import Sending, Transport, receive, wait_for_all


class ObjectStoreTransport(Transport):
    """Elastic: a worker needs nothing but the reference. A whole copy of the weights lies at rank 0 meanwhile, and one
    per node that has workers."""

    def send(self, learners: LearnerGroup, members: Membership, version: WeightVersion) -> Sending:
        """See `Transport.send`."""
        update, calls = learners.weights(version)
        wait_for_all(calls, self.config.timeout_s, f"the sync of weights {version}")
        return Sending(receive(members.workers, update), lambda: update)
