"""Where the parts run: what each reserves, as Ray's placement groups, and the wait until there is room.

    disaggregated   learner ranks: one group, packed         rollout workers: a group each
    colocated       learner ranks: one group, packed; rollout worker i is in the bundle of rank i, half of it each's

A worker for which there is no room yet is one group that waits: an autoscaler sees it, and the others start. A part's
groups go when it stops, and with them whatever of it still runs; with the driver they go too.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from apr_ray.config import Config
from apr_ray.core.errors import ConfigError

log = logging.getLogger(__name__)
WAIT_REPORT_S = 5.0
LEAST_CPUS = 0.01
"""CPUs reserved for an actor that asks for nothing: a group must reserve something."""
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Need:
    """The reservation of one part's actors: `count` times `cpus` and `gpus`. `keys` are where the config says so."""

    part: str
    count: int
    cpus: float
    gpus: float = 0.0
    keys: str = ""

    @property
    def resources(self) -> dict[str, float]:
        """Of one actor, by Ray's names."""
        named = {"GPU": self.gpus, "CPU": self.cpus}
        return {name: amount for name, amount in named.items() if amount} or {"CPU": LEAST_CPUS}

    def __str__(self) -> str:
        return f"{self.count} {self.part}{'s' * (self.count != 1)}"


def learner_need(config: Config) -> Need:
    """Of the learner group; colocated, the rollout workers are in it."""
    learner, rollout = config.learner, config.rollout
    keys = "learner.ranks, learner.cpus_per_rank or learner.gpus_per_rank"
    if config.placement.mode == "colocated":
        cpus = max(learner.cpus_per_rank, rollout.cpus_per_worker)
        return Need("learner rank", learner.ranks, cpus, learner.gpus_per_rank, keys)
    return Need("learner rank", learner.ranks, learner.cpus_per_rank, learner.gpus_per_rank, keys)


def worker_need(config: Config) -> Need:
    """Of rollout workers that have places of their own."""
    rollout = config.rollout
    keys = "rollout.workers, rollout.cpus_per_worker or rollout.gpus_per_worker"
    return Need("rollout worker", rollout.workers, rollout.cpus_per_worker, rollout.gpus_per_worker, keys)


def _least(workers: Need, config: Config) -> Need:
    """Reservations that must be met before they begin."""
    return replace(workers, count=config.rollout.min_workers or workers.count)


def training_needs(config: Config) -> list[Need]:
    """Reservations that must be met before training begins."""
    own = [] if config.placement.mode == "colocated" else [_least(worker_need(config), config)]
    return [learner_need(config), *own]


def require_room(needs: Sequence[Need], config: Config) -> None:
    """Raise ConfigError where the cluster, were it empty, could not hold all of it, and does not grow."""
    if config.placement.autoscaling:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    remedy = "{}, add nodes, or set placement.autoscaling=true if the cluster adds them itself"
    for resource in ("GPU", "CPU"):
        has = [node.get(resource, 0.0) for node in nodes]
        for need in needs:
            each = need.resources.get(resource, 0.0)
            room = sum(int(amount / each + ROUNDING) for amount in has) if each else need.count
            if room < need.count:
                raise ConfigError(
                    f"{need} at {each:g} {resource} each: the cluster has {sum(has):g} {resource}, room for {room}",
                    remedy.format(f"Lower {need.keys}"),
                )
        asking = [need for need in needs if resource in need.resources]
        asked = sum(need.count * need.resources[resource] for need in asking)
        if asked > sum(has) + ROUNDING:
            raise ConfigError(
                f"{' and '.join(map(str, asking))} ask for {asked:g} {resource} together: the cluster has {sum(has):g}",
                remedy.format("Lower " + " or ".join(need.keys for need in asking if need.keys)),
            )


class Places:
    """Where the actors of one part go. Made by `learner_places` and `worker_places`.

    Args:
        need: what was reserved.
        groups: its placement groups, which `remove` removes.
        slots: (group, bundle) of each actor.
        share: of its bundle that an actor takes.
    """

    def __init__(
        self, need: Need, groups: Sequence[PlacementGroup], slots: Sequence[tuple[PlacementGroup, int]], share: float
    ) -> None:
        self.need = need
        self.groups = list(groups)
        self.slots = slots
        self.share = share
        self.since = time.monotonic()
        self.due = self.since + WAIT_REPORT_S

    def options(self, index: int) -> dict[str, Any]:
        """Of an actor, for `ray.remote(...).options`."""
        group, bundle = self.slots[index]
        amounts = {name: amount * self.share for name, amount in self.need.resources.items()}
        return {
            "num_cpus": amounts.get("CPU", 0.0),
            "num_gpus": amounts.get("GPU", 0.0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle),
        }

    def beside(self, part: str) -> Places:
        """For another part's actors in the same bundles. The groups stay this one's to remove."""
        need = Need(part, self.need.count, self.need.cpus, self.need.gpus)
        return Places(need, [], self.slots, self.share)

    def wait(self) -> None:
        """Until there is room for all; tells who waits."""
        for group in self.groups:
            while not group.wait(WAIT_REPORT_S):
                self.tell()

    def tell(self) -> None:
        """Say who waits for what, if someone does: every few seconds at first, every minute in the end.

        Costs nothing between two such moments, so call it wherever there is a wait. Groups that lost their node wait
        again."""
        now = time.monotonic()
        if now < self.due:
            return
        made = {group for group in {group for group, _ in self.slots} if _is_made(group)}
        late = sum(group not in made for group, _ in self.slots)
        if late:
            log.warning(self._report(late, now - self.since))
        else:
            self.since = now
        self.due = now + min(60.0, max(WAIT_REPORT_S, (now - self.since) / 10))

    def _report(self, late: int, since_s: float) -> str:
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        whole = ray.cluster_resources()  # type: ignore[no-untyped-call]
        wanted = self.need.resources
        each = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        left = " and ".join(f"{free.get(name, 0.0):g} of {whole.get(name, 0.0):g} {name}" for name in wanted)
        return f"{late} of {self.need} wait for {each} each, since {since_s:.0f} s; free in the cluster: {left}"

    def remove(self) -> None:
        """Give the groups back; actors that are still in them end."""
        for group in self.groups:
            remove_placement_group(group)
        self.groups.clear()


def _is_made(group: PlacementGroup) -> bool:
    return bool(placement_group_table(group)["state"] == "CREATED")


def learner_places(config: Config) -> Places:
    """All ranks in one group, packed: they start together or not at all."""
    need = learner_need(config)
    require_room([need], config)
    group = _group(need, need.count, "learner-ranks")
    share = 0.5 if config.placement.mode == "colocated" else 1.0
    return Places(need, [group], [(group, rank) for rank in range(need.count)], share)


def worker_places(config: Config, learners: Places | None) -> Places:
    """A group for each worker; colocated, the learners' places where there are learners."""
    if learners is not None and config.placement.mode == "colocated":
        return learners.beside("rollout worker")
    need = worker_need(config)
    require_room([_least(need, config)], config)
    groups = [_group(need, 1, f"rollout-worker-{place:02d}") for place in range(need.count)]
    return Places(need, groups, [(group, 0) for group in groups], 1.0)


def _group(need: Need, bundles: int, name: str) -> PlacementGroup:
    """Named for whoever lists the cluster's groups; names must differ."""
    group: PlacementGroup = placement_group(
        [need.resources] * bundles, strategy="PACK", name=f"{name}-{uuid.uuid4().hex[:8]}"
    )
    return group
