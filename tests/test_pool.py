"""The pool and its syncs under every order of events: a stand-in for Ray ends calls and kills workers in any order.

What real actors do, `test_deaths.py`, `test_weights.py` and `test_spread.py` show.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from apr_ray.config import WeightsConfig
from apr_ray.core.errors import AprError, PartDied, SyncFailed, WeightsRejected
from apr_ray.core.weights import WeightVersion
from apr_ray.parts import DEAD, died, lasting_imports
from apr_ray.rollout import pool as pool_module
from apr_ray.rollout.pool import Membership, RolloutPool, Worker
from apr_ray.weights import transport as transport_module
from apr_ray.weights.transport import Sending, Transport, receive

Choose = Callable[[int], int]
"""A number below the given one."""


@dataclass(eq=False)
class Call:
    """An object reference."""

    actor: Actor
    method: str
    arguments: tuple[Any, ...]
    state: str = "running"
    answer: Any = None


@dataclass(eq=False)
class Actor:
    """A rollout worker as the pool sees it: it takes weights when it joins and draws trees under those it has."""

    world: World
    name: str
    version: int = 0
    alive: bool = True
    staged: int = 0
    refuses: bool = False
    hangs: bool = False

    def __getattr__(self, method: str) -> Any:
        return Handle(self, method)

    def join_(self, version: int | None) -> str:
        if version is not None and version < self.world.newest and self.world.choose(2):
            raise SyncFailed("its memory has been written over", "")
        self.version = self.version if version is None else version
        return "log"

    def receive_weights_(self, version: int) -> None:
        self.staged = version

    def apply_weights_(self) -> None:
        if self.refuses:
            raise WeightsRejected("not finite", "Look at the learners")
        self.version = self.staged

    def run_tree_(self, request: int) -> tuple[int, int]:
        return request, self.version

    def sample_for_check_(self, number: int, prompt: tuple[int, ...], tokens: int, temperature: float) -> Any:
        return (number,), (float(self.version),), ()


@dataclass
class Handle:
    actor: Actor
    method: str

    def remote(self, *arguments: Any) -> Call:
        call = Call(self.actor, self.method, arguments)
        if self.actor.alive:
            self.actor.world.running.append(call)
            busy = Counter(c.actor for c in self.actor.world.running if c.method == "run_tree")
            self.actor.world.most_at_once = max(self.actor.world.most_at_once, *busy.values(), 0)
        else:
            call.state = "dead"
        return call


@dataclass
class World:
    """Stands in for the module `ray`. Time passes only where somebody waits."""

    choose: Choose
    deaths_left: int = 0
    newest: int = 0
    actors: list[Actor] = field(default_factory=list)
    running: list[Call] = field(default_factory=list)
    most_at_once: int = 0
    exceptions: Any = ray.exceptions

    def hire(self, name: str, place: int) -> Actor:
        self.actors.append(Actor(self, name))
        return self.actors[-1]

    def kill(self, actor: Actor) -> None:
        actor.alive = False
        for call in [c for c in self.running if c.actor is actor]:
            self.running.remove(call)
            call.state = "dead"

    def pass_time(self) -> bool:
        """One thing happens: some call ends, or some worker dies, idle or not. False where nothing ever will."""
        living = [actor for actor in self.actors if actor.alive and not actor.hangs]
        if self.deaths_left and living and not self.choose(4):
            self.deaths_left -= 1
            self.kill(living[self.choose(len(living))])
            return True
        moving = [call for call in self.running if not call.actor.hangs]
        if not moving:
            return False
        call = moving[self.choose(len(moving))]
        self.running.remove(call)
        call.state = "ended"
        try:
            call.answer = getattr(call.actor, call.method + "_")(*call.arguments)
        except AprError as error:
            call.answer = ray.exceptions.RayTaskError(call.method, "", error)
        return True

    def wait(self, calls: Sequence[Call], num_returns: int = 1, timeout: float | None = None) -> Any:
        assert len(set(calls)) == len(calls), "Ray refuses to wait twice for the same"
        while timeout != 0 and sum(c.state != "running" for c in calls) < num_returns and self.pass_time():
            pass
        ended = [c for c in calls if c.state != "running"][:num_returns]
        return ended, [c for c in calls if c not in ended]

    def get(self, call: Call) -> Any:
        if call.state == "dead":
            raise ray.exceptions.RayActorError
        assert call.state == "ended", "it would block"
        if isinstance(call.answer, ray.exceptions.RayTaskError):
            raise call.answer.as_instanceof_cause()
        return call.answer


@contextmanager
def a_pool(choose: Choose, workers: int, deaths: int, restarts: int) -> Iterator[tuple[World, RolloutPool]]:
    """Of workers that have been hired and asked to join; `deaths` of them, or of their successors, will die."""
    world = World(choose, deaths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "ray", world)
        patch.setattr(transport_module, "ray", world)
        pool = RolloutPool([], 2, world.hire, restarts)
        for place in range(workers):
            pool.members.append(pool._invited(Worker(f"worker-{place:02d}", world.hire("", place))))
        yield world, pool


def chosen_by(data: st.DataObject) -> Choose:
    return lambda below: data.draw(st.integers(0, below - 1)) if below > 1 else 0


@given(st.data(), st.integers(1, 4), st.integers(0, 12), st.integers(0, 4))
@settings(max_examples=150)
def test_every_tree_comes_back_once_whoever_dies(data: st.DataObject, workers: int, trees: int, deaths: int) -> None:
    with a_pool(chosen_by(data), workers, deaths, restarts=deaths) as (world, pool):
        ended = list(pool.run(list(range(trees))))  # type: ignore[arg-type]
    assert sorted(ended) == [(i, (i, 0)) for i in range(trees)]
    assert world.most_at_once <= pool.concurrent_trees
    assert pool.restarts <= deaths - world.deaths_left  # of a death while idle, nobody may have heard yet
    assert len({w.name for w in pool.members}) == workers


@given(st.data(), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=50)
def test_one_death_too_many_ends_the_run_by_name(data: st.DataObject, workers: int, deaths: int) -> None:
    died = rf"rollout worker worker-0.*max_restarts is {deaths - 1}"
    with a_pool(chosen_by(data), workers, deaths, restarts=deaths - 1) as (world, pool):
        with pytest.raises(PartDied, match=died):
            [list(pool.run(list(range(8)))) for _ in range(1000)]  # type: ignore[arg-type]
        assert world.deaths_left == 0


@given(st.data(), st.integers(1, 4), st.integers(0, 4))
@settings(max_examples=150)
def test_nobody_draws_under_older_weights_than_the_pools(data: st.DataObject, workers: int, deaths: int) -> None:
    """Syncs between runs; workers die and join at any time, before, in and after one."""
    choose = chosen_by(data)
    with a_pool(choose, workers, deaths, restarts=deaths) as (world, pool):
        for version in range(1, 4):
            members = pool.membership()
            for _ in range(choose(3)):  # while weights are under way
                if world.running:
                    world.pass_time()
                pool._admit()  # as a thread that draws beside the sync would
            for worker in members.workers:
                worker.actor.version = version
            pool.now_run(members.workers, lambda _, now=version: now)
            world.newest = version
            ended = list(pool.run(list(range(5))))  # type: ignore[arg-type]
            assert sorted(ended) == [(i, (i, version)) for i in range(5)]


@given(st.data(), st.integers(1, 3), st.integers(0, 5))
@settings(max_examples=100)
def test_a_check_has_samples_however_many_die(data: st.DataObject, workers: int, deaths: int) -> None:
    prompts = [(1,), (2,)]
    with a_pool(chosen_by(data), workers, deaths, restarts=deaths) as (world, pool):
        pool._ready(workers)  # deaths before it do not matter
        before = {w.name for w in pool.members}
        left = world.deaths_left if all(w.actor.alive for w in pool.members) else -1
        samples = pool.sample_for_check(prompts, 5, 1.0)
    assert samples
    assert {sample.prompt for sample in samples} <= set(prompts)
    if world.deaths_left == left:
        assert {sample.worker for sample in samples} == before
        assert {sample.prompt for sample in samples} == set(prompts)


# --- syncs ------------------------------------------------------------------------------------------------------------


class Numbers(Transport):
    """Weights that are a number."""

    def send(self, learners: Any, members: Membership, version: WeightVersion) -> Sending:
        return Sending(receive(members.workers, version.counter), lambda _: version.counter)


class Learners:
    parameters = 1


def broadcast(pool: RolloutPool, version: int) -> None:
    Numbers(WeightsConfig()).broadcast(Learners(), pool, WeightVersion(0, version))  # type: ignore[arg-type]


@given(st.data(), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=150)
def test_after_a_sync_everybody_runs_its_version_whoever_dies(data: st.DataObject, workers: int, deaths: int) -> None:
    with a_pool(chosen_by(data), workers, deaths, restarts=deaths) as (world, pool):
        for version in range(1, 4):
            broadcast(pool, version)
            world.newest = version
            ended = list(pool.run(list(range(5))))  # type: ignore[arg-type]
            assert sorted(ended) == [(i, (i, version)) for i in range(5)]
        assert {worker.actor.version for worker in pool._ready(workers) if worker.actor.alive} <= {3}


@given(st.data(), st.integers(1, 4), st.integers(0, 2))
@settings(max_examples=100)
def test_a_worker_that_refuses_a_version_ends_the_run_whoever_dies_beside_it(
    data: st.DataObject, workers: int, deaths: int
) -> None:
    """Unless it dies itself: who takes its place is asked anew."""
    choose = chosen_by(data)
    with a_pool(choose, workers, deaths, restarts=deaths) as (_, pool):
        refusing = pool._ready(workers)[0].actor
        refusing.refuses = True
        said = ""
        try:
            broadcast(pool, 1)
        except (WeightsRejected, SyncFailed) as error:
            said = str(error)
        assert "not finite" in said or not refusing.alive
        if not said:
            assert {answer[1] for _, answer in pool.run(list(range(5)))} == {1}  # type: ignore[arg-type]


@given(st.data(), st.integers(2, 4), st.integers(0, 2))
@settings(max_examples=100)
def test_a_worker_that_hangs_is_named_whoever_dies_beside_it(data: st.DataObject, workers: int, deaths: int) -> None:
    with a_pool(chosen_by(data), workers, deaths, restarts=deaths) as (_, pool):
        hanging = pool._ready(workers)[0]
        assume(hanging.actor.alive)
        hanging.actor.hangs = True
        with pytest.raises(SyncFailed, match=f"{hanging.name} did not answer within"):
            broadcast(pool, 1)
        assert all(worker.actor.version == 0 for worker in pool.members)


class Hasty(Worker):
    """A worker whom another thread admits between any two looks at it that the pool's lock does not hold together."""

    pool: RolloutPool
    seen: Any

    @property
    def joining(self) -> Any:  # type: ignore[override]
        now = self.seen
        if not self.pool.changing._is_owned():  # type: ignore[attr-defined]
            self.seen = None
        return now

    @joining.setter
    def joining(self, value: Any) -> None:
        self.seen = value


