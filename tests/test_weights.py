"""Weight transports: every one brings the same bytes, a broken one is refused, a lost part is named in bounded time."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_ray.config import Config, LearnerConfig, OptimizerConfig, WeightsConfig, load_config
from apr_ray.core.batch import TrainSequence, lay_out
from apr_ray.core.engine import FinishReason
from apr_ray.core.errors import ConfigError, PartDied, SyncFailed, WeightsRejected
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.weights import TensorSpec, WeightUpdate, WeightVersion, layout_of, pieces_of
from apr_ray.learner.actor import LearnerActor
from apr_ray.learner.group import LearnerGroup
from apr_ray.learner.trainer import Trainer
from apr_ray.model.llama import load_policy
from apr_ray.model.shared_buffer import MemorySource, memory_source, name_of, new_shared, open_shared
from apr_ray.model.state import (
    CACHED_NUMBERS,
    GOLDEN,
    RunningChecksum,
    check_update,
    checksum,
    checksum_of_tensor,
    pack_weights,
    trainable_parameters,
)
from apr_ray.rl.losses import token_logprobs
from apr_ray.rollout.pool import Membership, RolloutPool
from apr_ray.rollout.worker import _Trees
from apr_ray.tasks.countdown.task import CountdownTask
from apr_ray.threads.runtime import TreeRequest
from apr_ray.weights.check import check_engines
from apr_ray.weights.collective import CollectiveSink, CollectiveSource, CollectiveTransport, Group, Place
from apr_ray.weights.cuda_ipc import CudaIpcTransport, GpuSource
from apr_ray.weights.disk import DiskTransport, FileSink, FileSource
from apr_ray.weights.registry import build_transport
from apr_ray.weights.shared_memory import MemorySink
from apr_ray.weights.transport import Sending, receive

TRANSPORTS = ("object_store", "collective", "shared_memory", "disk")
FIRST = WeightVersion(0, 1)


def weights_config(name: str, folder: Path, **options: Any) -> WeightsConfig:
    given_options = {"transport": name, "folder": str(folder), "piece_numbers": 3000, "timeout_s": 20.0}
    return WeightsConfig(**(given_options | options))


@pytest.fixture(scope="module")
def learners(ray_local: None, small_config: Config, checkpoint: Path) -> Iterator[LearnerGroup]:
    """Two ranks that share all parameters: the hardest case to send."""
    learner = LearnerConfig(ranks=2, zero_stage=3, zero3_whole_parameters=100)
    config = small_config.model_copy(update={"learner": learner})
    group = LearnerGroup.start(config, OptimizerConfig(learning_rate=1e-3), str(checkpoint))
    yield group
    group.stop()


@pytest.fixture(scope="module")
def pool(ray_local: None, small_config: Config, checkpoint: Path) -> Iterator[RolloutPool]:
    """Two workers, replaced when they die: one pool for all tests, which go on from the version that they find."""
    rollout = small_config.rollout.model_copy(update={"max_restarts": 100})
    started = RolloutPool.start(small_config.model_copy(update={"rollout": rollout}), str(checkpoint))
    yield started
    started.stop()


def engine_weights(pool: RolloutPool) -> list[tuple[str, int]]:
    """The version that each worker's engine runs, and a checksum of all that its decoder holds."""

    def read(worker: Any) -> tuple[str, int]:
        tensors = [t for _, t in sorted(vars(worker.engine.decoder).items()) if hasattr(t, "numpy")]
        running, total = RunningChecksum(), 0
        for tensor in tensors:
            if tensor.numel() and tensor.dim() < 4:  # not the KV
                total = running.add(tensor.numpy())
        return str(worker.engine.version), total

    return list(ray.get([worker.__ray_call__.remote(read) for worker in pool.workers]))


def versions(pool: RolloutPool) -> set[str]:
    """That the workers' engines run."""
    return {version for version, _ in engine_weights(pool)}


def following(pool: RolloutPool) -> WeightVersion:
    """A version that no engine runs yet."""
    return max(WeightVersion.parse(version) for version in versions(pool)).next()


