"""Building, saving and loading the policy. `transformers` does the work; sizes come from `config.ModelConfig`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from pydantic import ValidationError

from apr_ray.config import ModelConfig, TaskConfig
from apr_ray.core.errors import AprError
from apr_ray.core.task import Tokenizer

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM


TASK_CARD = "apr_ray.json"
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
"""Of a Llama's `config.json`."""


def llama_config(model: ModelConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """The Hugging Face config of a model over a tokenizer's vocabulary (Llama-2 architecture, paper section 4.1)."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads or model.heads,
        intermediate_size=model.ffn_size,
        max_position_embeddings=model.context_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tied_embeddings,
        initializer_range=model.initializer_range,
        pad_token_id=tokenizer.pad_id,
        eos_token_id=tokenizer.eos_id,
        bos_token_id=None,
    )


def new_policy(model: ModelConfig, tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """A freshly initialised policy in float32; the same seed gives the same weights."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama_config(model, tokenizer))


def load_policy(checkpoint: str | Path) -> LlamaForCausalLM:
    """A checkpoint's policy in float32. Raises AprError where there is none."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    read_config(checkpoint)
    logging.disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32)


def load_weights(checkpoint: str | Path) -> dict[str, np.ndarray[Any, Any]]:
    """A checkpoint's tensors in float32, by Hugging Face name, tied ones once. Raises AprError where there are none.

    Without `transformers`, whose import takes an engine as long as everything else at its start.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(checkpoint)
    files = sorted(Path(checkpoint).glob("model*.safetensors"))
    if not files:
        raise AprError(f"no weights in {checkpoint} (model.safetensors is missing)", "Save them as safetensors")
    state: dict[str, np.ndarray[Any, Any]] = {}
    for file in files:
        try:
            state |= {name: tensor.float().numpy() for name, tensor in load_file(file).items()}
        except SafetensorError as error:
            raise AprError(f"{file} is damaged: {error}", "Copy it again, whole (no Git LFS pointer)") from error
    for name, values in state.items():
        if not np.isfinite(values).all():
            raise AprError(f"{checkpoint}: {name} holds a number that is not finite", "Give an earlier checkpoint")
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    return state


def require_vocabulary(checkpoint: str | Path, tokenizer: Tokenizer) -> None:
    """Raise AprError unless a checkpoint's vocabulary is the tokenizer's."""
    size = read_config(checkpoint)["vocab_size"]
    if size != tokenizer.vocab_size:
        raise AprError(
            f"{checkpoint} has a vocabulary of {size}, the task's has {tokenizer.vocab_size}",
            "Give a checkpoint trained with this task's tokenizer, or train one: apr-ray sft",
        )


def read_config(checkpoint: str | Path) -> dict[str, Any]:
    """A checkpoint's `config.json`. Raises AprError where there is none, or it is not a Llama's."""
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise AprError(f"no checkpoint at {checkpoint} (config.json is missing)", "Give a folder that apr-ray wrote")
    data = read_json(path)
    if data.get("model_type") != "llama":
        raise AprError(f"{path} is a {data.get('model_type')!r} model", "Only Llama checkpoints are supported")
    for key in SIZES:
        if not isinstance(data.get(key), int) or data[key] < 1:
            raise AprError(f"{path}: {key} is {data.get(key)!r}", "Give a whole checkpoint of a Llama")
    data.setdefault("rms_norm_eps", 1e-6)  # as transformers does
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file. Raises AprError where it is none."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AprError(f"{path} is damaged: {error}", "Copy the checkpoint again, whole") from error
    if not isinstance(data, dict):
        raise AprError(f"{path} holds no JSON object", "Copy the checkpoint again, whole")
    return data


def save_policy(policy: Any, tokenizer: Tokenizer, task: TaskConfig, directory: str | Path) -> None:
    """Weights (safetensors), config and tokenizer in Hugging Face form, and the task it was trained for; complete or
    not there at all."""
    from transformers.utils import logging

    final = Path(directory)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    logging.disable_progress_bar()
    policy.save_pretrained(partial)
    tokenizer.save(str(partial))
    (partial / TASK_CARD).write_text(task.model_dump_json(indent=1))
    replace_directory(partial, final)


def policy_fingerprint(checkpoint: str | Path) -> str:
    """A checksum of a checkpoint's weights as they lie on disk: other weights have another."""
    running = xxhash.xxh3_64()
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        running.update(path.read_bytes())
    return running.hexdigest()


def read_task(checkpoint: str | Path) -> TaskConfig:
    """The task a checkpoint was trained for. Raises AprError where it does not say."""
    path = Path(checkpoint) / TASK_CARD
    if not path.is_file():
        raise AprError(
            f"{checkpoint} does not say which task it was trained for ({TASK_CARD} is missing)",
            'Copy it from the run, or write {"name": "countdown", "options": {}} with the options of the training',
        )
    data = read_json(path)
    try:
        return TaskConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(map(str, first["loc"])) or "it"
        raise AprError(
            f"{path}: {what}: {first['msg']}", "It holds the task's name and options; copy the checkpoint again"
        ) from error


def replace_directory(partial: Path, final: Path) -> None:
    """Put a finished folder in its place; a reader sees the old one or the new one, whole."""
    if final.exists():
        import shutil

        old = final.with_name(f".{final.name}.old-{os.getpid()}")
        os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old)
    else:
        os.replace(partial, final)


def parameter_count(policy: Any) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in policy.parameters())
