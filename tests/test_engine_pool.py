"""SGLang and vLLM in Ray actors: trees, weight sync, and what is left when a process of theirs is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from apr_ray.bench.sglang_process import Server, sglang_server
from apr_ray.config import Config, EngineConfig, WeightsConfig
from apr_ray.core.errors import MismatchError, PartDied
from apr_ray.core.ledger import Outcome, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.model.llama import load_policy, parameter_count
from apr_ray.model.state import pack_weights, trainable_parameters
from apr_ray.rollout.pool import RolloutPool
from apr_ray.tasks.countdown.task import CountdownTask
from apr_ray.threads.runtime import TreeRequest
from apr_ray.weights.check import check_engines
from apr_ray.weights.object_store import ObjectStoreTransport

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]
GONE_S = 60.0


class PolicyInHand:
    """What the transport and the check ask of a learner group, over a policy in this process."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.parameters = parameter_count(policy)

    def weights(self, version: WeightVersion) -> tuple[Any, dict[str, Any]]:
        return ray.put(pack_weights(trainable_parameters(self.policy), version)), {}

    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[np.ndarray[Any, Any]]:
        out = []
        for ids in sequences:
            with torch.no_grad():
                logits = self.policy(torch.tensor([list(ids)])).logits[0, :-1] / temperature
            drawn = torch.log_softmax(logits, -1).gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0]
            out.append(np.concatenate([[0.0], drawn.numpy()]))
        return out

    def change(self) -> None:
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.mul_(1.1)