def test_every_transport_brings_the_same_weights(
    learners: LearnerGroup, pool: RolloutPool, checkpoint: Path, tmp_path: Path
) -> None:
    """Two versions by each, to two workers, from learners at ZeRO stage 3; checked by logprobs after each."""
    held = set()
    for name in TRANSPORTS:
        config = weights_config(name, tmp_path)
        transport = build_transport(config)
        for _ in range(2):
            version = following(pool)
            report = transport.broadcast(learners, pool, version)
            assert report.version == version
            assert report.weight_bytes == 4 * learners.parameters
            assert check_engines(learners, pool, [(5, 6, 7), (8, 9)], 1.0, config, version, exact=True) < 1e-5
            now = engine_weights(pool)
            assert {v for v, _ in now} == {str(version)}
            held |= {total for _, total in now}
        transport.close()
    assert len(held) == 1, "the learners' weights did not change, what the engines hold did"


def test_a_group_has_one_worker_of_each_node(learners: LearnerGroup, pool: RolloutPool, tmp_path: Path) -> None:
    """The workers of this node share memory. Where one says that it is elsewhere, the broadcast reaches it too."""
    here = ray.get(pool.workers[0].node.remote())
    for node, groups in (("another", 2), (here, 1)):
        ray.get(pool.workers[1].__ray_call__.remote(lambda worker, node=node: setattr(worker, "node_id", node)))
        transport = CollectiveTransport(weights_config("collective", tmp_path))
        for _ in range(2):
            version = following(pool)
            transport.broadcast(learners, pool, version)
            (ours, held), (theirs, theirs_held) = engine_weights(pool)
            assert ours == theirs == str(version)
            assert held == theirs_held
        assert len(transport.nodes) == groups
        transport.close()


def test_a_stale_version_is_refused_by_its_name(learners: LearnerGroup, pool: RolloutPool, tmp_path: Path) -> None:
    transport = build_transport(weights_config("shared_memory", tmp_path))
    with pytest.raises(WeightsRejected, match=r"weights 0\.0 refused: the engine already runs"):
        transport.broadcast(learners, pool, WeightVersion(0, 0))
    transport.close()


def test_the_group_reads_shared_parameters_through_every_rank(
    learners: LearnerGroup, checkpoint: Path, tmp_path: Path
) -> None:
    """At ZeRO stage 3, weights, logprobs and the saved policy are the checkpoint's."""
    policy = load_policy(checkpoint)
    expected = pack_weights(trainable_parameters(policy), FIRST)
    sent = ray.get(learners.weights(FIRST)[0])
    assert sent.specs == expected.specs
    np.testing.assert_array_equal(sent.flat, expected.flat)
    ids = [5, 6, 7, 8]
    with torch.no_grad():
        ours = token_logprobs(policy(torch.tensor([ids])).logits, torch.tensor([ids]))[0]
    np.testing.assert_allclose(learners.logprobs([ids], 1.0)[0], ours.numpy(), atol=1e-5)
    learners.save(tmp_path)
    saved = pack_weights(trainable_parameters(load_policy(tmp_path / "policy")), FIRST)
    np.testing.assert_array_equal(saved.flat, expected.flat)
    learners.load(tmp_path)


# --- lost parts -------------------------------------------------------------------------------------------------------


def wait_until_ready(pool: RolloutPool, workers: int) -> None:
    end = time.monotonic() + 120
    while len(pool.membership().workers) < workers:
        assert time.monotonic() < end
        time.sleep(0.1)


def pid_of(actor: Any) -> int:
    found: int = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    return found


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_worker_that_dies_is_replaced_and_its_successor_gets_the_version(
    name: str, learners: LearnerGroup, pool: RolloutPool, tmp_path: Path
) -> None:
    """The sync goes on with those that are left; who joins late takes the current version before anything else. Every
    version has other weights."""
    transport = build_transport(weights_config(name, tmp_path, timeout_s=6.0))
    version, restarts = following(pool), pool.restarts
    transport.broadcast(learners, pool, version)
    seen = [only(engine_weights(pool))]
    change(learners)
    os.kill(pid_of(pool.workers[1]), signal.SIGKILL)
    transport.broadcast(learners, pool, version.next())
    wait_until_ready(pool, 2)
    seen.append(only(engine_weights(pool)))
    assert pool.restarts == restarts + 1
    change(learners)
    transport.broadcast(learners, pool, version.next().next())
    seen.append(only(engine_weights(pool)))
    assert [ran for ran, _ in seen] == [str(version), str(version.next()), str(version.next().next())]
    assert len({total for _, total in seen}) == 3
    transport.close()


