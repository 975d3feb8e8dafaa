"""The pool: every worker is kept as full as it may be, trees come back as they end, who dies is replaced.

    hired ──▶ joining: has room, builds its engine, takes the current weights ──▶ ready: is given work ──▶ dead

A worker that died is replaced in its place.

A long tree holds one of its worker's places and nothing else. Results do not depend on which worker ran what: a tree's
seeds come from its request, so a tree whose worker died is run again on another, and in deterministic mode is the same.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from apr_ray.config import Config
from apr_ray.core.engine import EngineStats
from apr_ray.core.errors import PartDied, SyncFailed, WeightsRejected
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.parts import DEAD, died, reason
from apr_ray.placement import Places, worker_places
from apr_ray.rollout.worker import RolloutWorker
from apr_ray.threads.runtime import TreeRequest

log = logging.getLogger(__name__)
WAIT_REPORT_S = 60.0
TICK_S = 1.0


def calls_at_once(config: Config) -> int:
    """Calls that a worker must be able to serve at the same time: its trees, where they are spread the children of
    others' trees, and room for weight updates and checks."""
    trees = config.rollout.concurrent_trees
    children = config.bounds.max_children if config.rollout.fan_out == "spread" else 0
    return trees * (1 + children) + 8


@dataclass(eq=False, slots=True)
class Worker:
    """A worker of the pool.

    Attributes:
        name: of its place, followed by a number if others held the place before: `worker-01.2`.
        actor: its handle.
        joining: the answer that makes it ready; None once it is.
        given: `RolloutPool.current` when it was asked to join.
        log: where it logs; "" until it is ready.
    """

    name: str
    actor: Any
    joining: Any = None
    given: Current | None = None
    log: str = ""


@dataclass(frozen=True, slots=True)
class CheckSample:
    """A short generation of one worker, to compare with the learner; `versions`: the weights that its engine says drew
    it."""

    worker: str
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[WeightVersion, ...]


@dataclass(frozen=True, slots=True)
class Membership:
    """The workers that are ready, and a counter that grows whenever they change: what was built of them under an epoch
    (the group of a collective, say) is whole as long as the pool's epoch is the same."""

    epoch: int
    workers: tuple[Worker, ...]


Current = Callable[[Sequence[Worker]], Any]
"""Makes an object reference to a source of the weights that all ready workers run, for one that joins later; it is told
who is ready then."""


