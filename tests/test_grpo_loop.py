"""What the GRPO loop keeps and reports, with stand-ins for all that computes: how a run ends, which policy is best."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_ray.config import Config, parse_config
from apr_ray.core.engine import FinishReason, VersionSpan
from apr_ray.core.errors import AprError, ConfigError
from apr_ray.core.ledger import SOLVED, Call, Outcome, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.evaluation.evaluate import EvalResult
from apr_ray.learner.steps import StepStats
from apr_ray.model.llama import policy_fingerprint
from apr_ray.rollout.pool import CheckSample
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.groups import Drawn, GroupStream, fresh_groups, group
from apr_ray.training.grpo import Parts, batch_of, run_grpo, train_grpo
from apr_ray.training.policy import Policy
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.step import Pace, Step
from apr_ray.training.step_report import step_metrics
from apr_ray.training.watch import Judge, Watch

V0 = WeightVersion(0, 0)
PROBLEMS = [type("P", (), {"key": f"p{i}"})() for i in range(40)]


def a_tree(problem_key: str, sample: int, version: WeightVersion, reward: float | None = None) -> ThreadTree:
    call = Call(
        (), 0, (7,), (1, 2), (-0.1, -0.2), (), (), FinishReason.STOP,
        (VersionSpan(version, 0, 2),), version, 0, 0, 0.0, 0.5, 1.0, "e",
    )  # fmt: skip
    verdict = "" if reward is None else SOLVED if reward else "wrong_value"
    return ThreadTree(problem_key, sample, (call,), (), (), "", Outcome.ANSWERED, reward=reward, verdict=verdict)


class Stub:
    """Learners, pool, reward, transport and protocol in one: the policy is the number of its step."""

    def __init__(self, accuracy: Sequence[float]) -> None:
        self.accuracy = accuracy
        self.version = WeightVersion(0, 0)
        self.restarts = 0

    def run(self, requests: Sequence[Any]) -> Iterator[tuple[int, ThreadTree]]:
        for i, request in enumerate(requests):
            yield i, a_tree(request.problem.key, request.sample, self.version)

    def score(self, problems: Sequence[Any], trees: Sequence[ThreadTree]) -> list[ThreadTree]:
        """Of ten, as many are right as the present policy's accuracy says."""
        right = round(10 * self.accuracy[self.version.counter])
        return [replace(tree, verdict=SOLVED if i % 10 < right else "wrong_value") for i, tree in enumerate(trees)]

    def grpo_step(self, batch: Any, how: Any, rate: float) -> list[StepStats]:
        return [StepStats(loss=0.1, tokens=4, padded_tokens=4, grad_norm=1.0, learning_rate=rate)]

    def broadcast(self, learners: Any, pool: Any, version: WeightVersion) -> None:
        self.version = version

    def close(self) -> None:
        pass

    def chooses_to_spawn(self, token_id: int) -> None:
        """Nothing decides."""

    def sample_for_check(
        self, prompts: Sequence[Any], tokens: int, temperature: float, timeout_s: float
    ) -> list[CheckSample]:
        return [CheckSample("worker-00", (7,), (1,), (-0.1,), (self.version,))]

    def logprobs(self, sequences: Sequence[Any], temperature: float) -> list[np.ndarray[Any, Any]]:
        return [np.array([0.0, -0.1]) for _ in sequences]

    def save(self, folder: Path) -> None:
        write_policy(folder / "policy", self.version.counter)
        (folder / "optimizer").mkdir()


class Silent:
    def log(self, metrics: Any, step: int) -> None:
        pass

    log_trees = log


