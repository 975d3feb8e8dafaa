"""What the GRPO loop keeps and reports, with stand-ins for all that computes: how a run ends, which policy is best."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from apr_ray.rollout.pool import CheckSample
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training import grpo as loop
from apr_ray.training.grpo import Parts, batch_of, step_metrics, train_grpo
from apr_ray.training.rollouts import Rollouts
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.session import Clock
from apr_ray.training.turns import Turns
from apr_ray.training.watch import Watch

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


def trained(
    config: Config, accuracy: Sequence[float], monkeypatch: pytest.MonkeyPatch, clock_steps: int | None = None
) -> tuple[RunDir, Path]:
    """A run whose policy after step n has `accuracy[n]`; with `clock_steps`, its time is up in that step."""
    stub: Any = Stub(accuracy)

    @contextmanager
    def parts_of(config: Config, run: RunDir, policy: Path, state: LoopState, bars: ProgressBars) -> Iterator[Parts]:
        rollouts = Rollouts(stub, PROBLEMS * 10, config)  # type: ignore[arg-type]
        watch = Watch(config, run, Silent(), bars)  # type: ignore[arg-type]
        yield Parts(stub, stub, stub, stub, Turns(config, stub), rollouts, watch, stub)
        rollouts.stop()

    monkeypatch.setattr(loop, "parts_of", parts_of)
    if clock_steps is not None:
        monkeypatch.setattr(Clock, "share_of", lambda clock, minutes: stub.version.counter / clock_steps)
    run = RunDir.create(config, "train")
    return run, train_grpo(config, run, write_policy(run.path.parent / "start", 0), ProgressBars(quiet=True))


@pytest.mark.parametrize(("save_every", "eval_every"), [(100, 100), (2, 100), (3, 3), (1, 2), (100, 3)])
def test_a_run_that_its_clock_ends_reports_the_policy_that_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int, eval_every: int
) -> None:
    config = a_config(tmp_path, steps=100, max_minutes=1.0, save_every=save_every, eval_every=eval_every)
    run, final = trained(config, [0.5] * 9, monkeypatch, clock_steps=3)
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
def test_the_best_policy_is_never_worse_than_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: list[float], best: int
) -> None:
    run, final = trained(a_config(tmp_path, steps=6), accuracy, monkeypatch)
    assert policy_of(run.path / "best") == best
    assert policy_of(final) == 6
    quick = {r["step"]: r["eval/quick/accuracy"] for r in run.metrics() if "eval/quick/accuracy" in r}
    assert quick == {step: accuracy[step] for step in (0, 2, 4, 6)}, "the best is chosen on validation problems"


def test_trees_that_were_begun_when_the_clock_ends_a_run_end_before_its_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    run = Stub.run

    def slowly(stub: Stub, requests: Sequence[Any]) -> Iterator[tuple[int, ThreadTree]]:
        evaluation = requests[0].temperature == 0
        if not evaluation:
            time.sleep(0.05)
        yield from run(stub, requests)
        events.append("evaluation" if evaluation else "step")

    monkeypatch.setattr(Stub, "run", slowly)
    config = a_config(tmp_path, steps=100, overlap=True, max_staleness=1, eval_every=100, max_minutes=1.0)
    trained(config, [0.5] * 9, monkeypatch, clock_steps=3)
    full = ["evaluation"] * 2  # the test set, then validation problems
    assert events == [*full, *["step"] * 4, *full]


def test_a_steps_metrics_are_means_over_what_was_trained() -> None:
    config = a_config(Path("unused"))
    version = WeightVersion(0, 4)
    trees = [a_tree("p", i, WeightVersion(0, 3 + i), float(i)) for i in range(2)]
    trees += [a_tree("q", i, version, 1.0) for i in range(2)]
    grpo = config.grpo.model_copy(update={"max_staleness": 1})
    made = batch_of(trees, grpo, version)
    stats = [
        StepStats(0.1, 4, 8, 1.0, 1e-3, kl=0.2, entropy=3.0, clipped=1, cut=2),
        StepStats(0.1, 4, 8, 3.0, 1e-3, kl=0.4, entropy=5.0, clipped=3),
    ]
    times = [0.0, 1.0, 1.5, 3.5, 3.75, 4.0]
    found = step_metrics(trees, made, stats, version, times, rollout_s=2.0, with_kl=True)
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
    assert "train/kl" not in step_metrics(trees, made, stats, version, times, 2.0, with_kl=False)


def test_a_run_that_died_before_its_first_checkpoint_goes_on_with_fresh_trees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines begin at version 0.0, the weights of the second attempt are 1.0: they are told before the first tree."""
    monkeypatch.setattr(RunDir, "unused_incarnation", lambda run, saved=-1: 1)
    run, _ = trained(a_config(tmp_path, steps=1), [0.5] * 2, monkeypatch)
    (step,) = [row for row in run.metrics() if "rollout/reward" in row]
    assert step["rollout/staleness"] == 0
    assert "rollout/tokens/stale" not in step or step["rollout/tokens/stale"] == 0
    assert step["train/loss"] == 0.1