def only(values: list[tuple[str, int]]) -> tuple[str, int]:
    """What both workers have."""
    [value] = set(values)
    return value


def change(learners: LearnerGroup) -> None:
    """Take a step."""
    batch = lay_out([TrainSequence([5, 6, 7, 8], [0.1] * 4) for _ in range(4)])
    learners.finish_sft_step(learners.submit_sft_step(batch, 1e-2))


def test_a_death_that_rollouts_notice_first_does_not_end_the_sync(
    learners: LearnerGroup, pool: RolloutPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `grpo.ahead` the worker is replaced already when the sync learns that it is dead."""
    transport = build_transport(weights_config("object_store", tmp_path, timeout_s=6.0))
    version, restarts, send = following(pool), pool.restarts, transport.send
    transport.broadcast(learners, pool, version)

    def send_and_lose(learners: LearnerGroup, members: Membership, version: WeightVersion) -> Sending:
        monkeypatch.undo()
        os.kill(pid_of(members.workers[1].actor), signal.SIGKILL)
        sending = send(learners, members, version)
        while pool.restarts == restarts:
            pool.stats()
        return sending

    monkeypatch.setattr(transport, "send", send_and_lose)
    transport.broadcast(learners, pool, version.next())
    wait_until_ready(pool, 2)
    assert versions(pool) == {str(version.next())}
    transport.close()


def test_a_worker_that_holds_the_current_version_joins_with_it(pool: RolloutPool) -> None:
    """As one may that took it while it became current."""
    held, _ = pool.workers[0].held_weights.options(num_returns=2).remote()
    before = versions(pool)
    ray.get(pool.workers[0].join.remote(held))
    assert versions(pool) == before


@pytest.mark.parametrize("fails", ["room", "take"])
def test_rank_0_gathers_to_the_end_even_where_its_sink_fails(fails: str) -> None:
    """Or the other ranks would wait for it in their gathering."""
    gathered: list[int] = []

    class Gathering:
        def layout(self) -> tuple[TensorSpec, ...]:
            return LAYOUT

        def weight_pieces(
            self, numbers: int, flat: Any = None, until_sent: Any = None
        ) -> Iterator[np.ndarray[Any, Any]]:
            for piece in pieces(np.zeros(NUMBERS, dtype=np.float32) if flat is None else flat, numbers):
                gathered.append(piece.size)
                yield piece

    class Full(MemorySink):
        def room(self, layout: tuple[TensorSpec, ...], version: WeightVersion) -> np.ndarray[Any, Any]:
            if fails == "room":
                raise MemoryError("no room")
            return super().room(layout, version)

        def take(self, layout: Any, pieces: Iterator[np.ndarray[Any, Any]], version: WeightVersion) -> None:
            next(pieces)
            raise MemoryError("no room")

    actor = LearnerActor.__new__(LearnerActor)
    actor.trainer = Gathering()  # type: ignore[assignment]
    actor.sinks = {"full": Full()}
    with pytest.raises(MemoryError):
        actor.send_weights("full", FIRST, 1)
    assert sum(gathered) == NUMBERS


def test_memory_that_is_sent_again_leaves_the_version_before_alone() -> None:
    sink = MemorySink()
    sink.open()
    sources = [fill(sink, np.full(NUMBERS, n, dtype=np.float32), 12, WeightVersion(0, n)) for n in (1, 2)]
    fill(sink, np.full(NUMBERS, 2, dtype=np.float32), 12, WeightVersion(0, 2))
    for number, source in enumerate(sources, start=1):
        assert source is not None
        assert set(source.fetch().flat.tolist()) == {float(number)}


def test_memory_is_mapped_once_and_of_many_the_last_two_stay_mapped() -> None:
    owned = [new_shared(8) for _ in range(3)]
    a, b, c = (name for name in map(name_of, owned) if name)
    of_a, of_b = open_shared(a), open_shared(b)
    assert open_shared(a) is of_a
    of_c = open_shared(c)  # now b is the one that was not asked for longest
    assert open_shared(a) is of_a
    assert open_shared(c) is of_c
    assert open_shared(b) is not of_b
    owned[2][:] = 7
    assert of_c.tolist() == [7] * 8
    with pytest.raises(OSError, match="is not that array"):
        open_shared(replace(c, inode=a.inode))


def test_without_a_successor_the_sync_fails_and_the_others_keep_their_version(
    learners: LearnerGroup, single_config: Config, checkpoint: Path, pool: RolloutPool, tmp_path: Path
) -> None:
    """No engine applies a version that has not reached everyone. The learners can send again at once."""
    transport = build_transport(weights_config("collective", tmp_path, timeout_s=6.0))
    alone = RolloutPool.start(single_config, str(checkpoint))
    both = RolloutPool([pool.workers[0], *alone.workers], 4)
    version = following(both)
    transport.broadcast(learners, both, version)
    os.kill(pid_of(both.workers[1]), signal.SIGKILL)
    with pytest.raises(PartDied, match="rollout worker worker-01"):
        transport.broadcast(learners, both, version.next())
    left = RolloutPool([pool.workers[0]], 4)
    assert versions(left) == {str(version)}
    transport.broadcast(learners, left, version.next())
    assert versions(left) == {str(version.next())}
    transport.close()
    alone.stop()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_learner_rank_that_dies_while_it_sends_does_not_hang_the_others(
    rank: int, small_config: Config, pool: RolloutPool, checkpoint: Path, tmp_path: Path
) -> None:
    """In the middle of the pieces, at ZeRO stage 3: the other rank gathers with it, the workers receive."""
    learner = LearnerConfig(ranks=2, zero_stage=3, zero3_whole_parameters=100)
    config = small_config.model_copy(update={"learner": learner})
    group = LearnerGroup.start(config, OptimizerConfig(learning_rate=1e-3), str(checkpoint))
    transport = build_transport(weights_config("collective", tmp_path, timeout_s=5.0))
    version = following(pool)
    transport.broadcast(group, pool, version)

    def die_at_the_third_piece(actor: Any) -> None:
        whole = actor.trainer.weight_pieces

        def half(*arguments: Any, **options: Any) -> Iterator[Any]:
            for number, piece in enumerate(whole(*arguments, **options)):
                if number == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield piece

        actor.trainer.weight_pieces = half

    ray.get(group.actors[rank].__ray_call__.remote(die_at_the_third_piece))
    with pytest.raises(SyncFailed, match=f"learner-{rank} died"):
        transport.broadcast(group, pool, version.next())
    assert versions(pool) == {str(version)}
    group.stop()


def test_a_worker_that_dies_while_it_receives_is_replaced(
    learners: LearnerGroup, pool: RolloutPool, tmp_path: Path
) -> None:
    """In the middle of the pieces of a collective; the version is sent again to who is left."""
    transport = build_transport(weights_config("collective", tmp_path, timeout_s=5.0))
    version, restarts = following(pool), pool.restarts
    transport.broadcast(learners, pool, version)

    def die_at_the_third_piece(worker: Any) -> None:
        from apr_ray.weights.collective import Group

        begun, broadcast = itertools.count(), Group.broadcast

        def half(group: Group, tensor: torch.Tensor) -> Any:
            if next(begun) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return broadcast(group, tensor)

        Group.broadcast = half  # type: ignore[method-assign]

    ray.get(pool.workers[0].__ray_call__.remote(die_at_the_third_piece))  # the first of its node: it is in the group
    transport.broadcast(learners, pool, version.next())
    assert pool.restarts == restarts + 1
    wait_until_ready(pool, 2)
    assert versions(pool) == {str(version.next())}
    transport.close()


@pytest.mark.parametrize("zero", [1, 3])
def test_a_sender_has_memory_for_two_pieces(zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ZeRO stage 3 one is the piece that was gathered: it is not copied before the other may be written over."""
    import deepspeed

    events: list[str] = []
    parameters = [(spec.name, torch.ones(spec.shape)) for spec in LAYOUT]
    stub: Any = SimpleNamespace(zero=zero, rank=0, policy=SimpleNamespace(named_parameters=lambda: parameters))
    stub.layout = lambda: LAYOUT

    @contextmanager
    def gathered(tensors: Sequence[torch.Tensor], enabled: bool) -> Iterator[None]:
        events.append("gather" if enabled else "whole")
        yield

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", gathered)
    places = set()
    pieces = Trainer.weight_pieces(stub, 1, until_sent=lambda: events.append("sent"))
    for piece in pieces:
        places.add(piece.ctypes.data)
        events.append("send")
    count = len(LAYOUT)
    assert count > 2
    if zero == 3:
        assert events == ["gather", "sent", "send"] * count
        assert len(places) == 1
    else:
        assert events == ["whole", "send"] * count
        assert len(places) == 2


def test_a_worker_that_hangs_is_named_in_bounded_time(
    learners: LearnerGroup, pool: RolloutPool, tmp_path: Path
) -> None:
    transport = build_transport(weights_config("collective", tmp_path, timeout_s=4.0))
    version = following(pool)
    transport.broadcast(learners, pool, version)
    hung = pid_of(pool.workers[0])
    os.kill(hung, signal.SIGSTOP)
    try:
        with pytest.raises(SyncFailed, match=r"worker-00[.0-9]* did not answer within"):
            transport.broadcast(learners, pool, version.next())
    finally:
        os.kill(hung, signal.SIGCONT)
    transport.close()


# --- one process ------------------------------------------------------------------------------------------------------

LAYOUT = layout_of([("a", (3, 4)), ("b", (5,)), ("c", (2, 2, 2)), ("d", (1,))])
NUMBERS = sum(spec.size for spec in LAYOUT)


def pieces(flat: np.ndarray[Any, Any], numbers: int) -> Iterator[np.ndarray[Any, Any]]:
    for piece in pieces_of(LAYOUT, numbers):
        yield flat[piece[0].offset : piece[-1].offset + piece[-1].size]


def fill(sink: MemorySink | FileSink, flat: np.ndarray[Any, Any], numbers: int, version: WeightVersion) -> Any:
    """As rank 0 does: what is sent is written where the sink wants it."""
    room = sink.room(LAYOUT, version)
    room[:] = flat
    return sink.take(LAYOUT, pieces(room, numbers), version)


@given(
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=12),
    numbers=st.integers(1, 60),
)
def test_pieces_are_all_of_the_layout_in_order(shapes: list[tuple[int, ...]], numbers: int) -> None:
    layout = layout_of((f"p{i}", shape) for i, shape in enumerate(shapes))
    made = pieces_of(layout, numbers)
    assert [spec for piece in made for spec in piece] == list(layout)
    assert all(len(piece) == 1 or sum(spec.size for spec in piece) <= numbers for piece in made)
    end = 0
    for spec in layout:
        assert spec.offset == end
        end += spec.size


