"""TorchEngine against transformers, and its own promises."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_ray.core.engine import Chunk, GenerateRequest, SamplingParams
from apr_ray.engines.torch_engine import TorchEngine
from apr_ray.engines.torch_engine.sampler import sample, uniforms
from apr_ray.model.llama import load_policy

VOCAB = 57


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Any:
    return load_policy(checkpoint)


def engine_of(checkpoint: Path, **options: Any) -> TorchEngine:
    return TorchEngine.from_checkpoint(
        checkpoint, **{"max_sequences": 6, "cache_slots": 4, "stream_interval": 5, **options}
    )


def request(
    name: str, prompt: Sequence[int], tokens: int = 12, temperature: float = 0.0, **options: Any
) -> GenerateRequest:
    priority = options.pop("priority", 0)
    return GenerateRequest(name, tuple(prompt), SamplingParams(temperature, max_new_tokens=tokens, **options), priority)


async def collect(engine: TorchEngine, asked: GenerateRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(asked)]


def run_all(engine: TorchEngine, requests: Sequence[GenerateRequest]) -> list[list[Chunk]]:
    async def main() -> list[list[Chunk]]:
        return list(await asyncio.gather(*(collect(engine, r) for r in requests)))

    return asyncio.run(main())


def ids_of(chunks: Sequence[Chunk]) -> list[int]:
    return [i for c in chunks for i in c.token_ids]


def logprobs_of(chunks: Sequence[Chunk]) -> list[float]:
    return [lp for c in chunks for lp in c.logprobs]


def reference(policy: Any, prompt: Sequence[int], sampled: Sequence[int], temperature: float) -> np.ndarray[Any, Any]:
    """Logprobs of `sampled` from one plain forward pass, in float32."""
    with torch.no_grad():
        logits = policy(torch.tensor([[*prompt, *sampled]])).logits[0] / temperature
    logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(list(sampled))[:, None])[:, 0].numpy()


def greedy(policy: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """The likeliest token, one full forward pass each. (`generate` would hold back the end token.)"""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(policy(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_tokens_and_logprobs_equal_transformers_over_batch_mixes(
    checkpoint: Path, policy: Any, data: st.DataObject
) -> None:
    """Contract 2: more requests than rows, ragged lengths, shared prefixes, temperatures side by side."""
    engine = engine_of(checkpoint)
    shared = data.draw(st.lists(st.integers(2, VOCAB - 1), max_size=12))
    prompts = data.draw(st.lists(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=40), min_size=1, max_size=10))
    prompts = [shared + p if i % 2 else p for i, p in enumerate(prompts)]
    temperatures = [data.draw(st.sampled_from([0.0, 1.0, 0.6])) for _ in prompts]
    lengths = [data.draw(st.integers(1, 20)) for _ in prompts]
    asked = [
        request(f"r{i}", p, n, t, seed=i)
        for i, (p, n, t) in enumerate(zip(prompts, lengths, temperatures, strict=True))
    ]
    for prompt, length, temperature, chunks in zip(prompts, lengths, temperatures, run_all(engine, asked), strict=True):
        sampled = ids_of(chunks)
        assert len(sampled) == length
        expected = reference(policy, prompt, sampled, temperature or 1.0)
        np.testing.assert_allclose(logprobs_of(chunks), expected, atol=1e-4)
        if temperature == 0:
            assert sampled == greedy(policy, prompt, length)
    assert engine.stats().active_requests == 0
    assert not engine.by_id


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


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).repeat(20_000, 1)
    draws = uniforms(np.arange(20_000, dtype=np.uint64), np.full(20_000, 7, dtype=np.uint64))
    tokens, logprobs = sample(logits, [SamplingParams(0.5)] * 20_000, draws)
    expected = torch.softmax(logits[0] / 0.5, -1).numpy()
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 20_000, expected, atol=0.012)
    np.testing.assert_allclose(np.exp(logprobs[:50]), expected[tokens[:50]], atol=1e-6)


def test_top_k_and_top_p_keep_the_likeliest_tokens() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(4000, 1)
    draws = uniforms(np.arange(4000, dtype=np.uint64), np.zeros(4000, dtype=np.uint64))
    for params, kept in (
        (SamplingParams(top_k=2), {0, 1}),
        (SamplingParams(top_p=0.7), {0, 1}),
        (SamplingParams(top_p=0.6), {0}),
    ):
        tokens, logprobs = sample(logits, [params] * 4000, draws)
        assert set(tokens) == kept
        whole = torch.log_softmax(logits[0], -1)
        assert logprobs[0] == pytest.approx(float(whole[tokens[0]]), abs=1e-6)


def test_uniforms_are_uniform_and_independent_of_company() -> None:
    seeds, counters = np.arange(50_000, dtype=np.uint64), np.zeros(50_000, dtype=np.uint64)
    draws = uniforms(seeds, counters)
    assert abs(draws.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02
    assert draws.min() >= 0
    assert draws.max() < 1
    assert uniforms(seeds[7:8], counters[7:8])[0] == draws[7]
