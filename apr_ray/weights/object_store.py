"""Through Ray's object store: rank 0 packs one flat buffer, every worker reads it where it lies."""

from __future__ import annotations

from apr_ray.core.weights import WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.rollout.pool import Membership
from apr_ray.weights.transport import Sending, Transport


class ObjectStoreTransport(Transport):
    """Elastic: a worker needs nothing but the reference. Rank 0 keeps a whole copy of the weights from sync to sync;
    one more lies on each node that has workers."""

    def send(self, learners: LearnerGroup, members: Membership, version: WeightVersion) -> Sending:
        """See `Transport.send`."""
        update, sent = learners.weights(version)
        return self.passed_on(members, update, sent, version)