@settings(max_examples=5)
@given(numbers=st.integers(1, 30))
def test_a_collective_of_any_piece_size_brings_all_numbers(numbers: int) -> None:
    flat = np.random.default_rng(numbers).normal(size=NUMBERS).astype(np.float32)
    sink = CollectiveSink(Place(("", 0), 0, 2, 1, "gloo", 10.0))
    address = sink.open()
    source = CollectiveSource(Place(address, 1, 2, 1, "gloo", 10.0), LAYOUT, numbers, FIRST)
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(sink.take, LAYOUT, pieces(flat, numbers), FIRST)
        update = source.fetch()
        sending.result()
    np.testing.assert_array_equal(update.flat, flat)
    assert update.checksum == checksum(flat)
    assert update.specs == LAYOUT
    sink.close()


def test_a_wrong_checksum_names_the_piece() -> None:
    sink = CollectiveSink(Place(("", 0), 0, 2, 1, "gloo", 10.0))
    address = sink.open()
    source = CollectiveSource(Place(address, 1, 2, 1, "gloo", 10.0), LAYOUT, 12, FIRST)

    def send_badly() -> None:
        group, running, sums = Group(sink.place, sink.store), RunningChecksum(), []
        for piece in pieces(np.ones(NUMBERS, dtype=np.float32), 12):
            group.finish(group.broadcast(torch.from_numpy(piece)))
            sums.append(running.add(piece))
        sums[1] ^= 1
        group.finish(group.broadcast(torch.tensor(sums)))

    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(send_badly)
        with pytest.raises(WeightsRejected, match=r"weights 0\.1 refused: the checksum of b … b is wrong"):
            source.fetch()
        sending.result()


