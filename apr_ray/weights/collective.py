"""Through torch.distributed: rank 0 broadcasts piece by piece while it gathers the next, to all nodes at once.

    learner rank 0             gather 1 │ gather 2 ∥ broadcast 1 │ gather 3 ∥ broadcast 2 │ …
    a worker of each node                 receive 1              │ receive 2 ∥ checksum 1 │ …
    other workers of its node  read them where they lie, in shared memory

The group of one sender and one worker of each node stands beside whatever other groups a process is in. Its membership
has an epoch: when the pool's workers change, the next version is sent over a new group. Each wait in it is bounded by
`weights.timeout_s`; gloo ends at once when a peer's process dies.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import ray
import torch
import torch.distributed

from apr_ray.config import WeightsConfig
from apr_ray.core.errors import PartDied, SyncFailed, WeightsRejected
from apr_ray.core.weights import SyncReport, TensorSpec, WeightUpdate, WeightVersion, pieces_of
from apr_ray.learner.group import LearnerGroup
from apr_ray.model.shared_buffer import new_shared
from apr_ray.model.state import RunningChecksum
from apr_ray.parts import DEAD
from apr_ray.rollout.pool import Membership, RolloutPool, Worker
from apr_ray.weights.transport import GRACE_S, Sending, Transport, receive, wait_for_all

dist: Any = torch.distributed  # its stub names none of the classes used here


class CollectiveTransport(Transport):
    """gloo between CPUs, NCCL between GPUs (`weights.backend`). The learner holds two pieces besides its weights; a
    node that has workers two buffers of the weights' size in host memory."""

    def __init__(self, config: WeightsConfig) -> None:
        super().__init__(config)
        self.epoch = 0
        self.members: Membership | None = None
        self.nodes: list[list[Worker]] = []
        """The members by node; the first of each is in the group."""
        self.layout: tuple[TensorSpec, ...] = ()
        self.address = ("", 0)

    def send(self, learners: LearnerGroup, members: Membership, version: WeightVersion) -> Sending:
        """See `Transport.send`. A group in which somebody failed is not used again."""
        what = f"the sync of weights {version}"
        if self.members != members or self.opened is not learners:
            self.epoch += 1
            asked = {worker.name: worker.actor.node.remote() for worker in members.workers}
            by_node: dict[str, list[Worker]] = {}
            for node, worker in zip(wait_for_all(asked, self.config.timeout_s, what), members.workers, strict=True):
                by_node.setdefault(node, []).append(worker)
            self.nodes = list(by_node.values())
            self.layout, self.address = self.open_sink(learners, CollectiveSink(self._place(0)))
            self.members = members
        calls = self.send_into_sink(learners, version)
        reading: dict[str, Any] = {}
        for rank, (first, *others) in enumerate(self.nodes, start=1):
            source = CollectiveSource(self._place(rank), self.layout, self.config.piece_numbers, version)
            calls |= receive([first], source)
            reading |= receive(others, calls[first.name])  # asked before it is there: see `Transport.passed_on`
        wait_for_all(calls, self.config.timeout_s + GRACE_S, what)
        return Sending(reading, lambda ready: _held_by_one_of(ready, self.config.timeout_s))

    def broadcast(self, learners: LearnerGroup, pool: RolloutPool, version: WeightVersion) -> SyncReport:
        """See `core.weights.WeightTransport.broadcast`."""
        try:
            return super().broadcast(learners, pool, version)
        except BaseException:
            self.members = None
            raise

    def _place(self, rank: int) -> Place:
        return Place(self.address, rank, 1 + len(self.nodes), self.epoch, self.config.backend, self.config.timeout_s)


def _held_by_one_of(workers: Sequence[Worker], timeout_s: float) -> Any:
    """An object reference to the weights that came by the group, from the first of these workers that answers."""
    for worker in workers:
        held, done = worker.actor.held_weights.options(num_returns=2).remote()
        try:
            ray.get(done, timeout=timeout_s)
        except (*DEAD, ray.exceptions.GetTimeoutError):
            continue
        return held
    raise PartDied("no worker is left that holds the current weights", "Go on with --resume RUN")


@dataclass(frozen=True)
class Place:
    """One process's place in a group."""

    address: tuple[str, int]
    """Where rank 0's store listens; unknown to rank 0 itself."""
    rank: int
    size: int
    epoch: int
    backend: Literal["gloo", "nccl"]
    timeout_s: float


