"""The pool: every worker is kept as full as it may be, trees come back as they end.

A long tree holds one of its worker's places and nothing else. Results do not depend on which worker ran what: a tree's
seeds come from its request.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from apr_ray.config import Config
from apr_ray.core.engine import EngineStats
from apr_ray.core.errors import PartDied
from apr_ray.core.ledger import ThreadTree
from apr_ray.rollout.worker import RolloutWorker
from apr_ray.threads.runtime import TreeRequest

log = logging.getLogger(__name__)
WAIT_REPORT_S = 60.0


def calls_at_once(config: Config) -> int:
    """Calls that a worker must be able to serve at the same time: its trees, where they are spread the children of
    others' trees, and room for weight updates and checks."""
    trees = config.rollout.concurrent_trees
    children = config.bounds.max_children if config.rollout.fan_out == "spread" else 0
    return trees * (1 + children) + 8


class RolloutPool:
    """N rollout workers. Build it with `start`."""

    def __init__(self, workers: Sequence[Any], concurrent_trees: int) -> None:
        self.workers = list(workers)
        self.concurrent_trees = concurrent_trees

    @classmethod
    def start(cls, config: Config, checkpoint: str) -> RolloutPool:
        """Start the workers on a checkpoint and wait until every engine is built."""
        rollout = config.rollout
        options = {
            "num_cpus": rollout.cpus_per_worker,
            "max_concurrency": calls_at_once(config),
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
        }
        workers: list[Any] = [
            ray.remote(RolloutWorker).options(**options).remote(config, checkpoint, f"worker-{i:02d}")
            for i in range(rollout.workers)
        ]
        ray.get([worker.ready.remote() for worker in workers])
        if rollout.fan_out == "spread":
            ray.get([worker.meet.remote(index, workers) for index, worker in enumerate(workers)])
        return cls(workers, rollout.concurrent_trees)

    def run(self, requests: Sequence[TreeRequest]) -> Iterator[tuple[int, ThreadTree]]:
        """Run trees; yields (index of the request, tree) in the order they end.

        Raises:
            PartDied: a worker's process ended; the message names it.
        """
        todo = deque(enumerate(requests))
        running: dict[Any, tuple[int, int]] = {}
        load = [0] * len(self.workers)
        since = time.monotonic()
        while todo or running:
            while todo and min(load) < self.concurrent_trees:
                where = load.index(min(load))
                index, request = todo.popleft()
                running[self.workers[where].run_tree.remote(request)] = (index, where)
                load[where] += 1
            ended, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_REPORT_S)
            if not ended:
                log.warning("waiting for %d trees since %.0f s", len(running), time.monotonic() - since)
                continue
            more, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
            for reference in more:
                index, where = running.pop(reference)
                load[where] -= 1
                try:
                    tree = ray.get(reference)
                except ray.exceptions.RayActorError as error:
                    raise PartDied(
                        f"rollout worker {where} died while it ran a tree: {error.__class__.__name__}",
                        "Its log is in Ray's session folder; go on with --resume",
                    ) from error
                since = time.monotonic()
                yield index, tree

    def members(self) -> tuple[str, ...]:
        """Which workers these are: changes whenever one is replaced."""
        return tuple(worker._actor_id.hex() for worker in self.workers)

    def receive_weights(self, source: Any) -> dict[str, Any]:
        """Have every worker fetch a version from one source (an object reference): an object reference by worker."""
        return self.receive_weights_each([source] * len(self.workers))

    def receive_weights_each(self, sources: Sequence[Any]) -> dict[str, Any]:
        """The same, from a source for each."""
        return {
            f"worker-{number:02d}": worker.receive_weights.remote(source)
            for number, (worker, source) in enumerate(zip(self.workers, sources, strict=True))
        }

    def apply_weights(self) -> dict[str, Any]:
        """Have every worker put to work what it has fetched: an object reference by worker."""
        return {f"worker-{number:02d}": worker.apply_weights.remote() for number, worker in enumerate(self.workers)}

    def sample_for_check(
        self, prompts: Sequence[tuple[int, ...]], tokens: int, temperature: float
    ) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]]:
        """(prompt, sampled ids, logprobs) from every worker; the prompts are dealt out among them."""
        parts = [prompts[i :: len(self.workers)] for i in range(len(self.workers))]
        results = ray.get(
            [w.sample_for_check.remote(p, tokens, temperature) for w, p in zip(self.workers, parts, strict=True)]
        )
        return [
            (prompt, ids, logprobs)
            for part, made in zip(parts, results, strict=True)
            for prompt, (ids, logprobs) in zip(part, made, strict=True)
        ]

    def stats(self) -> list[EngineStats]:
        """Each engine's counters."""
        result: list[EngineStats] = ray.get([worker.stats.remote() for worker in self.workers])
        return result

    def stop(self) -> None:
        """End the workers."""
        for worker in self.workers:
            ray.kill(worker)
