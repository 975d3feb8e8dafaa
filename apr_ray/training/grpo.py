"""The GRPO loop: rollouts of thread trees, rewards, learning, weights back to the engines (paper section 3.3).

    problems ─▶ pool.run ─▶ reward.score ─▶ grpo_batch ─▶ learners.grpo_step ─▶ broadcast ─▶ check ─▶ next step

Departures from textbook GRPO: the loss of a call is the mean over its tokens, of a tree the mean over its calls; the
old policy of the ratio is the engine that drew the tokens (`grpo.loss_mean` and `grpo.ratio` change that); groups
without variance are left out when there is no KL term.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from apr_ray.config import Config, GrpoConfig
from apr_ray.core.errors import MismatchError
from apr_ray.core.ledger import Group, Problem, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.evaluation.evaluate import tree_seed
from apr_ray.evaluation.kept_batch import KeptStep, Reported, keep_batch
from apr_ray.learner.group import LearnerGroup
from apr_ray.learner.trainer import GrpoStep, StepStats
from apr_ray.metrics.mismatch import mismatch_metrics
from apr_ray.metrics.trees import failure_reasons, staleness, tree_metrics
from apr_ray.reward.actor import RewardClient
from apr_ray.rl.batches import GrpoBatch, grpo_batch
from apr_ray.rl.schedules import learning_rate
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tasks.registry import load_task
from apr_ray.threads.runtime import TreeRequest
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.session import Clock, ray_session, tracked
from apr_ray.training.watch import Watch
from apr_ray.weights.check import check_engines
from apr_ray.weights.registry import build_transport


def train_grpo(config: Config, run: RunDir, policy: Path, bars: ProgressBars) -> Path:
    """Train until `grpo.steps` or `grpo.max_minutes`, from `policy`; returns the final policy's folder."""
    grpo, seed = config.grpo, config.run.seed
    task = load_task(config.task)
    found = run.latest()
    state = found[1] if found else LoopState()
    start = found[0] / "policy" if found else policy
    on_disk: Path | None = start  # the learners' present weights, where a checkpoint holds them
    run.truncate_metrics(state.metrics_rows)
    train = task.problems("train", grpo.steps * grpo.problems_per_step, seed + 1)
    heldout = task.problems(config.evaluation.split, config.evaluation.problems, seed)
    with ray_session(config), tracked(config, run, state) as tracker, ExitStack() as parts:
        learners = LearnerGroup.start(config, grpo.optimizer, str(start))
        pool = RolloutPool.start(config, str(policy))  # not a checkpoint: those are removed in time
        reward = RewardClient(config.task)
        watch = Watch(config, run, tracker, heldout, bars)
        transport = build_transport(config.weights)
        rollouts = Rollouts(pool, train, config)
        for part in (reward, learners, rollouts, pool):  # the last first: without its pool, a thread of rollouts ends
            parts.callback(part.stop)
        if grpo.kl_coefficient:
            learners.freeze_reference(str(policy))
        version = WeightVersion.parse(state.version)
        if found:
            learners.load(found[0])
            transport.broadcast(learners, pool, version)
        else:
            watch.full_evaluation(pool, reward, 0)
        how = GrpoStep.of(grpo)
        clock = Clock(state.elapsed_s)

        def done() -> float:
            return max(state.step / grpo.steps, clock.share_of(grpo.max_minutes))

        with bars.bar("GRPO", 1.0) as bar:
            while done() < 1:
                times = [time.perf_counter()]
                trees, rollout_s = rollouts.take(state.step)
                due = (state.step + 1) % grpo.eval_every == 0
                if grpo.overlap and not due and state.step + 1 < grpo.steps:  # an evaluation has the engines to itself
                    rollouts.begin(state.step + 1)
                times.append(time.perf_counter())
                trees = reward.score([p for p in rollouts.problems(state.step) for _ in range(grpo.group_size)], trees)
                if grpo.reward == "random":
                    trees = randomly_rewarded(trees, seed, state.step)
                times.append(time.perf_counter())
                made = batch_of(trees, grpo, version)
                rate = learning_rate(grpo.optimizer, state.step, done())
                stats = learners.grpo_step(made.batch, how, rate) if len(made.batch) else []
                times.append(time.perf_counter())
                if on_disk and grpo.keep_batches != "off":
                    what = kept_step(config, state.step + 1, version, made, stats, str(policy))
                    keep_batch(run.path, what, trees, on_disk, only_newest=grpo.keep_batches == "last")
                if config.weights.mode != "in_flight":  # else older KV makes a difference of its own
                    check_mismatch(stats, version, config.weights.mismatch_tolerance)
                measured = version
                version = version.next()
                transport.broadcast(learners, pool, version)
                prompts = [t.calls[0].prompt_ids for t in trees[:: grpo.group_size]][: config.weights.check_calls]
                delta = check_engines(learners, pool, prompts, grpo.temperature, config.weights, version)
                times.append(time.perf_counter())
                state.step += 1
                state.version = str(version)
                state.tokens += sum(s.tokens for s in stats)
                state.elapsed_s = clock.elapsed_s()
                metrics = step_metrics(trees, made, stats, measured, times, rollout_s)
                metrics |= {"sync/delta_logprob_mean": delta, "rollout/restarts": float(pool.restarts)}
                watch.log(metrics, state.step)
                note = f"step {state.step}  reward {metrics['rollout/reward']:.3f}  {metrics['time/step_s']:.1f} s/step"
                bar.update(min(1.0, done()), note)
                last = done() >= 1
                on_disk = None
                improved = due and not last and watch.quick_evaluation(pool, reward, state)
                if improved or last or state.step % grpo.save_every == 0:
                    with run.checkpoint(state) as folder:
                        learners.save(folder)
                        if improved:
                            run.keep_policy(folder, "best")
                    on_disk = run.path / "checkpoints" / f"step-{state.step:06d}" / "policy"
        watch.full_evaluation(pool, reward, state.step)
        transport.close()
    latest = run.latest()
    assert latest is not None
    return run.keep_policy(latest[0], "final")