def test_who_does_not_enter_a_group_is_named() -> None:
    sink = CollectiveSink(Place(("", 0), 0, 3, 1, "gloo", 1.0))
    sink.open()
    with pytest.raises(SyncFailed, match=r"ranks \[1, 2\] of 3 did not enter group 1 within 1 s"):
        sink.take(LAYOUT, iter(()), FIRST)


def read_and_answer(source: MemorySource, answer: float) -> float:
    flat = source.fetch().flat
    found = float(flat[0])
    flat[0] = answer
    return found


def test_another_process_reads_an_update_where_it_lies() -> None:
    flat = new_shared(NUMBERS)
    flat[:] = 1
    flat[0] = 7
    source = memory_source(WeightUpdate(FIRST, LAYOUT, flat, checksum(flat)))
    assert source is not None
    with ProcessPoolExecutor(1, get_context("spawn")) as processes:
        assert processes.submit(read_and_answer, source, 9.0).result() == 7
    assert flat[0] == 9, "it was copied"
    del flat
    with pytest.raises(SyncFailed, match=r"cannot map the weights in the memory of process \d+: .*Does it run"):
        source.fetch()


def test_an_array_of_its_own_process_has_no_name_for_others() -> None:
    assert memory_source(WeightUpdate(FIRST, LAYOUT, np.ones(NUMBERS, dtype=np.float32), 0)) is None
    assert memory_source(WeightUpdate(FIRST, LAYOUT, torch.ones(NUMBERS).numpy(), 0)) is None
    assert memory_source(WeightUpdate(FIRST, LAYOUT, new_shared(NUMBERS + 1)[1:], 0)) is None


