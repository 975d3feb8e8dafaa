"""Is it GRPO over threads that helps? The same policy, trained on in several ways with as many tokens each.

    policy ─▶ for each seed: grpo · continued-sft · rejection · final-norm · random-reward · frozen-engine ─▶ table

An arm is the configuration with the preset `control-ARM` on top. Every arm samples as many tokens, or is shown as many
demonstrated ones, and all arms of all seeds are judged on one set of problems (`evaluation.seed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apr_ray.config import Config, load_config
from apr_ray.core.errors import AprError, MismatchError
from apr_ray.data.demonstrations import require_demonstrations
from apr_ray.evaluation.comparison import best_mode, paired, read_evaluation, solved_shares
from apr_ray.metrics.intervals import Interval, t_interval
from apr_ray.metrics.names import mode_name
from apr_ray.reward.actor import RewardClient
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.grpo import run_grpo
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.session import ray_session, tracked
from apr_ray.training.sft import run_sft
from apr_ray.training.watch import Watch

GRPO, CONTINUED, FROZEN = "grpo", "continued-sft", "frozen-engine"
CONTROLS = (GRPO, CONTINUED, "rejection", "final-norm", "random-reward", FROZEN)
ARMS = (*CONTROLS, "ahead")
"""The last is no control: GRPO with rollouts one step ahead, which does as well per step at best, and may be faster."""
STEPS = 1000
"""Of GRPO at most: its problems are drawn beforehand, and its tokens end it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two accuracies, asked in two ways that are never put into one number.

    Attributes:
        seeds: of the recipe: t over one mean per seed.
        problems: of these policies: t over problems, each the mean of its seeds, with the policies fixed.
    """

    seeds: Interval
    problems: Interval


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm at one temperature, over all seeds.

    Attributes:
        before: accuracy of the policy that all began with, at its best temperature: the yardstick.
        after: accuracy of the arm in this mode, mean over seeds and problems.
        gain: after less before.
        lead: GRPO's accuracy in the same mode less this arm's.
        tokens, seconds: of training, with each seed.
        stopped: why its runs stopped early, where they did.
    """

    arm: str
    mode: str
    before: float
    after: float
    gain: Difference
    lead: Difference
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    stopped: str = ""


def run_controls(
    files: Sequence[str | Path],
    overrides: Sequence[str],
    policy: Path,
    data: Path,
    *,
    tokens: int,
    seeds: int,
    arms: Sequence[str] = CONTROLS,
    bars: ProgressBars,
) -> list[ArmResult]:
    """Train the arms with every seed on `tokens` each, and compare; what is complete is not run again.

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
        f"grpo.tokens={tokens}",
        f"sft.tokens={tokens}",
        "grpo.eval_every=1000000",  # only training counts
        "sft.eval_every=1000000",
        "sft.save_every=1000000",
        "sft.max_minutes=null",
        "grpo.max_minutes=null",
        f"grpo.steps={STEPS}",  # tokens alone end it
        "grpo.keep_batches=off",
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
    return [result for arm in arms for result in _results(root, arm, modes, seeds)]


def _train(arm: str, config: Config, path: Path, policy: Path, data: Path, bars: ProgressBars) -> None:
    run = RunDir.resume(path, config) if (path / "config.yaml").exists() else RunDir.create(config, "controls")
    if (path / "done").exists():
        return
    stopped = ""
    if arm == CONTINUED:
        _judge(run, run_sft(run.config, run, data, bars), bars)
    else:
        try:
            run_grpo(run.config, run, policy, bars)
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


def _results(root: Path, arm: str, modes: Sequence[str], seeds: int) -> list[ArmResult]:
    """An arm in every mode. One that was stopped is left with the policy that it began with."""
    runs = [root / f"{arm}-{seed}" for seed in range(seeds)]
    leaders = [root / f"{GRPO}-{seed}" for seed in range(seeds)]
    stopped = (runs[0] / "done").read_text()
    first = [read_evaluation(run, 0) for run in leaders]
    last = first if stopped else [read_evaluation(run) for run in runs]
    leading = [read_evaluation(run) for run in leaders]

    best = best_mode({mode: [t for one in first for t in one[mode]] for mode in modes})
    yardstick = [solved_shares(one[best]) for one in first]
    states = [LoopState() if found is None else found[1] for found in (RunDir.resume(run).latest() for run in runs)]
    tokens = tuple(state.tokens if arm == CONTINUED else state.sampled_tokens for state in states)
    seconds = tuple(state.elapsed_s for state in states)

    results = []
    for mode in modes:
        now, leader = ([solved_shares(one[mode]) for one in of] for of in (last, leading))
        results.append(
            ArmResult(
                arm, mode, _mean(yardstick), _mean(now), difference(yardstick, now), difference(now, leader),
                tokens, seconds, stopped,
            )
        )  # fmt: skip
    return results


def difference(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> Difference:
    """After less before, by seed the shares solved of each problem. Raises AprError where problems differ."""
    by_seed = [paired(a, b) for a, b in zip(before, after, strict=True)]
    merged = ({key: _mean_of([one[key] for one in of]) for key in of[0]} for of in (before, after))
    return Difference(t_interval([one.mean for one in by_seed]), paired(*merged))


def _mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean(shares: Sequence[Mapping[str, float]]) -> float:
    return _mean_of([_mean_of(list(one.values())) for one in shares])


TABLE_HEAD = (
    "arm",
    "mode",
    "before at its best, %",
    "after, %",
    "gain [95 % over seeds]",
    "gain [95 % over problems]",
    "GRPO is ahead by [seeds]",
    "[problems]",
    "tokens in seconds",
)


def table_rows(results: Sequence[ArmResult]) -> list[tuple[str, ...]]:
    """For a table under `TABLE_HEAD`, in per cent and percentage points."""
    rows: list[tuple[str, ...]] = []
    for r in results:
        gain = (r.stopped, "") if r.stopped else (str(r.gain.seeds), str(r.gain.problems))
        lead = ("", "") if r.stopped or r.arm == GRPO else (str(r.lead.seeds), str(r.lead.problems))
        cost = ", ".join(f"{n:,} in {s:.0f}" for n, s in zip(r.tokens, r.seconds, strict=True))
        rows.append((r.arm, r.mode, f"{100 * r.before:.1f}", f"{100 * r.after:.1f}", *gain, *lead, cost))
    return rows