class Rollouts:
    """The trees of each step, which may begin before they are asked for (`grpo.overlap`)."""

    def __init__(self, pool: RolloutPool, train: Sequence[Problem], config: Config) -> None:
        self.pool = pool
        self.train = train
        self.config = config
        self.thread = ThreadPoolExecutor(1, "rollouts")
        self.begun: dict[int, Future[tuple[list[ThreadTree], float]]] = {}

    def problems(self, step: int) -> Sequence[Problem]:
        """Those of one step."""
        first = step * self.config.grpo.problems_per_step
        return self.train[first : first + self.config.grpo.problems_per_step]

    def begin(self, step: int) -> None:
        """Start a step's trees."""
        self.begun[step] = self.thread.submit(self._sample, step)

    def take(self, step: int) -> tuple[list[ThreadTree], float]:
        """A step's trees, and the seconds that they took."""
        if step not in self.begun:
            return self._sample(step)
        return self.begun.pop(step).result()

    def stop(self) -> None:
        """End the thread, whose pool must have been stopped."""
        self.thread.shutdown(cancel_futures=True)

    def _sample(self, step: int) -> tuple[list[ThreadTree], float]:
        start = time.perf_counter()
        trees = sample_trees(self.pool, self.problems(step), self.config, step)
        return trees, time.perf_counter() - start


def sample_trees(pool: RolloutPool, problems: Sequence[Problem], config: Config, step: int) -> list[ThreadTree]:
    """`group_size` trees per problem, in the order (problem, sample)."""
    grpo = config.grpo
    requests = [
        TreeRequest(
            p, s, tree_seed(config.run.seed, f"step-{step}", p.key, s), grpo.temperature, budget=config.rollout.budget
        )
        for p in problems
        for s in range(grpo.group_size)
    ]
    ended = dict(pool.run(requests))
    return [ended[i] for i in range(len(requests))]


def randomly_rewarded(trees: Sequence[ThreadTree], seed: int, step: int) -> list[ThreadTree]:
    """Rewards by a fair coin, the same for the same seed and step."""
    return [replace(t, reward=float(tree_seed(seed, f"coin-{step}", t.problem_key, t.sample) % 2)) for t in trees]


def group(trees: Sequence[ThreadTree], size: int) -> list[Group]:
    """Consecutive trees of one problem as groups."""
    return [Group(trees[i].problem_key, tuple(trees[i : i + size])) for i in range(0, len(trees), size)]


def batch_of(trees: Sequence[ThreadTree], grpo: GrpoConfig, version: WeightVersion) -> GrpoBatch:
    """A step's trees, with their rewards, as the configured objective takes them."""
    fresh, stale = fresh_groups(group(trees, grpo.group_size), version, grpo.max_staleness)
    return grpo_batch(
        fresh,
        skip_zero_advantage=not grpo.kl_coefficient,
        stale=stale,
        loss_mean=grpo.loss_mean,
        advantage_kind=grpo.advantage,
    )


