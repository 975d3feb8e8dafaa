"""The GRPO loop: rollouts of thread trees, rewards, learning, weights back to the engines (paper section 3.3).

    problems ─▶ groups.take ─▶ batch_of ─▶ policy.learn ─▶ policy.publish ─▶ next step

Departures from textbook GRPO: the loss of a call is the mean over its tokens, of a tree the mean over its calls; the
old policy of the ratio is the engine that drew the tokens (`grpo.loss_mean` and `grpo.ratio` change that); groups
without variance are left out when there is no KL term.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from apr_ray.config import Config, GrpoConfig
from apr_ray.core.errors import ConfigError
from apr_ray.core.task import SpawnJoinProtocol
from apr_ray.core.weights import WeightVersion
from apr_ray.evaluation.decisions import sampled_p_spawn
from apr_ray.evaluation.kept_batch import keep_batch
from apr_ray.learner.group import LearnerGroup
from apr_ray.learner.steps import StepStats
from apr_ray.metrics.trees import samples
from apr_ray.model.llama import policy_fingerprint
from apr_ray.placement import training_needs
from apr_ray.reward.actor import RewardClient
from apr_ray.rl.batches import GrpoBatch, grpo_batch
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tasks.registry import load_task
from apr_ray.tracking.progress import Bar, ProgressBars
from apr_ray.training.groups import Drawn, GroupStream
from apr_ray.training.policy import Policy
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.session import ray_session, tracked
from apr_ray.training.step import Pace, Step
from apr_ray.training.step_report import kept_step, require_learning, require_match, step_metrics
from apr_ray.training.watch import Judge, Watch
from apr_ray.weights.registry import build_transport


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that works on a run.

    Attributes:
        is_new: the run has no checkpoint yet.
        start: folder of the policy that the run began with.
    """

    policy: Policy
    groups: GroupStream
    judge: Judge
    pace: Pace
    bar: Bar
    protocol: SpawnJoinProtocol
    is_new: bool
    start: Path


def run_grpo(config: Config, run: RunDir, policy: Path, bars: ProgressBars) -> Path:
    """Train from `policy`, or from the run's newest checkpoint; returns the final policy's folder."""
    found = run.latest()
    state = found[1] if found else LoopState()
    fingerprint = policy_fingerprint(policy)
    if state.policy and state.policy != fingerprint:
        raise ConfigError(f"{run.path} began with another policy than {policy}", "Give --init the one it began with")
    state.policy = fingerprint
    run.truncate_metrics(state.metrics_rows)
    run.truncate_samples(state.step)
    version = WeightVersion.parse(state.version) if found else WeightVersion(run.unused_incarnation(), 0)
    run.use_incarnation(version.incarnation)
    with parts_of(config, run, policy, state, version, bars) as parts:
        return train_grpo(run, config.grpo, parts)


@contextmanager
def parts_of(
    config: Config, run: RunDir, start: Path, state: LoopState, version: WeightVersion, bars: ProgressBars
) -> Iterator[Parts]:
    """Start all parts, on the newest checkpoint or on `start`; they end with the block, however it ends."""
    grpo, found = config.grpo, run.latest()
    task = load_task(config.task)
    train = task.problems("train", grpo.steps * grpo.problems_per_step * (1 + grpo.refill_rounds), config.run.seed + 1)
    with ray_session(config, training_needs(config)), tracked(config, run, state) as tracker, ExitStack() as ends:
        transport = build_transport(config.weights)
        ends.callback(transport.discard)
        folder = found[0] / "policy" if found else start
        learners = LearnerGroup.start(config, grpo.optimizer, str(folder))
        ends.callback(learners.stop)
        if grpo.kl_coefficient:
            learners.freeze_reference(str(start))
        if found:
            learners.load(found[0])
        if config.placement.mode == "colocated":
            learners.sleep()  # the engines' turn

        reward = RewardClient(config.task)
        ends.callback(reward.stop)

        # Engines start on the run's first policy, not on a checkpoint: old checkpoints are deleted, and a worker hired
        # later must still find this path.
        pool = RolloutPool.start(config, str(start), beside=learners.places)
        groups = GroupStream(pool, reward, train, config)
        ends.callback(groups.stop)
        ends.callback(pool.stop)  # callbacks run in reverse: without its pool, the stream's thread ends

        policy = Policy(config, learners, pool, transport, version, folder)
        judge = Judge(Watch(config, run, tracker, bars), pool, reward, state)
        pace = Pace(
            state,
            grpo.optimizer,
            steps=grpo.steps,
            tokens=grpo.tokens,
            minutes=grpo.max_minutes,
            eval_every=grpo.eval_every,
            save_every=grpo.save_every,
        )
        protocol = task.protocol(task.load_tokenizer(str(start)))
        with bars.bar("GRPO", 1.0) as bar:
            yield Parts(policy, groups, judge, pace, bar, protocol, found is None, start)
        transport.close()