class Group:
    """A process's end of the group. Rank 0's store must have been opened before others enter."""

    def __init__(self, place: Place, store: Any) -> None:
        self.place = place
        timeout = timedelta(seconds=place.timeout_s)
        prefixed = dist.PrefixStore(f"weights-{place.epoch}", store)
        prefixed.set(f"here-{place.rank}", "1")
        try:
            prefixed.wait([f"here-{rank}" for rank in range(place.size)], timeout)
        except (dist.DistStoreError, RuntimeError) as error:
            absent = [rank for rank in range(place.size) if not prefixed.check([f"here-{rank}"])]
            raise SyncFailed(
                f"ranks {absent} of {place.size} did not enter group {place.epoch} within {place.timeout_s:.0f} s"
                " (rank 0 is the learner, the others are one worker of each node)",
                "See whether they live",
            ) from error
        # The classes themselves, since `init_process_group` knows one default group per process, and learners have one.
        if place.backend == "gloo":
            self.device = torch.device("cpu")
            self.group: Any = dist.ProcessGroupGloo(prefixed, place.rank, place.size, timeout)
        else:
            self.device = torch.device("cuda")
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group = dist.ProcessGroupNCCL(prefixed, place.rank, place.size, options)
        self.store = store

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """Start a broadcast from rank 0; wait with `finish`."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=self.place.timeout_s)
        return self.group.broadcast([tensor], options)

    def finish(self, work: Any) -> None:
        """Raises SyncFailed where the broadcast failed or took too long."""
        try:
            if self.place.backend == "nccl":  # whose `wait` makes the stream wait, not this thread
                self._wait_on_gpu(work)
            work.wait()
        except RuntimeError as error:
            who = "a worker" if self.place.rank == 0 else "the learner or another worker"
            raise SyncFailed(
                f"rank {self.place.rank} lost {who} in a weight broadcast: {str(error).splitlines()[0]}",
                "See whether they live; weights.timeout_s bounds the wait",
            ) from error

    def _wait_on_gpu(self, work: Any) -> None:
        end = time.monotonic() + self.place.timeout_s
        while not work.is_completed():
            if time.monotonic() > end:
                self.group.abort()  # or its kernel would hold the GPU
                raise RuntimeError(f"not done within {self.place.timeout_s:.0f} s")
            time.sleep(0.0005)


@dataclass
class CollectiveSink:
    """Rank 0's end. See `core.weights.WeightSink`."""

    place: Place
    store: Any = field(default=None, repr=False)
    group: Any = field(default=None, repr=False)
    sending: Any = field(default=None, repr=False)
    """The piece that is on its way."""
    failure: SyncFailed | None = field(default=None, repr=False)

    def open(self) -> tuple[str, int]:
        """Listen on a free port; returns where. The group forms when the first version is sent."""
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        timeout = timedelta(seconds=self.place.timeout_s)
        self.store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return address, self.store.port

    def room(self, layout: tuple[TensorSpec, ...], version: WeightVersion) -> None:
        """None: a piece is on its way while the next is gathered."""

    def take(
        self, layout: tuple[TensorSpec, ...], pieces: Iterator[np.ndarray[Any, Any]], version: WeightVersion
    ) -> None:
        """Broadcast each piece while the next is gathered, then the checksums up to the end of each."""
        if self.group is None:
            self.group = Group(self.place, self.store)
        group, running, sums = self.group, RunningChecksum(), []
        for piece in pieces:
            self._require_sent()
            self.sending = group.broadcast(torch.from_numpy(piece).to(group.device))
            sums.append(running.add(piece))
        self._require_sent()
        group.finish(group.broadcast(torch.tensor(sums, dtype=torch.int64, device=group.device)))

    def until_sent(self) -> None:
        """See `core.weights.WeightSink`. `take` raises what fails here: other ranks still wait for pieces to gather."""
        work, self.sending = self.sending, None
        try:
            if work is not None:
                self.group.finish(work)
        except SyncFailed as error:
            self.failure = error

    def _require_sent(self) -> None:
        self.until_sent()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Leave the group."""
        self.group = self.store = self.sending = None


@dataclass(frozen=True)
class CollectiveSource:
    """A worker's end. See `core.weights.WeightSource`."""

    place: Place
    layout: tuple[TensorSpec, ...]
    piece_numbers: int
    version: WeightVersion

    def fetch(self) -> WeightUpdate:
        """Receive all pieces, checking each while the next comes.

        Raises:
            SyncFailed: the sender or another worker was lost.
            WeightsRejected: a piece's checksum is wrong; it is named.
        """
        receiver = _receiver(self.place)
        group, flat = receiver.group, receiver.next_buffer(sum(spec.size for spec in self.layout))
        pieces = pieces_of(self.layout, self.piece_numbers)
        views = [flat[piece[0].offset : piece[-1].offset + piece[-1].size] for piece in pieces]
        on_gpu = group.place.backend == "nccl"
        running, sums = RunningChecksum(), []
        coming: deque[tuple[np.ndarray[Any, Any], torch.Tensor, Any]] = deque()
        for view in [*views, None]:
            if view is not None:
                landing = torch.empty(view.size, device=group.device) if on_gpu else torch.from_numpy(view)
                coming.append((view, landing, group.broadcast(landing)))
            # On a GPU a piece needs memory of its own until it is copied from there, so two come at a time.
            while coming and (view is None or (on_gpu and len(coming) == 2)):
                came, landing, work = coming.popleft()
                group.finish(work)
                if on_gpu:
                    came[:] = landing.cpu().numpy()
                sums.append(running.add(came))
        sent = torch.zeros(len(sums), dtype=torch.int64, device=group.device)
        group.finish(group.broadcast(sent))
        for number, (ours, theirs) in enumerate(zip(sums, sent.tolist(), strict=True)):
            if ours != theirs:
                names = [spec.name for spec in pieces[number]]
                raise WeightsRejected(
                    f"weights {self.version} refused: the checksum of {names[0]} … {names[-1]} is wrong",
                    "Nothing was applied; send a full update",
                )
        return WeightUpdate(self.version, self.layout, flat, sums[-1])


class _Receiver:
    """State that a worker keeps from version to version: its end of the group, and two shared buffers by turns. The
    other one holds the version that runs, for a worker that is admitted late."""

    def __init__(self, place: Place) -> None:
        host, port = place.address
        timeout = timedelta(seconds=place.timeout_s)
        self.group = Group(place, dist.TCPStore(host, port, is_master=False, timeout=timeout))
        self.buffers: list[np.ndarray[Any, Any]] = []

    def next_buffer(self, size: int) -> np.ndarray[Any, Any]:
        if len(self.buffers) < 2:
            self.buffers.append(new_shared(size))
        else:
            self.buffers.reverse()
        return self.buffers[-1]


_receivers: dict[Place, _Receiver] = {}
_entering = threading.Lock()


def _receiver(place: Place) -> _Receiver:
    """This process's end of a group; one of an older epoch is let go."""
    with _entering:
        if place not in _receivers:
            _receivers.clear()
            _receivers[place] = _Receiver(place)
        return _receivers[place]
