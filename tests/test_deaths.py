"""Contract 8: what is lost when a process is killed. Every row of docs/reliability.md names a test."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from by_heart import learn_by_heart
from configs import changed

from apr_ray.config import Config, WeightsConfig, to_yaml
from apr_ray.core.batch import TrainSequence, lay_out
from apr_ray.core.errors import AprError, PartDied
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.data.demonstrations import Demonstrations, write_demonstrations
from apr_ray.engines.process_guard import MARK, marked_processes
from apr_ray.learner.group import LearnerGroup
from apr_ray.local import solve
from apr_ray.model.llama import load_policy
from apr_ray.model.state import pack_weights, trainable_parameters
from apr_ray.reward.actor import RewardClient
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tasks.countdown.task import CountdownTask
from apr_ray.threads.runtime import TreeRequest
from apr_ray.tracking.progress import ProgressBars
from apr_ray.training.grpo import run_grpo
from apr_ray.training.run_dir import LoopState, RunDir
from apr_ray.training.session import tracked
from apr_ray.training.watch import Watch
from apr_ray.weights.registry import build_transport

pytestmark = pytest.mark.usefixtures("ray_local")
GONE_S = 60.0


@pytest.fixture(scope="module")
def exact(small_config: Config) -> Config:
    """Engines whose trees do not depend on what runs beside them."""
    return changed(small_config, engine={"deterministic": True, "max_sequences": 16}, tracking={"tracker": "none"})


def pid_of(actor: Any) -> int:
    pid: int = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
    return pid


def wait_until(what: Callable[[], Any], meanwhile: Callable[[], Any] = lambda: True, every_s: float = 0.1) -> None:
    """Look until it is there, as long as there is hope."""
    while not what():
        assert meanwhile()
        time.sleep(every_s)


# --- one part at a time ---------------------------------------------------------------------------------------------


def send(pool: RolloutPool, update: Any, counter: int) -> None:
    """An update that lies in the object store, as the default transport sends it."""
    learners: Any = SimpleNamespace(weights=lambda _: (update, {}), parameters=0)
    build_transport(WeightsConfig()).broadcast(learners, pool, WeightVersion(0, counter))


def drawn(trees: Iterable[tuple[int, ThreadTree]]) -> dict[int, list[Any]]:
    """What was drawn, whoever drew it and when."""
    return {i: [(c.path, c.segment, c.seed, c.sampled_ids, c.logprobs) for c in tree.calls] for i, tree in trees}


def test_killed_workers_are_replaced_and_their_trees_drawn_again(
    exact: Config, checkpoint: Path, task: CountdownTask
) -> None:
    """A worker dies over its trees, another during an update, the third is one too many.

    Trees are those of an unbroken pool; whoever is new runs the present version before its first tree, also where that
    one was sent while it took an older.
    """
    parameters = list(trainable_parameters(load_policy(checkpoint)))
    updates = {counter: ray.put(pack_weights(parameters, WeightVersion(0, counter))) for counter in (1, 2)}
    requests = [TreeRequest(p, seed=i) for i, p in enumerate(task.problems("train", 12, 0))]
    prompts = [(5, 6, 7), (8, 9, 10, 11)]

    def versions() -> list[WeightVersion]:
        """Of every worker, once all are ready."""
        wait_until(lambda: len(pool.membership().workers) == 2)
        return pool.everywhere(lambda actor: actor.__ray_call__.remote(lambda self: self.engine.version))

    pool = RolloutPool.start(changed(exact, rollout={"max_restarts": 2}), str(checkpoint))
    send(pool, updates[1], 1)
    assert versions() == [WeightVersion(0, 1)] * 2
    before = pool.membership()
    unbroken = drawn(pool.run(requests))

    def checked() -> list[Any]:
        return [(sample.prompt, sample.ids, sample.logprobs) for sample in pool.sample_for_check(prompts, 8, 1.0)]

    check = checked()
    assert pool.membership() == before

    running = pool.run(requests)
    first = next(running)
    os.kill(pid_of(before.workers[0].actor), signal.SIGKILL)
    assert drawn([first, *running]) == unbroken
    assert pool.restarts == 1
    assert versions() == [WeightVersion(0, 1)] * 2

    os.kill(pid_of(before.workers[1].actor), signal.SIGKILL)
    send(pool, updates[2], 2)
    assert pool.restarts == 2
    assert versions() == [WeightVersion(0, 2)] * 2
    assert drawn(pool.run(requests)) == unbroken
    assert checked() == check
    after = pool.membership()
    assert not set(after.workers) & set(before.workers)
    assert after.epoch == before.epoch + 4  # two left, two joined

    os.kill(pid_of(after.workers[0].actor), signal.SIGKILL)
    with pytest.raises(PartDied, match=r"worker-00.1 .*max_restarts is 2\) died: .*Its log is .*worker-.*err"):
        list(pool.run(requests))
    pool.stop()


def test_a_worker_that_cannot_start_is_not_tried_again(exact: Config, tmp_path: Path) -> None:
    with pytest.raises(PartDied, match=r"worker-00 did not start: .*AprError: no tokenizer in"):
        RolloutPool.start(changed(exact, rollout={"workers": 1}), str(tmp_path))


def test_a_learner_rank_that_dies_in_a_step_is_named(exact: Config, checkpoint: Path) -> None:
    """The other rank would wait for it: the driver does not wait for the other. When that one fails too, by the loss of
    its peer, it is still the dead one that is named."""
    group = LearnerGroup.start(exact, exact.sft.optimizer, str(checkpoint))
    batch = lay_out([TrainSequence([5, 6, 7, 8], [0.1] * 4, [0.0] * 4, [0.0] * 4) for _ in range(8)])
    group.finish_sft_step(group.submit_sft_step(batch, 1e-3))
    survivor, victim = (pid_of(actor) for actor in group.actors)
    os.kill(survivor, signal.SIGSTOP)  # nothing comes from it any more, as from one that waits in a collective
    pending = group.submit_sft_step(batch, 1e-3)
    os.kill(victim, signal.SIGKILL)
    named = r"learner rank 1 died: .*Its log is .*worker-.*err; go on with --resume"
    try:
        with pytest.raises(PartDied, match=named):
            group.finish_sft_step(pending)
    finally:
        os.kill(survivor, signal.SIGCONT)
    ended, _ = ray.wait([pending[0]])
    with pytest.raises(ray.exceptions.RayTaskError):
        ray.get(ended)
    with pytest.raises(PartDied, match=named):
        group.finish_sft_step(pending[:1])
    os.kill(survivor, signal.SIGKILL)
    with pytest.raises(PartDied, match="learner rank"):
        group.logprobs([[5, 6, 7]], 1.0)
    group.stop()


def test_a_killed_reward_actor_is_asked_again(exact: Config, checkpoint: Path, task: CountdownTask) -> None:
    trees = [solve("3 5 7 -> 22", checkpoint, temperature=1.0, seed=seed).tree for seed in range(2)]
    problems = [task.problem_from_text("3 5 7 -> 22")] * 2
    reward = RewardClient(exact.task)
    scored = reward.score(problems, trees)
    os.kill(pid_of(reward.actor), signal.SIGKILL)
    assert reward.score(problems, trees) == scored
    second = pid_of(reward.actor)
    reward.stop()
    wait_until(lambda: not psutil.pid_exists(second))
    with pytest.raises(PartDied, match="reward actor"):
        reward.score(problems, trees)


def test_a_killed_solver_task_is_run_again(task: CountdownTask, exact: Config, tmp_path: Path) -> None:
    what = task.problems("train", 400, 0), exact.task, exact.data, 0
    unbroken = write_demonstrations(*what, tmp_path / "unbroken")
    with ThreadPoolExecutor() as beside:
        data = beside.submit(write_demonstrations, *what, tmp_path / "killed")
        wait_until(solver_tasks, lambda: not data.done(), every_s=0.01)
        os.kill(solver_tasks()[0], signal.SIGKILL)
    assert data.result() == unbroken
    loaded = [Demonstrations.load(tmp_path / name).ids for name in ("unbroken", "killed")]
    np.testing.assert_array_equal(*loaded)


def test_metrics_are_in_the_run_folder_when_the_tracker_fails(exact: Config, tmp_path: Path) -> None:
    config = changed(exact, run={"root": str(tmp_path), "name": "r"}, tracking={"tracker": "mlflow"})
    run = RunDir.create(config, "train")

    def log_without_database() -> None:
        with tracked(config, run, LoopState()) as tracker:
            (tmp_path / "mlflow.db").write_bytes(b"no database " * 1000)
            Watch(config, run, tracker, ProgressBars(quiet=True)).log({"train/loss": 1.0}, 1)

    with pytest.raises(AprError, match=r"MLflow failed: .*tracking\.tracker=none"):
        log_without_database()
    assert [row["train/loss"] for row in run.metrics()] == [1.0]


def solver_tasks() -> list[int]:
    """The processes of this Ray that solve demonstrations now."""
    children = psutil.Process().children(recursive=True)
    return [p.pid for p in children if "_write_part" in "".join(p.cmdline())]


# --- whole runs -----------------------------------------------------------------------------------------------------

PLACES = ("rollout/cached_tokens", "rollout/restarts")
"""Who drew a tree decides what was cached; who died is told."""


def told(run: RunDir) -> list[dict[str, float]]:
    """Every line of a run's metrics without what may differ."""
    return [
        {
            name: value
            for name, value in row.items()
            if name not in PLACES and not name.startswith("time") and not name.endswith(("latency_s", "tokens_per_s"))
        }
        for row in run.metrics()
    ]


