"""What `SGLangEngine` makes of SGLang's answers, good and bad, with a scripted SGLang in place of the real one.

The real one is held to the same interface as every engine in `test_engine_conformance.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from apr_ray.config import BoundsConfig, EngineConfig, load_config
from apr_ray.core.engine import Chunk, FinishReason, GenerateRequest, SamplingParams
from apr_ray.core.errors import AprError, ConfigError, EngineAsleep, PartDied
from apr_ray.core.ledger import JoinOutcome, Outcome
from apr_ray.core.task import ChildResult, ChildSpec, SpawnRequest, ThreadEnd
from apr_ray.core.weights import WeightVersion
from apr_ray.engines import sglang_engine
from apr_ray.engines.registry import build_engine
from apr_ray.engines.scripted_engine import Reply, ScriptedEngine
from apr_ray.engines.sglang_base import SGLangBase
from apr_ray.engines.sglang_engine import SGLangEngine
from apr_ray.model.llama import load_policy
from apr_ray.model.state import pack_weights, trainable_parameters
from apr_ray.tasks.countdown.problem import CountdownProblem
from apr_ray.threads.runtime import TreeRequest, run_tree

STOP, END = 9, 1
REFUSED, FORCED, JOINED = 7, 8, 6
Output = dict[str, Any]


def output(
    ids: list[int], finish: dict[str, Any] | None = None, spans: list[tuple[str, int, int]] | None = None
) -> Output:
    """As SGLang streams: all tokens of the request so far, each time."""
    meta: dict[str, Any] = {
        "finish_reason": finish,
        "cached_tokens": 2,
        "output_token_logprobs": [(-float(i), i, None) for i in ids],
    }
    if spans is not None:
        meta["weight_versions"] = [{"version": v, "start": s, "end": e} for v, s, e in spans]
    return {"output_ids": ids, "meta_info": meta}


class ScriptedSGLang:
    """A tokenizer manager: `answers[n]` are the outputs of the n-th request that it gets; None waits for `go_on`."""

    def __init__(self, *answers: list[Output | None]) -> None:
        self.answers = list(answers)
        self.go_on = asyncio.Event()
        self.requests: list[Any] = []
        self.sent: list[Any] = []
        self.steps: list[str] = []
        self.failing = ""
        self.device, self.saves_memory = "cpu", False
        self.asyncio_tasks: set[Any] = set()
        self.recv_from_detokenizer = self.send_to_scheduler = SimpleNamespace(close=lambda linger: None)
        reading, self.life = os.pipe()
        self.process = SimpleNamespace(
            sentinel=reading, pid=4242, exitcode=-9, is_alive=lambda: False, join=lambda _: None
        )
        self._subprocess_watchdog = SimpleNamespace(stop=lambda: None, _processes=[self.process])

    async def generate_request(self, request: Any, http: None) -> AsyncIterator[Output]:
        self.requests.append(request)
        for answer in self.answers.pop(0):
            if answer is None:
                await self.go_on.wait()
            else:
                yield answer

    def _dispatch_to_scheduler(self, message: Any) -> None:
        self.sent.append(message)

    async def step(self, name: str) -> tuple[bool, str]:
        self.steps.append(name)
        await asyncio.sleep(0)
        return name != self.failing, "disk on fire"

    async def pause_generation(self, request: Any) -> None:
        await self.step(f"pause {request.mode}")

    async def begin_weight_update(self, request: Any) -> tuple[bool, str]:
        return await self.step("begin_weight_update")

    async def update_weights_from_tensor(self, request: Any) -> tuple[bool, str]:
        return await self.step("update_weights_from_tensor")

    async def end_weight_update(self, request: Any) -> tuple[bool, str]:
        return await self.step("end_weight_update")

    async def continue_generation(self, request: Any) -> None:
        await self.step("continue")

    async def flush_cache(self, timeout_s: float) -> Any:
        success, message = await self.step("flush")
        return SimpleNamespace(success=success, message=message)

    async def release_memory_occupation(self, request: Any) -> None:
        await self.step(f"release {request.tags}")

    async def resume_memory_occupation(self, request: Any) -> None:
        await self.step(f"resume {request.tags}")


@pytest.fixture
def engine_over(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Callable[..., SGLangEngine]:
    def make(manager: ScriptedSGLang, **options: Any) -> SGLangEngine:
        engine = SimpleNamespace(
            tokenizer_manager=manager,
            server_args=SimpleNamespace(
                tp_size=1, page_size=1, device=manager.device, enable_memory_saver=manager.saves_memory
            ),
            shutdown=lambda: None,
            send_to_rpc=manager.send_to_scheduler,
        )
        guard = SimpleNamespace(close=lambda: None)
        monkeypatch.setattr(sglang_engine, "_launch", lambda arguments: (guard, engine))
        return SGLangEngine(checkpoint, device="cpu", **options)

    return make


def request(name: str = "a", tokens: int = 8) -> GenerateRequest:
    return GenerateRequest(name, (5, 6, 7), SamplingParams(1.0, max_new_tokens=tokens, stop_ids=frozenset({STOP})))


async def collect(engine: SGLangEngine, asked: GenerateRequest | None = None) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(asked or request())]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


def ids_of(chunks: list[Chunk]) -> list[tuple[int, ...]]:
    return [c.token_ids for c in chunks]


def test_what_is_streamed_is_cut_into_what_is_new(engine_over: Callable[..., SGLangEngine]) -> None:
    stop = {"type": "stop", "matched": STOP}
    manager = ScriptedSGLang([output([3]), output([3, 4, 5]), output([3, 4, 5, STOP], stop)])
    chunks = run(collect(engine_over(manager)))
    assert ids_of(chunks) == [(3,), (4, 5), (STOP,)]
    assert [c.logprobs for c in chunks] == [(-3.0,), (-4.0, -5.0), (-float(STOP),)]
    assert [c.finish for c in chunks] == [None, None, FinishReason.STOP]
    assert chunks[0].cached_tokens == 2


def test_an_end_token_that_was_not_asked_for_is_gone_on_from(engine_over: Callable[..., SGLangEngine]) -> None:
    unasked = {"type": "stop", "matched": END}
    manager = ScriptedSGLang([output([3, END], unasked)], [output([4, END], unasked)])
    chunks = run(collect(engine_over(manager), request(tokens=4)))
    assert sum(ids_of(chunks), ()) == (3, END, 4, END)
    assert [c.finish for c in chunks] == [None, FinishReason.LENGTH]
    first, second = manager.requests
    assert second.input_ids == [*first.input_ids, 3, END]
    assert second.sampling_params["max_new_tokens"] == 2
    assert not second.rid.startswith(first.rid), "aborting the first would abort the second"


@pytest.mark.parametrize(
    ("finish", "what"),
    [
        ({"type": "abort", "message": "out of memory", "status_code": 500}, "out of memory"),
        ({"type": "stop", "matched": "NaN happened"}, "NaN happened"),
    ],
)
def test_what_sglang_ends_by_itself_is_an_error(
    engine_over: Callable[..., SGLangEngine], finish: dict[str, Any], what: str
) -> None:
    (chunk,) = run(collect(engine_over(ScriptedSGLang([output([3], finish)]))))
    assert (chunk.finish, chunk.token_ids) == (FinishReason.ERROR, (3,))
    assert what in chunk.error


def test_an_abort_is_one_message_and_ends_what_waits_too(engine_over: Callable[..., SGLangEngine]) -> None:
    aborted = {"type": "abort", "message": ""}
    manager = ScriptedSGLang(*([output([3]), None, output([3], aborted)] for _ in range(3)))

    async def main() -> list[list[Chunk]]:
        engine = engine_over(manager)
        tasks = [asyncio.create_task(collect(engine, request(f"tree-1/{i:03d}"))) for i in range(3)]
        await until(lambda: len(manager.requests) == 3)
        await engine.abort("tree-1/")
        await engine.abort("tree-2/")
        manager.go_on.set()
        return list(await asyncio.gather(*tasks))

    assert [c[-1].finish for c in run(main())] == [FinishReason.ABORTED] * 3
    assert [m.rid for m in manager.sent] == ["tree-1/"]


def test_no_request_id_is_the_beginning_of_another(engine_over: Callable[..., SGLangEngine]) -> None:
    length = {"type": "length"}
    manager = ScriptedSGLang([output([3], length)], [output([3], length)])

    async def main() -> None:
        engine = engine_over(manager)
        await asyncio.gather(collect(engine, request("a-1")), collect(engine, request("a-10")))
        with pytest.raises(AprError, match="holds a '#'"):
            await collect(engine, request("a#"))

    run(main())
    first, second = (r.rid for r in manager.requests)
    assert not first.startswith(second)
    assert not second.startswith(first)


@dataclass(frozen=True)
class Branching:
    """A protocol by plan: a thread at depth d spawns `rounds[d]` children, one number after the other; every call goes
    on after a forced token, if they are `forced`."""

    rounds: Sequence[Sequence[int]]
    forced: bool
    stop_ids = frozenset({REFUSED, STOP})
    max_depth = 2

    def reply(self, asked: GenerateRequest) -> Reply:
        return Reply([REFUSED if self.forced and asked.prompt_ids[-1] != FORCED else STOP])

    def root_prompt(self, problem: Any, budget: int | None = None) -> tuple[int, ...]:
        return (5,)

    def forced_replacement(self, token_id: int) -> int | None:
        return FORCED if token_id == REFUSED else None

    def read_call(self, context: Sequence[int], sampled: Sequence[int], depth: int) -> SpawnRequest | ThreadEnd:
        rounds, done = self.rounds[depth] if depth < len(self.rounds) else (), context.count(JOINED)
        if done == len(rounds):
            return ThreadEnd(Outcome.ANSWERED)
        return SpawnRequest(tuple(ChildSpec((5,), str(i)) for i in range(rounds[done])), 0)

    def read_child(self, context: Sequence[int], sampled: Sequence[int]) -> ChildResult:
        return ChildResult(JoinOutcome.SOLVED)

    def join_ids(self, asked: SpawnRequest, results: Sequence[ChildResult], depth: int) -> tuple[int, ...]:
        return (JOINED,)

    def text(self, ids: Sequence[int]) -> str:
        return ""


@given(
    rounds=st.tuples(st.lists(st.integers(1, 12), max_size=2), st.lists(st.integers(1, 2), max_size=2)),
    forced=st.booleans(),
    tail=st.text("0123456789-.", min_size=1, max_size=3),
)
@example(rounds=([12, 12], [2]), forced=False, tail="0")
@example(rounds=([1] * 11, [1] * 11), forced=True, tail="1")
def test_a_request_id_begins_another_only_as_its_subtree(
    rounds: tuple[list[int], list[int]], forced: bool, tail: str
) -> None:
    """Of two trees, one's id the beginning of the other's: no request's id begins another's, and what a thread's have
    in common begins those of its descendants and of nobody else."""
    protocol, bounds = Branching(rounds, forced), BoundsConfig(max_depth=2, max_rounds=11)
    calls: list[tuple[str, GenerateRequest]] = []
    for tree in ("tree-1", "tree-1" + tail):
        engine = ScriptedEngine(protocol.reply)
        ask = TreeRequest(CountdownProblem((3, 5, 7), 22))
        made = run(run_tree(engine, protocol, ask, bounds, tree_id=tree))  # type: ignore[arg-type]
        assert made.outcome is Outcome.ANSWERED
        assert len(engine.requests) == len(made.calls) * (1 + forced)
        calls += [(tree, one) for one in engine.requests]
    ids = sorted(one.request_id for _, one in calls)
    assert not any(after.startswith(before) for before, after in pairwise(ids))
    threads = {(tree, one.thread): one.request_id.rpartition("/")[0] for tree, one in calls}
    for (tree, thread), subtree in threads.items():
        below = {(t, one.thread) for t, one in calls if one.request_id.startswith(subtree)}
        assert below == {(t, p) for t, p in threads if t == tree and p[: len(thread)] == thread}


# --- weights ----------------------------------------------------------------------------------------------------------


def update(checkpoint: Path) -> Any:
    return pack_weights(trainable_parameters(load_policy(checkpoint)), WeightVersion(0, 1))


def test_tokens_around_an_update_are_held_back_and_cut_at_the_version(
    engine_over: Callable[..., SGLangEngine], checkpoint: Path
) -> None:
    """SGLang says only at the end that tokens 0 to 3 were of the old version; one chunk of them was out already."""
    spans = [("0.0", 0, 3), ("0.1", 3, 5)]
    manager = ScriptedSGLang(
        [output([3]), None, output([3, 4, 5, 6]), output([3, 4, 5, 6, STOP], {"type": "stop", "matched": STOP}, spans)]
    )

    async def main() -> list[Chunk]:
        engine = engine_over(manager)
        task = asyncio.create_task(collect(engine))
        await until(lambda: engine.stats().active_requests == 1)
        await engine.update_weights(update(checkpoint))
        manager.go_on.set()
        assert engine.version == WeightVersion(0, 1)
        return await task

    chunks = run(main())
    assert ids_of(chunks) == [(3,), (4, 5), (6, STOP), ()]
    assert [c.version.counter for c in chunks] == [0, 0, 1, 1]
    assert chunks[-1].finish is FinishReason.STOP
    assert manager.steps == [
        "pause retract", "begin_weight_update", "update_weights_from_tensor", "end_weight_update", "continue"
    ]  # fmt: skip


def test_what_is_sent_after_an_update_is_of_the_new_weights_while_the_old_buffer_is_put_away(
    engine_over: Callable[..., SGLangEngine], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = ScriptedSGLang([output([5], {"type": "length"})])
    collected = asyncio.Event()

    @contextlib.asynccontextmanager
    async def staged(engine: SGLangEngine, update: Any) -> AsyncIterator[list[bytes]]:
        yield []
        await collected.wait()

    monkeypatch.setattr(SGLangEngine, "_staged", staged)

    async def main() -> list[Chunk]:
        engine = engine_over(manager)
        swap = asyncio.create_task(engine.update_weights(update(checkpoint)))
        await until(lambda: "continue" in manager.steps)
        chunks = await collect(engine, request(tokens=1))
        collected.set()
        await swap
        return chunks

    assert [c.version.counter for c in run(main())] == [1]


class OlderSGLang(ScriptedSGLang):
    """SGLang 0.5.17: it neither takes an update in steps nor tells which version drew which token."""

    @property
    def begin_weight_update(self) -> Any:  # type: ignore[override]
        raise AttributeError


def interrupted_by_an_update(engine: SGLangEngine, manager: ScriptedSGLang, policy: Path, tokens: int) -> list[Chunk]:
    async def main() -> list[Chunk]:
        task = asyncio.create_task(collect(engine, request(tokens=tokens)))
        await until(lambda: len(manager.requests) == 1)
        swap = asyncio.create_task(engine.update_weights(update(policy)))
        await until(lambda: bool(manager.sent))
        assert manager.steps == [], "weights are changing while something runs"
        manager.go_on.set()
        await swap
        return await task

    chunks: list[Chunk] = run(main())
    return chunks


ABORTED = {"type": "abort", "message": ""}


def test_an_sglang_that_tells_no_versions_ends_what_runs_and_goes_on_after_the_update(
    engine_over: Callable[..., SGLangEngine], checkpoint: Path
) -> None:
    stop = {"type": "stop", "matched": STOP}
    manager = OlderSGLang([output([3]), None, output([3, 4], ABORTED)], [output([5, STOP], stop)])
    chunks = interrupted_by_an_update(engine_over(manager), manager, checkpoint, 8)
    assert ids_of(chunks) == [(3,), (4,), (5, STOP)]
    assert [c.version.counter for c in chunks] == [0, 0, 1]
    assert [c.finish for c in chunks] == [None, None, FinishReason.STOP]
    assert manager.steps == ["flush", "pause retract", "update_weights_from_tensor", "continue"]
    first, second = manager.requests
    assert second.input_ids == [*first.input_ids, 3, 4]


@pytest.mark.parametrize(("last", "finish"), [(STOP, FinishReason.STOP), (4, FinishReason.LENGTH)])
def test_what_ends_by_itself_as_it_is_interrupted_has_ended(
    engine_over: Callable[..., SGLangEngine], checkpoint: Path, last: int, finish: FinishReason
) -> None:
    """SGLang says "abort" all the same."""
    manager = OlderSGLang([output([3]), None, output([3, last], ABORTED)])
    chunks = interrupted_by_an_update(engine_over(manager), manager, checkpoint, 2)
    assert (sum(ids_of(chunks), ()), chunks[-1].finish) == ((3, last), finish)


def test_tokens_that_an_abort_leaves_out_are_drawn_again(
    engine_over: Callable[..., SGLangEngine], checkpoint: Path
) -> None:
    """Of a request that it had put back to wait, SGLang sends the last token alone."""
    cut = {**output([3, 4], ABORTED), "output_ids": [4]}
    manager = OlderSGLang([None, cut], [output([5], {"type": "length"})])
    chunks = interrupted_by_an_update(engine_over(manager), manager, checkpoint, 1)
    assert ids_of(chunks) == [(5,)]
    assert manager.requests[1].input_ids == manager.requests[0].input_ids


@pytest.mark.parametrize("step", ["begin_weight_update", "update_weights_from_tensor", "end_weight_update"])
def test_a_step_that_reports_failure_ends_the_engine(
    engine_over: Callable[..., SGLangEngine], checkpoint: Path, step: str
) -> None:
    """Whatever was applied cannot be taken back: nothing may be sampled from it."""
    manager = ScriptedSGLang([output([3]), None])
    manager.failing = step
    told: list[str] = []

    async def main() -> list[Chunk]:
        engine = engine_over(manager, on_death=told.append)
        task = asyncio.create_task(collect(engine))
        await until(lambda: engine.stats().active_requests == 1)
        with pytest.raises(PartDied, match=f"{step}: disk on fire"):
            await engine.update_weights(update(checkpoint))
        with pytest.raises(PartDied, match="disk on fire"):
            await collect(engine, request("later"))
        return await task

    chunks = run(main())
    assert chunks[-1].finish is FinishReason.ERROR
    assert "disk on fire" in chunks[-1].error
    assert len(told) == 1


@pytest.mark.parametrize("updating", [False, True])
def test_a_process_that_ends_is_told_and_ends_what_runs(
    engine_over: Callable[..., SGLangEngine], checkpoint: Path, updating: bool
) -> None:
    """Also an update, which SGLang would let wait for ever."""
    manager = ScriptedSGLang([output([3]), None])
    told: list[str] = []

    async def never(name: str) -> tuple[bool, str]:
        await asyncio.Event().wait()
        raise AssertionError

    manager.step = never  # type: ignore[method-assign]

    async def main() -> list[Chunk]:
        engine = engine_over(manager, on_death=told.append)
        task = asyncio.create_task(collect(engine))
        await until(lambda: engine.stats().active_requests == 1)
        swap = asyncio.create_task(engine.update_weights(update(checkpoint))) if updating else None
        await asyncio.sleep(0)
        os.close(manager.life)
        if swap is not None:
            with pytest.raises(PartDied, match="exit code -9"):
                await swap
        return await task

    chunks = run(main())
    assert chunks[-1].finish is FinishReason.ERROR
    assert "process 4242 ended with exit code -9" in chunks[-1].error
    assert len(told) == 1


# --- what is refused before anything starts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.server_args={model_path: x}", "server_args.model_path may not be given: apr-ray sets it itself"),
        ("engine.server_args={context_length: 5}", "set engine.context_tokens instead"),
    ],
)
def test_arguments_that_apr_ray_sets_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], ["engine.name=sglang", override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.server_args={chunked_prefill_size: 64}", "are SGLang's or vLLM's, name is torch"),
        ("engine.device=cuda", "gpus_per_worker is 0"),
    ],
)
def test_the_torch_engine_takes_none_of_sglangs_keys(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    assert message in str(caught.value)


def test_an_argument_that_sglang_does_not_know_is_named_with_its_neighbour(checkpoint: Path) -> None:
    config = EngineConfig(name="sglang", device="cpu", server_args={"chunked_prefil_size": 64})
    with pytest.raises(
        ConfigError, match=r"chunked_prefil_size is not an argument.*Did you mean 'chunked_prefill_size'"
    ):
        build_engine(config, str(checkpoint))


def test_a_kv_pool_smaller_than_one_request_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="kv_tokens is 100, one full request needs 774"):
        build_engine(EngineConfig(name="sglang", device="cpu", kv_tokens=100), str(checkpoint))


def test_a_missing_sglang_is_named_with_what_to_install(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang.srt.entrypoints.engine", None)
    with pytest.raises(AprError, match=r"is not installed\. Install SGLang 0.5.23: pip install 'apr-ray\[sglang\]'"):
        build_engine(EngineConfig(name="sglang", device="cpu"), str(checkpoint))


def test_what_the_tests_install_for_sglang_is_not_met_outside_of_them() -> None:
    """Its torchvision breaks transformers beside a CPU build of torch: a quickstart after `make test` would fail."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = (
        "import importlib.util as u; from transformers import LlamaForCausalLM; assert not u.find_spec('torchvision')"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_sglang_is_imported_only_when_an_engine_is_built() -> None:
    code = "import sys, apr_ray, apr_ray.engines.sglang_engine; sys.exit('sglang' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_start_that_fails_leaves_no_process(checkpoint: Path, tmp_path: Path) -> None:
    """A truncated weight file: the scheduler dies, this process does not, and nothing is left."""
    import shutil

    import psutil

    broken = tmp_path / "policy"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with pytest.raises(AprError, match="SGLang did not start"):
        build_engine(EngineConfig(name="sglang", device="cpu", max_sequences=2), str(broken))
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    running = [p for p in left if p.status() != psutil.STATUS_ZOMBIE]
    assert [p for p in running if "resource_tracker" not in " ".join(p.cmdline())] == []


