"""Is it GRPO over threads that helps? The same policy, trained on in several ways for the same time each.

    policy ─▶ for each seed: grpo · continued-sft · rejection · random-reward · frozen-engine ─▶ evaluations ─▶ table

An arm is the configuration with the preset `control-ARM` on top. Arms of a seed are judged on the same problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apr_ray.config import Config, load_config
from apr_ray.core.errors import AprError, MismatchError
from apr_ray.core.trees_io import read_trees
from apr_ray.data.demonstrations import require_demonstrations
from apr_ray.metrics.names import mode_name
from apr_ray.reward.actor import RewardClient
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.grpo import train_grpo
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.session import ray_session, tracked
from apr_ray.training.sft import train_sft
from apr_ray.training.watch import Watch

GRPO, CONTINUED, FROZEN = "grpo", "continued-sft", "frozen-engine"
CONTROLS = (GRPO, CONTINUED, "rejection", "random-reward", FROZEN)
ARMS = (*CONTROLS, "overlap")
"""The last is no control: GRPO with rollouts one step ahead, which does as well per step at best, and may be faster."""
DRAWS = 4000
"""Of the bootstrap."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One arm at one temperature, over all seeds.

    Attributes:
        before, after: accuracy, mean over seeds and problems.
        low, high: 95 % interval of after - before, by a bootstrap over seeds and, within each, problems.
        steps, seconds: taken with each seed; `by_amount` whether any ended for its steps, before its time.
        lead: GRPO's accuracy less this arm's, on the same problems; `lead_low`, `lead_high` as above.
        stopped: why its runs stopped early, where they did.
    """

    arm: str
    mode: str
    seeds: int
    before: float
    after: float
    low: float
    high: float
    lead: float
    lead_low: float
    lead_high: float
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    by_amount: bool
    stopped: str = ""


def run_controls(
    files: Sequence[str | Path],
    overrides: Sequence[str],
    policy: Path,
    data: Path,
    *,
    minutes: float,
    seeds: int,
    arms: Sequence[str] = CONTROLS,
    bars: ProgressBars,
) -> list[Outcome]:
    """Train the arms with every seed, `minutes` each, and compare; what is complete is not run again.

    Args:
        files: configuration files; presets of the arms come on top.
        policy: the checkpoint that all arms begin with.
        data: the demonstrations that continued supervised training goes on with.
        arms: which to compare with GRPO, of `ARMS`; GRPO is always trained.

    Raises:
        AprError: there is no such arm, the engine that was frozen was not noticed, or an arm has no result.
    """
    if unknown := sorted(set(arms) - set(ARMS)):
        raise AprError(f"There is no arm {', '.join(unknown)}", f"Choose of {', '.join(ARMS)}")
    arms = [arm for arm in ARMS if arm == GRPO or arm in arms]
    common = [
        *overrides,
        f"init_from={policy.resolve()}",
        f"grpo.max_minutes={minutes}",
        f"sft.max_minutes={minutes}",
        "grpo.eval_every=1000000",  # only training counts
        "sft.eval_every=1000000",
        "sft.save_every=1000000",
        f"sft.tokens={10**15}",  # the clock alone ends it
        "grpo.keep_batches='off'",
    ]
    require_demonstrations(data)  # what is missing is said before the first arm is trained
    base = load_config(files, overrides)
    name = base.run.name or "controls"
    root = Path(base.run.root).resolve() / name
    for seed in range(seeds):
        for arm in arms:
            preset = [] if arm == GRPO else [str(Path(__file__).parents[1] / "presets" / f"control-{arm}.yaml")]
            own = [f"run.seed={seed}", f"run.name={name}/{arm}-{seed}", f"grpo.initial_evaluation={arm == GRPO}"]
            _train(arm, load_config([*files, *preset], [*common, *own]), root / f"{arm}-{seed}", policy, data, bars)
    modes = [mode_name(t) for t in base.evaluation.temperatures]
    return [_outcome(root, arm, mode, seeds) for arm in arms for mode in modes]


def _train(arm: str, config: Config, path: Path, policy: Path, data: Path, bars: ProgressBars) -> None:
    run = RunDir.resume(path, config) if (path / "config.yaml").exists() else RunDir.create(config, "controls")
    if (path / "done").exists():
        return
    stopped = ""
    if arm == CONTINUED:
        _judge(run, train_sft(run.config, run, data, bars), bars)
    else:
        try:
            train_grpo(run.config, run, policy, bars)
        except MismatchError as error:
            stopped = error.what
    if (arm == FROZEN) != bool(stopped):
        raise AprError(
            f"{path} {'stopped' if stopped else 'did not stop'}: {stopped or 'its engines kept the first weights'}",
            "Only engines that are frozen may differ from the learners",
        )
    (path / "done").write_text(stopped)


def _judge(run: RunDir, policy: Path, bars: ProgressBars) -> None:
    """Evaluate a policy of the supervised loop as GRPO's loop evaluates its own."""
    config = run.config
    found = run.latest()
    state = found[1] if found else LoopState()
    with ray_session(config), tracked(config, run, state) as tracker:
        pool, reward = RolloutPool.start(config, str(policy)), RewardClient(config.task)
        Watch(config, run, tracker, bars).full_evaluation(pool, reward, state)
        pool.stop()
        reward.stop()