@given(
    numbers=st.integers(1, 3 * CACHED_NUMBERS),
    value=st.sampled_from([0.0, 1.0, 3e38, -3e38, np.inf, -np.inf, np.nan]),
    at=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=30, deadline=None)
def test_one_pass_sees_every_number(numbers: int, value: float, at: float) -> None:
    """Sums that overflow are no fault: the numbers around the one in question are the largest there are."""
    flat = np.full(numbers, 3e38, dtype=np.float32)
    flat[int(at * numbers)] = value
    layout = layout_of([("all", (numbers,))])
    update = WeightUpdate(FIRST, layout, flat, checksum(flat))
    if np.isfinite(value):
        check_update(update, {"all": (numbers,)}, WeightVersion(0, 0))
    else:
        with pytest.raises(WeightsRejected, match="all holds a number that is not finite"):
            check_update(update, {"all": (numbers,)}, WeightVersion(0, 0))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9), st.integers(1, 4))
def test_a_tensor_is_checked_and_copied_on_its_device(numbers: list[float], summed: int) -> None:
    """What a GPU does to an update, on the CPU, by pieces of any size."""
    flat = torch.tensor(numbers, dtype=torch.float32)
    bits = flat.view(torch.int32).tolist()
    expected = sum((place * GOLDEN % 2**64 | 1) * each for place, each in enumerate(bits)) % 2**64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apr_ray.model.state.SUMMED_NUMBERS", summed)
        assert checksum_of_tensor(flat) % 2**64 == expected
    shapes = {"all": (len(numbers),)}
    update = WeightUpdate(FIRST, layout_of(shapes.items()), flat, checksum_of_tensor(flat))
    copied = torch.empty_like(flat)
    if flat.isfinite().all():
        check_update(update, shapes, WeightVersion(0, 0), copied)
        assert torch.equal(copied, flat)
    else:
        with pytest.raises(WeightsRejected, match="all holds a number that is not finite"):
            check_update(update, shapes, WeightVersion(0, 0), copied)
    with pytest.raises(WeightsRejected, match="checksum is wrong"):
        check_update(replace(update, checksum=update.checksum + 1), shapes, WeightVersion(0, 0))
    with pytest.raises(WeightsRejected, match="the buffer is float64 with 1 dimensions"):
        check_update(replace(update, flat=flat.double()), shapes, WeightVersion(0, 0))