def on_a_gpu(*answers: list[Output | None]) -> ScriptedSGLang:
    sglang = ScriptedSGLang(*answers)
    sglang.device, sglang.saves_memory = "cuda", True
    return sglang


def test_it_releases_its_memory_when_it_is_idle_and_resumes(engine_over: Callable[..., SGLangEngine]) -> None:
    """Tags None: SGLang's KV, weights and graphs. Its scheduler would die if it were told while it is busy."""
    sglang = on_a_gpu([None, output([5, STOP], {"type": "stop", "matched": STOP})])
    engine = engine_over(sglang)

    async def main() -> None:
        running = asyncio.create_task(collect(engine))
        await asyncio.sleep(0)
        with pytest.raises(AprError, match="1 requests run, a first"):
            await engine.sleep()
        sglang.go_on.set()
        await running
        await engine.sleep()
        with pytest.raises(EngineAsleep):
            await collect(engine, request("b"))
        await engine.wake()

    asyncio.run(main())
    assert engine.capabilities.sleeps
    assert sglang.steps == ["flush", "release None", "resume None"]


def test_one_that_does_not_come_to_rest_is_dead(engine_over: Callable[..., SGLangEngine]) -> None:
    sglang = on_a_gpu()
    sglang.failing = "flush"
    engine = engine_over(sglang)

    async def main() -> None:
        with pytest.raises(PartDied, match="flush_cache: disk on fire"):
            await engine.sleep()
        with pytest.raises(PartDied):
            await collect(engine)

    asyncio.run(main())
    assert "release None" not in sglang.steps


def test_a_token_whose_weights_sglang_does_not_name_ends_the_request(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults 14f: tokens after the last version span were dropped in silence."""
    base = object.__new__(SGLangBase)
    emitted: list[tuple[list[int], WeightVersion]] = []
    monkeypatch.setattr(
        SGLangBase, "_emit", lambda self, running, ids, *others, version: emitted.append((ids, version))
    )
    running = SimpleNamespace(version=WeightVersion(0, 0))

    def cut(*spans: tuple[int, int]) -> None:
        told = [{"version": f"0.{i}", "start": a, "end": b} for i, (a, b) in enumerate(spans)]
        base._emit_by_version(running, [5, 6, 7, 8], [-0.1] * 4, told, 0, None, "")  # type: ignore[arg-type]

    cut((0, 2), (2, 4))
    assert emitted == [([5, 6], WeightVersion(0, 0)), ([7, 8], WeightVersion(0, 1))]
    for spans in ([(0, 3)], [], [(0, 1), (2, 4)]):
        with pytest.raises(RuntimeError, match=r"SGLang names the weights of \d tokens, and sampled 4"):
            cut(*spans)
