"""One suite for every engine: what `core.engine.Engine` promises, checked against transformers in float64.

Each test is a row of the table that the run ends with, each engine a column. What an engine says it lacks is "n/a"
there; it is not skipped, and it is not faked. Another engine is another entry of `ENGINES`; `--engines` says which are
run: vLLM has an environment of its own (`make test-vllm`). `--device cuda` runs them on a GPU; Triton then must not
round float32 to TF32 (`TRITON_F32_DEFAULT=ieee`).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import os
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch

from apr_ray.bench.sglang_process import Server, sglang_server
from apr_ray.config import BoundsConfig, EngineConfig, ModelConfig
from apr_ray.core.engine import Chunk, Engine, FinishReason, GenerateRequest, SamplingParams
from apr_ray.core.errors import AprError, EngineAsleep, WeightsRejected
from apr_ray.core.ledger import JoinOutcome, Outcome, ThreadTree
from apr_ray.core.task import ChildResult, ChildSpec, SpawnRequest, ThreadEnd
from apr_ray.core.weights import TensorSpec, WeightUpdate, WeightVersion
from apr_ray.engines.registry import build_engine
from apr_ray.model.llama import load_policy, new_policy, save_policy
from apr_ray.model.state import checksum, pack_weights, trainable_parameters
from apr_ray.threads.runtime import TreeRequest, run_tree

pytestmark = pytest.mark.timeout(900)
T = TypeVar("T")
VOCAB = 57
SEQUENCES = 8
INTERVAL = 5
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"cache_slots": 8},
    "sglang": {},
    "sglang_server": {},
    "vllm": {},
}
ON_CUDA: dict[str, dict[str, Any]] = {
    "sglang": {  # the attention that computes in float32, and no prefill graphs, which take long to capture
        "kv_tokens": SEQUENCES * 800,
        "server_args": {"attention_backend": "triton", "cuda_graph_backend_prefill": "disabled"},
    }
}
TOLERANCE = 1e-4
"""Largest |Δ logprob| of an engine in float32 to transformers in float64; transformers in float32 has up to 2e-5."""
WAIT_S = 300.0
IDLE_S = 60.0
"""In which an engine must have let go of all requests that ended."""
GROWTH_BYTES = 16 << 20
"""What each process may grow by in 200 thread trees after 100; the most that any engine's took was 2.4 MiB."""


