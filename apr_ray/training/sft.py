"""The supervised loop: demonstrations in, a policy out (paper section 3.2)."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

from apr_ray.config import Config
from apr_ray.data.demonstrations import Demonstrations, SftSampler
from apr_ray.learner.group import LearnerGroup
from apr_ray.rl.schedules import learning_rate
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.session import Clock, ray_session, tracked

IN_FLIGHT = 2
"""Steps submitted ahead, so that no rank waits for the driver to build the next batch."""


def train_sft(config: Config, run: RunDir, data_dir: Path, bars: ProgressBars) -> Path:
    """Train until `sft.tokens` or `sft.max_minutes`; returns the final policy's folder. Resumes where `run` stands."""
    sft = config.sft
    data = Demonstrations.load(data_dir)
    found = run.latest()
    state = found[1] if found else LoopState()
    sampler = SftSampler(
        data, sft.batch_tokens, mask_prompt=sft.mask_prompt, seed=config.run.seed, position=state.position
    )
    run.truncate_metrics(state.step)
    with ray_session(config), tracked(config, run, state) as tracker:
        learners = LearnerGroup.start(config, sft.optimizer, config.init_from)
        if found:
            learners.load(found[0])
        clock = Clock(state.elapsed_s)

        def done() -> float:
            return max(state.tokens / sft.tokens, clock.share_of(sft.max_minutes))

        pending: deque[tuple[list[object], int]] = deque()
        submitted = state.step
        since, trained = time.monotonic(), 0
        with bars.bar("supervised", 1.0) as bar:
            while done() < 1 or pending:
                while done() < 1 and len(pending) < IN_FLIGHT:
                    phase = "child" if done() < sft.child_first_fraction and data.child.any() else "all"
                    batch = sampler.next(phase)
                    rate = learning_rate(sft.optimizer, submitted, done())
                    pending.append((learners.submit_sft_step(batch, rate), len(batch.tokens)))
                    submitted += 1
                    state.tokens += len(batch.tokens)
                submission, size = pending.popleft()
                stats = learners.finish_sft_step(submission)
                state.step += 1
                trained += size
                if state.step % sft.log_every == 0:
                    speed, since, trained = trained / (time.monotonic() - since), time.monotonic(), 0
                    metrics = {
                        "sft/loss": stats.loss,
                        "sft/grad_norm": stats.grad_norm,
                        "sft/learning_rate": stats.learning_rate,
                        "sft/tokens": float(state.tokens),
                        "sft/tokens_per_s": speed,
                        "sft/padding": 1 - size / stats.padded_tokens,
                    }
                    run.log(metrics, state.step)
                    tracker.log(metrics, state.step)
                    note = (
                        f"step {state.step}  loss {stats.loss:.4f}  {state.tokens / 1e6:.2f} M tokens  {speed:,.0f}/s"
                    )
                    bar.update(min(1.0, done()), note)
                if (state.step % sft.save_every == 0 and not pending) or (done() >= 1 and not pending):
                    state.elapsed_s, state.position = clock.elapsed_s(), dict(sampler.position)
                    with run.checkpoint(state) as folder:
                        learners.save(folder)
        learners.stop()
    latest = run.latest()
    assert latest is not None
    return run.keep_policy(latest[0], "final")
