"""An engine and the learner on one GPU: their numbers against float32, then their speed.

`ratio` is the learner's share, in bfloat16, of what a square product reaches on the same GPU: its utilisation on the
paper's model of 228 M parameters. Of SGLang only the engine's part is run, and `ratio` is its speed at the most trees
over that of one. Every part's numbers are also written to stderr as soon as they are known.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from apr_ray.bench.learner import RATE, STEP, batch_of, free_port, step_flops
from apr_ray.bench.recording import fresh_policy, record, replay_trees
from apr_ray.bench.timing import Result, in_fresh_process, turns
from apr_ray.config import Config, OptimizerConfig, load_config
from apr_ray.core.engine import Engine, GenerateRequest, SamplingParams
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.engines.registry import build_engine
from apr_ray.learner.device import init_process_group
from apr_ray.learner.trainer import Trainer
from apr_ray.model.llama import load_policy, save_policy
from apr_ray.model.state import pack_weights, trainable_parameters
from apr_ray.rl.losses import token_logprobs
from apr_ray.tasks.registry import load_task

PAPER_MODEL = (
    *("model.hidden_size=1024", "model.layers=18", "model.heads=16", "model.ffn_size=2752"),
    "learner.micro_batch_tokens=16384",  # activations of more would not fit beside float32's
)
CONCURRENT = (1, 8, 64, 256, 512)
"""Trees at the same time."""
LEAST_TREES = 4
"""Of a turn."""
LEARNER_TREES = 64
COMPARED, NEW_TOKENS = 16, 100
"""Prompts, and tokens after each, whose logprobs are compared."""


def run(engine: str = "torch", overrides: tuple[str, ...] = (), trees: int = 512, repeats: int = 2) -> Result:
    """See the module. One GPU, one learner rank; trees of four numbers by the solver, with its lengths.

    Args:
        engine: torch or sglang.
        overrides: of the presets `four-numbers` and `gpu`, whose model of 14 M parameters the engine runs.
        trees: at most so many at the same time.
        repeats: of a learner's step.
    """
    if engine not in ("torch", "sglang"):
        raise AprError(f"bench gpu runs no {engine}", "Choose torch or sglang")
    if not torch.cuda.is_available():
        raise AprError(f"bench gpu needs a GPU, torch {torch.__version__} finds none", "Run it where there is one")
    result: Result = in_fresh_process(_measure, engine, overrides, trees, repeats)
    return result


def _measure(engine: str, overrides: Sequence[str], most_trees: int, repeats: int) -> Result:
    torch.set_num_threads(4)
    config = _config((f"engine.name={engine}", *overrides))
    trees = record(most_trees, config).trees
    result: Result = {"gpu": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as checkpoint:
        save_policy(fresh_policy(config), load_task(config.task).tokenizer(), config.task, checkpoint)
        parts: list[Iterator[Result]] = [_engine(config, dtype, trees, checkpoint) for dtype in ("float32", "bfloat16")]
        if engine == "torch":
            init_process_group(0, 1, "127.0.0.1", free_port())
            parts.insert(0, _learner(_config(PAPER_MODEL), trees[:LEARNER_TREES], repeats))
        for part in itertools.chain(*parts):
            sys.stderr.write(f"{part}\n")
            result |= part
    if engine == "torch":
        return {"ratio": result["learner_bf16_share_of_peak"]} | result
    most = max(number for number in CONCURRENT if number <= most_trees)
    many, one = (float(result[f"engine_{number}_trees_tokens_per_s"]) for number in (most, 1))
    return {"ratio": many / one} | result


def _config(overrides: Sequence[str]) -> Config:
    presets = files("apr_ray") / "presets"
    return load_config([str(presets / "four-numbers.yaml"), str(presets / "gpu.yaml")], overrides)


# --- the engine -------------------------------------------------------------------------------------------------------


def _engine(config: Config, dtype: str, trees: Sequence[ThreadTree], checkpoint: str) -> Iterator[Result]:
    """What the engine says of tokens that it drew, against transformers in float32 on the CPU; then, in bfloat16, its
    sampled tokens/s at so many thread trees at the same time."""
    gc.collect()  # of the one before, whose KV takes much
    torch.cuda.empty_cache()
    engine = build_engine(config.engine.model_copy(update={"dtype": dtype}), checkpoint)
    with asyncio.Runner() as loop:  # an engine is used from one loop
        prompts = [call.prompt_ids for tree in trees[:4] for call in tree.calls][:COMPARED]
        policy: Any = load_policy(checkpoint)
        policy.eval()
        differences = compared(loop.run(_decode(engine, prompts)), prompts, policy)
        yield {
            f"engine_{dtype}_mean_delta_logprob": float(np.mean(differences)),
            f"engine_{dtype}_max_delta_logprob": float(np.max(differences)),
        }
        for concurrent in CONCURRENT if dtype == "bfloat16" else ():
            if concurrent <= len(trees):
                yield loop.run(_speed(engine, policy, trees[: max(concurrent, LEAST_TREES)], concurrent))
        loop.run(engine.close())


async def _decode(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], list[float]]]:
    """Ids and logprobs that follow each prompt, all decoded at once."""

    async def one(number: int, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, seed=number)
        request = GenerateRequest(f"compared-{number:04d}", tuple(prompt), sampling)
        chunks = [chunk async for chunk in engine.generate(request)]
        return [i for c in chunks for i in c.token_ids], [lp for c in chunks for lp in c.logprobs]

    return list(await asyncio.gather(*(one(n, prompt) for n, prompt in enumerate(prompts))))


def compared(
    drawn: Sequence[tuple[list[int], list[float]]], prompts: Sequence[Sequence[int]], policy: Any
) -> list[float]:
    """|Δ logprob| of every token that was drawn, to a policy of transformers."""
    differences: list[float] = []
    for prompt, (ids, logprobs) in zip(prompts, drawn, strict=True):
        tokens = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            expected = token_logprobs(policy(input_ids=tokens, use_cache=False).logits, tokens)[0, len(prompt) :]
        differences += (expected - torch.tensor(logprobs)).abs().tolist()
    return differences


async def _speed(engine: Engine, policy: Any, trees: Sequence[ThreadTree], concurrent: int) -> Result:
    """After one turn that warms up. The same weights come as new ones, so that no KV is served from before."""
    seconds = 0.0
    for turn in range(2):
        await engine.update_weights(pack_weights(trainable_parameters(policy), WeightVersion(concurrent, turn)))
        start = time.perf_counter()
        await replay_trees(engine, trees, concurrent)
        seconds = time.perf_counter() - start
    tokens = sum(tree.total_tokens for tree in trees)
    return {
        f"engine_{concurrent}_trees_tokens_per_s": tokens / seconds,
        f"engine_{concurrent}_trees_per_s": len(trees) / seconds,
    }


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
