"""TorchEngine against transformers, and its own promises."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_requests import CheckedEngine, collect, engine_of, greedy, ids_of, logprobs_of, reference, request, run_all

from apr_ray.core.engine import Chunk, FinishReason, SamplingParams
from apr_ray.core.errors import AprError, EngineAsleep
from apr_ray.engines.torch_engine import TorchEngine
from apr_ray.engines.torch_engine import engine as engine_module
from apr_ray.engines.torch_engine import rows as rows_module
from apr_ray.engines.torch_engine.decoder import Decoder, Span
from apr_ray.engines.torch_engine.rows import passes
from apr_ray.engines.torch_engine.sampler import Sampling, sample, uniforms
from apr_ray.model.llama import load_policy

VOCAB = 57


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Any:
    return load_policy(checkpoint)


@settings(max_examples=12)
@given(st.data())
def test_tokens_and_logprobs_equal_transformers_over_batch_mixes(
    checkpoint: Path, policy: Any, data: st.DataObject
) -> None:
    """Contract 2: more requests than rows, ragged lengths, shared prefixes, temperatures and stop ids side by side."""
    with patch.object(rows_module, "COHORT_TOKENS", {"cpu": data.draw(st.sampled_from([1, 5, 1000]))}):
        check_a_batch_mix(checkpoint, policy, data)


def check_a_batch_mix(checkpoint: Path, policy: Any, data: st.DataObject) -> None:
    engine = CheckedEngine.from_checkpoint(checkpoint, max_sequences=6, cache_slots=4, stream_interval=5)
    shared = data.draw(st.lists(st.integers(2, VOCAB - 1), max_size=12))
    prompts = data.draw(st.lists(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=40), min_size=1, max_size=10))
    prompts = [shared + p if i % 2 else p for i, p in enumerate(prompts)]
    temperatures = [data.draw(st.sampled_from([0.0, 1.0, 0.6])) for _ in prompts]
    lengths = [data.draw(st.integers(1, 20)) for _ in prompts]
    stops = [data.draw(st.frozensets(st.integers(2, VOCAB - 1), max_size=8)) for _ in prompts]
    asked = [
        request(f"r{i}", p, n, t, seed=i, stop_ids=stop)
        for i, (p, n, t, stop) in enumerate(zip(prompts, lengths, temperatures, stops, strict=True))
    ]
    for one, chunks in zip(asked, run_all(engine, asked), strict=True):
        how, sampled = one.sampling, ids_of(chunks)
        assert not how.stop_ids.intersection(sampled[:-1])
        stopped = sampled[-1] in how.stop_ids
        assert len(sampled) <= how.max_new_tokens if stopped else len(sampled) == how.max_new_tokens
        assert chunks[-1].finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)
        expected = reference(policy, one.prompt_ids, sampled, how.temperature or 1.0)
        np.testing.assert_allclose(logprobs_of(chunks), expected, atol=1e-4)
        if how.temperature == 0:
            assert sampled == greedy(policy, one.prompt_ids, len(sampled))
    assert engine.stats().active_requests == 0
    assert not engine.by_id


@pytest.mark.parametrize("deterministic", [False, True])
def test_below_float32_it_computes_in_what_was_asked_for_and_stays_near(
    checkpoint: Path, policy: Any, deterministic: bool
) -> None:
    """bfloat16 has three digits: logprobs differ from float32's by hundredths, not by nothing and not by much."""
    engine = engine_of(checkpoint, dtype="bfloat16", deterministic=deterministic, max_sequences=16)
    prompts = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8, 11, 12]]
    differences: list[float] = []
    for turn in range(2):  # the second one on KV that was kept
        asked = [request(f"r{turn}{i}", p, 20, 1.0, seed=i) for i, p in enumerate(prompts)]
        for prompt, chunks in zip(prompts, run_all(engine, asked), strict=True):
            expected = reference(policy, prompt, ids_of(chunks), 1.0)
            differences += np.abs(logprobs_of(chunks) - expected).tolist()
    assert {engine.decoder.keys.dtype, engine.decoder.embed.dtype} == {torch.bfloat16}
    assert 1e-4 < np.mean(differences) < 0.02
    assert max(differences) < 0.2


