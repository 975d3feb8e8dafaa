"""One GRPO step, phase by phase, and how much of the machine it leaves idle."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray

from apr_ray.bench.recording import Recording, bench_config, fresh_policy, record
from apr_ray.bench.rollout import replaying_pool
from apr_ray.bench.sync import private_ray
from apr_ray.bench.timing import Result
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.learner.steps import GrpoStep
from apr_ray.model.llama import save_policy
from apr_ray.reward.actor import RewardClient
from apr_ray.rl.batches import grpo_batch
from apr_ray.tasks.registry import load_task
from apr_ray.threads.runtime import TreeRequest
from apr_ray.training.groups import group
from apr_ray.weights.check import check_engines
from apr_ray.weights.registry import build_transport
from apr_ray.weights.transport import Transport

PHASES = ("rollout", "reward", "batch", "learn", "sync", "check")


def run(problems: int = 32, group_size: int = 8, steps: int = 4, overrides: Sequence[str] = ()) -> Result:
    """`ratio`: share of the wall time that rollout and learning take: what the rest costs is 1 less that.

    The quickstart's step on recorded trees, first step left out. All of a group's trees are the recorded one, so the
    bench gives every other tree reward 1: without variance nothing would be learnt. The phases are those of
    `training.grpo`, in its order.
    """
    recording = record(problems, bench_config(overrides))
    config = recording.config
    requests = [replace(r, sample=s) for r in recording.requests for s in range(group_size)]
    walls: list[float] = []
    busy: list[float] = []
    phases: list[dict[str, float]] = []
    with private_ray(), tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/policy"
        save_policy(fresh_policy(config), load_task(config.task).tokenizer(), config.task, checkpoint)
        learners = LearnerGroup.start(config, config.grpo.optimizer, checkpoint)
        pool = replaying_pool(recording, checkpoint, config.rollout.workers)
        reward = RewardClient(config.task)
        actors = [*learners.actors, *pool.workers, reward.actor]
        transport = build_transport(config.weights)
        version = WeightVersion(0, 0)
        for _ in range(steps + 1):
            before, start = _cpu_seconds(actors), time.perf_counter()
            taken, version = _step(recording, requests, group_size, learners, pool, reward, transport, version)
            walls.append(time.perf_counter() - start)
            busy.append(_cpu_seconds(actors) - before)
            phases.append(taken)
        transport.close()
        for part in (learners, pool, reward):
            part.stop()
    wall, cores = sum(walls[1:]), os.cpu_count() or 1
    total = {name: sum(taken[name] for taken in phases[1:]) for name in PHASES}
    return {
        "ratio": (total["rollout"] + total["learn"]) / wall,
        "step_s": wall / steps,
        **{f"{name}_share": seconds / wall for name, seconds in total.items()},
        "rest_share": 1 - sum(total.values()) / wall,
        "cores": float(cores),
        "idle_core_s_per_step": (cores * wall - sum(busy[1:])) / steps,
        "trees": float(len(requests)),
        "tokens": float(group_size * recording.sampled_tokens),
        "rollout_tokens_per_s": group_size * recording.sampled_tokens * steps / total["rollout"],
        "delta_logprob_mean": max(taken["delta_logprob"] for taken in phases),
    }


def _step(
    recording: Recording,
    requests: Sequence[TreeRequest],
    group_size: int,
    learners: LearnerGroup,
    pool: Any,
    reward: RewardClient,
    transport: Transport,
    version: WeightVersion,
) -> tuple[dict[str, float], WeightVersion]:
    """Seconds of every phase, and how far engines and learners differ after the sync; and the new version."""
    config, times = recording.config, [time.perf_counter()]
    ended: dict[int, ThreadTree] = dict(pool.run(requests))
    trees = [ended[i] for i in range(len(requests))]
    times.append(time.perf_counter())
    scored = reward.score([request.problem for request in requests], trees)
    times.append(time.perf_counter())
    scored = [replace(tree, reward=float(tree.sample % 2)) for tree in scored]
    made = grpo_batch(group(scored, group_size), skip_zero_advantage=True)
    times.append(time.perf_counter())
    grpo = config.grpo
    learners.grpo_step(made.batch, GrpoStep(grpo.clip, 0.0, grpo.temperature, grpo.inner_steps), 1e-5)
    times.append(time.perf_counter())
    version = version.next()
    transport.broadcast(learners, pool, version)
    times.append(time.perf_counter())
    prompts = [tree.calls[0].prompt_ids for tree in trees[::group_size]][: config.weights.check_calls]
    delta = check_engines(learners, pool, prompts, grpo.temperature, config.weights, version, config.engine.exact)
    times.append(time.perf_counter())
    taken = {name: b - a for name, a, b in zip(PHASES, times[:-1], times[1:], strict=True)}
    return taken | {"delta_logprob": delta}, version


def _cpu_seconds(actors: Sequence[Any]) -> float:
    """CPU seconds that this process and the actors have used; Ray's own daemons are left out."""
    used: list[float] = ray.get([actor.__ray_call__.remote(lambda _: time.process_time()) for actor in actors])
    return time.process_time() + sum(used)
