"""Requests to the embedded engine, and plain forward passes to hold its answers against."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apr_ray.core.engine import Chunk, GenerateRequest, SamplingParams
from apr_ray.engines.torch_engine import TorchEngine
from apr_ray.engines.torch_engine.sampler import uniforms


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


class CheckedEngine(TorchEngine):
    """Asserts, at every step, what the engine's module promises of its rows."""

    cohorts_seen = 0

    def _forward(self) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
        rows, n = self.rows, len(self.rows.active)
        cohorts, lengths = rows.cohorts[:n], rows.lengths[:n]
        assert (np.diff(cohorts) <= 0).all()
        assert [running.row for running in rows.active] == list(range(n))
        for running in rows.active:
            params, first = running.request.sampling, len(running.request.prompt_ids)
            assert rows.ends[running.row] == first + running.max_new
            assert set(rows.stop_ids[running.row]) - {-1} == set(params.stop_ids)
            places = np.arange(first, first + running.max_new, dtype=np.uint64)
            draws = uniforms(np.array([params.seed], dtype=np.uint64), places)
            assert (rows.draws[running.row, first : rows.ends[running.row]] == draws).all()
        for cohort in np.unique(cohorts):
            assert np.ptp(lengths[cohorts == cohort]) < rows.cohort_tokens
        self.cohorts_seen = max(self.cohorts_seen, len(np.unique(cohorts)))
        count = lengths - rows.kv_lengths[:n]
        afresh = rows._cut(count)
        result = super()._forward()
        if count.sum() == n:
            assert rows._decoding == afresh
        return result
