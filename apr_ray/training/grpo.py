"""The GRPO loop: rollouts of thread trees, rewards, learning, weights back to the engines (paper section 3.3).

    problems ─▶ pool.run ─▶ reward.score ─▶ grpo_batch ─▶ learners.grpo_step ─▶ broadcast ─▶ check ─▶ next step

Departures from textbook GRPO: the loss of a call is the mean over its tokens, of a tree the mean over its calls; the
old policy of the ratio is the engine that drew the tokens (`grpo.loss_mean` and `grpo.ratio` change that); groups
without variance are left out when there is no KL term.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from apr_ray.config import Config, GrpoConfig
from apr_ray.core.errors import AprError, ConfigError, MismatchError
from apr_ray.core.ledger import Disposition, Ending, Group, Problem, ThreadTree
from apr_ray.core.task import SpawnJoinProtocol
from apr_ray.core.weights import FIRST_VERSION, WeightVersion
from apr_ray.evaluation.decisions import sampled_p_spawn
from apr_ray.evaluation.evaluate import tree_seed
from apr_ray.evaluation.kept_batch import KeptStep, Reported, keep_batch
from apr_ray.learner.group import LearnerGroup
from apr_ray.learner.steps import GrpoStep, StepStats
from apr_ray.metrics.mismatch import mismatch_metrics
from apr_ray.metrics.trees import failure_reasons, samples, staleness, tree_metrics
from apr_ray.model.llama import policy_fingerprint
from apr_ray.placement import training_needs
from apr_ray.reward.actor import RewardClient
from apr_ray.rl.batches import GrpoBatch, grpo_batch
from apr_ray.rl.rewards import priced
from apr_ray.rl.schedules import learning_rate
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tasks.registry import load_task
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.rollouts import Rollouts
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.session import Clock, ray_session, tracked
from apr_ray.training.turns import Turns
from apr_ray.training.watch import Watch
from apr_ray.weights.check import check_engines
from apr_ray.weights.registry import build_transport
from apr_ray.weights.transport import Transport

log = logging.getLogger(__name__)
IDLE_STEPS = 3
"""Steps in a row without a trained token that end a run."""
WHY_IDLE = {
    Disposition.STALE: (
        "all trees were drawn under weights older than grpo.max_staleness allows",
        "Raise grpo.max_staleness, or see why the engines' weights are old",
    ),
    Disposition.ZERO_ADVANTAGE: (
        "in every group all trees have the same reward",
        "Begin with a policy that solves some problems and not all, raise grpo.problems_per_step or grpo.group_size,"
        " or set grpo.refill_rounds",
    ),
    Disposition.ERROR: ("the engines failed", "See the workers' logs"),
    Disposition.ABORTED: ("all trees were cut by the clock", "Raise bounds.max_seconds"),
}


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that works on a run."""

    learners: LearnerGroup
    pool: RolloutPool
    reward: RewardClient
    transport: Transport
    turns: Turns
    rollouts: Rollouts
    watch: Watch
    protocol: SpawnJoinProtocol


@contextmanager
def parts_of(config: Config, run: RunDir, policy: Path, state: LoopState, bars: ProgressBars) -> Iterator[Parts]:
    """Start all parts, on the newest checkpoint or on `policy`; they end with the block, however it ends."""
    grpo, seed = config.grpo, config.run.seed
    task = load_task(config.task)
    train = task.problems("train", grpo.steps * grpo.problems_per_step * (1 + grpo.refill_rounds), seed + 1)
    found = run.latest()
    with ray_session(config, training_needs(config)), tracked(config, run, state) as tracker, ExitStack() as ends:
        transport = build_transport(config.weights)
        ends.callback(transport.discard)
        learners = LearnerGroup.start(config, grpo.optimizer, str(found[0] / "policy" if found else policy))
        ends.callback(learners.stop)
        if grpo.kl_coefficient:
            learners.freeze_reference(str(policy))
        if found:
            learners.load(found[0])
        turns = Turns(config, learners)
        turns.engines()
        # Not on a checkpoint: those are removed in time.
        pool = RolloutPool.start(config, str(policy), beside=learners.places)
        rollouts = Rollouts(pool, train, config)
        ends.callback(rollouts.stop)
        ends.callback(pool.stop)  # the last first: without its pool, a thread of rollouts ends
        reward = RewardClient(config.task)
        ends.callback(reward.stop)
        watch = Watch(config, run, tracker, bars)
        protocol = task.protocol(task.load_tokenizer(str(policy)))
        yield Parts(learners, pool, reward, transport, turns, rollouts, watch, protocol)