class RolloutPool:
    """N rollout workers. Build it with `start`.

    Args:
        actors: workers that are ready.
        concurrent_trees: trees that each may run at a time.
        hire: starts a worker of the given name in the given place; without it nobody is replaced.
        max_restarts: workers that may be replaced in all.
        spread_children: children decode on all workers' engines, not on their parent's alone.
        places: where they are.
        longest_tree_s: how long a tree may run.

    Attributes:
        current: see `Current`; None as long as the workers run the checkpoint they started on. `now_run` sets it.
        restarts: workers replaced so far.

    Raises:
        PartDied: from any method, where a worker dies and may not be replaced. The message names it.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        concurrent_trees: int,
        hire: Callable[[str, int], Any] | None = None,
        max_restarts: int = 0,
        spread_children: bool = False,
        places: Places | None = None,
        longest_tree_s: float = 0.0,
    ) -> None:
        self.members = [Worker(_name(place), actor) for place, actor in enumerate(actors)]
        self.concurrent_trees = concurrent_trees
        self.hire = hire
        self.max_restarts = max_restarts
        self.current: Current | None = None
        self.restarts = 0
        self.epoch = 0
        self.spread_children = spread_children
        self.places = places
        self.longest_tree_s = longest_tree_s
        self.replaced: set[str] = set()
        self.changing = threading.RLock()  # rollouts may run in a thread beside a sync (`grpo.ahead`)
        self._changed()

    @classmethod
    def start(cls, config: Config, checkpoint: str, beside: Places | None = None) -> RolloutPool:
        """Hire the workers and wait until `rollout.min_workers` are ready; the others join as they are. Where that
        fails, nothing is left.

        Args:
            checkpoint: must stay where it is: those hired later start on it too.
            beside: the learners' places, which the workers share where `placement.mode` is colocated.
        """
        rollout = config.rollout
        places = worker_places(config, beside)
        concurrency = calls_at_once(config)

        def hire(name: str, place: int) -> Any:
            worker = ray.remote(RolloutWorker).options(max_concurrency=concurrency, **places.options(place))
            return worker.remote(config, checkpoint, name, place)

        spread, longest_s = rollout.fan_out == "spread", config.bounds.max_seconds
        pool = cls([], rollout.concurrent_trees, hire, rollout.max_restarts, spread, places, longest_s)
        try:
            for place in range(rollout.workers):
                pool.members.append(pool._invited(Worker(_name(place), hire(_name(place), place))))
            pool._ready(rollout.min_workers or rollout.workers)
        except BaseException:
            pool.stop()
            raise
        return pool

    @property
    def workers(self) -> list[Any]:
        """Every worker's actor, ready or not."""
        return [worker.actor for worker in self.members]

    def membership(self) -> Membership:
        """The workers that are ready now; waits until at least one is."""
        ready = self._ready()
        return Membership(self.epoch, tuple(ready))

    # --- work -------------------------------------------------------------------------------------------------------

    def run(self, requests: Sequence[TreeRequest]) -> Iterator[tuple[int, ThreadTree]]:
        """Run trees; yields (index of the request, tree) in the order they end."""
        return self._spread([ask("run_tree", request) for request in requests])

    def sample_for_check(
        self, prompts: Sequence[tuple[int, ...]], tokens: int, temperature: float, timeout_s: float | None = None
    ) -> list[CheckSample]:
        """Short generations of every ready worker: the prompts are dealt out among them, again from the first where
        there are more workers. One that dies meanwhile is replaced and gives none; where all do, the next are asked.

        Raises SyncFailed naming whoever neither answers nor dies within `timeout_s`.
        """
        ready = self._ready()
        running: dict[Any, tuple[int, Worker]] = {}
        for number in range(max(len(prompts), len(ready))):
            worker, prompt = ready[number % len(ready)], prompts[number % len(prompts)]
            running[worker.actor.sample_for_check.remote(number, prompt, tokens, temperature)] = number, worker
        made = self._answers(running, timeout_s)
        if not made:
            return self.sample_for_check(prompts, tokens, temperature, timeout_s)
        return [
            CheckSample(ready[number % len(ready)].name, prompts[number % len(prompts)], *made[number])
            for number in sorted(made)
        ]

    def _spread(self, calls: Sequence[Callable[[Any], Any]]) -> Iterator[tuple[int, Any]]:
        """Make each call on the least busy worker, and again on another if that one dies; yields (index, answer)."""
        todo = deque(range(len(calls)))
        running: dict[Any, tuple[int, Worker]] = {}
        load: Counter[Worker] = Counter()
        while todo or running:
            while todo and load[worker := min(self._ready(), key=load.__getitem__)] < self.concurrent_trees:
                index = todo.popleft()
                running[calls[index](worker.actor)] = index, worker
                load[worker] += 1
            for reference in self._wait(running):
                index, worker = running.pop(reference)
                load[worker] -= 1
                try:
                    answer = ray.get(reference)
                except DEAD as error:
                    self._replace(worker, error)
                    todo.appendleft(index)
                else:
                    yield index, answer

    def everywhere(self, call: Callable[[Any], Any]) -> list[Any]:
        """The answers of all ready workers to `call(actor)`; one that dies meanwhile is replaced and gives none."""
        answers = self._answers({call(worker.actor): (i, worker) for i, worker in enumerate(self._ready())})
        return [answers[i] for i in sorted(answers)]

    def _answers(self, running: dict[Any, tuple[int, Worker]], timeout_s: float | None = None) -> dict[int, Any]:
        """The answers to these calls, by number; a worker that dies is replaced, and its calls have no answer."""
        answers = {}
        end = time.monotonic() + timeout_s if timeout_s is not None else math.inf
        while running:
            came = self._wait(running, end)
            if not came and time.monotonic() > end:
                names = ", ".join(sorted({worker.name for _, worker in running.values()}))
                raise SyncFailed(f"{names} did not answer within {timeout_s:.0f} s", "Go on with --resume RUN")
            for reference in came:
                number, worker = running.pop(reference)
                try:
                    answers[number] = ray.get(reference)
                except DEAD as error:
                    self._replace(worker, error)
        return answers

    def sleep(self) -> None:
        """Have every engine give its memory back, those of workers that join meanwhile too; no tree may run."""
        epoch = -1
        while epoch != self.epoch:
            self._ready(len(self.members))
            epoch = self.epoch
            self.everywhere(ask("sleep"))

    def wake(self) -> None:
        """Have every engine take its memory again."""
        self.everywhere(ask("wake"))

    def stats(self) -> list[EngineStats]:
        """Each ready engine's counters."""
        return self.everywhere(ask("stats"))

    def stop(self) -> None:
        """End the workers and give their places back; whoever still waits for one gets PartDied."""
        with self.changing:
            self.hire = None
            for worker in self.members:
                ray.kill(worker.actor)
            if self.places is not None:
                self.places.remove()

    def now_run(self, workers: Sequence[Worker], current: Current) -> None:
        """These workers run new weights, of which `current` makes a source; whoever is not among them takes it."""
        with self.changing:
            self.current = current
            late = [worker for worker in self.members if worker.joining is None and worker not in workers]
            for worker in late:
                self._invited(worker)
            if late:
                self._changed()

    def replace_dead(self, dead: Mapping[str, Exception]) -> bool:
        """Replace workers by name; whether there was one to replace, or was until another of its calls told."""
        for worker in [worker for worker in self.members if worker.name in dead]:
            self._replace(worker, dead[worker.name])
        return not self.replaced.isdisjoint(dead)

    # --- who is there -----------------------------------------------------------------------------------------------

    def _invited(self, worker: Worker, dead: Worker | None = None) -> Worker:
        """Let a worker join, maybe in a dead one's place; it takes the current weights first."""
        worker.given = self.current
        ready = [member for member in self.members if member.joining is None and member not in (worker, dead)]
        worker.joining = worker.actor.join.remote(self.current(ready) if self.current else None)
        return worker

    def _ready(self, least: int = 1) -> list[Worker]:
        """Those that may be given work; waits until there are so many."""
        self._admit()
        while len(ready := [worker for worker in self.members if worker.joining is None]) < least:
            self._wait(())
        return ready

    def _admit(self) -> None:
        """Make ready whoever has taken the current weights."""
        with self.changing:
            for worker in [w for w in self.members if w.joining is not None and _is_there(w.joining)]:
                try:
                    worker.log = ray.get(worker.joining)
                except DEAD as error:
                    self._replace(worker, error)
                    continue
                except (SyncFailed, WeightsRejected):
                    if worker.given is self.current:
                        raise
                    # what it was given is gone by now, or has been written over
                if worker.given is self.current:
                    worker.joining = worker.given = None  # or it would hold on to the weights that it was given
                    self._changed()
                else:  # the weights changed while it took them
                    self._invited(worker)

    def _changed(self) -> None:
        """Others are ready now than before."""
        self.epoch += 1
        if self.spread_children:
            ready = [worker.actor for worker in self.members if worker.joining is None]
            for index, actor in enumerate(ready):
                actor.meet.remote(index, ready)

    def _replace(self, worker: Worker, error: Exception) -> None:
        """Hire another in a dead worker's place."""
        with self.changing:
            if worker in self.members:  # else another of its calls has told already
                self._hire_for(worker, error)

    def _hire_for(self, worker: Worker, error: Exception) -> None:
        what = f"rollout worker {worker.name}"
        if self.hire is None:
            raise died(what, error, worker.log) from error
        if self.restarts >= self.max_restarts:
            raise died(f"{what} (rollout.max_restarts is {self.max_restarts})", error, worker.log) from error
        if getattr(error, "actor_init_failed", False):
            raise PartDied(f"{what} did not start: {reason(error)}") from error  # the next one would fail alike
        self.restarts += 1
        self.replaced.add(worker.name)
        ray.kill(worker.actor)  # Ray may only have lost sight of it
        name = f"{worker.name.partition('.')[0]}.{self.restarts}"
        log.warning("%s died: %s; %s takes its place (log: %s)", what, reason(error), name, worker.log)
        place = self.members.index(worker)
        self.members[place] = self._invited(Worker(name, self.hire(name, place)), worker)
        self._changed()

    def _wait(self, running: Iterable[Any], end: float = math.inf) -> list[Any]:
        """The answers that came; waits until one did, a worker joined or `time.monotonic()` is `end`."""
        awaited = list(running)
        since = told = time.monotonic()
        while True:
            with self.changing:  # another thread may admit one between two looks at it
                joining = {w.joining: w.name for w in self.members if w.joining is not None}
            references = [*awaited, *joining]
            if not references or ray.wait(references, num_returns=1, timeout=TICK_S)[0] or time.monotonic() > end:
                break
            self._tell_who_has_no_place()
            if (now := time.monotonic()) - told >= WAIT_REPORT_S:
                told = now
                names = ", ".join(joining.values()) or "none"
                log.warning("waiting since %.0f s for %d answers; joining: %s", now - since, len(awaited), names)
        self._tell_who_has_no_place()
        self._admit()
        came: list[Any] = ray.wait(awaited, num_returns=len(awaited), timeout=0)[0] if awaited else []
        return came

    def _tell_who_has_no_place(self) -> None:
        if self.places is not None:
            self.places.tell()


def ask(method: str, *arguments: Any) -> Callable[[Any], Any]:
    """A call that can be made on any worker's actor."""
    return lambda actor: getattr(actor, method).remote(*arguments)


def _name(place: int) -> str:
    return f"worker-{place:02d}"


def _is_there(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])