@dataclass
class Subject:
    """An engine, the loop it lives in, and the policy that it should be running now."""

    name: str
    engine: Any
    policy: Any
    loop: asyncio.Runner
    server: Server | None = None
    counter: int = 0
    requests: int = 0
    record: Callable[[str, object], None] = print
    worst: float = 0.0
    """Largest |Δ logprob| of the present test."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(WAIT_S):
                return await work

        return self.loop.run(bounded())

    def request(
        self, prompt: Sequence[int], tokens: int = 10, temperature: float = 0.0, name: str = "", **options: Any
    ) -> GenerateRequest:
        self.requests += 1
        priority = options.pop("priority", 0)
        sampling = SamplingParams(temperature, max_new_tokens=tokens, **options)
        return GenerateRequest(name or f"request-{self.requests:06d}", tuple(prompt), sampling, priority)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[list[Chunk]]:
        async def together() -> list[list[Chunk]]:
            return list(await asyncio.gather(*(collect(self.engine, r) for r in requests)))

        return self.run(together())

    def one(self, prompt: Sequence[int], *args: Any, **options: Any) -> list[Chunk]:
        return self.generate([self.request(prompt, *args, **options)])[0]

    def update(self, factor: float) -> WeightUpdate:
        """The present policy with all weights times `factor`, as the next version."""
        self.counter += 1
        version = WeightVersion(0, self.counter)
        return pack_weights([(n, p * factor) for n, p in trainable_parameters(self.policy)], version)

    def adopt(self, update: WeightUpdate) -> None:
        """The engine took an update: the policy is now that one."""
        with torch.no_grad():
            for name, parameter in trainable_parameters(self.policy):
                parameter.copy_(torch.from_numpy(update.state_dict()[name].copy()))

    def compare(self, prompt: Sequence[int], chunks: Sequence[Chunk], temperature: float) -> None:
        """Every logprob against one plain forward pass under the present policy."""
        self.compare_part(prompt, ids_of(chunks), chunks, temperature)

    def compare_part(
        self, prompt: Sequence[int], sampled: Sequence[int], chunks: Sequence[Chunk], temperature: float, start: int = 0
    ) -> None:
        found = np.array(logprobs_of(chunks))
        expected = reference(self.policy, prompt, sampled, temperature)[start : start + len(found)]
        self.worst = max(self.worst, float(np.abs(found - expected).max()))
        self.record("delta", self.worst)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)

    async def until_idle(self) -> None:
        """Wait until nothing of any request is left, in SGLang's case in its scheduler either."""
        end = time.monotonic() + IDLE_S
        while held := {what: count for what, count in self.held().items() if count}:
            assert time.monotonic() < end, f"left behind: {held}"
            await asyncio.sleep(0.02)

    def held(self) -> dict[str, int]:
        """What the engine holds for requests, at and below the interface; KV that is only cached is nobody's."""
        engine, stats = self.engine, self.engine.stats()
        held = {"known": len(engine.by_id), "active": stats.active_requests, "waiting": stats.waiting_requests}
        match self.name:
            case "torch":
                free = slice(len(engine.rows.active), SEQUENCES)
                held["tokens in free rows"] = int((engine.rows.lengths[free] + engine.rows.kv_lengths[free]).sum())
            case "sglang":
                scheduled = engine.scheduler_load()
                held |= dict(zip(("running there", "waiting there", "tokens of KV"), scheduled, strict=True))
                held["states"] = len(engine._manager.rid_to_state)
            case "sglang_server":
                assert self.server is not None
                for load in self.server.get("/v1/loads")["loads"]:
                    keys = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
                    held |= {key: held.get(key, 0) + int(load[key]) for key in keys}
            case "vllm":
                scheduler = engine._engine.engine_core.engine_core.scheduler
                pool = scheduler.kv_cache_manager.block_pool
                running, waiting = scheduler.get_request_counts()
                used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one of them is never given out
                held |= {"to end": engine.scheduled(), "running there": running, "waiting there": waiting}
                held["blocks of KV"] = used
        return held

    def resident_bytes(self) -> dict[int, int]:
        """Memory of this process and of the engine's, by their ids."""
        gc.collect()
        pids = {os.getpid(), *getattr(self.engine, "process_ids", ())}
        if self.server is not None:
            server = psutil.Process(self.server.process.pid)
            pids |= {server.pid, *(child.pid for child in server.children(recursive=True))}
        return {pid: psutil.Process(pid).memory_info().rss for pid in pids}

    def whole_blocks(self, tokens: int) -> int:
        """How many of a prefix of that many tokens the engine may share."""
        block = self.engine.capabilities.cache_block
        return tokens // block * block


async def collect(engine: Engine, asked: GenerateRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(asked)]


def ids_of(chunks: Sequence[Chunk]) -> list[int]:
    return [i for c in chunks for i in c.token_ids]


def logprobs_of(chunks: Sequence[Chunk]) -> list[float]:
    return [lp for c in chunks for lp in c.logprobs]


def in_float64(policy: Any) -> Any:
    return copy.deepcopy(policy).double()


def reference(policy: Any, prompt: Sequence[int], sampled: Sequence[int], temperature: float) -> np.ndarray[Any, Any]:
    """Logprobs of `sampled` from one plain forward pass, in float64: float32's own error is the engine's alone."""
    with torch.no_grad():
        logits = in_float64(policy)(torch.tensor([[*prompt, *sampled]])).logits[0] / (temperature or 1.0)
    logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(list(sampled))[:, None])[:, 0].numpy()


