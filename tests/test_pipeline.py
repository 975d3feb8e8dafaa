"""The slice end to end on real Ray actors, real DeepSpeed, real MLflow: tiny, but everything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from by_heart import learn_by_heart

from apr_ray.config import Config, PlacementConfig, RewardConfig, to_yaml
from apr_ray.core.errors import AprError, MismatchError, WeightsRejected
from apr_ray.core.ledger import Disposition
from apr_ray.core.trees_io import read_trees
from apr_ray.core.weights import WeightVersion
from apr_ray.evaluation.audit import audit_batch
from apr_ray.evaluation.kept_batch import find_batch, read_batch
from apr_ray.evaluation.report import summarise, table_rows, write_report, yardstick
from apr_ray.metrics.names import is_known
from apr_ray.reward.actor import RewardClient
from apr_ray.rl.batches import grpo_batch
from apr_ray.rl.rewards import priced
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tasks.countdown.task import CountdownTask
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.controls import CONTROLS, run_controls
from apr_ray.training.groups import fresh_groups, group, sample_trees
from apr_ray.training.grpo import run_grpo
from apr_ray.training.quickstart import run_quickstart
from apr_ray.training.run_dir import RunDir
from apr_ray.training.sft import run_sft
from apr_ray.training.watch import Watch
from apr_ray.weights.registry import build_transport

pytestmark = pytest.mark.usefixtures("ray_local")
QUIET = ProgressBars(quiet=True)


def with_run(config: Config, root: Path, name: str) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"root": str(root), "name": name})})


@pytest.fixture(scope="module")
def finished(small_config: Config, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> RunDir:
    """A whole quickstart, run once for the tests below."""
    root = tmp_path_factory.mktemp("runs")
    run = RunDir.create(with_run(small_config, root, "quick"), "quickstart")
    run_quickstart(run.config, run, QUIET)
    return run


def test_every_phase_leaves_its_policy_and_only_known_metrics(finished: RunDir) -> None:
    for phase in ("sft", "grpo"):
        assert (finished.path / phase / "final" / "model.safetensors").is_file()
        rows = RunDir(finished.path / phase, finished.config).metrics()
        assert rows
        assert all(is_known(name) for row in rows for name in row if name not in ("step", "time"))
    rows = RunDir(finished.path / "grpo", finished.config).metrics()
    steps = [r for r in rows if "rollout/reward" in r]
    assert [r["step"] for r in steps] == [1, 2, 3]
    for row in steps:
        assert row["rollout/staleness"] == 0
        assert row["sync/delta_logprob_mean"] < 1e-4
        assert row.get("train/delta_logprob_mean", 0) < 1e-4
        assert {"train/kl", "train/entropy", "train/clip_fraction", "time/learn_s", "rollout/children"} <= row.keys()


def test_supervised_training_is_evaluated_and_its_best_policy_kept(finished: RunDir) -> None:
    rows = RunDir(finished.path / "sft", finished.config).metrics()
    assert [r["step"] for r in rows if "eval/quick/accuracy" in r] == [6, 12]
    assert (finished.path / "sft" / "best" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_killed_supervised_run_goes_on_from_its_checkpoint(
    finished: RunDir, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after step 10, resumed from step 8: the policy of the unbroken run, which was evaluated too, bit for bit."""
    sft = small_config.sft.model_copy(update={"eval_every": 1_000_000})
    config = with_run(small_config.model_copy(update={"sft": sft}), tmp_path, "s")
    run = RunDir.create(config, "sft")
    log = Watch.log

    def cut(watch: Watch, metrics: Mapping[str, float], step: int) -> None:
        log(watch, metrics, step)
        if step == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "log", cut)
    with pytest.raises(KeyboardInterrupt):
        run_sft(config, run, finished.path / "data", QUIET)
    monkeypatch.undo()
    found = run.latest()
    assert found is not None
    assert found[1].step == 8
    policy = run_sft(config, run, finished.path / "data", QUIET)
    unbroken = finished.path / "sft" / "final"
    assert (policy / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    steps = [r["step"] for r in run.metrics() if "sft/loss" in r]
    assert steps == sorted(set(steps))


@pytest.mark.slow  # `test_placement.py` has colocated steps of GRPO in the quick tier
def test_a_colocated_supervised_run_learns_the_same_beside_engines_that_sleep(
    finished: RunDir, small_config: Config, tmp_path: Path
) -> None:
    """Evaluated twice in between, on engines that share the learners' places; bit for bit the policy of `finished`."""
    config = with_run(small_config, tmp_path, "s")
    config = config.model_copy(update={"placement": PlacementConfig(mode="colocated")})
    run = RunDir.create(config, "sft")
    policy = run_sft(config, run, finished.path / "data", QUIET)
    assert [r["step"] for r in run.metrics() if "eval/quick/accuracy" in r] == [6, 12]
    unbroken = finished.path / "sft" / "final"
    assert (policy / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_weights_went_back_to_the_engines(finished: RunDir) -> None:
    """The last evaluation's trees were drawn under the last version."""
    files = sorted((finished.path / "grpo" / "eval").glob("*.jsonl"))
    assert {f.name for f in files} == {
        f"step-{step:06d}-{mode}.jsonl" for step in (0, 3) for mode in ("greedy", "t1.0")
    }
    for file, counter in ((files[0], 0), (files[-1], 3)):
        versions = {v for tree in read_trees(file) for v in tree.versions()}
        assert versions == {WeightVersion(0, counter)}


def test_mlflow_holds_the_run_its_metrics_and_its_trees(finished: RunDir) -> None:
    import mlflow

    root = finished.path.parent
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "apr-ray"]
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert {"quick/sft", "quick/grpo"} <= set(runs)
    assert all(runs[f"quick/{phase}"].info.status == "FINISHED" for phase in ("sft", "grpo"))
    assert [m.step for m in client.get_metric_history(runs["quick/grpo"].info.run_id, "rollout/reward")] == [1, 2, 3]
    assert runs["quick/grpo"].data.params["grpo.group_size"] == "2"
    traces = mlflow.search_traces(locations=[experiment.experiment_id], return_type="list")
    assert len(traces) >= 4
    for trace in traces:
        spans = trace.data.spans
        root_span = next(s for s in spans if s.parent_id is None)
        assert all(root_span.start_time_ns <= s.start_time_ns <= s.end_time_ns <= root_span.end_time_ns for s in spans)


def test_a_finished_quickstart_is_not_run_again(finished: RunDir) -> None:
    before = (finished.path / "grpo" / "metrics.jsonl").read_bytes()
    run_quickstart(finished.config, finished, QUIET)
    assert (finished.path / "grpo" / "metrics.jsonl").read_bytes() == before


def test_the_report_shows_before_and_after(finished: RunDir) -> None:
    page = write_report(finished.path, finished.path / "sft", finished.path / "grpo")
    text = page.read_text()
    before, after = summarise(finished.path / "grpo")
    assert (before.step, after.step) == (0, 3)
    for mode in ("greedy", "t1.0"):
        assert f"{100 * after.modes[mode]['accuracy']:.1f} %" in text
    for picture in ("accuracy.png", "curves.png", "claims.png", "tree.png"):
        assert (finished.path / picture).stat().st_size > 5000
    best, gains = yardstick(finished.path / "grpo", (before, after))
    assert best in before.modes
    assert "The yardstick is the policy before at its best temperature" in text
    highest = max(m["accuracy"] for m in before.modes.values())
    rows = table_rows((before, after), gains)
    assert [row[1] for row in rows] == ["before GRPO", "after 3 GRPO steps"] * 2
    for mode, gain in gains.items():
        assert gain.mean == pytest.approx(after.modes[mode]["accuracy"] - highest)
        assert any(row[3] == str(gain) for row in rows)


def test_without_an_evaluation_before_the_report_claims_none(finished: RunDir, tmp_path: Path) -> None:
    grpo = shutil.copytree(finished.path / "grpo", tmp_path / "grpo", ignore=shutil.ignore_patterns("step-000000-*"))
    (after,) = summarise(grpo)
    assert after.step == 3
    assert "before GRPO" not in write_report(tmp_path, finished.path / "sft", grpo).read_text()


def test_a_killed_grpo_run_goes_on_from_its_checkpoint(finished: RunDir, single_config: Config, tmp_path: Path) -> None:
    """Two steps, then a resume to three: the metrics of an unbroken run, within float rounding; a new incarnation."""
    policy = finished.path / "sft" / "final"
    grpo = single_config.grpo.model_copy(update={"steps": 2})
    short = with_run(single_config.model_copy(update={"grpo": grpo}), tmp_path, "r")
    run = RunDir.create(short, "train")
    run_grpo(short, run, policy, QUIET)
    long = with_run(single_config, tmp_path, "r")
    run_grpo(long, RunDir(run.path, long), policy, QUIET)
    rows = [r for r in run.metrics() if "rollout/reward" in r]
    assert any("train/update_norm" in r and r["train/logit_scale"] > 0 for r in rows)
    unbroken = [r for r in RunDir(finished.path / "grpo", finished.config).metrics() if "rollout/reward" in r]
    assert [r["step"] for r in rows] == [1, 2, 3]
    for ours, theirs in zip(rows, unbroken, strict=True):
        for name in ("rollout/reward", "rollout/total_tokens", "train/loss", "train/entropy"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-5), (ours["step"], name)
    state = json.loads((run.path / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["version"] == "1.3"


def test_the_audit_of_a_real_batch_agrees(finished: RunDir) -> None:
    """Every part of the step computed again in plain transformers; by default the newest batch is kept."""
    assert [p.name for p in (finished.path / "grpo" / "batches").iterdir()] == ["step-000003"]
    kept = read_batch(find_batch(finished.path, 3))
    assert kept.version == WeightVersion(0, 2)
    assert len(kept.trees) == 6
    report = audit_batch(kept)
    assert report.agrees, report.rows()
    found = {finding.check: finding.found for finding in report.findings}
    calls = sum(len(tree.calls) for tree in kept.trees)
    assert found["calls drawn under these weights"] == f"{calls} of {calls}"
    assert found["rewards that are their ending's price"] == "6 of 6"
    assert float(found["gradient norm"]) > 0
    with pytest.raises(AprError, match=r"no batch of step 2.*Kept are steps 3"):
        find_batch(finished.path, 2)


def test_results_do_not_depend_on_the_number_of_workers(
    small_config: Config, task: CountdownTask, tmp_path: Path
) -> None:
    """Contract 7: the same requests on one worker and on two, arriving in another order, give the same trees, joins and
    all, with the same logprobs to the last bit."""
    problems = task.problems("train", 4, 0)
    policy = learn_by_heart(problems, small_config, tmp_path / "policy")
    found = []
    for workers, order in ((1, [0, 1, 2, 3]), (2, [2, 0, 3, 1])):
        config = small_config.model_copy(
            update={
                "rollout": small_config.rollout.model_copy(update={"workers": workers}),
                "engine": small_config.engine.model_copy(update={"deterministic": True, "max_sequences": 16}),
            }
        )
        pool = RolloutPool.start(config, str(policy))
        trees = sample_trees(pool, [problems[i] for i in order], config, 0)
        pool.stop()
        assert sum(len(tree.joins) for tree in trees) > 0, "no parent was resumed"
        found.append(
            {
                (tree.problem_key, tree.sample): [
                    (c.path, c.segment, c.seed, c.sampled_ids, c.logprobs) for c in tree.calls
                ]
                for tree in trees
            }
        )
    assert len(found[0]) == 8
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def pool(single_config: Config, checkpoint: Path, ray_local: None) -> Iterator[RolloutPool]:
    started = RolloutPool.start(single_config, str(checkpoint))
    yield started
    started.stop()


def test_stale_trees_are_left_out_and_counted(pool: RolloutPool, single_config: Config, task: CountdownTask) -> None:
    """Contracts 4 and 9 on real trees: dispositions add up; trees of another version or incarnation are not used."""
    reward = RewardClient(single_config.task)
    problems = task.problems("train", 3, 0)
    trees = sample_trees(pool, problems, single_config, 0)
    scored = priced(reward.score([p for p in problems for _ in range(2)], trees), RewardConfig())
    reward.stop()
    groups = group(scored, 2)
    assert [len(g.trees) for g in groups] == [2, 2, 2]
    assert fresh_groups(groups, WeightVersion(0, 1), 1) == (groups, [])
    assert fresh_groups(groups, WeightVersion(0, 1), 0) == ([], groups)
    assert fresh_groups(groups, WeightVersion(1, 0), 5) == ([], groups)
    batch = grpo_batch(groups[:2], skip_zero_advantage=False, stale=groups[2:])
    assert sum(batch.dispositions.values()) == sum(t.total_tokens for t in scored)
    assert batch.dispositions[Disposition.STALE] == sum(t.total_tokens for t in groups[2].trees)
    assert batch.dispositions[Disposition.TRAINED] == batch.batch.trained_tokens


def test_a_refused_update_reaches_the_driver_and_changes_nothing(
    pool: RolloutPool, single_config: Config, checkpoint: Path
) -> None:
    import ray

    from apr_ray.model.llama import load_policy
    from apr_ray.model.state import pack_weights, trainable_parameters

    update = pack_weights(trainable_parameters(load_policy(checkpoint)), WeightVersion(0, 1))
    update.flat[3] = np.nan
    before = pool.sample_for_check([(5, 6, 7)], 8, 1.0)
    learners: Any = SimpleNamespace(weights=lambda _: (ray.put(update), {}), parameters=0)
    with pytest.raises(WeightsRejected, match="the checksum is wrong"):
        build_transport(single_config.weights).broadcast(learners, pool, WeightVersion(0, 1))
    assert pool.sample_for_check([(5, 6, 7)], 8, 1.0) == before


def test_rollouts_one_step_ahead_are_stale_by_one_at_most_and_change_nothing_else(
    finished: RunDir, small_config: Config, single_config: Config, tmp_path: Path
) -> None:
    """Overlap, with what else it meets: a collective sync, weights in flight, lanes over both engines."""
    grpo = small_config.grpo.model_copy(
        update={
            "ahead": 1,
            "max_staleness": 1,
            "steps": 4,
            "eval_every": 3,
            "kl_coefficient": 0.0,
            "reward": RewardConfig(coin=True),  # so that there is something to learn
        }
    )
    weights = small_config.weights.model_copy(update={"transport": "collective", "mode": "in_flight"})
    rollout = small_config.rollout.model_copy(update={"fan_out": "spread"})
    sections = {"grpo": grpo, "weights": weights, "rollout": rollout, "learner": single_config.learner}
    changed = small_config.model_copy(update=sections)
    config = with_run(changed, tmp_path, "ahead")
    run = RunDir.create(config, "train")
    run_grpo(config, run, finished.path / "sft" / "final", QUIET)
    rows = {r["step"]: r for r in run.metrics() if "rollout/reward" in r}
    assert list(rows) == [1, 2, 3, 4]
    assert rows[1]["rollout/staleness"] == 0
    assert 0 < rows[2]["rollout/staleness"] <= 1, "its trees were to begin before the first step's weights"
    assert rows[4]["rollout/staleness"] == 0, "an evaluation has the engines to itself, and nothing runs ahead of it"
    assert all(r.get("rollout/tokens/stale", 0) == 0 for r in rows.values())
    assert all(r["sync/delta_logprob_mean"] < 1e-4 for r in rows.values())


def test_controls_run_and_a_frozen_engine_is_noticed(finished: RunDir, single_config: Config, tmp_path: Path) -> None:
    """Coin rewards are half ones, whatever was solved; engines that do not follow stop the run at the first sync."""
    policy = finished.path / "sft" / "final"
    coin = single_config.grpo.model_copy(update={"reward": RewardConfig(coin=True), "steps": 1})
    run = RunDir.create(with_run(single_config.model_copy(update={"grpo": coin}), tmp_path, "coin"), "train")
    run_grpo(run.config, run, policy, QUIET)
    (row,) = [r for r in run.metrics() if "rollout/reward" in r]
    assert row["rollout/reward"] > 0
    weights = single_config.weights.model_copy(update={"transport": "none"})
    # Coin rewards: else there may be nothing to learn from.
    changing = single_config.grpo.model_copy(update={"reward": RewardConfig(coin=True)})
    frozen = with_run(single_config.model_copy(update={"weights": weights, "grpo": changing}), tmp_path, "frozen")
    with pytest.raises(MismatchError, match=r"after sync 0\.1 worker-00 decodes with weights 0\.0"):
        run_grpo(frozen, RunDir.create(frozen, "train"), policy, QUIET)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_arms_are_trained_and_compared(finished: RunDir, single_config: Config, tmp_path: Path) -> None:
    """Every arm trains and is judged on the same problems; engines that do not follow stop theirs at the first sync."""
    file = tmp_path / "small.yaml"
    file.write_text(to_yaml(single_config))
    policy = finished.path / "sft" / "final"
    # Coin rewards for all: else there may be nothing to learn from, and frozen engines would be the learners' policy.
    overrides = [
        f"run.root={tmp_path}",
        "run.name=arms",
        "tracking.tracker=none",
        "grpo.reward.coin=true",
    ]
    outcomes = run_controls([file], overrides, policy, finished.path / "data", tokens=2000, seeds=1, bars=QUIET)
    assert [(o.arm, o.mode) for o in outcomes] == [(arm, mode) for arm in CONTROLS for mode in ("greedy", "t1.0")]
    for outcome in outcomes:
        assert ("decodes with weights 0.0" in outcome.stopped) == (outcome.arm == "frozen-engine")
        assert 0 <= outcome.before <= 1
        assert outcome.gain.seeds.mean == pytest.approx(outcome.after - outcome.before)
        assert outcome.gain.problems.low <= outcome.gain.problems.mean <= outcome.gain.problems.high
        assert outcome.stopped or outcome.tokens[0] >= 2000
        if outcome.arm == "grpo":
            assert outcome.lead.problems.mean == 0
    trained = RunDir.resume(tmp_path / "arms" / "continued-sft-0")
    assert any("sft/loss" in row or "eval/greedy/accuracy" in row for row in trained.metrics())
    before = (tmp_path / "arms" / "grpo-0" / "metrics.jsonl").read_bytes()
    again = run_controls(
        [file], overrides, policy, finished.path / "data", tokens=2000, seeds=1, arms=["ahead"], bars=QUIET
    )
    assert {o.arm for o in again} == {"grpo", "ahead"}
    assert (tmp_path / "arms" / "grpo-0" / "metrics.jsonl").read_bytes() == before, "what was complete was run again"