def write_policy(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(str(step))
    return folder


def policy_of(folder: Path) -> int:
    return int((folder / "config.json").read_text())


def a_config(root: Path, **grpo: Any) -> Config:
    return parse_config(
        {
            "run": {"root": str(root), "name": "r"},
            "grpo": {"problems_per_step": 5, "group_size": 2, "eval_every": 2, "save_every": 100, "keep_batches": "off"}
            | grpo,
            "evaluation": {"problems": 10, "during_training_problems": 10, "temperatures": [0.0]},
        }
    )


class Ended:
    """A clock by which a run's time is up after some versions."""

    def __init__(self, stub: Stub, steps: int) -> None:
        self.stub, self.steps = stub, steps

    def elapsed_s(self) -> float:
        return 1.0

    def share_of(self, minutes: float | None) -> float:
        return self.stub.version.counter / self.steps


class NoBar:
    def update(self, done: float, note: str = "") -> None:
        pass


def trained(
    config: Config,
    accuracy: Sequence[float],
    clock_steps: int | None = None,
    stub: Any = None,
    version: WeightVersion = V0,
) -> tuple[RunDir, Path]:
    """A run whose policy after step n has `accuracy[n]`; with `clock_steps`, its time is up in that step."""
    stub = stub or Stub(accuracy)
    run, state, grpo = RunDir.create(config, "train"), LoopState(), config.grpo
    start = write_policy(run.path.parent / "start", 0)
    pace = Pace(
        state, grpo.optimizer, steps=grpo.steps, tokens=grpo.tokens, minutes=grpo.max_minutes,
        eval_every=grpo.eval_every, save_every=grpo.save_every,
    )  # fmt: skip
    if clock_steps is not None:
        pace.clock = Ended(stub, clock_steps)  # type: ignore[assignment]
    watch = Watch(config, run, Silent(), ProgressBars(quiet=True))  # type: ignore[arg-type]
    groups = GroupStream(stub, stub, PROBLEMS * 10, config)  # type: ignore[arg-type]
    policy = Policy(config, stub, stub, stub, version, start)
    parts = Parts(policy, groups, Judge(watch, stub, stub, state), pace, NoBar(), stub, True, start)
    try:
        return run, train_grpo(run, grpo, parts)
    finally:
        groups.stop()


@pytest.mark.parametrize(("save_every", "eval_every"), [(100, 100), (2, 100), (3, 3), (1, 2), (100, 3)])
def test_a_run_that_its_clock_ends_reports_the_policy_that_it_keeps(
    tmp_path: Path, save_every: int, eval_every: int
) -> None:
    config = a_config(tmp_path, steps=100, max_minutes=1.0, save_every=save_every, eval_every=eval_every)
    run, final = trained(config, [0.5] * 9, clock_steps=3)
    rows = run.metrics()
    assert [row["step"] for row in rows if "rollout/reward" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "eval/greedy/accuracy" in row] == [0, 3]
    found = run.latest()
    assert found is not None
    assert (policy_of(final), found[1].step, WeightVersion.parse(found[1].version).counter) == (3, 3, 3)


@pytest.mark.parametrize(
    ("accuracy", "best"),
    [
        ([0.5, 0.9, 0.3, 0.9, 0.8, 0.9, 0.6], 4),  # odd steps are not evaluated
        ([0.5, 0.9, 0.3, 0.9, 0.4, 0.9, 0.4], 0),
        ([0.5, 0.9, 0.3, 0.9, 0.4, 0.9, 0.6], 6),
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], 0),  # the first of equals
    ],
)
def test_the_best_policy_is_never_worse_than_the_first(tmp_path: Path, accuracy: list[float], best: int) -> None:
    run, final = trained(a_config(tmp_path, steps=6), accuracy)
    assert policy_of(run.path / "best") == best
    assert policy_of(final) == 6
    quick = {r["step"]: r["eval/quick/accuracy"] for r in run.metrics() if "eval/quick/accuracy" in r}
    assert quick == {step: accuracy[step] for step in (0, 2, 4, 6)}, "the best is chosen on validation problems"


def test_trees_that_were_begun_when_the_clock_ends_a_run_end_before_its_evaluation(tmp_path: Path) -> None:
    events: list[str] = []

    class Slow(Stub):
        def run(self, requests: Sequence[Any]) -> Iterator[tuple[int, ThreadTree]]:
            evaluation = requests[0].temperature == 0
            if not evaluation:
                time.sleep(0.05)
            yield from super().run(requests)
            events.append("evaluation" if evaluation else "step")

    config = a_config(tmp_path, steps=100, ahead=1, max_staleness=1, eval_every=100, max_minutes=1.0)
    trained(config, [], clock_steps=3, stub=Slow([0.5] * 9))
    full = ["evaluation"] * 2  # the test set, then validation problems
    assert events == [*full, *["step"] * 4, *full]


