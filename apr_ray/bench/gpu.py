"""The embedded engine and the learner on one GPU: their numbers against float32, then their speed.

`ratio` is the learner's share, in bfloat16, of what a square product reaches on the same GPU: its utilisation on the
paper's model of 228 M parameters. Every part's numbers are also written to stderr as soon as they are known.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

import numpy as np
import torch

from apr_ray.bench.learner import RATE, STEP, batch_of, free_port, step_flops
from apr_ray.bench.recording import fresh_policy, fresh_weights, record
from apr_ray.bench.timing import Result, in_fresh_process, turns
from apr_ray.config import Config, OptimizerConfig, load_config
from apr_ray.core.engine import GenerateRequest, SamplingParams
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import ThreadTree
from apr_ray.engines.torch_engine import TorchEngine
from apr_ray.learner.device import init_process_group
from apr_ray.learner.trainer import Trainer
from apr_ray.rl.losses import token_logprobs

PAPER_MODEL = (
    *("model.hidden_size=1024", "model.layers=18", "model.heads=16", "model.ffn_size=2752"),
    "learner.micro_batch_tokens=16384",  # activations of more would not fit beside float32's
)
SEQUENCES = (1, 8, 64, 256, 512)
NEW_TOKENS = 100


def run(learner_trees: int = 64, sequences: Sequence[int] = SEQUENCES, repeats: int = 2) -> Result:
    """See the module. One GPU, one learner rank; trees of four numbers by the solver, with its lengths; the engine's
    model has 14 M parameters (preset `four-numbers`)."""
    if not torch.cuda.is_available():
        raise AprError(f"bench gpu needs a GPU, torch {torch.__version__} finds none", "Run it where there is one")
    result: Result = in_fresh_process(_measure, learner_trees, tuple(sequences), repeats)
    return result


def _measure(learner_trees: int, sequences: Sequence[int], repeats: int) -> Result:
    torch.set_num_threads(4)
    small = _config(())
    trees = record(learner_trees, small).trees
    prompts = [call.prompt_ids for call in trees[0].calls + trees[1].calls + trees[2].calls][:16]
    init_process_group(0, 1, "127.0.0.1", free_port())
    parts = itertools.chain(
        _learner(_config(PAPER_MODEL), trees, repeats),
        (_engine_numbers(small, prompts, dtype) for dtype in ("float32", "bfloat16")),
        (_engine_speed(small, count) for count in sequences),
    )
    result: Result = {"gpu": torch.cuda.get_device_name()}
    for part in parts:
        sys.stderr.write(f"{part}\n")
        result |= part
    return {"ratio": result["learner_bf16_share_of_peak"]} | result


def _config(overrides: Sequence[str]) -> Config:
    presets = files("apr_ray") / "presets"
    return load_config([str(presets / "four-numbers.yaml"), str(presets / "gpu.yaml")], overrides)


# --- the embedded engine ----------------------------------------------------------------------------------------------


def _decode(config: Config, dtype: str, prompts: Sequence[Sequence[int]], tokens: int, repeats: int) -> _Decoded:
    """Every prompt at once, `repeats` times over, once more to warm up."""
    gc.collect()  # of the one before, whose KV takes much
    torch.cuda.empty_cache()
    engine = TorchEngine(*fresh_weights(config), max_sequences=len(prompts), cache_slots=0, device="cuda", dtype=dtype)

    async def one(name: str, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
        sampling = SamplingParams(max_new_tokens=tokens, seed=len(prompt))
        chunks = [chunk async for chunk in engine.generate(GenerateRequest(name, tuple(prompt), sampling))]
        return [i for c in chunks for i in c.token_ids], [lp for c in chunks for lp in c.logprobs]

    async def all_of_them(turn: int) -> list[tuple[list[int], list[float]]]:
        return list(await asyncio.gather(*(one(f"{turn}-{n:04d}", p) for n, p in enumerate(prompts))))

    asyncio.run(all_of_them(0))
    start, drawn = time.perf_counter(), []
    for turn in range(repeats):
        drawn = asyncio.run(all_of_them(1 + turn))
    seconds = time.perf_counter() - start
    return _Decoded(drawn, repeats * len(prompts) * tokens / seconds)


@dataclass(frozen=True, slots=True)
class _Decoded:
    drawn: list[tuple[list[int], list[float]]]
    tokens_per_s: float


def _engine_numbers(config: Config, prompts: Sequence[Sequence[int]], dtype: str) -> Result:
    """What the engine says of tokens that it drew, against transformers in float32 on the CPU."""
    policy = fresh_policy(config).eval()
    differences: list[float] = []
    for prompt, (ids, logprobs) in zip(prompts, _decode(config, dtype, prompts, NEW_TOKENS, 1).drawn, strict=True):
        tokens = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            expected = token_logprobs(policy(input_ids=tokens, use_cache=False).logits, tokens)[0, len(prompt) :]
        differences += (expected - torch.tensor(logprobs)).abs().tolist()
    return {
        f"engine_{dtype}_mean_delta_logprob": float(np.mean(differences)),
        f"engine_{dtype}_max_delta_logprob": float(np.max(differences)),
    }


def _engine_speed(config: Config, sequences: int) -> Result:
    """Sampled tokens/s of so many requests at once, all begun together."""
    prompts = [[2 + (n + k) % 50 for k in range(32)] for n in range(sequences)]
    return {f"engine_{sequences}_tokens_per_s": _decode(config, "bfloat16", prompts, NEW_TOKENS, 2).tokens_per_s}


# --- the learner ------------------------------------------------------------------------------------------------------


def _learner(config: Config, trees: Sequence[ThreadTree], repeats: int) -> Iterator[Result]:
    """GRPO steps of the paper's model: gradients' norm and entropy in bfloat16 over float32's; tokens/s; memory."""
    batch = batch_of(trees)
    few = batch_of(trees[:8])
    trainer = Trainer(fresh_policy(config), config.learner, OptimizerConfig(learning_rate=RATE))
    exact = trainer.grpo_step(few, STEP, 0.0)[0]  # a rate of 0: the weights stay
    rough = trainer.grpo_step(few, replace(STEP, bf16=True), 0.0)[0]
    yield {
        "learner_parameters": float(sum(p.numel() for p in trainer.policy.parameters())),
        "learner_batch_tokens": float(len(batch.tokens)),
        "learner_bf16_grad_norm_over_fp32": rough.grad_norm / exact.grad_norm,
        "learner_bf16_entropy_over_fp32": rough.entropy / exact.entropy,
    }
    peaks = {"bf16": matmul_peak(torch.bfloat16), "fp32": matmul_peak(torch.float32)}
    tokens = len(batch.tokens)
    for name, peak in peaks.items():
        step = replace(STEP, bf16=name == "bf16")
        torch.cuda.reset_peak_memory_stats()
        best, padded = float("inf"), 0
        for turn in turns(f"learner, {name}", (repeats if name == "bf16" else 1) + 1):
            start = time.perf_counter()
            padded = trainer.grpo_step(batch, step, RATE)[0].padded_tokens  # its sums wait for the GPU
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start) if turn else best
        rate = step_flops(batch, config, trainer.policy) / best
        yield {
            f"learner_{name}_tokens_per_s": tokens / best,
            f"learner_{name}_tflops": rate / 1e12,
            f"learner_{name}_share_of_peak": rate / peak,
            f"matmul_{name}_peak_tflops": peak / 1e12,
            f"learner_{name}_peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
            "learner_padding_share": 1 - tokens / padded,
        }


def matmul_peak(dtype: torch.dtype, size: int = 8192, repeats: int = 20) -> float:
    """Floating-point operations per second of a square product on the GPU: the best of many."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in "ab")
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
