"""The supervised loop: demonstrations in, a policy out (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from apr_ray.config import Config, SftConfig
from apr_ray.core.errors import ConfigError
from apr_ray.core.task import SpawnJoinProtocol
from apr_ray.core.weights import WeightVersion
from apr_ray.data.demonstrations import Demonstrations
from apr_ray.data.sampler import SftSampler
from apr_ray.evaluation.decisions import DecisionPoint, decide, decision_points
from apr_ray.learner.group import LearnerGroup
from apr_ray.model.llama import read_config
from apr_ray.placement import training_needs
from apr_ray.reward.actor import RewardClient
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tasks.registry import load_task
from apr_ray.tracking.progress import Bar, ProgressBars
from apr_ray.training.feed import Done, Feed, Meter
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.session import ray_session, tracked
from apr_ray.training.turns import Turns
from apr_ray.training.watch import Watch
from apr_ray.weights.check import check_engines
from apr_ray.weights.registry import build_transport

DECISION_POINTS = 60
"""Validation problems at whose first decisions P(spawn) is looked at before each checkpoint."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that works on a supervised run."""

    learners: LearnerGroup
    feed: Feed
    watch: Watch
    judge: _Judge
    points: Sequence[DecisionPoint]
    protocol: SpawnJoinProtocol
    bar: Bar


def run_sft(config: Config, run: RunDir, data_dir: Path, bars: ProgressBars) -> Path:
    """Train on demonstrations, from `init_from`, from new weights, or from the run's newest checkpoint; returns the
    final policy's folder."""
    data = Demonstrations.load(data_dir)
    _require_fitting(data, data_dir, config)
    found = run.latest()
    state = found[1] if found else LoopState()
    fingerprint = data.fingerprint()
    if state.data and state.data != fingerprint:
        raise ConfigError(f"{run.path} was trained on other demonstrations than {data_dir}", "Give those it began with")
    state.data = fingerprint
    run.truncate_metrics(state.metrics_rows)
    with parts_of(config, run, data, state, bars) as parts:
        return train_sft(run, config.sft, parts)


@contextmanager
def parts_of(
    config: Config, run: RunDir, data: Demonstrations, state: LoopState, bars: ProgressBars
) -> Iterator[Parts]:
    """Start all parts; they end with the block, however it ends."""
    sft, found = config.sft, run.latest()
    task = load_task(config.task)
    protocol = task.protocol(task.tokenizer())
    bins, bin_tokens = _bins(config)
    sampler = SftSampler(
        data,
        mask=sft.mask,
        targets=protocol.supervised_targets(),
        batch_bins=bins,
        bin_tokens=bin_tokens,
        seed=config.run.seed,
        child_share=sft.child_share,
        position=state.position,
    )
    with ray_session(config, training_needs(config)), tracked(config, run, state) as tracker, ExitStack() as ends:
        learners = LearnerGroup.start(config, sft.optimizer, config.init_from)
        ends.callback(learners.stop)
        watch = Watch(config, run, tracker, bars)
        points = decision_points(task, watch.validation[:DECISION_POINTS], config.run.seed)
        judge = _Judge(config, run, learners, data.first_prompts(config.weights.check_calls))
        ends.callback(judge.stop)
        if found:
            learners.load(found[0])
        state.precision = state.precision or _precision(config, learners, bars)
        feed = Feed(sft, learners, sampler, state, state.precision == "bf16")
        with bars.bar("supervised", 1.0) as bar:
            yield Parts(learners, feed, watch, judge, points, protocol, bar)


def train_sft(run: RunDir, sft: SftConfig, parts: Parts) -> Path:
    """Train until the feed ends; returns the final policy's folder."""
    learners, feed, watch, state = parts.learners, parts.feed, parts.watch, parts.feed.state
    meter = Meter(state.tokens)
    for step in feed.steps():
        if step.number % sft.log_every == 0:
            tell(parts, step, meter.read(step.shown))
        if not step.saves:
            continue

        if decided := decide(parts.points, parts.protocol, learners.logprobs):
            watch.log({"sft/p_spawn": decided.p_spawn}, step.number)
        with run.checkpoint(state) as folder:
            learners.save(folder)
            if step.evaluates and parts.judge.finds_better(folder, watch, state):
                run.keep_policy(folder / "policy", "best")

    latest = run.latest()
    assert latest is not None
    return run.keep_policy(latest[0] / "policy", "final")


