"""Starting vLLM inside this process, on a GPU or a CPU, and ending it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch._dynamo

from apr_ray.core.errors import AprError, ConfigError
from apr_ray.engines.requests import refuse_unknown
from apr_ray.engines.torch_engine.decoder import DecoderShape

CPU_BLOCK_TOKENS = 32
"""vLLM shares prefixes in whole blocks; on a CPU it would take 128 tokens, and asks for multiples of 32."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM's attention on a CPU, which takes others too and fails at the first step."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def require_device(device: str | None) -> bool:
    """Whether vLLM runs on the CPU.

    Raises:
        AprError: it is not installed.
        ConfigError: it is built for another device.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # `vllm_worker` knows the sampler of the first
    try:
        from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        raise AprError(
            f"engine.name is vllm, but {error.name} is not installed",
            "pip install 'apr-ray[vllm]' on a GPU machine; `make test-vllm` shows how on a CPU",
        ) from error
    on_cpu = bool(current_platform.is_cpu())
    found = "cpu" if on_cpu else "cuda"
    if device is not None and device != found:
        raise ConfigError(
            f"engine.device is {device}, the installed vLLM runs on {found}", f"Use engine.device={found}"
        )
    return on_cpu


def require_head_size(shape: DecoderShape, on_cpu: bool) -> None:
    """Raise ConfigError where vLLM has no attention for a model."""
    if on_cpu and shape.head_size not in CPU_HEAD_SIZES:
        raise ConfigError(
            f"vLLM's attention on a CPU has no heads of size {shape.head_size}",
            f"Use a model with one of {', '.join(map(str, CPU_HEAD_SIZES))}: hidden_size / heads",
        )


def engine_arguments(
    checkpoint: str | Path,
    shape: DecoderShape,
    given: Mapping[str, Any],
    *,
    max_sequences: int,
    context_tokens: int,
    kv_tokens: int | None,
    dtype: str,
    sleeps: bool,
    on_cpu: bool,
) -> dict[str, Any]:
    """vLLM's engine arguments: ours, and the user's on top (`engine.server_args`, which may hold none of ours)."""
    tensor_parallel = int(given.get("tensor_parallel_size", 1))
    several = tensor_parallel * int(given.get("pipeline_parallel_size", 1)) > 1
    return {
        "model": str(checkpoint),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the checkpoint's: it would add stop tokens and sampling defaults
        "dtype": dtype,
        "max_model_len": context_tokens,
        "max_num_seqs": max_sequences,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "logprobs_mode": "processed_logprobs",
        "async_scheduling": False,  # else tokens of a step may come after the next one began
        "disable_log_stats": True,
        "seed": 0,
        "enable_sleep_mode": sleeps,
        "worker_extension_cls": "apr_ray.engines.vllm_worker.WorkerExtension",
        **kv_arguments(shape, dtype, kv_tokens, max_sequences, context_tokens, on_cpu, tensor_parallel),
        # By itself vLLM would ask Ray for workers, in bundles of one GPU; ours holds all of this actor's.
        **({"distributed_executor_backend": "mp"} if several else {}),
        # Prefilled in pieces, a request with a seed would need an offset that generators on a CPU have not.
        **({"enforce_eager": True, "enable_chunked_prefill": False} if on_cpu else {}),
        **given,
    }


def kv_arguments(
    shape: DecoderShape,
    dtype: str,
    kv_tokens: int | None,
    max_sequences: int,
    context_tokens: int,
    on_cpu: bool,
    tensor_parallel: int,
) -> dict[str, Any]:
    """How much memory KV gets, on each of the GPUs that share its heads. On a CPU vLLM would take most of it."""
    if on_cpu and kv_tokens is None:
        kv_tokens = (max_sequences + 1) * (context_tokens + CPU_BLOCK_TOKENS)
    arguments: dict[str, Any] = {"block_size": CPU_BLOCK_TOKENS} if on_cpu else {}
    if kv_tokens is not None:
        if kv_tokens < context_tokens + CPU_BLOCK_TOKENS:
            raise ConfigError(
                f"engine.kv_tokens is {kv_tokens}, one full request needs {context_tokens + CPU_BLOCK_TOKENS}",
                "Raise it, or lower engine.context_tokens",
            )
        heads = -(-shape.kv_heads // tensor_parallel)
        arguments["kv_cache_memory_bytes"] = kv_tokens * shape.layers * 2 * heads * shape.head_size * BYTES[dtype]
    return arguments


def launch(arguments: dict[str, Any], on_cpu: bool) -> Any:
    """vLLM's engine, in the thread that will own it. Raises AprError or ConfigError."""
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # vLLM ranks each sampled token by a function that torch would compile, which takes 20 s and a compiler.
        torch._dynamo.config.disable = True
        import vllm._custom_ops

        # oneDNN would multiply with packed copies of the weights, which an update does not reach.
        vllm._custom_ops._supports_onednn = False
        import vllm.model_executor.layers.utils

        vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda *_: False  # which packs them too, with AMX
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    refuse_unknown(arguments, [f.name for f in fields(EngineArgs)], "vLLM")
    try:
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        engine.collective_rpc("apr_ray_report_whole_vocabulary")
    except (RuntimeError, ValueError, OSError) as error:
        raise AprError(f"vLLM did not start: {error}", "Its own log above names the cause") from error
    return engine


def shut_down(engine: Any) -> None:
    """End vLLM's workers and leave its process groups, so that this process can start another engine."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