def train_grpo(config: Config, run: RunDir, policy: Path, bars: ProgressBars) -> Path:
    """Train until `grpo.steps` or `grpo.max_minutes`, from `policy`; returns the final policy's folder."""
    grpo, found = config.grpo, run.latest()
    state = found[1] if found else LoopState()
    fingerprint = policy_fingerprint(policy)
    if state.policy and state.policy != fingerprint:
        raise ConfigError(f"{run.path} began with another policy than {policy}", "Give --init the one it began with")
    state.policy = fingerprint
    run.truncate_metrics(state.metrics_rows)
    run.truncate_samples(state.step)
    version = WeightVersion.parse(state.version) if found else WeightVersion(run.unused_incarnation(), 0)
    run.use_incarnation(version.incarnation)
    on_disk: Path | None = found[0] / "policy" if found else policy  # where the present weights lie, if they do
    how = GrpoStep.of(grpo)
    with parts_of(config, run, policy, state, bars) as parts:
        learners, pool, watch = parts.learners, parts.pool, parts.watch
        if version != FIRST_VERSION:  # resumed, maybe before the first checkpoint
            parts.transport.broadcast(learners, pool, version)
        if not found and grpo.initial_evaluation and watch.full_evaluation(pool, parts.reward, state):
            run.keep_policy(policy, "best")
        clock = Clock(state.elapsed_s)

        def done() -> float:
            sampled = state.sampled_tokens / grpo.tokens if grpo.tokens else 0.0
            return max(state.step / grpo.steps, sampled, clock.share_of(grpo.max_minutes))

        last = done() >= 1
        with bars.bar("GRPO", 1.0) as bar:
            while not last:
                times = [time.perf_counter()]
                trees, rollout_s = parts.rollouts.take(state.step)
                due = (state.step + 1) % grpo.eval_every == 0
                if grpo.overlap and not due and state.step + 1 < grpo.steps:  # an evaluation has the engines to itself
                    parts.rollouts.begin(state.step + 1)
                times.append(time.perf_counter())
                trees = rewarded(parts.rollouts.problems(state.step), trees, parts.reward, config, state.step)
                more, refill_s = refilled(trees, parts, config, state.step)
                trees, rollout_s = [*trees, *more], rollout_s + refill_s
                times.append(time.perf_counter())
                made = batch_of(trees, grpo, version)
                rate = learning_rate(grpo.optimizer, state.step, done())
                parts.turns.learn(pool)
                stats = learners.grpo_step(made.batch, how, rate) if len(made.batch) else []
                parts.turns.engines(pool)
                state.idle_steps = 0 if stats else state.idle_steps + 1
                require_learning(made, state)
                times.append(time.perf_counter())
                if on_disk and grpo.keep_batches != "off":
                    asked = parts.rollouts.problems_of(trees, state.step)
                    what = kept_step(config, state.step + 1, version, made, stats, str(policy), asked)
                    keep_batch(run.path, what, trees, on_disk, only_newest=grpo.keep_batches == "last")
                times.append(time.perf_counter())
                if config.weights.mode != "in_flight":  # else older KV makes a difference of its own
                    exact = config.engine.exact and grpo.precision == "fp32"
                    check_mismatch(stats, version, config.weights.tolerance(exact))
                measured, version = version, version.next()
                parts.transport.broadcast(learners, pool, version)
                prompts = [t.calls[0].prompt_ids for t in trees[:: grpo.group_size]][: config.weights.check_calls]
                delta = check_engines(
                    learners, pool, prompts, grpo.temperature, config.weights, version, config.engine.exact
                )
                times.append(time.perf_counter())
                state.step += 1
                state.version = str(version)
                state.tokens += sum(s.tokens for s in stats)
                state.sampled_tokens += sum(t.total_tokens for t in trees)
                state.elapsed_s = clock.elapsed_s()
                metrics = step_metrics(trees, made, stats, measured, times, rollout_s, grpo.kl_coefficient > 0)
                metrics |= {"sync/delta_logprob_mean": delta, "rollout/restarts": float(pool.restarts)}
                if (p_spawn := sampled_p_spawn(trees, parts.protocol)) is not None:
                    metrics["rollout/p_spawn"] = p_spawn
                run.log_samples(samples(trees, measured), state.step)
                watch.log(metrics, state.step)
                last = done() >= 1  # what comes until the next step is not training
                note = (
                    f"step {state.step}  solved {metrics['rollout/accuracy']:.3f}  {metrics['time/step_s']:.1f} s/step"
                )
                bar.update(min(1.0, done()), note)
                improved = due and not last and watch.quick_evaluation(pool, parts.reward, state)
                on_disk = None
                if improved or last or state.step % grpo.save_every == 0:
                    on_disk = save(run, learners, state, improved)
        parts.rollouts.settle()
        improved = watch.full_evaluation(pool, parts.reward, state)
        parts.transport.close()
    latest = run.latest()
    assert latest is not None
    if improved:
        run.keep_policy(latest[0] / "policy", "best")
    return run.keep_policy(latest[0] / "policy", "final")


