"""SGLang and vLLM in Ray actors: trees, weight sync, and what is left when a process of theirs is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
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
from apr_ray.core.ledger import Outcome
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
    settings: dict[str, Any] = {"name": request.param, "max_sequences": 8}
    with ExitStack() as stack:
        if request.param == "sglang_server":
            server = stack.enter_context(sglang_server(checkpoint))
            SERVERS.append(server)
            settings |= {"server_urls": [server.url]}
        else:
            settings |= {"device": "cpu"}
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
        check_engines(learner, pool, prompts, 1.0, WeightsConfig(), version)  # type: ignore[arg-type]
    ObjectStoreTransport(WeightsConfig()).broadcast(learner, pool, version)  # type: ignore[arg-type]
    delta = check_engines(learner, pool, prompts, 1.0, WeightsConfig(), version)  # type: ignore[arg-type]
    assert delta < 1e-5
    trees = [tree for _, tree in pool.run(requests)]
    assert {v for t in trees for v in t.versions()} == {version}
    stats = pool.stats()
    assert all(s.sampled_tokens > 0 and s.active_requests == 0 for s in stats)


def processes_of(pool: RolloutPool, worker: int) -> tuple[int, tuple[int, ...]]:
    """The ids of a worker's own process and of its engine's."""
    ask = pool.workers[worker].__ray_call__.remote(lambda self: (os.getpid(), self.engine.process_ids))
    found: tuple[int, tuple[int, ...]] = ray.get(ask)
    return found


def wait_until_gone(pids: Sequence[int]) -> None:
    end = time.monotonic() + GONE_S
    while left := [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < end, f"{left} outlived their worker"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_worker_ends_with_its_scheduler(pool: RolloutPool, checkpoint: Path, task: CountdownTask) -> None:
    """Ray sees a dead actor, not one that answers nothing; the one in its place runs the version that was sent."""
    learner, version = PolicyInHand(load_policy(checkpoint)), WeightVersion(0, 2)
    ObjectStoreTransport(WeightsConfig()).broadcast(learner, pool, version)  # type: ignore[arg-type]
    worker, engine = processes_of(pool, 0)
    os.kill(engine[0], signal.SIGKILL)
    wait_until_gone([worker, *engine])
    trees = [tree for _, tree in pool.run([TreeRequest(p) for p in task.problems("train", 2, 0)])]
    assert {v for tree in trees for v in tree.versions()} == {version}
    assert pool.restarts == 1


@pytest.mark.slow
def test_a_killed_worker_leaves_no_scheduler(pool: RolloutPool, task: CountdownTask) -> None:
    worker, engine = processes_of(pool, 0)
    assert len(engine) >= 2
    os.kill(worker, signal.SIGKILL)
    wait_until_gone([worker, *engine])
    only = RolloutPool([pool.workers[0]], 4)
    with pytest.raises(PartDied):
        list(only.run([TreeRequest(p) for p in task.problems("train", 2, 0)]))


def test_a_worker_ends_with_its_server(pool: RolloutPool, task: CountdownTask) -> None:
    """The one in its place finds no server either, which is not tried again."""
    os.killpg(SERVERS[-1].process.pid, signal.SIGKILL)
    with pytest.raises(PartDied, match=r"did not start: .*no SGLang server at http"):
        list(pool.run([TreeRequest(p) for p in task.problems("train", 2, 0)]))
