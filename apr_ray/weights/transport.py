"""What all transports share: every worker gets a version beside its decoding, and only then do all put it to work.

    learners ─▶ sink (rank 0) ~~~ carrier ~~~▶ source (each worker) ─▶ staged │ all have it │ ─▶ engine.update_weights

So a part that dies while weights are under way leaves every engine on the version it ran before.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import ray

from apr_ray.config import WeightsConfig
from apr_ray.core.errors import AprError, SyncFailed
from apr_ray.core.weights import SyncReport, TensorSpec, WeightSink, WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.rollout.pool import RolloutPool

GRACE_S = 5.0
"""How much later than its parts the driver gives up: a part that waited in vain says best for whom."""


class Transport(ABC):
    """A `core.weights.WeightTransport`; subclasses say how the weights reach the workers."""

    def __init__(self, config: WeightsConfig) -> None:
        self.config = config
        self.opened: LearnerGroup | None = None
        """Whose rank 0 has our sink."""

    @abstractmethod
    def send(self, learners: LearnerGroup, pool: RolloutPool, version: WeightVersion) -> dict[str, Any]:
        """Start everyone who takes part: an object reference by name. When all are done, all workers have it staged."""

    def broadcast(self, learners: LearnerGroup, pool: RolloutPool, version: WeightVersion) -> SyncReport:
        """See `core.weights.WeightTransport.broadcast`."""
        start = time.perf_counter()
        what = f"the sync of weights {version}"
        wait_for_all(self.send(learners, pool, version), self.config.timeout_s + GRACE_S, what)
        sent = time.perf_counter()
        # A drained worker first ends its trees, which have their own bounds on time.
        wait_for_all(pool.apply_weights(), None if self.config.mode == "drain" else self.config.timeout_s, what)
        end = time.perf_counter()
        return SyncReport(version, end - start, sent - start, end - sent, 4 * learners.parameters)

    def open_sink(self, learners: LearnerGroup, sink: WeightSink) -> tuple[tuple[TensorSpec, ...], Any]:
        """Give rank 0 a sink in place of the one it has; see `LearnerGroup.open_sink`."""
        self.close()
        self.opened = learners
        return learners.open_sink(self.config.transport, sink)

    def send_into_sink(self, learners: LearnerGroup, version: WeightVersion) -> dict[str, Any]:
        """Start sending the learners' weights into the sink: an object reference by rank."""
        return learners.send_weights(self.config.transport, version, self.config.piece_numbers)

    def close(self) -> None:
        """See `core.weights.WeightTransport.close`."""
        if self.opened is not None:
            self.opened.close_sink(self.config.transport)
            self.opened = None


def wait_for_all(calls: Mapping[str, Any], timeout_s: float | None, what: str) -> list[Any]:
    """The results of all calls, in their order. Bounded: nobody is waited for longer than `timeout_s`.

    Raises:
        SyncFailed: names everyone who died, and everyone who did not answer in time.
        AprError: what the first of those who answered with an error of ours raised.
    """
    names = {reference: name for name, reference in calls.items()}
    ended, late = ray.wait(list(names), num_returns=len(names), timeout=timeout_s)
    results, errors, dead = {}, [], []
    for reference in ended:
        try:
            results[names[reference]] = ray.get(reference)
        except ray.exceptions.RayActorError:
            dead.append(names[reference])
        except ray.exceptions.RayTaskError as error:
            errors.append((names[reference], error.cause))
    missing = [f"{name} died" for name in dead] + [f"{names[r]} did not answer within {timeout_s:.0f} s" for r in late]
    if missing:
        missing += [f"{name}: {error}" for name, error in errors]
        raise SyncFailed(f"{what} failed: {'; '.join(missing)}", "Their logs are in Ray's session folder")
    for name, cause in errors:
        if isinstance(cause, AprError):
            raise cause
        said = f"{name}: {type(cause).__name__}: {cause}"
        raise SyncFailed(f"{what} failed: {said}", "Its log is in Ray's session folder")
    return [results[name] for name in calls]
