"""Shared by all transports: every worker gets a version beside its decoding, and only then do all put it to work.

    learners ─▶ sink (rank 0) ~~~ carrier ~~~▶ source (each worker) ─▶ staged │ all have it │ ─▶ engine.update_weights

So a part that dies while weights are under way leaves every engine on the version it ran before. A worker that dies is
replaced, and the version is sent again to those that are left; who joins later takes it from `RolloutPool.current`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from apr_ray.config import WeightsConfig
from apr_ray.core.errors import AprError, SyncFailed
from apr_ray.core.weights import SyncReport, TensorSpec, WeightSink, WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.parts import DEAD, reason
from apr_ray.rollout.pool import Current, Membership, RolloutPool, Worker

GRACE_S = 5.0
"""How much later than its parts the driver gives up: a part that waited in vain says best for whom."""


@dataclass(frozen=True, slots=True)
class Sending:
    """A version under way.

    Attributes:
        calls: an object reference by the name of everyone who takes part; when all are done, all workers have it.
        current: makes a source of it for a worker that joins later; see `rollout.pool.Current`.
    """

    calls: Mapping[str, Any]
    current: Current


class Transport(ABC):
    """A `core.weights.WeightTransport`; subclasses say how the weights reach the workers."""

    def __init__(self, config: WeightsConfig) -> None:
        self.config = config
        self.opened: LearnerGroup | None = None
        """Whose rank 0 has our sink."""

    @abstractmethod
    def send(self, learners: LearnerGroup, members: Membership, version: WeightVersion) -> Sending:
        """Start everyone who takes part."""

    def broadcast(self, learners: LearnerGroup, pool: RolloutPool, version: WeightVersion) -> SyncReport:
        """See `core.weights.WeightTransport.broadcast`."""
        start = time.perf_counter()
        what = f"the sync of weights {version}"
        while True:
            members = pool.membership()
            try:
                sending = self.send(learners, members, version)
                wait_for_all(sending.calls, self.config.timeout_s + GRACE_S, what)
                break
            except SyncFailed as failure:
                if not pool.replace_dead(failure.dead):
                    raise
        sent = time.perf_counter()
        applying = {worker.name: worker.actor.apply_weights.remote() for worker in members.workers}
        try:
            ending_s = pool.longest_tree_s if self.config.mode == "drain" else 0.0
            wait_for_all(applying, self.config.timeout_s + ending_s, what)
        except SyncFailed as failure:
            if failure.others or not pool.replace_dead(failure.dead):
                raise
        pool.now_run(members.workers, sending.current)
        end = time.perf_counter()
        return SyncReport(version, end - start, sent - start, end - sent, 4 * learners.parameters)

    def open_sink(self, learners: LearnerGroup, sink: WeightSink) -> tuple[tuple[TensorSpec, ...], Any]:
        """Give rank 0 a sink in place of the one it has; see `LearnerGroup.open_sink`."""
        self.close()
        self.opened = learners
        opening = {"learner-0": learners.open_sink(self.config.transport, sink)}
        opened: tuple[tuple[TensorSpec, ...], Any]
        [opened] = wait_for_all(opening, self.config.timeout_s, "opening a sink for weights")
        return opened

    def passed_on(self, members: Membership, source: Any, sent: Mapping[str, Any], version: WeightVersion) -> Sending:
        """Have all workers fetch a version from what `source`, one of the learners' answers `sent`, will be.

        They are asked before it is there, which spares a sync one of three trips through the driver. Where the learners
        fail, the workers' calls do too, and only the learners are named.
        """
        fetching = receive(members.workers, source)
        wait_for_all(sent, self.config.timeout_s, f"the sync of weights {version}")
        return Sending(fetching, lambda _: source)

    def send_into_sink(self, learners: LearnerGroup, version: WeightVersion) -> dict[str, Any]:
        """Start sending the learners' weights into the sink: an object reference by rank."""
        return learners.send_weights(self.config.transport, version, self.config.piece_numbers)

    def close(self) -> None:
        """See `core.weights.WeightTransport.close`."""
        learners, self.opened = self.opened, None
        if learners is not None:
            closing = {"learner-0": learners.close_sink(self.config.transport)}
            wait_for_all(closing, self.config.timeout_s, "closing a sink for weights")

    def discard(self) -> None:  # noqa: B027  most leave nothing
        """Remove what would outlive the run, when its actors are gone, however it ended."""


def receive(workers: Sequence[Worker], source: Any) -> dict[str, Any]:
    """Have workers fetch a version from one source, or from what an object reference will be: an object reference by
    name."""
    return {worker.name: worker.actor.receive_weights.remote(source) for worker in workers}


def wait_for_all(calls: Mapping[str, Any], timeout_s: float, what: str) -> list[Any]:
    """The results of all calls, in their order. Bounded: nobody is waited for longer than `timeout_s`.

    Raises:
        SyncFailed: names everyone who died, and everyone who did not answer in time.
        AprError: what the first of those who answered with an error of ours raised.
    """
    names = {reference: name for name, reference in calls.items()}
    ended, late = ray.wait(list(names), num_returns=len(names), timeout=timeout_s) if names else ([], [])
    results: dict[str, Any] = {}
    errors: dict[str, Exception] = {}
    dead: dict[str, Exception] = {}
    for reference in ended:
        name = names[reference]
        try:
            results[name] = ray.get(reference)
        except DEAD as error:
            dead[name] = error
        except ray.exceptions.RayTaskError as error:
            errors[name] = error.cause
    said = [f"{name} died ({reason(error)})" for name, error in dead.items()]
    said += [f"{names[reference]} did not answer within {timeout_s:.0f} s" for reference in late]
    ours = [error for error in errors.values() if isinstance(error, AprError)]
    if not said and ours:
        raise ours[0]
    said += [f"{name}: {error}" for name, error in errors.items()]
    if said:
        raise SyncFailed(f"{what} failed: {'; '.join(said)}", "Go on with --resume RUN", dead, bool(late or errors))
    return [results[name] for name in calls]