def test_a_steps_metrics_are_means_over_what_was_trained() -> None:
    config = a_config(Path("unused"))
    version = WeightVersion(0, 4)
    trees = [a_tree("p", i, WeightVersion(0, 3 + i), float(i)) for i in range(2)]
    trees += [a_tree("q", i, version, 1.0) for i in range(2)]
    grpo = config.grpo.model_copy(update={"max_staleness": 1})
    fresh, stale = fresh_groups(group(trees, 2), version, 1)
    drawn = Drawn(trees, [], fresh, stale, rollout_s=2.0)
    made = batch_of(drawn, grpo)
    stats = [
        StepStats(0.1, 4, 8, 1.0, 1e-3, kl=0.2, entropy=3.0, clipped=1, cut=2),
        StepStats(0.1, 4, 8, 3.0, 1e-3, kl=0.4, entropy=5.0, clipped=3),
    ]
    step = Step(1, 1e-3, False, False)
    step.seconds |= {"wait": 1.0, "reward": 0.5, "learn": 2.0, "keep": 0.25, "sync": 0.25}
    found = step_metrics(step, drawn, made, stats, version, with_kl=True)
    assert found["rollout/reward"] == 0.75
    assert found["rollout/zero_variance_groups"] == 0.5
    assert found["rollout/staleness"] == 0.25
    assert found["rollout/tokens_per_s"] == 4.0
    assert found["train/grad_norm"] == 2.0
    assert found["train/entropy"] == pytest.approx(3.0 / float(made.batch.loss_weights.sum()))  # at the first
    assert found["train/kl"] == 0.2
    assert found["train/clip_fraction"] == 0.75  # at the last one
    assert found["train/mismatch/cut"] == 0.5
    assert found["train/tokens_per_s"] == 4.0
    parts = [found[f"time/{name}_s"] for name in ("wait", "reward", "learn", "keep", "sync")]
    assert parts == [1.0, 0.5, 2.0, 0.25, 0.25]
    assert sum(parts) == found["time/step_s"]
    assert "train/kl" not in step_metrics(step, drawn, made, stats, version, with_kl=False)


def test_a_run_that_died_before_its_first_checkpoint_goes_on_with_fresh_trees(tmp_path: Path) -> None:
    """Engines begin at version 0.0, the weights of the second attempt are 1.0: they are told before the first tree."""
    run, _ = trained(a_config(tmp_path, steps=1), [0.5] * 2, version=WeightVersion(1, 0))
    (step,) = [row for row in run.metrics() if "rollout/reward" in row]
    assert step["rollout/staleness"] == 0
    assert "rollout/tokens/stale" not in step or step["rollout/tokens/stale"] == 0
    assert step["train/loss"] == 0.1