def test_rows_of_like_length_attend_together(checkpoint: Path) -> None:
    """Long and short requests come and go at different times, and stand in cohorts of their own all the while."""
    engine = CheckedEngine.from_checkpoint(checkpoint, max_sequences=8, cache_slots=0)
    sizes = [300, 10, 150, 12, 290, 11, 160, 400, 9, 310, 30, 170]
    asked = [request(f"r{i:02d}", [2 + i] * size, 5 + 7 * (i % 5)) for i, size in enumerate(sizes)]
    results = run_all(engine, asked)
    assert [len(ids_of(chunks)) for chunks in results] == [5 + 7 * (i % 5) for i in range(len(sizes))]
    assert engine.cohorts_seen >= 4


def test_what_is_not_resumed_takes_no_cache_slot(checkpoint: Path) -> None:
    engine = engine_of(checkpoint, cache_slots=1)
    prompt = list(range(2, 32))
    child = replace(request("child", [40] * 20, 5), resumes=False)
    run_all(engine, [request("parent-0", prompt, 5)])
    run_all(engine, [child])
    (again,) = run_all(engine, [request("parent-1", [*prompt, 50], 5)])
    assert again[0].cached_tokens == len(prompt)


def test_siblings_share_their_prompts_prefix(checkpoint: Path) -> None:
    engine = engine_of(checkpoint)
    prompt = list(range(2, 32))
    results = run_all(engine, [request("a", [*prompt, 50], 3), *(request(f"b{i}", [*prompt, 51], 3) for i in range(8))])
    assert sum(r[0].cached_tokens >= len(prompt) - 1 for r in results) >= 2


def test_the_cache_never_changes_a_result(checkpoint: Path) -> None:
    rng = np.random.default_rng(0)
    shared = rng.integers(2, 12, 40).tolist()
    prompts = [shared[: rng.integers(1, 40)] + rng.integers(2, 12, 5).tolist() for _ in range(30)]
    asked = [request(f"r{i:02d}", p, 10) for i, p in enumerate(prompts)]
    cached, plain = engine_of(checkpoint, cache_slots=8), engine_of(checkpoint, cache_slots=0)
    assert [ids_of(c) for c in run_all(cached, asked)] == [ids_of(c) for c in run_all(plain, asked)]
    assert cached.stats().cached_tokens > plain.stats().cached_tokens


# --- deterministic mode -----------------------------------------------------------------------------------------------


def bits_of(chunks: Sequence[Chunk]) -> tuple[list[int], list[float]]:
    return ids_of(chunks), logprobs_of(chunks)


@settings(max_examples=6)
@given(st.data())
def test_in_deterministic_mode_company_order_and_cache_change_no_bit(checkpoint: Path, data: st.DataObject) -> None:
    """Contract 7 at the engine: the same request alone, in a crowd that comes and goes, in another order, after others
    that left their prefixes, on an engine with fewer cache slots."""
    shared = data.draw(st.lists(st.integers(2, VOCAB - 1), min_size=5, max_size=12))
    prompts = data.draw(st.lists(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=30), min_size=9, max_size=14))
    asked = [
        request(
            f"r{i}",
            (shared if i % 2 else []) + prompt,
            data.draw(st.integers(1, 20)),
            data.draw(st.sampled_from([1.0, 0.6, 0.0])),
            seed=i,
            top_k=data.draw(st.sampled_from([0, 0, 5])),
            top_p=data.draw(st.sampled_from([1.0, 1.0, 0.9])),
        )
        for i, prompt in enumerate(prompts)
    ]
    engine = engine_of(checkpoint, deterministic=True)
    first = dict(zip([a.request_id for a in asked], map(bits_of, run_all(engine, asked)), strict=True))
    order = data.draw(st.permutations(asked))
    renamed = [replace(a, request_id=f"again-{a.request_id}", priority=i % 3) for i, a in enumerate(order)]
    for a, chunks in zip(order, run_all(engine, renamed), strict=True):
        assert bits_of(chunks) == first[a.request_id], "a second time, with prefixes cached"
    assert engine.stats().cached_tokens > 0
    other = engine_of(checkpoint, deterministic=True, cache_slots=0)
    for a, chunks in zip(order, run_all(other, order), strict=True):
        assert bits_of(chunks) == first[a.request_id], "in another order, without a cache"
    (alone,) = run_all(other, [order[0]])
    assert bits_of(alone) == first[order[0].request_id]