def save(run: RunDir, learners: LearnerGroup, state: LoopState, improved: bool) -> Path:
    """A checkpoint, and the policy as the best so far where it is; returns where the policy lies."""
    with run.checkpoint(state) as folder:
        learners.save(folder)
        if improved:
            run.keep_policy(folder / "policy", "best")
    return run.path / "checkpoints" / f"step-{state.step:06d}" / "policy"


def rewarded(
    problems: Sequence[Problem], trees: Sequence[ThreadTree], judge: RewardClient, config: Config, step: int
) -> list[ThreadTree]:
    """Trees with verdicts and rewards, `group_size` of them for each problem."""
    judged = judge.score([problem for problem in problems for _ in range(config.grpo.group_size)], trees)
    prices = config.grpo.reward
    return randomly_rewarded(judged, config.run.seed, step) if prices.coin else priced(judged, prices)


def refilled(trees: Sequence[ThreadTree], parts: Parts, config: Config, step: int) -> tuple[list[ThreadTree], float]:
    """Trees of further problems while groups without variance leave a step short; and the seconds of sampling them."""
    grpo, more, seconds = config.grpo, list[ThreadTree](), 0.0
    for refill in range(1, grpo.refill_rounds + 1):
        groups = group([*trees, *more], grpo.group_size)
        short = grpo.problems_per_step - sum(len({t.reward for t in one.trees}) > 1 for one in groups)
        if short <= 0:
            break
        drawn, took_s = parts.rollouts.refill(step, refill, short)
        more += rewarded(parts.rollouts.problems(step, refill)[:short], drawn, parts.reward, config, step)
        seconds += took_s
    return more, seconds


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
        credit=grpo.credit,
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


def require_learning(made: GrpoBatch, state: LoopState) -> None:
    """Say so where a step has nothing to train on; raise AprError after `IDLE_STEPS` of them in a row."""
    if not state.idle_steps:
        return
    reason, remedy = "no tree sampled a token", "Look at the failures in metrics.jsonl"
    for fate, _ in made.dispositions.most_common(1):
        reason, remedy = WHY_IDLE[fate]
    what = f"step {state.step + 1} trained on nothing, and no optimiser step was taken: {reason}"
    if state.idle_steps >= IDLE_STEPS:
        raise AprError(f"{what}; so were the {IDLE_STEPS - 1} steps before it", remedy)
    log.warning("%s", what)