def fresh_groups(
    groups: Sequence[Group], version: WeightVersion, max_staleness: int
) -> tuple[list[Group], list[Group]]:
    """Groups all of whose trees were drawn under weights at most `max_staleness` versions old, and the others
    (contract 9). Weights of another incarnation are never fresh."""
    fresh: list[Group] = []
    stale: list[Group] = []
    for one in groups:
        versions = {v for tree in one.trees for v in tree.versions()}
        recent = all(
            v.incarnation == version.incarnation and version.counter - v.counter <= max_staleness for v in versions
        )
        (fresh if recent else stale).append(one)
    return fresh, stale


def check_mismatch(stats: Sequence[StepStats], version: WeightVersion, tolerance: float) -> None:
    """Raise MismatchError where engines and learners differ too much on tokens said to be drawn under the learners'
    `version`: older ones differ for a reason."""
    found = stats[0].mismatch if stats else None
    own = found.versions.get(version.counter) if found else None
    if own and own.delta_mean > tolerance:
        raise MismatchError(
            f"weights {version}: engines and learners differ by {own.delta_mean:.2e} in logprob per token, tolerance"
            f" {tolerance:.0e}",
            "The trees were not drawn from the learners' policy",
        )


def kept_step(
    config: Config, step: int, version: WeightVersion, made: GrpoBatch, stats: Sequence[StepStats], reference: str
) -> KeptStep:
    """A step as `apr-ray audit` will want to know it."""
    grpo = config.grpo
    reported = None
    if stats and (found := stats[0].mismatch):
        one = stats[0]
        reported = Reported(one.loss, one.kl, one.grad_norm, one.tokens, found.delta_mean, found.delta_max, one.cut)
    return KeptStep(
        step=step,
        version=str(version),
        group_size=grpo.group_size,
        clip=grpo.clip,
        kl_coefficient=grpo.kl_coefficient,
        temperature=grpo.temperature,
        max_staleness=grpo.max_staleness,
        reference=reference if grpo.kl_coefficient else "",
        dispositions={disposition.value: n for disposition, n in made.dispositions.items()},
        reported=reported,
        advantage=grpo.advantage,
        loss_mean=grpo.loss_mean,
        ratio=grpo.ratio,
        correction=grpo.correction,
        correction_level=grpo.correction_level,
        correction_cap=grpo.correction_cap,
        correction_from=grpo.correction_from,
    )


def step_metrics(
    trees: Sequence[ThreadTree],
    made: GrpoBatch,
    stats: Sequence[StepStats],
    version: WeightVersion,
    times: Sequence[float],
    rollout_s: float,
) -> dict[str, float]:
    """One step's metrics, by their names in `metrics.names`."""
    wait_s, reward_s, learn_s, sync_s = (b - a for a, b in itertools.pairwise(times))
    groups = max(1, len({t.problem_key for t in trees}))
    prompt = sum(len(c.prompt_ids) for t in trees for c in t.calls)
    out = {
        "rollout/reward": sum(t.reward or 0.0 for t in trees) / len(trees),
        "rollout/zero_variance_groups": made.zero_variance_groups / groups,
        "rollout/staleness": staleness(trees, version.counter),
        "rollout/tokens_per_s": sum(t.total_tokens for t in trees) / rollout_s,
        "rollout/cached_tokens": sum(c.cached_tokens for t in trees for c in t.calls) / max(1, prompt),
        "time/rollout_s": rollout_s,
        "time/wait_s": wait_s,
        "time/reward_s": reward_s,
        "time/learn_s": learn_s,
        "time/sync_s": sync_s,
        "time/step_s": times[-1] - times[0],
    }
    out |= {f"rollout/{name}": value for name, value in tree_metrics(trees).items()}
    out |= {f"rollout/failure/{reason}": share for reason, share in failure_reasons(trees).items()}
    out |= {f"rollout/tokens/{disposition.value}": float(n) for disposition, n in made.dispositions.items()}
    if stats:
        first, last = stats[0], stats[-1]
        out |= {
            "train/loss": first.loss,
            "train/grad_norm": sum(s.grad_norm for s in stats) / len(stats),
            "train/learning_rate": first.learning_rate,
            "train/kl": last.kl,
            "train/entropy": first.entropy,
            "train/clip_fraction": last.clipped / max(1, last.tokens),
            "train/tokens": float(first.tokens),
            "train/tokens_per_s": sum(s.tokens for s in stats) / learn_s,
            "train/mismatch/cut": first.cut / max(1, first.tokens),
        }
        if first.mismatch:
            out |= mismatch_metrics(first.mismatch, version.counter)
    return out
