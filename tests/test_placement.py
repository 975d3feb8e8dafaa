"""Where parts run: who waits is seen, what cannot fit is refused, nothing is left, colocated parts take turns."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from configs import changed
from idle_parts import IdleRank, IdleWorker
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from apr_ray import placement
from apr_ray.config import Config, OptimizerConfig, load_config
from apr_ray.core.errors import AprError, ConfigError
from apr_ray.learner.group import LearnerGroup
from apr_ray.placement import Need, learner_places, require_room, training_needs, worker_places
from apr_ray.rollout.pool import RolloutPool
from apr_ray.rollout.worker import require_sleep
from apr_ray.tasks.countdown.task import CountdownTask
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.groups import sample_trees
from apr_ray.training.grpo import run_grpo
from apr_ray.training.run_dir import RunDir

CPUS = 4.0
"""Of the tests' Ray."""
MEANWHILE_S = 60.0
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
pytestmark = pytest.mark.usefixtures("idle_ray")


def until(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + MEANWHILE_S
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


def groups(state: str = "") -> set[str]:
    """Names of the groups that are there, or of those in one state."""
    table = placement_group_table().values()
    return {g["name"] for g in table if (g["state"] == state if state else g["state"] != "REMOVED")}


def is_idle() -> bool:
    return not groups() and ray.available_resources().get("CPU") == pytest.approx(CPUS, abs=1e-3)


@pytest.fixture
def idle_ray(ray_local: None) -> Iterator[None]:
    """Earlier tests' actors are gone, and so are this one's afterwards."""
    until(is_idle)
    yield
    until(is_idle)


@pytest.fixture
def idle_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts start, and do nothing."""
    monkeypatch.setattr("apr_ray.learner.group.LearnerActor", IdleRank)
    monkeypatch.setattr("apr_ray.rollout.pool.RolloutWorker", IdleWorker)


# --- room -------------------------------------------------------------------------------------------------------------


def test_a_worker_without_room_is_one_group_that_waits_by_name_and_the_others_begin(
    small_config: Config,
    checkpoint: Path,
    task: CountdownTask,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The second of two workers finds the CPUs taken. The pool begins with the first, says what is missing, and has
    the second when there is room."""
    monkeypatch.setattr(placement, "WAIT_REPORT_S", 0.3)
    other = placement_group([{"CPU": 2.5}])
    assert other.wait(MEANWHILE_S)
    config = changed(small_config, rollout={"cpus_per_worker": 1.0, "min_workers": 1})
    pool = RolloutPool.start(config, str(checkpoint))
    (pending,) = groups("PENDING")
    assert pending.startswith("rollout-worker-01-")
    assert len(pool.membership().workers) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, "apr_ray.placement"):
        while not caplog.messages:
            assert len(sample_trees(pool, task.problems("train", 3, 0), config, 0)) == 6
    assert "1 of 2 rollout workers wait for 1 CPU each, since" in caplog.messages[0]
    assert "free in the cluster: 0.5 of 4 CPU" in caplog.messages[0]
    remove_placement_group(other)
    until(lambda: len(pool.membership().workers) == 2)
    assert not groups("PENDING")
    pool.stop()