def greedy(policy: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """The likeliest token, one full forward pass each. (`generate` would hold back the end token.)"""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(policy(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@contextmanager
def started(name: str, checkpoint: Path, device: str) -> Iterator[Subject]:
    settings = {"name": name, **ENGINES[name]}
    if name != "sglang_server":
        settings |= {"max_sequences": SEQUENCES, "stream_interval": INTERVAL, "device": device}
        settings |= ON_CUDA.get(name, {}) if device == "cuda" else {}
    with ExitStack() as stack:
        server = None
        if name == "sglang_server":
            server = stack.enter_context(
                sglang_server(checkpoint, max_sequences=SEQUENCES, stream_interval=INTERVAL, device=device)
            )
            settings["server_urls"] = [server.url]
        engine = build_engine(EngineConfig.model_validate(settings), str(checkpoint))
        with asyncio.Runner() as loop:
            subject = Subject(name, engine, load_policy(checkpoint), loop, server)
            yield subject
            subject.run(engine.close())


@pytest.fixture(scope="module")
def checkpoints(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, task: Any, task_config: Any) -> Any:
    """Folders of a policy with tied embeddings, and of one with untied embeddings and grouped heads."""
    model = ModelConfig(
        hidden_size=128, layers=2, heads=4, kv_heads=2, ffn_size=40, context_tokens=64, tied_embeddings=False,
        initializer_range=0.1,
    )  # fmt: skip
    untied = tmp_path_factory.mktemp("untied") / "policy"
    save_policy(new_policy(model, task.tokenizer(), 1), task.tokenizer(), task_config, untied)
    return {"tied": checkpoint, "untied": untied}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names, embeddings = metafunc.config.getoption("--engines").split(","), "tied"
    if metafunc.function is test_untied_embeddings_and_grouped_heads:
        embeddings = "untied"
        names = [name for name in names if name != "sglang_server"]  # it would be the same SGLang once more
    metafunc.parametrize("subject", [(name, embeddings) for name in names], indirect=True, ids=str, scope="module")


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Subject]:
    """One engine for all tests of a policy: it takes SGLang a while to start; one per process at a time."""
    name, embeddings = request.param
    with started(name, checkpoints[embeddings], request.config.getoption("--device")) as subject:
        yield subject


@pytest.fixture(autouse=True)
def row(request: pytest.FixtureRequest, subject: Subject, record_property: Callable[[str, object], None]) -> None:
    """Tell the table which check this was, of which engine, and (while it runs) how far its logprobs were off."""
    subject.record, subject.worst = record_property, 0.0
    record_property("check", request.node.originalname.removeprefix("test_").replace("_", " "))
    record_property("engine", subject.name)


# --- tokens and logprobs ----------------------------------------------------------------------------------------------


def test_greedy_tokens_and_logprobs_equal_transformers(subject: Subject) -> None:
    for prompt in ([5, 6, 7, 8], [30], list(range(2, 42))):
        chunks = subject.one(prompt, 12)
        assert ids_of(chunks) == greedy(subject.policy, prompt, 12)
        subject.compare(prompt, chunks, 1.0)


def test_sampled_logprobs_are_at_the_temperature_over_the_whole_vocabulary(subject: Subject) -> None:
    """Side by side in one batch, greedy ones and truncated ones among them."""
    cases: list[tuple[float, dict[str, Any]]] = [
        (1.0, {}), (0.6, {}), (1.7, {}), (0.0, {}), (1.0, {"top_k": 3}), (0.8, {"top_p": 0.7})
    ]  # fmt: skip
    prompt = [9, 8, 7, 6, 5]
    asked = [subject.request(prompt, 15, temperature, **options) for temperature, options in cases]
    for (temperature, options), chunks in zip(cases, subject.generate(asked), strict=True):
        subject.compare(prompt, chunks, temperature)
        if options.get("top_k"):
            assert_among_the_likeliest(subject.policy, prompt, ids_of(chunks), options["top_k"])


def assert_among_the_likeliest(policy: Any, prompt: Sequence[int], sampled: Sequence[int], k: int) -> None:
    with torch.no_grad():
        logits = policy(torch.tensor([[*prompt, *sampled]])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(k).indices
    assert all(token in row for token, row in zip(sampled, best.tolist(), strict=True))


def test_a_stop_id_ends_a_call_and_is_part_of_it(subject: Subject) -> None:
    prompt = [5, 6, 7, 8]
    tokens = greedy(subject.policy, prompt, 12)
    stop = tokens[3]
    chunks = subject.one(prompt, 12, stop_ids=frozenset({stop}))
    assert ids_of(chunks) == tokens[: tokens.index(stop) + 1]
    assert chunks[-1].finish is FinishReason.STOP


def test_an_end_token_that_was_not_asked_for_does_not_end_a_call(subject: Subject) -> None:
    """Sampled at a high temperature until the checkpoint's own end token comes up in the middle."""
    end, other = subject.policy.config.eos_token_id, 40
    prompt = [11, 12, 13]
    asked = [subject.request(prompt, 80, 5.0, stop_ids=frozenset({other}), seed=i) for i in range(2 * SEQUENCES)]
    results = subject.generate(asked)
    for chunks in results:
        ids = ids_of(chunks)
        assert (ids[-1] == other) == (chunks[-1].finish is FinishReason.STOP)
        assert len(ids) == 80 or ids[-1] == other
        subject.compare(prompt, chunks, 5.0)
    assert any(end in ids_of(chunks)[:-1] for chunks in results), "the end token never came up: a longer test is needed"


def test_a_seed_gives_the_same_tokens_alone_and_in_company(
    subject: Subject, record_property: Callable[[str, object], None]
) -> None:
    if not subject.engine.capabilities.seeds:
        record_property("n/a", "the engine has no seeds")
        return
    alone = subject.one([9, 8, 7], 20, 1.0, seed=3)
    company = [subject.request([4 + i] * (i + 1), 15, 1.0, seed=i) for i in range(8)]
    crowd = subject.generate([*company, subject.request([9, 8, 7], 20, 1.0, seed=3)])[-1]
    other = subject.one([9, 8, 7], 20, 1.0, seed=4)
    assert ids_of(alone) == ids_of(crowd)
    assert ids_of(alone) != ids_of(other)


def test_a_hundred_requests_of_mixed_lengths(subject: Subject) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, VOCAB, rng.integers(1, 60)).tolist() for _ in range(100)]
    lengths = rng.integers(1, 25, 100).tolist()
    asked = [
        subject.request(p, n, 1.0 if i % 2 else 0.0) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    for i, (prompt, length, chunks) in enumerate(zip(prompts, lengths, subject.generate(asked), strict=True)):
        assert len(ids_of(chunks)) == length
        if i % 7 == 0:
            subject.compare(prompt, chunks, 1.0)
    subject.run(subject.until_idle())


def test_tokens_stream_before_the_end(subject: Subject) -> None:
    chunks = subject.one([5, 6, 7], 23)
    sizes = [len(c.token_ids) for c in chunks]
    assert sum(sizes) == 23
    assert len(sizes) >= 3
    assert [c.finish for c in chunks] == [None] * (len(chunks) - 1) + [FinishReason.LENGTH]


def test_a_context_overflow_is_named_and_a_full_context_ends_a_call(subject: Subject) -> None:
    context = subject.engine.context_tokens
    assert context == subject.policy.config.max_position_embeddings
    with pytest.raises(AprError, match="leaves no room"):
        subject.one([5] * context)
    prompt = [5, 6, 7] * (context // 3)
    chunks = subject.one(prompt[: context - 1], 10)
    assert (len(ids_of(chunks)), chunks[-1].finish) == (1, FinishReason.LENGTH)
    chunks = subject.one(prompt[: context - 12], 100)
    assert (len(ids_of(chunks)), chunks[-1].finish) == (12, FinishReason.LENGTH)
    subject.compare(prompt[: context - 12], chunks, 1.0)


@pytest.mark.parametrize(
    ("prompt", "what"), [([], "empty prompt"), ([2, VOCAB], "outside 0..56"), ([-1], "outside")], ids=str
)
def test_a_prompt_that_cannot_run_is_refused(subject: Subject, prompt: list[int], what: str) -> None:
    with pytest.raises(AprError, match=what):
        subject.one(prompt)


def test_an_engine_that_slept_draws_the_same_and_takes_nothing_meanwhile(
    subject: Subject, record_property: Callable[[str, object], None]
) -> None:
    """With the weights that it had, none of the KV that it had, and the next update as if nothing had been."""
    if not subject.engine.capabilities.sleeps:
        with pytest.raises(AprError, match="cannot sleep"):
            subject.run(subject.engine.sleep())
        record_property("n/a", "the engine cannot sleep here")
        return
    prompt = list(range(5, 45))
    update = subject.update(1.01)
    subject.run(subject.engine.update_weights(update))
    subject.adopt(update)
    before = subject.one(prompt, 20)
    later = subject.update(1.01)
    for _ in range(2):
        subject.run(subject.engine.sleep())
        with pytest.raises(EngineAsleep):
            subject.one(prompt)
        with pytest.raises(EngineAsleep):
            subject.run(subject.engine.update_weights(later))
        subject.run(subject.engine.sleep())  # which changes nothing
        subject.run(subject.engine.wake())
        subject.run(subject.engine.wake())
        after = subject.one(prompt, 20)
        assert ids_of(after) == ids_of(before)
        assert (after[0].cached_tokens, after[0].version) == (0, update.version)
        subject.compare(prompt, after, 0.0)
    subject.run(subject.engine.update_weights(later))
    subject.adopt(later)
    subject.compare(prompt, subject.one(prompt, 20), 0.0)


# --- aborts and order -------------------------------------------------------------------------------------------------


async def first_chunk(engine: Engine, asked: GenerateRequest, seen: asyncio.Event) -> list[Chunk]:
    chunks = []
    async for chunk in engine.generate(asked):
        chunks.append(chunk)
        seen.set()
    return chunks


def test_one_abort_ends_a_subtree_and_no_stranger(subject: Subject) -> None:
    """Running and waiting ones alike; what was sampled before comes back, and the places are free again."""

    async def main() -> None:
        engine, seen = subject.engine, asyncio.Event()
        subtree = [
            asyncio.create_task(first_chunk(engine, subject.request([5, 6, i], 700, 1.0, f"tree-1/{i:03d}"), seen))
            for i in range(2, 2 + SEQUENCES + 3)
        ]
        strangers = [
            asyncio.create_task(collect(engine, subject.request([7, 8], 3, name=n))) for n in ("tree-10/", "x")
        ]
        await seen.wait()
        await engine.abort("tree-1/")
        ended = await asyncio.gather(*subtree)
        assert all(chunks[-1].finish is FinishReason.ABORTED for chunks in ended)
        assert all(len(ids_of(chunks)) < 700 for chunks in ended)
        assert any(ids_of(chunks) for chunks in ended)
        for chunks in await asyncio.gather(*strangers):
            assert chunks[-1].finish is FinishReason.LENGTH, "a prefix hit a stranger"
        await subject.until_idle()

    subject.run(main())


def test_closing_or_cancelling_a_stream_frees_its_place_and_its_memory(subject: Subject) -> None:
    """A clock that began before them still runs when those that are abandoned have made room for as many more as fit:
    every step gives every running request a token, and they are as long as the clock."""
    tokens, full = 700, subject.engine.context_tokens - 8

    def long(first: int) -> GenerateRequest:
        return subject.request([first] * 60, tokens, 1.0)

    async def close(first: int) -> None:
        async with aclosing(subject.engine.generate(long(first))) as stream:
            await anext(stream)

    async def cancel(first: int, begun: bool) -> None:
        seen = asyncio.Event()
        task = asyncio.create_task(first_chunk(subject.engine, long(first), seen))
        await (seen.wait() if begun else asyncio.sleep(0.05))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def main() -> list[list[Chunk]]:
        seen = asyncio.Event()
        clock = asyncio.create_task(first_chunk(subject.engine, subject.request([3, 1, 4], tokens, 1.0), seen))
        await seen.wait()
        abandoned = [w for i in range(SEQUENCES) for w in (close(5 + i), cancel(20 + i, True), cancel(40 + i, False))]
        await asyncio.gather(*abandoned)
        asked = [subject.request([i] * full, 8) for i in range(5, 4 + SEQUENCES)]
        chunks = await asyncio.gather(*(collect(subject.engine, one) for one in asked))
        assert not clock.done(), "what was abandoned was decoded on, or kept its memory"
        clock.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await clock
        await subject.until_idle()
        return list(chunks)

    assert [len(ids_of(chunks)) for chunks in subject.run(main())] == [8] * (SEQUENCES - 1)


def test_a_higher_priority_is_admitted_first(subject: Subject) -> None:
    """With every place taken, a resumed parent that came last starts before the roots that wait."""

    async def main() -> list[str]:
        engine, order = subject.engine, []
        seen = asyncio.Event()
        busy = [
            asyncio.create_task(first_chunk(engine, subject.request([5, 6, i], 60, 1.0), seen))
            for i in range(2, 2 + SEQUENCES)
        ]
        await seen.wait()

        async def one(name: str, priority: int) -> None:
            async for chunk in engine.generate(subject.request([7, 8, 9], 1, name=name, priority=priority)):
                if chunk.token_ids:
                    order.append(name)

        waiting = [asyncio.create_task(one(f"root-{i}", 0)) for i in range(2)]
        await asyncio.sleep(0.02)
        waiting.append(asyncio.create_task(one("resumed", 1)))
        await asyncio.gather(*busy, *waiting)
        return order

    order = subject.run(main())
    assert sorted(order) == ["resumed", "root-0", "root-1"]
    assert order[0] == "resumed"


# --- the prefix cache -------------------------------------------------------------------------------------------------


def test_a_resumed_parent_prefills_only_what_is_new(subject: Subject) -> None:
    """Spawn and join: the parent's own tokens up to the spawn block, then the joined messages."""
    prompt = list(range(2, 42)) * 3
    made = ids_of(subject.one(prompt, 10))
    children = [subject.request([50 - i, 51, 52], 5) for i in range(3)]
    subject.generate(children)
    again = [*prompt, *made[:6], (made[6] + 1) % VOCAB, 41, 42]
    chunks = subject.one(again, 5)
    assert chunks[0].cached_tokens == subject.whole_blocks(len(prompt) + 6) > 0
    subject.compare(again, chunks, 1.0)


def test_children_after_a_warm_prompt_share_it(subject: Subject) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4] * 2
    subject.one(prompt, 1)
    for chunks in subject.generate([subject.request([*prompt, 50 + i], 3) for i in range(4)]):
        assert chunks[0].cached_tokens == subject.whole_blocks(len(prompt)) > 0


# --- weights ----------------------------------------------------------------------------------------------------------


def test_after_an_update_tokens_are_those_of_the_new_weights_and_no_old_kv_is_served(subject: Subject) -> None:
    prompt = list(range(3, 43))
    subject.one(prompt, 10)
    assert subject.one(prompt, 1)[0].cached_tokens > 0, "nothing was cached: the test would prove nothing"
    update = subject.update(1.15)
    subject.run(subject.engine.update_weights(update))
    subject.adopt(update)
    chunks = subject.one(prompt, 10, 1.0)
    subject.compare(prompt, chunks, 1.0)
    assert chunks[0].cached_tokens == 0, "KV of old weights was served"
    assert {c.version for c in chunks} == {update.version}


def test_an_update_in_flight_is_exact_on_both_sides(subject: Subject) -> None:
    """KV is recomputed, so each token is of the version that its chunk names, given all tokens before it."""
    prompts = [[5, 6, 7, 8], list(range(2, 30)), [44]]
    update = subject.update(0.9)

    async def main() -> list[list[Chunk]]:
        seen = [asyncio.Event() for _ in prompts]
        tasks = [
            asyncio.create_task(first_chunk(subject.engine, subject.request(p, 120, 1.0), event))
            for p, event in zip(prompts, seen, strict=True)
        ]
        for event in seen:
            await event.wait()
        await subject.engine.update_weights(update)
        late = collect(subject.engine, subject.request([9, 9, 9], 5, 1.0))
        return [*await asyncio.gather(*tasks), await late]

    *results, late = subject.run(main())
    old = update.version.counter - 1
    parts = [[c for c in chunks if c.version.counter == old] for chunks in results]
    assert all(parts)
    for prompt, chunks, before in zip(prompts, results, parts, strict=True):
        assert len(ids_of(chunks)) == 120
        assert [c.version.counter for c in chunks] == sorted(c.version.counter for c in chunks)
        subject.compare_part(prompt, ids_of(chunks), before, 1.0)
    subject.adopt(update)
    for prompt, chunks, before in zip(prompts, results, parts, strict=True):
        after = [c for c in chunks if c.version == update.version]
        assert ids_of(after), "it had ended before the update"
        subject.compare_part(prompt, ids_of(chunks), after, 1.0, start=len(ids_of(before)))
    assert {c.version for c in late} == {update.version}


def test_an_update_that_keeps_the_kv_says_which_weights_it_is_of(
    subject: Subject, record_property: Callable[[str, object], None]
) -> None:
    """What runs goes on from old KV, exactly, and says so; what comes later meets none of it."""
    if not subject.engine.capabilities.keeps_kv:
        record_property("n/a", "the engine computes all KV again")
        return
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
    subject.one(prompt, 1)
    update = subject.update(0.9)

    async def main() -> tuple[list[Chunk], list[Chunk]]:
        seen = asyncio.Event()
        running = asyncio.create_task(first_chunk(subject.engine, subject.request(prompt, 120, 1.0), seen))
        await seen.wait()
        await subject.engine.update_weights(update, keep_kv=True)
        late = asyncio.create_task(collect(subject.engine, subject.request([*prompt, 50], 10, 1.0)))
        return await running, await late

    chunks, late = subject.run(main())
    before = [c for c in chunks if c.version != update.version and c.token_ids]
    after = [c for c in chunks if c.version == update.version and c.token_ids]
    assert before, "the update came before the first token"
    assert after, "it had ended before the update"
    assert {c.kv_version for c in before} == {None}
    assert {c.kv_version for c in after} == {before[0].version}
    subject.compare_part(prompt, ids_of(chunks), before, 1.0)
    old = mixed_kv(subject.policy, [*prompt, *ids_of(before)][:-1])
    subject.adopt(update)
    found = np.array(logprobs_of(after))
    expected = reference_from(subject.policy, old, [ids_of(before)[-1], *ids_of(after)])
    subject.record("delta", float(np.abs(found - expected).max()))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert late[0].cached_tokens == 0, "KV of old weights was served"
    assert {c.kv_version for c in late} == {None}
    subject.compare([*prompt, 50], late, 1.0)


def mixed_kv(policy: Any, ids: Sequence[int]) -> Any:
    """The policy's KV of some tokens."""
    with torch.no_grad():
        return in_float64(policy)(torch.tensor([list(ids)]), use_cache=True).past_key_values


def reference_from(policy: Any, kv: Any, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """Logprobs of all but the first of `ids`, which follow what the KV holds."""
    with torch.no_grad():
        logits = in_float64(policy)(torch.tensor([list(ids)]), past_key_values=kv, use_cache=True).logits[0]
    logprobs = torch.log_softmax(logits, -1)[:-1]
    return logprobs.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].numpy()


def test_an_abort_ends_a_request_that_an_update_interrupted(subject: Subject) -> None:
    update = subject.update(1.0)

    async def main() -> list[Chunk]:
        seen = asyncio.Event()
        task = asyncio.create_task(first_chunk(subject.engine, subject.request([5, 6], 700, 1.0, "held/"), seen))
        await seen.wait()
        await subject.engine.update_weights(update)
        await subject.engine.abort("held/")
        return await task

    chunks = subject.run(main())
    subject.adopt(update)
    assert chunks[-1].finish is FinishReason.ABORTED
    assert len(logprobs_of(chunks)) == len(ids_of(chunks)) < 700


def broken(update: WeightUpdate, how: str) -> WeightUpdate:
    specs, flat = list(update.specs), update.flat.copy()
    if how == "stale":
        return replace(update, version=replace(update.version, counter=update.version.counter - 1))
    if how == "missing":
        specs.pop(3)
    elif how == "unknown":
        specs[3] = replace(specs[3], name="model.extra")
    elif how == "shape":
        specs[0] = TensorSpec(specs[0].name, specs[0].shape[::-1], specs[0].offset)
    elif how == "nan":
        flat[17] = np.nan
    elif how == "infinite":
        flat[-1] = np.inf
    elif how == "dtype":
        return replace(update, flat=flat.astype(np.float64))
    elif how == "short":
        flat = flat[:-1]
    elif how == "twice":
        specs.append(specs[0])
    elif how == "checksum":
        flat[5] += 1
        return replace(update, flat=flat)
    return replace(update, specs=tuple(specs), flat=flat, checksum=checksum(flat))


FAULTS = {
    "stale": "already runs",
    "missing": "is missing",
    "unknown": "is unknown|is missing",
    "shape": "has shape",
    "nan": "not finite",
    "infinite": "not finite",
    "dtype": "float64",
    "short": "buffer holds",
    "twice": "named twice",
    "checksum": "checksum",
}


def test_a_faulty_update_is_refused_before_a_byte_is_applied(subject: Subject) -> None:
    """Stale, partial, of another shape, not finite: the policy stays the same, and the KV cache too."""
    prompt = list(range(10, 50))
    before = subject.one(prompt, 10)
    version = subject.engine.version
    update = subject.update(1.3)
    for how, what in FAULTS.items():
        with pytest.raises(WeightsRejected, match=what):
            subject.run(subject.engine.update_weights(broken(update, how)))
    subject.counter -= 1
    after = subject.one(prompt, 10)
    assert after[0].cached_tokens == subject.whole_blocks(len(prompt) - 1) > 0
    assert (ids_of(before), version) == (ids_of(after), subject.engine.version)
    subject.compare(prompt, after, 1.0)


# --- thread trees -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A problem that is its own prompt."""

    key: str
    prompt: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {}


class Splitting:
    """A protocol for an untrained policy: half the vocabulary stops a call, and a root's first two calls spawn."""

    stop_ids = frozenset(range(30, VOCAB))
    max_depth = 1

    def root_prompt(self, problem: Any, budget: int | None = None) -> tuple[int, ...]:
        return problem.prompt

    def forced_replacement(self, token_id: int) -> int | None:
        return None

    def read_call(self, context: Sequence[int], sampled: Sequence[int], depth: int) -> SpawnRequest | ThreadEnd:
        if depth == 0 and len(context) < 30:
            children = tuple(ChildSpec((*sampled[-2:], 20 + i, 21, 22), str(i)) for i in range(3))
            return SpawnRequest(children, len(sampled))
        return ThreadEnd(Outcome.ANSWERED)

    def read_child(self, context: Sequence[int], sampled: Sequence[int]) -> ChildResult:
        return ChildResult(JoinOutcome.SOLVED, "".join(chr(65 + i) for i in sampled))

    def join_ids(self, request: SpawnRequest, results: Sequence[ChildResult], depth: int) -> tuple[int, ...]:
        return tuple(ord(r.message[:1] or "A") - 65 for r in results) + (7,) * 10

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def run_trees(subject: Subject, numbers: range) -> None:
    bounds = BoundsConfig(max_call_tokens=40, max_tree_tokens=400, cancel_on_success=False)

    async def one(number: int) -> ThreadTree:
        prompt = (10, 11, 12, 2 + number % 50, 2 + number // 50)
        ask = TreeRequest(Number(str(number), prompt), seed=number)  # type: ignore[arg-type]
        cut = bounds.model_copy(update={"cancel_on_success": number % 4 == 0})
        return await run_tree(subject.engine, Splitting(), ask, cut, tree_id=f"{subject.requests}-tree-{number:06d}")

    async def main() -> list[ThreadTree]:
        trees = list(await asyncio.gather(*(one(n) for n in numbers)))
        await subject.until_idle()
        return trees

    sampled = subject.engine.stats().sampled_tokens
    trees = subject.run(main())
    assert [call.error for tree in trees for call in tree.calls if call.error] == []
    assert sum(len(t.calls) for t in trees) > 3 * len(trees)
    assert sum(t.total_tokens for t in trees) <= subject.engine.stats().sampled_tokens - sampled
    for tree in trees[:: len(trees) // 4]:
        for call in tree.calls:
            if call.sampled_ids:
                expected = reference(subject.policy, call.prompt_ids, call.sampled_ids, 1.0)
                np.testing.assert_allclose(call.logprobs, expected, atol=TOLERANCE)


def test_three_hundred_thread_trees_leave_nothing_behind(subject: Subject) -> None:
    """No request, no KV, and after the first hundred no more memory in any process."""
    run_trees(subject, range(100))
    before = subject.resident_bytes()
    for first in (100, 200):  # as many at once as before: more of them take more memory
        run_trees(subject, range(first, first + 100))
    grown = {pid: now - before[pid] for pid, now in subject.resident_bytes().items()}
    assert max(grown.values()) < GROWTH_BYTES, grown


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_thousand_thread_trees_at_once_leave_nothing_behind(subject: Subject) -> None:
    run_trees(subject, range(1000))


# --- another model ----------------------------------------------------------------------------------------------------


def test_untied_embeddings_and_grouped_heads(subject: Subject) -> None:
    prompt = [5, 6, 7, 8]
    chunks = subject.one(prompt, 12)
    assert ids_of(chunks) == greedy(subject.policy, prompt, 12)
    subject.compare(prompt, chunks, 1.0)
    update = subject.update(1.2)
    subject.run(subject.engine.update_weights(update))
    subject.adopt(update)
    subject.compare(prompt, subject.one(prompt, 12, 0.7), 0.7)