def test_a_worker_admitted_while_others_are_awaited_is_not_waited_for() -> None:
    """Else None would reach `ray.wait`, which no Ray takes."""
    with a_pool(lambda below: 0, 1, deaths=0, restarts=0) as (world, pool):
        pool._ready()
        Hasty.pool = pool
        pool.members.append(pool._invited(Hasty("worker-01", world.hire("", 1))))
        awaited = pool.members[0].actor.run_tree.remote(7)
        came: list[Any] = []
        while not came:
            came = pool._wait([awaited])
        assert came == [awaited]


def test_a_worker_that_is_ready_holds_on_to_no_weights() -> None:
    with a_pool(lambda below: 0, 2, deaths=0, restarts=1) as (world, pool):
        broadcast(pool, 1)
        world.kill(pool.members[0].actor)
        list(pool.run(list(range(4))))  # type: ignore[arg-type]
        assert [worker.given for worker in pool._ready(2)] == [None, None]


def test_what_an_actor_imports_uses_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with lasting_imports():
        assert os.environ["OMP_NUM_THREADS"] == "1"


def test_who_joins_takes_the_weights_from_those_who_are_ready_by_then() -> None:
    """A collective's joiner asks another worker: not one of those that were there when the weights were sent."""
    asked: list[list[str]] = []

    class Passed(Numbers):
        def send(self, learners: Any, members: Membership, version: WeightVersion) -> Sending:
            def current(ready: Sequence[Worker]) -> int:
                asked.append([worker.name for worker in ready])
                return version.counter

            return Sending(receive(members.workers, version.counter), current)

    with a_pool(lambda below: 0, 2, deaths=0, restarts=4) as (world, pool):
        pool._ready(2)
        Passed(WeightsConfig()).broadcast(Learners(), pool, WeightVersion(0, 1))  # type: ignore[arg-type]
        for victim in (0, 1):
            world.kill(pool.members[victim].actor)
            list(pool.run(list(range(4))))  # type: ignore[arg-type]
            pool._ready(2)
        assert [actor.version for actor in world.actors if actor.alive] == [1, 1]
    assert asked == [["worker-01"], ["worker-00.1"]]


def test_a_worker_that_hangs_in_the_check_after_a_sync_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10_000))
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: float(next(now)))
    with a_pool(lambda below: 0, 2, deaths=0, restarts=0) as (_, pool):
        pool._ready(2)
        pool.members[1].actor.hangs = True
        with pytest.raises(SyncFailed, match=r"^worker-01 did not answer within 60 s"):
            pool.sample_for_check([(1,)], 5, 1.0, timeout_s=60.0)


def test_a_worker_that_ray_killed_for_memory_is_one_that_died() -> None:
    said = (
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 16) was"
        " 22.51GB used / 23.54GB (95.6%).\nOOM kill reason: …\nRefer to the documentation on how to address it"
    )
    error = ray.exceptions.OutOfMemoryError(said)
    assert isinstance(error, DEAD)
    assert died("learner rank 1", error, "").what == (
        "learner rank 1 died: its machine ran out of memory (22.51GB used / 23.54GB)"
    )
