"""The embedded engine and the learner on one GPU: their numbers against float32, then their speed.

`ratio` is the learner's share of the GPU's measured peak in bfloat16 (its MFU) on the paper's model of 228 M
parameters. There is no other system in it: what it is compared with is a square product.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from apr_ray.bench.learner import RATE, STEP, batch_of, free_port, step_flops
from apr_ray.bench.recording import Recording, fresh_policy, fresh_weights, record, replay_trees
from apr_ray.bench.timing import Result, in_fresh_process, turns
from apr_ray.config import Config, OptimizerConfig, load_config
from apr_ray.core.errors import AprError
from apr_ray.engines.torch_engine import TorchEngine
from apr_ray.learner.trainer import Trainer, init_process_group
from apr_ray.rl.losses import token_logprobs

PAPER_MODEL = (
    *("model.hidden_size=1024", "model.layers=18", "model.heads=16", "model.ffn_size=2752"),
    "learner.micro_batch_tokens=16384",  # activations of more would not fit beside float32's
)
CONCURRENT = (1, 8, 64, 256, 512)
ENGINE_SECONDS = 10.0
"""Trees are cut off so that a setting takes about this long at most, once warm."""


def run(learner_trees: int = 192, concurrent: Sequence[int] = CONCURRENT, repeats: int = 3) -> Result:
    """See the module. One GPU, one learner rank; trees of four numbers by the solver, with its lengths."""
    if not torch.cuda.is_available():
        raise AprError(f"bench gpu needs a GPU, torch {torch.__version__} finds none", "Run it where there is one")
    result: Result = in_fresh_process(_measure, learner_trees, tuple(concurrent), repeats)
    return result


def _measure(learner_trees: int, concurrent: Sequence[int], repeats: int) -> Result:
    torch.set_num_threads(4)
    tiny = _config(())
    paper = _config(PAPER_MODEL)
    recording = record(max(learner_trees, *concurrent), tiny)
    init_process_group(0, 1, "127.0.0.1", free_port())
    result: Result = {"gpu": torch.cuda.get_device_name()}
    result |= _engine_numbers(recording, "float32") | _engine_numbers(recording, "bfloat16")
    for trees in concurrent:
        result |= _engine_speed(recording, trees)
    return result | _learner(paper, recording, learner_trees, repeats)


def _config(overrides: Sequence[str]) -> Config:
    presets = files("apr_ray") / "presets"
    return load_config([str(presets / "four-numbers.yaml"), str(presets / "gpu.yaml")], overrides)


# --- the embedded engine ----------------------------------------------------------------------------------------------


def _engine(config: Config, dtype: str, sequences: int) -> TorchEngine:
    return TorchEngine(*fresh_weights(config), max_sequences=sequences, cache_slots=64, device="cuda", dtype=dtype)


def _engine_numbers(recording: Recording, dtype: str) -> Result:
    """What the engine says of tokens that it drew, against transformers in float32 on the CPU."""
    config, requests = recording.config, recording.trees[:8]
    policy = fresh_policy(config).eval()
    drawn: dict[tuple[str, tuple[int, ...]], tuple[list[int], list[float]]] = {}

    class Noting(TorchEngine):
        async def generate(self, request: Any) -> Any:
            ids, logprobs = drawn[request.request_id, request.prompt_ids] = ([], [])
            async for chunk in super().generate(request):
                ids += chunk.token_ids
                logprobs += chunk.logprobs
                yield chunk

    engine = Noting(*fresh_weights(config), max_sequences=32, cache_slots=64, device="cuda", dtype=dtype)
    asyncio.run(replay_trees(engine, requests, 8))
    differences: list[float] = []
    for (_, prompt), (ids, logprobs) in list(drawn.items())[:24]:
        tokens = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            expected = token_logprobs(policy(input_ids=tokens, use_cache=False).logits, tokens)[0, len(prompt) :]
        differences += (expected - torch.tensor(logprobs)).abs().tolist()
    _give_back()
    return {
        f"engine_{dtype}_compared_tokens": float(len(differences)),
        f"engine_{dtype}_mean_delta_logprob": float(np.mean(differences)),
        f"engine_{dtype}_max_delta_logprob": float(np.max(differences)),
    }


def _engine_speed(recording: Recording, trees: int) -> Result:
    """Sampled tokens/s with so many trees at once, every one of them begun together."""
    engine = _engine(recording.config, "bfloat16", max(64, 2 * trees))
    some = recording.trees[:trees]
    asyncio.run(replay_trees(engine, some[: max(1, trees // 8)], trees))  # warm
    start, tokens = time.perf_counter(), 0
    while time.perf_counter() - start < min(ENGINE_SECONDS, 0.02 * trees + 1.0):
        asyncio.run(replay_trees(engine, some, trees))
        tokens += sum(tree.total_tokens for tree in some)
    seconds = time.perf_counter() - start
    _give_back()
    return {f"engine_{trees}_trees_tokens_per_s": tokens / seconds}


# --- the learner ------------------------------------------------------------------------------------------------------


def _learner(config: Config, recording: Recording, trees: int, repeats: int) -> Result:
    """GRPO steps of the paper's model: gradients' norm and loss in bfloat16 against float32, tokens/s, memory."""
    batch = batch_of(recording.trees[:trees])
    few = batch_of(recording.trees[:8])
    trainer = Trainer(fresh_policy(config), config.learner, OptimizerConfig(learning_rate=RATE))
    exact = trainer.grpo_step(few, STEP, 0.0)[0]  # a rate of 0: the weights stay
    rough = trainer.grpo_step(few, replace(STEP, bf16=True), 0.0)[0]
    result: Result = {
        "learner_parameters": float(sum(p.numel() for p in trainer.policy.parameters())),
        "learner_bf16_grad_norm_over_fp32": rough.grad_norm / exact.grad_norm,
        "learner_bf16_entropy_over_fp32": rough.entropy / exact.entropy,
    }
    peaks = {"bf16": matmul_peak(torch.bfloat16), "fp32": matmul_peak(torch.float32)}
    tokens = len(batch.tokens)
    for name, peak in peaks.items():
        step = replace(STEP, bf16=name == "bf16")
        torch.cuda.reset_peak_memory_stats()
        best, padded = float("inf"), 0
        for turn in turns(f"learner, {name}", repeats + 1):
            start = time.perf_counter()
            padded = trainer.grpo_step(batch, step, RATE)[0].padded_tokens  # its sums wait for the GPU
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start) if turn else best
        rate = step_flops(batch, config, trainer.policy) / best
        result |= {
            f"learner_{name}_tokens_per_s": tokens / best,
            f"learner_{name}_tflops": rate / 1e12,
            f"learner_{name}_mfu": rate / peak,
            f"matmul_{name}_peak_tflops": peak / 1e12,
            f"learner_{name}_peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
            "learner_padding_share": 1 - tokens / padded,
        }
    return {"ratio": result["learner_bf16_mfu"]} | result | {"learner_batch_tokens": float(tokens)}


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


def _give_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()