def _outcome(root: Path, arm: str, mode: str, seeds: int) -> Outcome:
    before, after, grpo, steps, seconds, stopped = [], [], [], [], [], ""
    by_amount = False
    for seed in range(seeds):
        first = _rewards(root / f"{GRPO}-{seed}", mode, 0)  # all arms begin with the same policy
        stopped = (root / f"{arm}-{seed}" / "done").read_text()
        before.append(first)
        after.append(first if stopped else _rewards(root / f"{arm}-{seed}", mode, -1))
        grpo.append(_rewards(root / f"{GRPO}-{seed}", mode, -1))
        run = RunDir.resume(root / f"{arm}-{seed}")
        found = run.latest()
        steps.append(found[1].step if found else 0)
        seconds.append(found[1].elapsed_s if found else 0.0)
        by_amount |= arm != CONTINUED and steps[-1] >= run.config.grpo.steps
    gain, lead = (_with_interval(a, b) for a, b in ((after, before), (grpo, after)))
    means = _mean(before), _mean(after)
    return Outcome(arm, mode, seeds, *means, *gain[1:], *lead, tuple(steps), tuple(seconds), by_amount, stopped)


def _with_interval(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The mean of a - b over seeds and problems, and its interval."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return _mean(differences), *two_level_interval(differences)


def _rewards(run: Path, mode: str, which: int) -> np.ndarray:
    """One mean reward per problem, from an evaluation's trees: the first (0) or the last (-1)."""
    found = sorted(run.glob(f"eval/step-*-{mode}.jsonl"))
    if not found:
        raise AprError(f"{run} has no evaluation", "Remove the folder and run the controls again")
    per_problem: dict[str, list[float]] = {}
    for tree in read_trees(found[which]):
        per_problem.setdefault(tree.problem_key, []).append(float(tree.solved))
    return np.array([np.mean(per_problem[key]) for key in sorted(per_problem)])


def _mean(groups: Sequence[np.ndarray]) -> float:
    return float(np.mean([group.mean() for group in groups]))


def two_level_interval(gains: Sequence[np.ndarray], draws: int = DRAWS) -> tuple[float, float]:
    """95 % interval of the mean gain, where both seeds and problems are samples of what could have been.

    Of few seeds it is too narrow where they differ more than their problems do: simulated with three that alone vary,
    it covers 75 %.

    Args:
        gains: one array per seed, one number per problem.
        draws: bootstrap draws: seeds with replacement, then in each its problems.
    """
    rng = np.random.default_rng(0)
    means = np.empty((draws, len(gains)))
    for i in range(draws):
        for j, seed in enumerate(rng.integers(len(gains), size=len(gains))):
            means[i, j] = rng.choice(gains[seed], len(gains[seed])).mean()
    low, high = np.quantile(means.mean(1), [0.025, 0.975])
    return float(low), float(high)


def table_rows(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """(arm, mode, before, after, gain, how far GRPO is ahead, steps): per cent, gain and lead with their intervals."""

    def interval(mean: float, low: float, high: float) -> str:
        return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"

    rows: list[tuple[str, ...]] = []
    for o in outcomes:
        gain = o.stopped or interval(o.after - o.before, o.low, o.high)
        lead = "" if o.stopped or o.arm == GRPO else interval(o.lead, o.lead_low, o.lead_high)
        steps = ", ".join(f"{n} in {s:.0f} s" for n, s in zip(o.steps, o.seconds, strict=True))
        steps += " (grpo.steps, not the clock)" if o.by_amount else ""
        rows.append((o.arm, o.mode, f"{100 * o.before:.1f}", f"{100 * o.after:.1f}", gain, lead, steps))
    return rows