def final_policy(run: RunDir) -> bytes:
    return (run.path / "final" / "model.safetensors").read_bytes()


@dataclass(frozen=True)
class Driver:
    """`apr-ray train` in a process of its own, with a Ray of its own; all it starts bears a mark."""

    process: subprocess.Popen[str]
    run: Path
    mark: str

    @classmethod
    def start(cls, config: Config, policy: Path, root: Path, *arguments: str) -> Driver:
        file = root / "config.yaml"
        file.write_text(to_yaml(config))
        command = [sys.executable, "-m", "apr_ray.cli", "train"]
        command += arguments or ["-c", str(file), "--init", str(policy), f"run.root={root}", "run.name=run"]
        mark = f"test-{root}-{len(arguments)}"
        process = subprocess.Popen(
            command,
            env={**os.environ, MARK: mark, "SPT_NOENV": "1"},
            stdout=(root / "stdout").open("w"),
            stderr=(root / "stderr").open("w"),
            text=True,
        )
        return cls(process, root / "run", mark)

    def running(self) -> bool:
        return self.process.poll() is None

    def processes(self) -> dict[int, str]:
        """Everything that was started, by its id."""
        names = {}
        for pid in marked_processes(self.mark):
            try:
                names[pid] = " ".join(psutil.Process(pid).cmdline()) or "ended"
            except psutil.NoSuchProcess:
                continue
        return names

    def rows(self) -> list[dict[str, float]]:
        """The lines of metrics so far."""
        if not (self.run / "config.yaml").exists():
            return []
        return RunDir(self.run, Config()).metrics()

    def wait_until_gone(self) -> None:
        self.process.wait(GONE_S)
        end = time.monotonic() + GONE_S
        while left := self.processes():
            assert time.monotonic() < end, f"{left} outlived the driver"
            time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind_and_its_run_goes_on(
    exact: Config, checkpoint: Path, tmp_path: Path
) -> None:
    """Killed while it writes the second checkpoint: all its processes end, and the run resumed from the first is the
    unbroken one, bit for bit."""
    config = changed(
        exact, learner={"ranks": 1}, rollout={"workers": 1}, evaluation={"problems": 2, "temperatures": (0.0,)}
    )
    driver = Driver.start(config, checkpoint, tmp_path)
    half_written = "checkpoints/.step-000002.partial-*"  # is there for a moment only
    wait_until(lambda: any(driver.run.glob(half_written)), driver.running, every_s=0.002)
    started = " ".join(driver.processes().values())
    driver.process.kill()
    assert all(name in started for name in ("raylet", "gcs_server", "LearnerActor", "RolloutWorker", "RewardActor"))
    driver.wait_until_gone()

    run = RunDir.resume(driver.run)
    assert not list(run.path.glob("**/.*")), "half-written files are gone"
    found = run.latest()
    assert found is not None
    assert found[1].step == 1
    run_grpo(run.config, run, checkpoint, ProgressBars(quiet=True))
    unbroken = RunDir.create(changed(config, run={"root": str(tmp_path), "name": "unbroken"}), "train")
    run_grpo(unbroken.config, unbroken, checkpoint, ProgressBars(quiet=True))
    assert told(run) == told(unbroken)
    assert final_policy(run) == final_policy(unbroken)