ONLY = {
    "test_a_killed_worker_leaves_no_scheduler": ["sglang"],  # vLLM runs inside the worker, and a server goes on
    "test_a_worker_ends_with_its_scheduler": ["sglang"],
    "test_a_worker_ends_with_its_server": ["sglang_server"],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = [name for name in metafunc.config.getoption("--engines").split(",") if name != "torch"]
    names = [name for name in asked if name in ONLY.get(metafunc.function.__name__, asked)]
    metafunc.parametrize("config", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def config(single_config: Config, checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Config]:
    settings: dict[str, Any] = {"name": request.param}
    with ExitStack() as stack:
        if request.param == "sglang_server":
            server = stack.enter_context(sglang_server(checkpoint))
            SERVERS.append(server)
            settings |= {"server_urls": [server.url]}
        else:
            settings |= {"device": "cpu", "max_sequences": 8}
        yield single_config.model_copy(update={"engine": EngineConfig.model_validate(settings)})


SERVERS: list[Server] = []


@pytest.fixture(scope="module")
def pool(config: Config, checkpoint: Path, ray_local: None) -> Iterator[RolloutPool]:
    """One worker for all tests below, which kill it and the one in its place."""
    started = RolloutPool.start(config, str(checkpoint))
    yield started
    started.stop()


def test_trees_sync_and_check(pool: RolloutPool, config: Config, checkpoint: Path, task: CountdownTask) -> None:
    """Real trees, a new version to every worker, and the engines' logprobs equal to the learner's afterwards."""
    learner = PolicyInHand(load_policy(checkpoint))
    requests = [TreeRequest(p, seed=i) for i, p in enumerate(task.problems("train", 8, 0))]
    prompts = [tuple(range(5, 12)), (9, 8, 7)]
    trees = [tree for _, tree in pool.run(requests)]
    assert len(trees) == 8
    assert all(t.outcome is not Outcome.ENGINE_ERROR and t.total_tokens > 0 for t in trees)
    assert {v for t in trees for v in t.versions()} == {WeightVersion(0, 0)}

    learner.change()
    version = WeightVersion(0, 1)
    with pytest.raises(MismatchError):
        check_engines(learner, pool, prompts, 1.0, WeightsConfig(), version, True)  # type: ignore[arg-type]
    ObjectStoreTransport(WeightsConfig()).broadcast(learner, pool, version)  # type: ignore[arg-type]
    delta = check_engines(learner, pool, prompts, 1.0, WeightsConfig(), version, True)  # type: ignore[arg-type]
    assert delta < 1e-5
    trees = [tree for _, tree in pool.run(requests)]
    assert {v for t in trees for v in t.versions()} == {version}
    stats = pool.stats()
    assert all(s.sampled_tokens > 0 and s.active_requests == 0 for s in stats)


@dataclass(frozen=True)
class Victim:
    """A worker amid its trees.

    Attributes:
        name: its own.
        process: its process.
        below: all that it has started, its engine among them.
        engine: ids of the engine's own.
        begun: trees that it has begun.
        drawing: comes to the trees, by their places among those asked for.
    """

    name: str
    process: psutil.Process
    below: list[psutil.Process]
    engine: tuple[int, ...]
    begun: int
    drawing: Future[dict[int, ThreadTree]]

    def assert_all_gone(self) -> None:
        end = time.monotonic() + GONE_S
        while left := [process for process in (self.process, *self.below) if runs(process)]:
            assert time.monotonic() < end, f"{left} outlived their worker"
            time.sleep(0.1)


def runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


TREES = 12


@contextmanager
def amid_trees(pool: RolloutPool, task: CountdownTask) -> Iterator[Victim]:
    """The pool's only worker, while several requests of its trees have tokens and none of them has all."""
    requests = [TreeRequest(p, seed=i) for i, p in enumerate(task.problems("train", TREES, 0))]
    (member,) = pool.members
    with ThreadPoolExecutor(1) as beside:
        drawing = beside.submit(lambda: dict(pool.run(requests)))
        end = time.monotonic() + GONE_S
        while ray.get(member.actor.stats.remote()).active_requests < 3:
            assert time.monotonic() < end, "its trees do not run"
        ask = member.actor.__ray_call__.remote(
            lambda self: (os.getpid(), getattr(self.engine, "process_ids", ()), self.started)
        )
        pid, engine, begun = ray.get(ask)
        process = psutil.Process(pid)
        yield Victim(member.name, process, process.children(recursive=True), engine, begun, drawing)


def test_a_worker_ends_with_its_scheduler(pool: RolloutPool, checkpoint: Path, task: CountdownTask) -> None:
    """Killed amid trees. Ray sees a dead actor, not one that answers nothing; the one in its place runs the version
    that was sent, and draws the trees that were lost."""
    learner, version = PolicyInHand(load_policy(checkpoint)), WeightVersion(0, 2)
    ObjectStoreTransport(WeightsConfig()).broadcast(learner, pool, version)  # type: ignore[arg-type]
    restarts = pool.restarts
    with amid_trees(pool, task) as worker:
        os.kill(worker.engine[0], signal.SIGKILL)
        trees = worker.drawing.result()
    worker.assert_all_gone()
    assert sorted(trees) == list(range(TREES))
    assert all(tree.outcome is not Outcome.ENGINE_ERROR for tree in trees.values())
    assert {v for tree in trees.values() for v in tree.versions()} == {version}
    kept = [tree for tree in trees.values() if worker.name in {call.engine_id for call in tree.calls}]
    assert len(kept) < worker.begun, "no tree was lost: the kill came too late to prove anything"
    assert pool.restarts == restarts + 1


def test_a_killed_worker_leaves_no_scheduler(pool: RolloutPool, task: CountdownTask) -> None:
    only = RolloutPool([pool.workers[0]], 4)
    with amid_trees(only, task) as worker:
        assert len(worker.engine) >= 2
        worker.process.kill()
        with pytest.raises(PartDied):
            worker.drawing.result()
    worker.assert_all_gone()


def test_a_worker_ends_with_its_server(pool: RolloutPool, task: CountdownTask) -> None:
    """The one in its place finds no server either, which is not tried again."""
    with amid_trees(pool, task) as worker:
        os.killpg(SERVERS[-1].process.pid, signal.SIGKILL)
        with pytest.raises(PartDied, match=r"did not start: .*no SGLang server at http"):
            worker.drawing.result()
    worker.assert_all_gone()