def test_every_tree_is_a_line_of_the_samples(tmp_path: Path) -> None:
    run, _ = trained(a_config(tmp_path, steps=2, ahead=1, max_staleness=1), [0.5] * 3)
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 10 + [2] * 10
    assert {row["reward"] for row in rows} == {0.0, 1.0}
    for row in run.metrics():
        if "rollout/staleness" in row:
            of_step = [sample["age_oldest"] for sample in rows if sample["step"] == row["step"]]
            assert row["rollout/staleness"] == sum(of_step) / len(of_step)
    with (run.path / "samples.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    run.truncate_samples(1)
    assert len((run.path / "samples.jsonl").read_text().splitlines()) == 10


def test_a_run_does_not_go_on_from_another_policy(tmp_path: Path) -> None:
    run, start = RunDir.create(a_config(tmp_path, steps=1), "train"), write_policy(tmp_path / "start", 0)
    with run.checkpoint(LoopState(step=1, policy=policy_fingerprint(start))) as folder:
        Stub([]).save(folder)
    other = write_policy(tmp_path / "other", 0)
    (other / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="began with another policy than"):
        run_grpo(run.config, run, other, ProgressBars(quiet=True))


def test_a_problem_passes_with_one_solved_sample_of_several() -> None:
    version = WeightVersion(0, 0)
    rewards = {"a": (0.0, 1.0, 1.0), "b": (0.0, 0.0, 0.0)}
    trees = tuple(a_tree(key, s, version, r) for key, given in rewards.items() for s, r in enumerate(given))
    several = EvalResult(1.0, 2, 3, 1 / 3, 0.0, 1.0, trees).metrics()
    assert several["eval/t1.0/pass_at_n"] == 0.5
    assert "eval/t1.0/pass_at_n" not in EvalResult(1.0, 2, 1, 0.0, 0.0, 1.0, (trees[0], trees[3])).metrics()


def test_a_step_short_of_groups_with_variance_is_refilled(tmp_path: Path) -> None:
    """Of its five groups one has variance, so four further problems are drawn, and three more after the next one."""
    run, _ = trained(a_config(tmp_path, steps=1, refill_rounds=2), [0.5, 0.5])
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    drawn = [*range(5), *range(5, 9), *range(10, 13)]
    assert [row["problem"] for row in rows] == [f"p{i}" for i in drawn for _ in range(2)]


def test_tokens_end_a_run_at_the_end_of_a_step(tmp_path: Path) -> None:
    """A step samples 10 trees of 2 tokens: the third is the first that reaches 50."""
    run, _ = trained(a_config(tmp_path, steps=100, tokens=50), [0.5] * 4)
    found = run.latest()
    assert found is not None
    assert (found[1].step, found[1].sampled_tokens) == (3, 60)


def test_steps_that_train_on_nothing_are_said_and_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Faults 14a: a run whose trees were all dropped ended with rc 0, and nothing was said."""
    caplog.set_level("WARNING", logger="apr_ray")
    config = a_config(tmp_path, steps=9, kl_coefficient=0.0)
    with pytest.raises(AprError, match=r"step 3 trained on nothing.*all trees have the same reward; so were the 2"):
        trained(config, [0.0] * 9)
    assert [f"step {n} trained on nothing" in caplog.text for n in (1, 2, 3)] == [True, True, False]

    class Old(Stub):
        def run(self, requests: Sequence[Any]) -> Iterator[tuple[int, ThreadTree]]:
            yield from enumerate(a_tree(r.problem.key, r.sample, V0) for r in requests)

    with pytest.raises(AprError, match=r"step 4 trained on nothing.*older than grpo\.max_staleness allows"):
        trained(a_config(tmp_path / "stale", steps=9), [], stub=Old([0.5] * 9))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_trees_are_as_many_versions_old_as_steps_are_ahead(tmp_path: Path, ahead: int) -> None:
    """One loop: synchronous, one step off, asynchronous. An evaluation has the engines to itself."""
    config = a_config(tmp_path, steps=6, ahead=ahead, max_staleness=ahead, eval_every=100)

    class Waiting(Stub):
        """Trees of a later step are drawn at once, before the next version."""

        def grpo_step(self, *asked: Any) -> list[StepStats]:
            time.sleep(0.05)
            return super().grpo_step(*asked)

    run, _ = trained(config, [], stub=Waiting([0.5] * 9))
    ages = [row["rollout/staleness"] for row in run.metrics() if "rollout/staleness" in row]
    assert ages == [min(number, ahead) for number in range(6)]
    due = a_config(tmp_path / "due", steps=6, ahead=ahead, max_staleness=ahead, eval_every=3)
    run, _ = trained(due, [], stub=Waiting([0.5] * 9))
    ages = [row["rollout/staleness"] for row in run.metrics() if "rollout/staleness" in row]
    assert ages == [min(number % 3, ahead) for number in range(6)]


def test_no_version_without_an_optimiser_step(tmp_path: Path) -> None:
    """Step 2 has nothing to learn from, so the engines keep the weights that they have."""
    config = a_config(tmp_path, steps=3, kl_coefficient=0.0)
    run, _ = trained(config, [0.5, 0.0, 0.5])
    state = run.latest()
    assert state is not None
    assert WeightVersion.parse(state[1].version).counter == 1
    rows = [row for row in run.metrics() if "rollout/reward" in row]
    assert ["sync/delta_logprob_mean" in row for row in rows] == [True, False, False]