STEPS = 4
VICTIMS = {
    "driver": "apr_ray.cli train",
    "learner": "ray::LearnerActor",
    "worker": "ray::RolloutWorker",
    "reward": "ray::RewardActor",
    "raylet": "raylet/raylet",
    "gcs": "gcs_server",
}
"""What stands in the command line of a process."""


@pytest.fixture(scope="module")
def long(exact: Config) -> Config:
    return changed(exact, grpo={"steps": STEPS, "eval_every": 2}, evaluation={"problems": 2})


@pytest.fixture(scope="module")
def spawning(long: Config, task: CountdownTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that spawns on the problems of `long`."""
    problems = task.problems("train", STEPS * long.grpo.problems_per_step, long.run.seed + 1)
    return learn_by_heart(problems, long, tmp_path_factory.mktemp("spawning") / "policy")


@pytest.fixture(scope="module")
def unbroken_long(long: Config, spawning: Path, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> RunDir:
    root = tmp_path_factory.mktemp("unbroken")
    run = RunDir.create(changed(long, run={"root": str(root), "name": "run"}), "train")
    run_grpo(run.config, run, spawning, ProgressBars(quiet=True))
    assert sum(row["rollout/children"] for row in run.metrics() if "rollout/reward" in row) > 0, "no tree spawned"
    return run


def wait_for_step(driver: Driver, point: float) -> None:
    """Until about so many steps are done, after the first evaluation; the fraction by the time of the last."""

    def steps() -> Sequence[dict[str, float]]:
        return [row for row in driver.rows() if "rollout/reward" in row]

    wait_until(lambda: driver.rows() and len(steps()) >= int(point), driver.running)
    done = steps()
    time.sleep((point - int(point)) * (done[-1]["time/step_s"] if done else 1.0))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part_of_run", [(0.0, 1.0), (1.0, 2.0), (2.0, STEPS - 0.5)], ids=lambda part: f"{part[0]:g}")
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_run_survives_the_death_of_any_process_anywhere(
    victim: str,
    part_of_run: tuple[float, float],
    long: Config,
    unbroken_long: RunDir,
    spawning: Path,
    tmp_path: Path,
) -> None:
    """Killed at a random point, also before the first checkpoint: the run goes on by itself, or ends with one line and
    goes on with --resume; either way it is the unbroken run, bit for bit, and leaves no process behind."""
    draw = random.Random(f"{victim} {part_of_run}")
    driver = Driver.start(long, spawning, tmp_path)
    wait_for_step(driver, draw.uniform(*part_of_run))
    wait_until(lambda: any(VICTIMS[victim] in line for line in driver.processes().values()), driver.running)
    os.kill(
        draw.choice(sorted(pid for pid, line in driver.processes().items() if VICTIMS[victim] in line)), signal.SIGKILL
    )
    status = driver.process.wait(300)
    driver.wait_until_gone()
    errors = [line for line in (tmp_path / "stderr").read_text().splitlines() if line.startswith("error: ")]
    if victim in ("worker", "reward"):
        assert status == 0, errors
    elif victim != "driver":
        assert status != 0
        assert len(errors) == 1
        assert "--resume" in errors[0]
    if victim == "learner":
        assert "learner rank" in errors[0]
    if status:
        again = Driver.start(long, spawning, tmp_path, "--resume", str(driver.run))
        assert again.process.wait(300) == 0
        again.wait_until_gone()
    run = RunDir(driver.run, long)
    assert told(run) == told(unbroken_long)
    assert final_policy(run) == final_policy(unbroken_long)
    assert not list(run.path.glob("**/.*"))
