"""The supervised loop: demonstrations in, a policy out (paper section 3.2)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from apr_ray.config import Config
from apr_ray.core.errors import ConfigError
from apr_ray.core.weights import WeightVersion
from apr_ray.data.demonstrations import Demonstrations
from apr_ray.data.sampler import SftSampler
from apr_ray.evaluation.decisions import decide, decision_points
from apr_ray.learner.group import LearnerGroup
from apr_ray.learner.steps import StepStats
from apr_ray.model.llama import read_config
from apr_ray.placement import training_needs
from apr_ray.reward.actor import RewardClient
from apr_ray.rl.schedules import learning_rate
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tasks.registry import load_task
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.session import ray_session, tracked
from apr_ray.training.step import Clock
from apr_ray.training.turns import Turns
from apr_ray.training.watch import Watch
from apr_ray.weights.check import check_engines
from apr_ray.weights.registry import build_transport

DECISION_POINTS = 60
"""Validation problems at whose first decisions P(spawn) is looked at before each checkpoint."""
IN_FLIGHT = 2
"""Steps submitted ahead, so that no rank waits for the driver to build the next batch."""


def train_sft(config: Config, run: RunDir, data_dir: Path, bars: ProgressBars) -> Path:
    """Train until `sft.tokens` or `sft.max_minutes`; returns the final policy's folder. Resumes where `run` stands."""
    sft = config.sft
    data = Demonstrations.load(data_dir)
    _require_fitting(data, data_dir, config)
    found = run.latest()
    state = found[1] if found else LoopState()
    fingerprint = data.fingerprint()
    if state.data and state.data != fingerprint:
        raise ConfigError(f"{run.path} was trained on other demonstrations than {data_dir}", "Give those it began with")
    state.data = fingerprint
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
    run.truncate_metrics(state.metrics_rows)
    with ray_session(config, training_needs(config)), tracked(config, run, state) as tracker, ExitStack() as parts:
        learners = LearnerGroup.start(config, sft.optimizer, config.init_from)
        parts.callback(learners.stop)
        watch = Watch(config, run, tracker, bars)
        points = decision_points(task, watch.validation[:DECISION_POINTS], config.run.seed)
        judge = _Judge(config, run, learners, data.first_prompts(config.weights.check_calls))
        parts.callback(judge.stop)
        if found:
            learners.load(found[0])
        state.precision = state.precision or _precision(config, learners, bars)
        bf16 = state.precision == "bf16"
        clock = Clock(state.elapsed_s)

        def done() -> float:
            return max(state.tokens / sft.tokens, clock.share_of(sft.max_minutes))

        def stops_after(step: int) -> bool:
            """Whether nothing may be in flight after this step, because the policy is saved or evaluated there."""
            return step % sft.save_every == 0 or step % sft.eval_every == 0

        pending: deque[tuple[list[object], int]] = deque()
        submitted = state.step
        since, trained = time.monotonic(), 0
        with bars.bar("supervised", 1.0) as bar:
            while pending or done() < 1:
                while done() < 1 and len(pending) < IN_FLIGHT and not (pending and stops_after(submitted)):
                    batch = sampler.next(done(), sft.child_first_fraction)
                    rate = learning_rate(sft.optimizer, submitted, done())
                    pending.append((learners.submit_sft_step(batch, rate, bf16), len(batch.tokens)))
                    submitted += 1
                    state.tokens += len(batch.tokens)
                submission, size = pending.popleft()
                stats = learners.finish_sft_step(submission)
                state.step += 1
                trained += size
                if state.step % sft.log_every == 0:
                    speed, since, trained = trained / (time.monotonic() - since), time.monotonic(), 0
                    done_tokens = state.tokens - sum(size for _, size in pending)
                    watch.log(_metrics(stats, size, done_tokens, speed), state.step)
                    note = f"step {state.step}  loss {stats.loss:.4f}  {state.tokens / 1e6:.2f} M tokens"
                    bar.update(min(1.0, done()), f"{note}  {speed:,.0f}/s  {state.precision}")
                if pending:
                    continue
                last = done() >= 1
                due = state.step % sft.eval_every == 0 and not last
                if due or last or state.step % sft.save_every == 0:
                    state.elapsed_s, state.position = clock.elapsed_s(), dict(sampler.position)
                    if decided := decide(points, protocol, learners.logprobs):
                        watch.log({"sft/p_spawn": decided.p_spawn}, state.step)
                    with run.checkpoint(state) as folder:
                        learners.save(folder)
                        if due and judge.finds_better(folder, watch, state):
                            run.keep_policy(folder / "policy", "best")
    latest = run.latest()
    assert latest is not None
    return run.keep_policy(latest[0] / "policy", "final")


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


def _metrics(stats: StepStats, size: int, tokens: int, speed: float) -> dict[str, float]:
    return {
        "sft/loss": stats.loss,
        "sft/grad_norm": stats.grad_norm,
        "sft/learning_rate": stats.learning_rate,
        "sft/tokens": float(tokens),
        "sft/tokens_per_s": speed,
        "sft/padding": 1 - size / stats.padded_tokens,
    }


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