def test_weights_on_a_gpu_are_refused_where_that_gpu_is_not() -> None:
    with pytest.raises(SyncFailed, match=r"lie on GPU GPU-7, this worker computes on .* parts that share a GPU"):
        GpuSource("GPU-7", (), LAYOUT, FIRST, 0).fetch()
    chosen = ["weights.transport=cuda_ipc", "learner.gpus_per_rank=0.5"]
    gpu = ["engine.device=cuda", "rollout.gpus_per_worker=0.5"]
    server = ["engine.server_urls=[http://localhost:1]", "rollout.workers=1"]
    for given_, missing in (
        (chosen, r"engine\.name is torch, rollout\.gpus_per_worker 0"),
        ([*chosen, "engine.name=sglang_server", *server], r"engine\.name is sglang_server"),
        ([*chosen[:1], *gpu], r"learner\.gpus_per_rank is 0"),
        ([*chosen, *gpu, "rollout.workers=2"], r"they reserve 1\.5: lower"),
        ([*chosen, *gpu, "placement.mode=colocated", "learner.ranks=3"], r"they reserve 1\.5: lower"),
        ([*chosen, *gpu, "engine.device=cpu", "engine.name=sglang"], r"engine sglang uses none \(engine\.device cpu\)"),
        (["weights.transport=collective", "weights.backend=nccl", *gpu], r"between GPUs: learner\.gpus_per_rank is 0"),
    ):
        with pytest.raises(ConfigError, match=missing):
            load_config([], given_)
    fits = load_config([], [*chosen, *gpu, "rollout.workers=1"])
    assert isinstance(build_transport(fits.weights), CudaIpcTransport)


def test_a_file_is_complete_when_it_has_its_name_and_old_ones_go(tmp_path: Path) -> None:
    sink = FileSink(str(tmp_path / "w"))
    sink.open()
    version = WeightVersion(0, 0)
    for number in range(4):
        version = version.next()
        flat = np.full(NUMBERS, number, dtype=np.float32)
        update = fill(sink, flat, 7, version).fetch()
        np.testing.assert_array_equal(update.flat, flat)
        assert (update.version, update.specs, update.checksum) == (version, LAYOUT, checksum(flat))
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["weights-0.3.safetensors", "weights-0.4.safetensors"]
    sink.close()
    assert not list((tmp_path / "w").iterdir())


def test_a_file_that_is_gone_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(SyncFailed, match=r"cannot read weights .* Do all nodes share weights\.folder"):
        FileSource(str(tmp_path / "none.safetensors")).fetch()


def test_each_run_has_a_folder_of_its_own_on_a_shared_disk(tmp_path: Path) -> None:
    one, other = (build_transport(weights_config("disk", tmp_path)) for _ in range(2))
    assert isinstance(one, DiskTransport)
    assert isinstance(other, DiskTransport)
    sources = []
    for number, transport in enumerate((one, other)):
        sink = FileSink(str(transport.folder))
        sink.open()
        sources.append(fill(sink, np.full(NUMBERS, number, dtype=np.float32), 7, FIRST))
    assert [source.fetch().flat[0] for source in sources] == [0, 1]
    one.discard()
    assert [path.name for path in tmp_path.iterdir()] == [other.folder.name]


