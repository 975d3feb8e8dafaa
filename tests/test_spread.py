"""Children on other workers' engines: the same trees, drawn elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest

from apr_ray.bench.recording import fresh_policy, record
from apr_ray.bench.rollout import replaying_pool
from apr_ray.config import Config
from apr_ray.core.engine import FinishReason
from apr_ray.engines.scripted_engine import Reply, ScriptedEngine
from apr_ray.model.llama import save_policy
from apr_ray.rollout.pool import RolloutPool
from apr_ray.rollout.spread import SpreadEngine
from apr_ray.tasks.registry import load_task


def spread(config: Config, fan_out: str, workers: int) -> Config:
    rollout = config.rollout.model_copy(update={"fan_out": fan_out, "workers": workers})
    engine = config.engine.model_copy(update={"deterministic": True, "max_sequences": 16})
    return config.model_copy(update={"rollout": rollout, "engine": engine})


def test_siblings_are_apart_and_a_threads_calls_come_to_one_engine() -> None:
    lanes = SpreadEngine(ScriptedEngine(lambda asked: Reply((1,))), 1, ["a", "b", "c"])
    assert lanes.place(()) == 1
    assert [lanes.place((i,)) for i in range(4)] == [2, 0, 1, 2]
    assert lanes.place((0, 1)) == lanes.place((0, 1))


def test_spread_trees_are_the_local_ones(ray_local: None, tmp_path: Path) -> None:
    """Recorded trees, replayed: every call has its tokens, whichever engine drew them, and both drew children."""
    recording = record(8)
    config = recording.config
    save_policy(fresh_policy(config), load_task(config.task).tokenizer(), config.task, tmp_path / "policy")
    pool = replaying_pool(recording, str(tmp_path / "policy"), workers=2, fan_out="spread")
    pool.stats()  # a worker that answers has met the others: until then its children decode on their parent's engine
    trees = dict(pool.run(recording.requests))
    assert all(s.active_requests == s.waiting_requests == 0 for s in pool.stats())
    pool.stop()
    for number, recorded in enumerate(recording.trees):
        calls = {(c.path, c.segment): c for c in trees[number].calls}
        assert {place: c.sampled_ids for place, c in calls.items()} == {
            (c.path, c.segment): c.sampled_ids for c in recorded.calls
        }
        root = calls[(), 0].engine_id
        for (path, _), call in calls.items():
            assert (call.engine_id == root) == (not path or path[0] % 2 == 1)
    assert any(len(c.path) for tree in recording.trees for c in tree.calls), "no tree spawned"


def test_a_child_whose_worker_dies_goes_on_where_its_parent_is(
    ray_local: None, small_config: Config, checkpoint: Path
) -> None:
    """The whole request gives the same tokens and logprobs, whether or not the other worker lives to its end."""
    import os
    import signal

    import ray

    from apr_ray.core.engine import Chunk, GenerateRequest, SamplingParams
    from apr_ray.engines.registry import build_engine

    config = spread(small_config, "spread", 2)
    pool = RolloutPool.start(config, str(checkpoint))
    victim = ray.get(pool.workers[1].__ray_call__.remote(lambda _: os.getpid()))

    async def collect(kill: bool) -> list[Chunk]:
        lanes = SpreadEngine(build_engine(config.engine, str(checkpoint)), 0, pool.workers)
        asked = GenerateRequest("t/000/000-000", (5, 6, 7), SamplingParams(max_new_tokens=600), thread=(0,))
        chunks = []
        async for chunk in lanes.generate(asked):
            chunks.append(chunk)
            if kill and len(chunks) == 1:
                os.kill(victim, signal.SIGKILL)
        return chunks

    whole, broken = asyncio.run(collect(False)), asyncio.run(collect(True))
    assert {c.engine_id for c in whole} == {"worker-01"}
    assert {c.engine_id for c in broken} == {"worker-01", ""}
    for chunks in (whole, broken):
        assert chunks[-1].finish is FinishReason.LENGTH
    assert [i for c in whole for i in c.token_ids] == [i for c in broken for i in c.token_ids]
    assert [lp for c in whole for lp in c.logprobs] == [lp for c in broken for lp in c.logprobs]
    pool.stop()


@pytest.mark.parametrize(
    ("told", "limit", "end"),
    [(FinishReason.STOP, 600, None), (None, 600, FinishReason.STOP), (None, 1, FinishReason.LENGTH)],
    ids=["ended", "a stop id", "the limit"],
)
def test_a_worker_that_dies_after_its_last_token_has_nothing_left_to_draw(
    told: FinishReason | None, limit: int, end: FinishReason | None
) -> None:
    """Also where the chunk that would have said so was lost with it."""
    import ray

    from apr_ray.core.engine import Chunk, GenerateRequest, SamplingParams
    from apr_ray.core.weights import WeightVersion

    last = Chunk((7,), (-0.5,), WeightVersion(0, 3), finish=told)

    async def present() -> Chunk:
        return last

    class Dying:
        """Tells its last chunk, then is gone."""

        @property
        def generate(self) -> Dying:
            return self

        def options(self, **_: object) -> Dying:
            return self

        async def remote(self, _: GenerateRequest) -> AsyncIterator[Awaitable[Chunk]]:
            yield present()
            raise ray.exceptions.RayActorError

    async def collect() -> list[Chunk]:
        own = ScriptedEngine(lambda asked: Reply((1, 2, 3)))
        lanes = SpreadEngine(own, 0, [None, Dying()])
        sampling = SamplingParams(max_new_tokens=limit, stop_ids=frozenset({7} if limit > 1 else ()))
        asked = GenerateRequest("t/000/000-000", (5,), sampling, thread=(0,))
        return [chunk async for chunk in lanes.generate(asked)]

    expected = [last] if end is None else [last, Chunk((), (), WeightVersion(0, 3), finish=end)]
    assert asyncio.run(collect()) == expected


def test_an_abandoned_request_is_aborted_where_it_runs(ray_local: None, small_config: Config, checkpoint: Path) -> None:
    """Closing the stream frees the other engine's place."""
    import ray

    from apr_ray.core.engine import GenerateRequest, SamplingParams

    pool = RolloutPool.start(spread(small_config, "spread", 2), str(checkpoint))

    async def main() -> None:
        lanes = SpreadEngine(ScriptedEngine(lambda asked: Reply((1,))), 0, pool.workers)
        asked = GenerateRequest("t/000/000-000", (5, 6, 7), SamplingParams(max_new_tokens=700), thread=(0,))
        stream = lanes.generate(asked)
        chunk = await anext(stream)
        assert chunk.engine_id == "worker-01"
        await stream.aclose()  # type: ignore[attr-defined]
        for _ in range(600):
            stats = ray.get(pool.workers[1].stats.remote())
            if not stats.active_requests:
                break
            await asyncio.sleep(0.02)
        assert stats.active_requests == 0
        assert stats.sampled_tokens < 690

    asyncio.run(main())
    pool.stop()


def test_fan_out_is_one_of_two() -> None:
    from apr_ray.config import load_config
    from apr_ray.core.errors import ConfigError

    with pytest.raises(ConfigError, match=r"rollout\.fan_out"):
        load_config([], ["rollout.fan_out=everywhere"])
