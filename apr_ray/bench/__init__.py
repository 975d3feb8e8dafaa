"""Measuring one part against a baseline, side by side in one run. Every result has a `ratio`: ours over theirs, in
speed, so that more is better."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from apr_ray.config import ModelConfig
from apr_ray.core.errors import AprError

Result = dict[str, float | str]
REPEATS = 3


def run_bench(name: str) -> Result:
    """Run one bench. Raises AprError for an unknown name."""
    benches: dict[str, Callable[[], Result]] = {"engine": bench_engine, "solver": bench_solver, "sync": bench_sync}
    if name not in benches:
        raise AprError(f"unknown bench {name!r}", f"Choose one of {', '.join(sorted(benches))}")
    return benches[name]()


def bench_engine(sequences: int = 64, prompt_tokens: int = 32, new_tokens: int = 200) -> Result:
    """TorchEngine against `transformers.generate` on one static batch, `apr-tiny`, one thread."""
    import torch

    from apr_ray.config import TaskConfig
    from apr_ray.core.engine import GenerateRequest, SamplingParams
    from apr_ray.engines.torch_engine import TorchEngine
    from apr_ray.model.llama import new_policy, save_policy
    from apr_ray.tasks.countdown.tokenizer import build_tokenizer

    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    policy: Any = new_policy(ModelConfig(), tokenizer, 0)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, tokenizer.vocab_size, (sequences, prompt_tokens), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        save_policy(policy, tokenizer, TaskConfig(), f"{folder}/policy")
        engine = TorchEngine.from_checkpoint(f"{folder}/policy", max_sequences=sequences, cache_slots=0)

    async def ours() -> None:
        async def one(i: int) -> None:
            sampling = SamplingParams(1.0, max_new_tokens=new_tokens, seed=i)
            async for _ in engine.generate(GenerateRequest(f"r{i:04d}", tuple(prompts[i].tolist()), sampling)):
                pass

        await asyncio.gather(*(one(i) for i in range(sequences)))

    def theirs() -> None:
        with torch.inference_mode():
            policy.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                use_cache=True,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
            )

    tokens = sequences * new_tokens
    a, b = _side_by_side(lambda: asyncio.run(ours()), theirs)
    return {
        "ratio": b / a,
        "engine_tokens_per_s": tokens / a,
        "generate_tokens_per_s": tokens / b,
        "sequences": sequences,
    }


def bench_solver(problems: int = 400) -> Result:
    """Demonstrations per second on one core: text alone, and the whole way to token ids, at the paper's settings."""
    import random

    from apr_ray.tasks.countdown.problem import CountdownProblem
    from apr_ray.tasks.countdown.solver import solve_apr
    from apr_ray.tasks.countdown.tokenizer import build_tokenizer

    rng = random.Random(0)
    made = [
        CountdownProblem(tuple(rng.randint(1, 99) for _ in range(4)), rng.randint(10, 100)) for _ in range(problems)
    ]
    tokenizer = build_tokenizer()

    def text() -> None:
        for problem in made:
            solve_apr(problem, 0)

    def tokens() -> None:
        for problem in made:
            trace = solve_apr(problem, 0)
            for prompt, completion in (*trace.segments, *(c for spawned in trace.children for c in spawned)):
                tokenizer.encode(prompt), tokenizer.encode(completion)

    a, b = _side_by_side(text, tokens)
    return {"ratio": a / b, "text_trees_per_s": problems / a, "tokenised_trees_per_s": problems / b}


def bench_sync(megabytes: int = 50, tensors: int = 200) -> Result:
    """One flat buffer through the object store to two actors, against one object per tensor."""
    import numpy as np
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)

    class Reader:
        def take(self, *arrays: Any) -> float:
            return float(sum(a[0] for a in arrays))

    readers: list[Any] = [ray.remote(Reader).options(num_cpus=0.5).remote() for _ in range(2)]
    flat = np.ones(megabytes * 2**18, dtype=np.float32)
    parts = np.array_split(flat, tensors)

    def one() -> None:
        reference = ray.put(flat)
        ray.get([r.take.remote(reference) for r in readers])

    def many() -> None:
        references = [ray.put(part) for part in parts]
        ray.get([r.take.remote(*references) for r in readers])

    try:
        a, b = _side_by_side(one, many)
    finally:
        if started:
            ray.shutdown()
    return {"ratio": b / a, "flat_ms": 1000 * a, "per_tensor_ms": 1000 * b, "megabytes": float(megabytes)}


def _side_by_side(a: Callable[[], None], b: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of each, after one warm-up, taken in turn so that a machine's drift hits both."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(REPEATS + 1):
        for work, into in zip((a, b), times, strict=True):
            start = time.perf_counter()
            work()
            if turn:
                into.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