def check_mismatch(stats: Sequence[StepStats], version: WeightVersion, tolerance: float) -> None:
    """Raise MismatchError where engines and learners differ too much on tokens said to be drawn under the learners'
    `version`: older ones differ for a reason."""
    found = stats[0].mismatch if stats else None
    own = found.versions.get(version.counter) if found else None
    if own and not own.delta_mean <= tolerance:
        raise MismatchError(
            f"weights {version}: engines and learners differ by {own.delta_mean:.2e} in logprob per token, tolerance"
            f" {tolerance:.0e}",
            "The trees were not drawn from the learners' policy; or precisions differ: match grpo.precision and"
            " engine.dtype, or raise weights.mismatch_tolerance",
        )


def kept_step(
    config: Config,
    step: int,
    version: WeightVersion,
    made: GrpoBatch,
    stats: Sequence[StepStats],
    reference: str,
    problems: Sequence[Problem],
) -> KeptStep:
    """A step as `apr-ray audit` will want to know it."""
    grpo = config.grpo
    reported = None
    if stats and (apart := stats[0].mismatch):
        first = stats[0]
        deltas = apart.whole.delta_mean, apart.whole.delta_max
        reported = Reported(first.loss, first.kl, first.grad_norm, first.tokens, *deltas, first.cut, first.slope)
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
        credit=grpo.credit,
        prices={} if grpo.reward.coin else {e.value: getattr(grpo.reward, e.value) for e in Ending},
        problems=[dict(problem.to_json()) for problem in problems],
    )


def step_metrics(
    trees: Sequence[ThreadTree],
    made: GrpoBatch,
    stats: Sequence[StepStats],
    version: WeightVersion,
    times: Sequence[float],
    rollout_s: float,
    with_kl: bool,
) -> dict[str, float]:
    """One step's metrics, by their names in `metrics.names`."""
    wait_s, reward_s, learn_s, keep_s, sync_s = (b - a for a, b in itertools.pairwise(times))
    prompt = sum(len(c.prompt_ids) for t in trees for c in t.calls)
    out = {
        "rollout/reward": sum(t.reward or 0.0 for t in trees) / len(trees),
        "rollout/accuracy": sum(t.solved for t in trees) / len(trees),
        "rollout/zero_variance_groups": made.zero_variance_groups / max(1, made.groups),
        "rollout/staleness": staleness(trees, version),
        "rollout/tokens_per_s": sum(t.total_tokens for t in trees) / rollout_s,
        "rollout/cached_tokens": sum(c.cached_tokens for t in trees for c in t.calls) / max(1, prompt),
        "time/rollout_s": rollout_s,
        "time/wait_s": wait_s,
        "time/reward_s": reward_s,
        "time/learn_s": learn_s,
        "time/keep_s": keep_s,
        "time/sync_s": sync_s,
        "time/step_s": times[-1] - times[0],
    }
    out |= {f"rollout/{name}": value for name, value in tree_metrics(trees).items()}
    out |= {f"rollout/failure/{reason}": share for reason, share in failure_reasons(trees).items()}
    out |= {f"rollout/tokens/{disposition.value}": float(n) for disposition, n in made.dispositions.items()}
    if stats:
        first, last = stats[0], stats[-1]
        weight = float(made.batch.loss_weights.sum())
        out |= {
            "train/loss": first.loss,
            "train/grad_norm": sum(s.grad_norm for s in stats) / len(stats),
            "train/learning_rate": first.learning_rate,
            "train/entropy": first.entropy / weight,
            "train/logit_scale": first.logit_scale / weight,
            "train/clip_fraction": last.clipped / max(1, last.tokens),
            "train/tokens": float(first.tokens),
            "train/tokens_per_s": sum(s.tokens for s in stats) / learn_s,
            "train/mismatch/cut": first.cut / max(1, first.tokens),
        }
        if norms := [s.update_norm for s in stats if s.update_norm is not None]:
            out["train/update_norm"] = sum(norms) / len(norms)
        if with_kl:
            out["train/kl"] = first.kl
        if first.mismatch:
            out |= mismatch_metrics(first.mismatch, version.counter)
    return out