def test_every_tree_is_a_line_of_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = trained(a_config(tmp_path, steps=2, overlap=True, max_staleness=1), [0.5] * 3, monkeypatch)
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


def test_a_run_does_not_go_on_from_another_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = trained(a_config(tmp_path, steps=1), [0.5] * 3, monkeypatch)
    other = write_policy(tmp_path / "other", 0)
    (other / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="began with another policy than"):
        train_grpo(run.config, run, other, ProgressBars(quiet=True))


def test_a_problem_passes_with_one_solved_sample_of_several() -> None:
    version = WeightVersion(0, 0)
    rewards = {"a": (0.0, 1.0, 1.0), "b": (0.0, 0.0, 0.0)}
    trees = tuple(a_tree(key, s, version, r) for key, given in rewards.items() for s, r in enumerate(given))
    several = EvalResult(1.0, 2, 3, 1 / 3, 0.0, 1.0, trees).metrics()
    assert several["eval/t1.0/pass_at_n"] == 0.5
    assert "eval/t1.0/pass_at_n" not in EvalResult(1.0, 2, 1, 0.0, 0.0, 1.0, (trees[0], trees[3])).metrics()


def test_a_step_short_of_groups_with_variance_is_refilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its five groups one has variance, so four further problems are drawn, and three more after the next one."""
    run, _ = trained(a_config(tmp_path, steps=1, refill_rounds=2), [0.5, 0.5], monkeypatch)
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    drawn = [*range(5), *range(5, 9), *range(10, 13)]
    assert [row["problem"] for row in rows] == [f"p{i}" for i in drawn for _ in range(2)]


def test_tokens_end_a_run_at_the_end_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step samples 10 trees of 2 tokens: the third is the first that reaches 50."""
    run, _ = trained(a_config(tmp_path, steps=100, tokens=50), [0.5] * 4, monkeypatch)
    found = run.latest()
    assert found is not None
    assert (found[1].step, found[1].sampled_tokens) == (3, 60)


def test_steps_that_train_on_nothing_are_said_and_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Faults 14a: a run whose trees were all dropped ended with rc 0, and nothing was said."""
    caplog.set_level("WARNING", logger="apr_ray")
    config = a_config(tmp_path, steps=9, kl_coefficient=0.0)
    with pytest.raises(AprError, match=r"step 3 trained on nothing.*all trees have the same reward; so were the 2"):
        trained(config, [0.0] * 9, monkeypatch)
    assert [f"step {n} trained on nothing" in caplog.text for n in (1, 2, 3)] == [True, True, False]

    def old_trees(stub: Stub, requests: Sequence[Any]) -> Iterator[tuple[int, ThreadTree]]:
        yield from enumerate(a_tree(r.problem.key, r.sample, WeightVersion(0, 0)) for r in requests)

    monkeypatch.setattr(Stub, "run", old_trees)
    with pytest.raises(AprError, match=r"step 4 trained on nothing.*older than grpo\.max_staleness allows"):
        trained(a_config(tmp_path / "stale", steps=9), [0.5] * 9, monkeypatch)