def tell(parts: Parts, step: Done, speed: float) -> None:
    """A step's metrics and progress; `speed` in tokens a second."""
    stats, state = step.stats, parts.feed.state
    metrics = {
        "sft/loss": stats.loss,
        "sft/grad_norm": stats.grad_norm,
        "sft/learning_rate": stats.learning_rate,
        "sft/tokens": float(step.shown),
        "sft/tokens_per_s": speed,
        "sft/padding": 1 - step.tokens / stats.padded_tokens,
    }
    parts.watch.log(metrics, step.number)
    note = f"step {step.number}  loss {stats.loss:.4f}  {state.tokens / 1e6:.2f} M tokens"
    parts.bar.update(min(1.0, parts.feed.share()), f"{note}  {speed:,.0f}/s  {state.precision}")


def _bins(config: Config) -> tuple[int, int]:
    """Bins of a batch and padded tokens of each. A bin, up to a third larger than usual, is a micro-batch; every rank
    has as many of them."""
    ranks, batch = config.learner.ranks, config.sft.batch_tokens
    bin_tokens = max(1, min(config.learner.micro_batch_tokens * 3 // 4, batch // ranks))
    return ranks * max(1, round(batch / bin_tokens / ranks)), bin_tokens


def _precision(config: Config, learners: LearnerGroup, bars: ProgressBars) -> str:
    """The configured precision; for auto the one that is faster here, which is printed with both times."""
    if config.sft.precision != "auto":
        return config.sft.precision
    times = learners.time_precisions()
    bars.say(f"sft.precision auto takes {times}")
    return "bf16" if times.bf16_is_faster else "fp32"


def _require_fitting(data: Demonstrations, data_dir: Path, config: Config) -> None:
    """Raise ConfigError where sequences are longer than the policy's context, or hold ids outside its vocabulary."""
    context, vocab = config.model.context_tokens, load_task(config.task).tokenizer().vocab_size
    if config.init_from:
        its = read_config(config.init_from)
        context, vocab = its["max_position_embeddings"], its["vocab_size"]
    longest, largest = int(data.lengths.max()), int(data.ids.max())
    if longest > context or largest >= vocab:
        raise ConfigError(
            f"{data_dir} has sequences of up to {longest} tokens and ids up to {largest}; the policy takes {context}"
            f" tokens and {vocab} ids",
            "Make demonstrations with this config: apr-ray data",
        )


class _Judge:
    """The engines and the reward actor that evaluate a policy in training; started when first needed, since most of
    supervised training needs none."""

    def __init__(self, config: Config, run: RunDir, learners: LearnerGroup, prompts: Sequence[tuple[int, ...]]) -> None:
        self.config = config
        self.prompts = prompts  # of the check after a sync
        self.run = run
        self.learners = learners
        self.evaluations = 0
        self.transport = build_transport(config.weights)
        self.turns = Turns(config, learners)
        self.parts: tuple[RolloutPool, RewardClient] | None = None

    def finds_better(self, checkpoint: Path, watch: Watch, state: LoopState) -> bool:
        """Evaluate the learners' present policy, which has just been saved in `checkpoint`; whether it is the best."""
        self.evaluations += 1
        if self.parts is None:
            self.turns.engines()
            policy = self.run.keep_policy(checkpoint / "policy", "judge")
            pool = RolloutPool.start(self.config, str(policy), beside=self.learners.places)
            self.parts = pool, RewardClient(self.config.task)
        else:
            self.turns.engines(self.parts[0])
            version, config = WeightVersion(0, self.evaluations), self.config
            self.transport.broadcast(self.learners, self.parts[0], version)
            exact = config.engine.exact
            check_engines(self.learners, self.parts[0], self.prompts, 1.0, config.weights, version, exact)
        improved = watch.quick_evaluation(*self.parts, state)
        self.turns.learn(self.parts[0])
        return improved

    def stop(self) -> None:
        for part in self.parts or ():
            part.stop()
        self.transport.discard()