@pytest.mark.usefixtures("idle_parts")
def test_a_start_waits_for_all_by_default(
    small_config: Config, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Learners and workers alike; the wait is told from within `start`."""
    monkeypatch.setattr(placement, "WAIT_REPORT_S", 0.3)
    config = changed(small_config, rollout={"cpus_per_worker": 1.0}, learner={"cpus_per_rank": 1.0})
    starts = {
        "rollout worker": lambda: RolloutPool.start(config, str(checkpoint)),
        "learner rank": lambda: LearnerGroup.start(config, OPTIMIZER, str(checkpoint)),
    }
    for (part, start), waiting in zip(starts.items(), (1, 2), strict=True):  # the ranks start together or not at all
        caplog.clear()
        other = placement_group([{"CPU": 2.5}])
        assert other.wait(MEANWHILE_S)
        with ThreadPoolExecutor(1) as thread, caplog.at_level(logging.WARNING, "apr_ray.placement"):
            starting = thread.submit(start)
            until(lambda: caplog.messages)
            assert not starting.done()
            remove_placement_group(other)
            starting.result().stop()
        assert f"{waiting} of 2 {part}s wait for 1 CPU each" in caplog.messages[0]
        until(lambda: not groups())


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        ({"rollout": {"gpus_per_worker": 2.0}}, "2 rollout workers at 2 GPU each: the cluster has 2 GPU, room for 1"),
        ({"learner": {"cpus_per_rank": 5.0}}, "2 learner ranks at 5 CPU each: the cluster has 4 CPU, room for 0"),
        ({"rollout": {"workers": 9}}, "9 rollout workers at 0.5 CPU each: the cluster has 4 CPU, room for 8"),
        (
            {"rollout": {"workers": 4, "cpus_per_worker": 1.0}},
            "2 learner ranks and 4 rollout workers ask for 5 CPU together: the cluster has 4",
        ),
    ],
)
def test_what_can_never_fit_is_refused_before_anything_starts(
    small_config: Config, checkpoint: Path, tmp_path: Path, sections: dict[str, dict[str, Any]], error: str
) -> None:
    config = changed(small_config, run={"root": str(tmp_path), "name": "r"}, **sections)
    run = RunDir.create(config, "train")
    with pytest.raises(ConfigError) as raised:
        run_grpo(config, run, checkpoint, ProgressBars(quiet=True))
    assert raised.value.what == error
    (section,) = sections
    assert f"{section}." in raised.value.remedy
    assert "placement.autoscaling=true" in raised.value.remedy
    assert not groups()
    assert not (tmp_path / "mlflow.db").exists()
    require_room(training_needs(config), changed(config, placement={"autoscaling": True}))


def test_fewer_workers_need_less_room(small_config: Config) -> None:
    require_room(training_needs(changed(small_config, rollout={"workers": 9, "min_workers": 2})), small_config)
    require_room([Need("share", 40, 0.1)], small_config)  # 40 times 0.1 is not 4 in binary


@pytest.mark.usefixtures("idle_parts")
def test_groups_are_gone_after_a_stop_and_after_a_failed_start(
    single_config: Config, checkpoint: Path, tmp_path: Path
) -> None:
    pool = RolloutPool.start(single_config, str(checkpoint))
    learners = LearnerGroup.start(single_config, OPTIMIZER, str(checkpoint))
    assert {name.rsplit("-", 1)[0] for name in groups("CREATED")} == {"rollout-worker-00", "learner-ranks"}
    pool.stop()
    learners.stop()
    until(lambda: not groups())
    with pytest.raises(AprError):
        RolloutPool.start(single_config, str(tmp_path / "nothing"))
    with pytest.raises(Exception, match="nothing"):
        LearnerGroup.start(single_config, OPTIMIZER, str(tmp_path / "nothing"))
    until(is_idle)


@pytest.mark.usefixtures("idle_parts")
def test_a_failed_run_leaves_no_part_behind(
    single_config: Config, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(single_config, run={"root": str(tmp_path), "name": "r"}, tracking={"tracker": "none"})
    monkeypatch.setattr("apr_ray.training.grpo.RewardClient", lambda task: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_grpo(config, RunDir.create(config, "train"), checkpoint, ProgressBars(quiet=True))
    until(is_idle)


# --- taking turns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["grpo.ahead=1", "grpo.max_staleness=1"], "grpo.ahead needs learners and engines at work together"),
        (["rollout.workers=3"], r"learner.ranks 2, rollout.workers 3"),
        (["engine.name=sglang", "rollout.gpus_per_worker=1"], "learner.gpus_per_rank 0, rollout.gpus_per_worker 1"),
    ],
)
def test_parts_that_cannot_take_turns_are_refused(overrides: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        load_config([], ["placement.mode=colocated", "learner.ranks=2", "rollout.workers=2", *overrides])


def test_gpus_that_nothing_uses_and_engines_that_cannot_sleep_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout.gpus_per_worker is 1, engine torch uses none \(engine.device None"):
        load_config([], ["rollout.gpus_per_worker=1"])
    with pytest.raises(ConfigError, match="several GPUs are reserved whole"):
        load_config([], ["engine.name=sglang", "rollout.gpus_per_worker=1.5"])
    with pytest.raises(ConfigError, match=r"learner.gpus_per_rank: Input should be less than or equal to 1"):
        load_config([], ["learner.gpus_per_rank=2"])
    with pytest.raises(ConfigError, match=r"engine.device is cuda, rollout.gpus_per_worker is 0"):
        load_config([], ["engine.name=sglang", "engine.device=cuda"])
    with pytest.raises(ConfigError, match="min_workers 3 is above workers 2"):
        load_config([], ["rollout.workers=2", "rollout.min_workers=3"])
    with pytest.raises(ConfigError, match=r"sglang cannot here.*placement.mode=disaggregated"):
        require_sleep("colocated", "sglang", sleeps=False)
    require_sleep("disaggregated", "sglang", sleeps=False)


def test_colocated_a_rank_and_a_worker_share_a_gpu(small_config: Config) -> None:
    config = changed(
        small_config,
        placement={"mode": "colocated"},
        learner={"gpus_per_rank": 1.0},
        rollout={"gpus_per_worker": 1.0},
    )
    ranks = learner_places(config)
    ranks.wait()
    workers = worker_places(config, ranks)
    gpus = [
        ray.get(ray.remote(own_gpus).options(**places.options(i)).remote())
        for places in (ranks, workers)
        for i in (0, 1)
    ]
    assert gpus[:2] == gpus[2:]
    assert sorted(gpus[:2]) == [["0"], ["1"]]
    ranks.remove()


def own_gpus() -> list[str]:
    found: list[str] = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return found


@pytest.mark.usefixtures("idle_parts")
def test_colocated_the_learners_group_is_all_there_is(small_config: Config, checkpoint: Path) -> None:
    colocated = changed(small_config, placement={"mode": "colocated"})
    learners = LearnerGroup.start(colocated, OPTIMIZER, str(checkpoint))
    pool = RolloutPool.start(colocated, str(checkpoint), beside=learners.places)
    assert len(groups()) == 1
    assert ray.available_resources()["CPU"] == pytest.approx(CPUS - 2 * 0.5)
    assert [learners.places.slots[i] for i in range(2)] == [pool.places.slots[i] for i in range(2)]  # type: ignore[union-attr]
    pool.stop()
    assert len(groups()) == 1
    learners.stop()
    until(lambda: not groups())


def test_two_colocated_steps_are_those_of_parts_with_places_of_their_own(
    single_config: Config, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every metric that is not a time, to the last bit; and the engines did sleep, once a step."""
    slept: list[str] = []
    for name in ("sleep", "wake"):
        method = getattr(RolloutPool, name)

        def noted(pool: RolloutPool, name: str = name, method: Callable[[RolloutPool], None] = method) -> None:
            slept.append(name)
            method(pool)

        monkeypatch.setattr(RolloutPool, name, noted)
    rows: dict[str, list[dict[str, Any]]] = {}
    for mode in ("disaggregated", "colocated"):
        config = changed(
            single_config,
            run={"root": str(tmp_path), "name": mode},
            placement={"mode": mode},
            engine={"deterministic": True, "max_sequences": 16},
            grpo={"steps": 2, "eval_every": 2},
            tracking={"tracker": "none"},
        )
        run = RunDir.create(config, "train")
        run_grpo(config, run, checkpoint, ProgressBars(quiet=True))
        rows[mode] = [{k: v for k, v in row.items() if not is_about_time(k)} for row in run.metrics()]
        assert slept == ([] if mode == "disaggregated" else ["sleep", "wake"] * 2)
    assert sum("train/loss" in row for row in rows["colocated"]) >= 1
    assert rows["colocated"] == rows["disaggregated"]


def is_about_time(name: str) -> bool:
    return name.startswith("time") or name.endswith(("_s", "cached_tokens"))


def test_sleeping_workers_give_their_memory_back_and_draw_the_same_after(
    single_config: Config, checkpoint: Path, task: CountdownTask
) -> None:
    """KV of 300 MB in each worker's process, as the system counts it; afterwards the same trees again."""
    config = changed(single_config, engine={"deterministic": True, "max_sequences": 16, "cache_slots": 750})
    pool = RolloutPool.start(config, str(checkpoint))
    problems = task.problems("train", 3, 0)
    before = sample_trees(pool, problems, config, 0)
    touched = pool.everywhere(lambda actor: actor.__ray_call__.remote(touch_kv))
    pool.sleep()
    asleep = pool.everywhere(lambda actor: actor.__ray_call__.remote(lambda _: resident_bytes()))
    with pytest.raises(AprError, match="asleep"):
        pool.sample_for_check([(5, 6, 7)], 4, 1.0)
    pool.wake()
    after = sample_trees(pool, problems, config, 0)
    pool.stop()
    for (kv_bytes, resident), slept in zip(touched, asleep, strict=True):
        assert kv_bytes > 200e6
        assert resident - slept > 0.95 * kv_bytes
    calls = [
        [(c.path, c.segment, c.sampled_ids, c.logprobs) for t in trees for c in t.calls] for trees in (before, after)
    ]
    assert calls[0] == calls[1]


def resident_bytes() -> int:
    """Memory of this process that is in use, by /proc."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def touch_kv(worker: Any) -> tuple[int, int]:
    """Take all KV memory for real: the system gives a page when it is first written. Zeros change nothing."""
    decoder = worker.engine.decoder
    decoder.keys.add_(0.0)
    decoder.values.add_(0.0)
    return decoder.keys.nbytes + decoder.values.nbytes, resident_bytes()
