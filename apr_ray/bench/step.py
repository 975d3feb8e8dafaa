"""GRPO steps of the real loop's parts, phase by phase, and how much of the machine they leave idle."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from apr_ray.bench.recording import bench_config, fresh_policy, record
from apr_ray.bench.rollout import replaying_pool
from apr_ray.bench.sync import private_ray
from apr_ray.bench.timing import Result
from apr_ray.config import RewardConfig
from apr_ray.core.weights import WeightVersion
from apr_ray.learner.group import LearnerGroup
from apr_ray.model.llama import save_policy
from apr_ray.reward.actor import RewardClient
from apr_ray.tasks.registry import load_task
from apr_ray.training.groups import GroupStream
from apr_ray.training.grpo import batch_of
from apr_ray.training.policy import Policy
from apr_ray.training.step import Step
from apr_ray.training.step_report import PHASES
from apr_ray.weights.registry import build_transport

TIMED = tuple(name for name in PHASES if name != "keep")
"""Nothing is kept for the audit here."""


def run(problems: int = 32, group_size: int = 8, steps: int = 4, overrides: Sequence[str] = ()) -> Result:
    """`ratio`: share of the wall time that rollout and learning take: what the rest costs is 1 less that.

    The quickstart's step on recorded trees, first step left out. All of a group's trees are the recorded one, so a coin
    rewards them, and credit goes to whole trees: without variance nothing would be learnt. The phases are those that
    the parts of the loop report.
    """
    recording = record(problems, bench_config(overrides))
    asked = [request.problem for request in recording.requests]
    changed = {
        "problems_per_step": len(asked),
        "group_size": group_size,
        "steps": steps + 1,
        "reward": RewardConfig(coin=True),
        "credit": "tree",
        "refill_rounds": 0,
        "kl_coefficient": 0.0,
    }
    config = recording.config
    config = config.model_copy(update={"grpo": config.grpo.model_copy(update=changed)})
    with private_ray(), tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/policy"
        save_policy(fresh_policy(config), load_task(config.task).tokenizer(), config.task, checkpoint)
        learners = LearnerGroup.start(config, config.grpo.optimizer, checkpoint)
        pool = replaying_pool(recording, checkpoint, config.rollout.workers)
        reward, transport = RewardClient(config.task), build_transport(config.weights)
        policy = Policy(config, learners, pool, transport, WeightVersion(0, 0), Path(checkpoint))
        groups = GroupStream(pool, reward, asked * (steps + 1), config)
        actors = [*learners.actors, *pool.workers, reward.actor]

        walls, busy, made, deltas = [], [], [], []
        for number in range(1, steps + 2):
            before, start = _cpu_seconds(actors), time.perf_counter()
            step = Step(number, config.grpo.optimizer.learning_rate, False, False)
            drawn = groups.take(step, policy.version)
            with step.phase("learn"):
                stats = policy.learn(batch_of(drawn, config.grpo).batch, step.rate)
            with step.phase("sync"):
                deltas.append(policy.publish(stats, drawn.prompts) or 0.0)
            walls.append(time.perf_counter() - start)
            busy.append(_cpu_seconds(actors) - before)
            made.append(step.seconds)

        transport.close()
        for part in (learners, pool, reward, groups):
            part.stop()
    wall, cores = sum(walls[1:]), os.cpu_count() or 1
    total = {name: sum(seconds[name] for seconds in made[1:]) for name in TIMED}
    return {
        "ratio": (total["wait"] + total["learn"]) / wall,
        "step_s": wall / steps,
        **{f"{name}_share": seconds / wall for name, seconds in total.items()},
        "rest_share": 1 - sum(total.values()) / wall,
        "cores": float(cores),
        "idle_core_s_per_step": (cores * wall - sum(busy[1:])) / steps,
        "trees": float(len(asked) * group_size),
        "tokens": float(group_size * recording.sampled_tokens),
        "rollout_tokens_per_s": group_size * recording.sampled_tokens * steps / total["wait"],
        "delta_logprob_mean": max(deltas),
    }


def _cpu_seconds(actors: Sequence[Any]) -> float:
    """CPU seconds that this process and the actors have used; Ray's own daemons are left out."""
    used: list[float] = ray.get([actor.__ray_call__.remote(lambda _: time.process_time()) for actor in actors])
    return time.process_time() + sum(used)