def train_grpo(run: RunDir, grpo: GrpoConfig, parts: Parts) -> Path:
    """Train until the pace ends; returns the final policy's folder."""
    policy, groups, judge, pace = parts.policy, parts.groups, parts.judge, parts.pace
    policy.restore()
    if parts.is_new and grpo.initial_evaluation and judge.full():
        run.keep_policy(parts.start, "best")

    for step in pace.steps():
        drawn = groups.take(step, policy.version)
        with step.phase("learn"):
            batch = batch_of(drawn, grpo)
            stats = policy.learn(batch.batch, step.rate)
        with step.phase("keep"):
            keep(run, parts, step, drawn, batch, stats)
        with step.phase("sync"):
            begun_with = policy.version
            delta = policy.publish(stats, drawn.prompts)

        pace.advance(drawn.tokens, stats, policy.version)
        tell(run, parts, step, drawn, batch, stats, begun_with, delta)
        improved = step.evaluates and not pace.ended and judge.quick()
        if improved or pace.ended or step.saves:
            policy.folder = save(run, policy, pace.state, improved)

    groups.settle()
    improved = judge.full()
    assert policy.folder is not None
    if improved:
        run.keep_policy(policy.folder, "best")
    return run.keep_policy(policy.folder, "final")


def batch_of(drawn: Drawn, grpo: GrpoConfig) -> GrpoBatch:
    """A step's trees as the configured objective takes them."""
    return grpo_batch(
        drawn.fresh,
        skip_zero_advantage=not grpo.kl_coefficient,
        stale=drawn.stale,
        loss_mean=grpo.loss_mean,
        advantage_kind=grpo.advantage,
        credit=grpo.credit,
    )


def keep(run: RunDir, parts: Parts, step: Step, drawn: Drawn, batch: GrpoBatch, stats: Sequence[StepStats]) -> None:
    """Check what was learned from, and keep the batch for the audit where the policy that drew it lies on disk."""
    config, policy = run.config, parts.policy
    require_learning(step.number, batch, parts.pace.state.idle_steps + 1 if not stats else 0)
    if policy.folder and config.grpo.keep_batches != "off":
        kept = kept_step(config, step.number, policy.version, batch, stats, str(parts.start), drawn.problems)
        only_newest = config.grpo.keep_batches == "last"
        keep_batch(run.path, kept, drawn.trees, policy.folder, only_newest=only_newest)
    if config.weights.mode != "in_flight":  # else older KV makes a difference of its own
        exact = config.engine.exact and config.grpo.precision == "fp32"
        require_match(stats, policy.version, config.weights.tolerance(exact))


def tell(
    run: RunDir,
    parts: Parts,
    step: Step,
    drawn: Drawn,
    batch: GrpoBatch,
    stats: Sequence[StepStats],
    version: WeightVersion,
    delta: float | None,
) -> None:
    """A step's metrics, samples and progress; `version` is the weights' that it began with."""
    metrics = step_metrics(step, drawn, batch, stats, version, run.config.grpo.kl_coefficient > 0)
    metrics["rollout/restarts"] = float(parts.policy.pool.restarts)
    if delta is not None:
        metrics["sync/delta_logprob_mean"] = delta
    if (p_spawn := sampled_p_spawn(drawn.trees, parts.protocol)) is not None:
        metrics["rollout/p_spawn"] = p_spawn
    run.log_samples(samples(drawn.trees, version), step.number)
    parts.judge.watch.log(metrics, step.number)
    solved, seconds = metrics["rollout/accuracy"], metrics["time/step_s"]
    parts.bar.update(min(1.0, parts.pace.share()), f"step {step.number}  solved {solved:.3f}  {seconds:.1f} s/step")


def save(run: RunDir, policy: Policy, state: LoopState, improved: bool) -> Path:
    """A checkpoint, and the policy as the best so far where it is; returns where the policy lies."""
    with run.checkpoint(state) as folder:
        policy.save(folder)
        if improved:
            run.keep_policy(folder / "policy", "best")
    return run.path / "checkpoints" / f"step-{state.step:06d}" / "policy"