def test_deterministic_mode_draws_from_the_same_policy(checkpoint: Path, policy: Any) -> None:
    engine = engine_of(checkpoint, deterministic=True)
    assert engine.capabilities.deterministic
    assert not engine_of(checkpoint).capabilities.deterministic
    asked = [request(f"r{i}", range(2, 4 + 3 * i), 12, 1.0, seed=i) for i in range(8)]
    for a, chunks in zip(asked, run_all(engine, asked), strict=True):
        expected = reference(policy, a.prompt_ids, ids_of(chunks), 1.0)
        np.testing.assert_allclose(logprobs_of(chunks), expected, atol=1e-4)


def test_deterministic_mode_refuses_a_machine_whose_rows_differ(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apr_ray.engines.torch_engine.decoder import Decoder

    right = Decoder.forward_fixed

    def wrong(self: Decoder, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        logits = right(self, tokens, start).clone()
        logits[-1] *= 1 + 2**-23
        return logits

    monkeypatch.setattr(Decoder, "forward_fixed", wrong)
    with pytest.raises(AprError, match="not computed alike"):
        engine_of(checkpoint, deterministic=True)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).repeat(20_000, 1)
    draws = uniforms(np.arange(20_000, dtype=np.uint64), np.full(20_000, 7, dtype=np.uint64))
    tokens, logprobs = sample(logits, Sampling.of([SamplingParams(0.5)] * 20_000), draws)
    expected = torch.softmax(logits[0] / 0.5, -1).numpy()
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 20_000, expected, atol=0.012)
    np.testing.assert_allclose(logprobs[:50].exp(), np.tile(expected, (50, 1)), atol=1e-6)


def test_top_k_and_top_p_keep_the_likeliest_tokens() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(4000, 1)
    draws = uniforms(np.arange(4000, dtype=np.uint64), np.zeros(4000, dtype=np.uint64))
    for params, kept in (
        (SamplingParams(top_k=2), {0, 1}),
        (SamplingParams(top_p=0.7), {0, 1}),
        (SamplingParams(top_p=0.6), {0}),
    ):
        tokens, logprobs = sample(logits, Sampling.of([params] * 4000), draws)
        assert set(tokens.tolist()) == kept
        torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1))