def test_a_transport_to_disk_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"weights\.folder"):
        load_config([], ["weights.transport=disk"])


# --- what becomes of trees that run -----------------------------------------------------------------------------------


def test_drained_trees_end_before_and_new_ones_wait() -> None:
    """The order of events, whatever the scheduling: what ran ends, weights change, what waited begins."""

    async def main() -> list[str]:
        trees, events, may_end = _Trees(), [], asyncio.Event()

        async def tree(name: str) -> None:
            async with trees.one():
                events.append(f"{name} begins")
                await may_end.wait()
                events.append(f"{name} ends")

        async def update() -> None:
            async with trees.halted(drain=True):
                events.append("weights")

        first = asyncio.create_task(tree("first"))
        await asyncio.sleep(0)
        changing = asyncio.create_task(update())
        for _ in range(3):
            await asyncio.sleep(0)
        second = asyncio.create_task(tree("second"))
        for _ in range(5):
            await asyncio.sleep(0)
        may_end.set()
        await asyncio.gather(first, changing, second)
        return events

    assert asyncio.run(main()) == ["first begins", "first ends", "weights", "second begins", "second ends"]


@pytest.fixture(scope="module")
def one_worker(ray_local: None, single_config: Config, checkpoint: Path) -> Iterator[RolloutPool]:
    rollout = single_config.rollout.model_copy(update={"concurrent_trees": 6})
    started = RolloutPool.start(single_config.model_copy(update={"rollout": rollout}), str(checkpoint))
    yield started
    started.stop()


@pytest.mark.parametrize("mode", ["drain", "pause", "in_flight"])
def test_versions_of_trees_under_each_mode(
    mode: str, one_worker: RolloutPool, checkpoint: Path, task: CountdownTask
) -> None:
    """Trees that run while new weights come: drained ones saw one version, others two; in flight old KV is named."""
    ray.get(one_worker.workers[0].__ray_call__.remote(lambda worker: setattr(worker, "mode", mode)))
    policy = load_policy(checkpoint)
    first = version = following(one_worker)
    trees: list[ThreadTree] = []
    requests = [TreeRequest(p, seed=i) for i, p in enumerate(task.problems("train", 60, 0))]
    pending: list[Any] = []
    for number, (_, tree) in enumerate(one_worker.run(requests)):
        trees.append(tree)
        if number % 15 == 5:
            update = pack_weights(trainable_parameters(policy), version)
            ray.get(list(receive(one_worker.membership().workers, ray.put(update)).values()))
            pending += [actor.apply_weights.remote() for actor in one_worker.workers]
            version = version.next()
    ray.get(pending)
    assert len(pending) == 4
    calls = [call for tree in trees for call in tree.calls if call.sampled_ids]
    spans = [len(call.versions) for call in calls]
    newest = max(v for tree in trees for v in tree.versions())
    assert newest.counter >= first.counter + 2, "updates came too late to matter"
    if mode == "drain":
        assert all(len(tree.versions()) == 1 for tree in trees)
    else:
        assert max(spans) > 1, "no call saw two versions: the test would prove nothing"
    on_older_kv = [span for call in calls for span in call.versions if span.kv is not None]
    assert bool(on_older_kv) == (mode == "in_flight")
    assert all(span.kv is not None and span.kv < span.version for span in on_older_kv)
    assert all(call.versions[0].kv is None for call in calls), "a call begins on KV of the weights that draw it"
    assert all(call.finish is not FinishReason.ERROR for call in calls)


def test_a_mode_that_the_engine_has_not_is_refused() -> None:
    from apr_ray.rollout.worker import require_mode

    with pytest.raises(ConfigError, match=r"weights\.mode in_flight .* engine vllm cannot.* weights\.mode=pause"):
        require_mode("in_flight", "vllm", keeps_kv=False)
    require_mode("in_flight", "torch", keeps_kv=True)
    require_mode("pause", "vllm", keeps_kv=False)