def test_uniforms_are_uniform_and_independent_of_company() -> None:
    seeds, counters = np.arange(50_000, dtype=np.uint64), np.zeros(50_000, dtype=np.uint64)
    draws = uniforms(seeds, counters)
    assert abs(draws.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02
    assert draws.min() >= 0
    assert draws.max() < 1
    assert uniforms(seeds[7:8], counters[7:8])[0] == draws[7]


def test_an_engine_sleeps_once_what_was_aborted_is_gone_and_not_while_a_request_runs(checkpoint: Path) -> None:
    engine = engine_of(checkpoint)
    size = engine.decoder.keys.nbytes

    async def main() -> None:
        running = asyncio.create_task(collect(engine, request("a", [5, 6, 7], 300)))
        left = engine.generate(request("b", [8, 9], 300))
        await anext(left)
        with pytest.raises(AprError, match=r"2 requests run, b first"):
            await engine.sleep()
        assert engine.decoder.keys.nbytes == size
        await left.aclose()  # type: ignore[attr-defined]
        await engine.abort("a")
        await engine.sleep()
        assert not engine.rows.active
        assert (await running)[-1].finish is FinishReason.ABORTED

    asyncio.run(main())
    assert engine.decoder.keys.nbytes == engine.decoder.values.nbytes == 0
    with pytest.raises(EngineAsleep, match="Wake it first"):
        run_all(engine, [request("c", [5])])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}, "rope_type is 'llama3'"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("attention_bias", True, "attention_bias is True"),
    ],
)
def test_a_llama_that_the_decoder_would_compute_otherwise_is_refused(
    key: str, value: object, said: str, checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(AprError, match=rf"{said}, the torch engine knows"):
        TorchEngine.from_checkpoint(other)


def test_a_step_that_fails_is_told_and_ends_what_runs(checkpoint: Path) -> None:
    """Else a worker whose engine fails at once would be the least busy, and be given every tree."""
    said: list[str] = []
    engine = TorchEngine.from_checkpoint(checkpoint, max_sequences=4, cache_slots=0, on_death=said.append)

    def fail() -> None:
        raise RuntimeError("the device is gone")

    engine._step = fail  # type: ignore[method-assign]
    chunks = run_all(engine, [request("a", [5, 6])])
    assert chunks[0][-1].finish is FinishReason.ERROR
    assert said == ["a step failed: RuntimeError: the device is gone"]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_step_that_fails_later_loses_no_token_and_the_next_request_none_either(
    checkpoint: Path, deterministic: bool
) -> None:
    engine = engine_of(checkpoint, deterministic=deterministic, max_sequences=16)
    [whole] = run_all(engine_of(checkpoint, deterministic=deterministic, max_sequences=16), [request("a", [5], 20)])
    draw, steps = engine._draw, 0

    def fail_at_the_eighth(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise RuntimeError("out of memory")
        return draw(*given)

    engine._draw = fail_at_the_eighth  # type: ignore[method-assign]
    [chunks] = run_all(engine, [request("a", [5], 20)])
    assert [len(chunk.token_ids) for chunk in chunks] == [5, 2]
    assert chunks[-1].finish is FinishReason.ERROR
    assert (ids_of(chunks), logprobs_of(chunks)) == (ids_of(whole)[:7], logprobs_of(whole)[:7])
    [again] = run_all(engine, [request("b", [5], 20)])
    assert (ids_of(again), logprobs_of(again)) == (ids_of(whole), logprobs_of(whole))


def test_an_idle_engine_waits_for_what_comes_one_by_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "GATHER_S", 0.1)  # however busy the machine is
    engine = engine_of(checkpoint)

    async def one_by_one() -> None:
        tasks = []
        for number in range(4):
            tasks.append(asyncio.create_task(collect(engine, request(f"r{number}", [5], 3))))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    asyncio.run(one_by_one())
    assert engine.stats().steps == 3


def test_no_forward_pass_is_longer_than_its_bound(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults 14e: all prompts that came in, and all running rows after an update, went in one pass."""
    engine = engine_of(checkpoint, max_sequences=8, cache_slots=0)
    asked = [request(f"r{i}", range(5, 5 + 6 * (1 + i % 4)), 20, 1.0, seed=i) for i in range(8)]
    expected = [ids_of(chunks) for chunks in run_all(engine, asked)]

    monkeypatch.setattr("apr_ray.engines.torch_engine.engine.PASS_TOKENS", 30)
    widths: list[int] = []
    forward = Decoder.forward

    def counted(decoder: Decoder, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        widths.append(len(tokens))
        return forward(decoder, tokens, *others)

    monkeypatch.setattr(Decoder, "forward", counted)
    again = engine_of(checkpoint, max_sequences=8, cache_slots=0)
    assert [ids_of(chunks) for chunks in run_all(again, asked)] == expected
    assert len(widths) > 20, "the prompts took several passes"
    assert max(widths) <= 30


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=6),
    st.integers(1, 100),
)
def test_passes_hold_every_row_once_and_no_more_tokens_than_they_may(spans: list[tuple[int, int]], limit: int) -> None:
    first, given_spans = 0, []
    for rows, width in spans:
        given_spans.append(Span(first, rows, width, width, True))
        first += rows
    found = passes(given_spans, limit)
    rows_of = [row for spans_of in found for s in spans_of for row in range(s.first, s.first + s.rows)]
    assert rows_of == list(range(first))
    for spans_of in found:
        assert spans_of
        assert sum(s.rows * s.width for s in spans_of) <= limit or sum(s.rows for s in spans_of) == 1


def test_what_waits_and_is_aborted_ends_before_a_row_is_free(checkpoint: Path) -> None:
    engine = engine_of(checkpoint, max_sequences=1, cache_slots=0)

    async def main() -> FinishReason | None:
        long = asyncio.create_task(collect(engine, request("long", [5, 6, 7], 500)))
        waits = asyncio.create_task(collect(engine, request("waits", [5, 6], 5)))
        while not engine.waiting or not engine.rows.active:  # noqa: ASYNC110  the engine's own state
            await asyncio.sleep(0)
        await engine.abort("waits")
        chunks = await waits
        assert not long.done()
        await engine.close()
        await long
        return chunks[-1].finish

    assert asyncio.run(main()) is FinishReason.ABORTED


@pytest.mark.parametrize("temperature", [1e-60, 1e-5, float("inf"), float("nan"), -1.0])
def test_a_temperature_that_logits_cannot_be_divided_by_is_refused(temperature: float) -> None:
    with pytest.raises(AprError, match="temperature is"):
        SamplingParams(temperature)
