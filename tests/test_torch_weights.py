"""The embedded engine's weights: read, taken, refused, and where they lie in memory."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apr_ray.core.errors import AprError, WeightsRejected
from apr_ray.core.weights import WeightVersion, layout_of
from apr_ray.engines.torch_engine import TorchEngine
from apr_ray.model.llama import load_policy, load_weights
from apr_ray.model.state import flatten, pack_weights, trainable_parameters


def test_weights_that_do_not_fit_leave_the_old_ones_whole(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = TorchEngine.from_checkpoint(checkpoint, max_sequences=4, cache_slots=0, dtype="bfloat16").decoder
    before = decoder.embed, decoder.head, decoder.final_norm, decoder.layers
    layout = layout_of(sorted(decoder.shape.parameter_shapes().items()))  # k before q: not stacked yet
    flat = flatten(load_weights(checkpoint), layout)
    made, real = 0, torch.cat

    def cat(*given: Any, **options: Any) -> torch.Tensor:
        nonlocal made
        made += 1
        if made == 2:
            raise torch.OutOfMemoryError("no room")
        return real(*given, **options)

    monkeypatch.setattr(torch, "cat", cat)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.load(flat, layout)
    assert (decoder.embed, decoder.head, decoder.final_norm, decoder.layers) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slots_that_do_not_fit_into_memory_are_refused_with_their_size(checkpoint: Path, dtype: str) -> None:
    with pytest.raises(
        AprError, match=r"1000000000 slots of 768 tokens take \d+\.\d GB, which the machine lacks\. Lower"
    ):
        TorchEngine.from_checkpoint(checkpoint, max_sequences=10**9, cache_slots=0, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", [list, sorted])
def test_weights_are_taken_in_any_order_and_on_a_cpu_where_they_lie(
    checkpoint: Path, dtype: str, order: Callable[[Any], list[tuple[str, tuple[int, ...]]]]
) -> None:
    engine = TorchEngine.from_checkpoint(checkpoint, max_sequences=4, cache_slots=0, dtype=dtype)
    decoder, state = engine.decoder, load_weights(checkpoint)
    layout = layout_of(order(decoder.shape.parameter_shapes().items()))
    flat = flatten({name: 2 * part for name, part in state.items()}, layout)
    decoder.load(flat, layout)
    assert (decoder.flat is flat) == (dtype == "float32")
    if dtype == "float32":
        lies_there = [np.shares_memory(flat, matrix.numpy()) for matrix in decoder.layers[1]]
        assert lies_there == [True, order is list, True, True, True, True]
    for matrix, pattern, parts in (
        (decoder.embed, "model.embed_tokens.weight", [""]),
        (decoder.layers[1][1], "model.layers.1.self_attn.{}_proj.weight", ["q", "k", "v"]),
        (decoder.layers[1][4], "model.layers.1.mlp.{}_proj.weight", ["gate", "up"]),
        (decoder.final_norm, "model.norm.weight", [""]),
    ):
        stacked = np.concatenate([state[pattern.format(part)] for part in parts])
        torch.testing.assert_close(matrix, 2 * torch.tensor(stacked).to(matrix.dtype))


def test_an_update_is_copied_to_where_the_weights_before_the_present_ones_were(checkpoint: Path) -> None:
    engine = TorchEngine.from_checkpoint(checkpoint, max_sequences=4, cache_slots=0)
    parameters = [(name, torch.tensor(part)) for name, part in load_weights(checkpoint).items()]
    memory = [engine.decoder.flat]
    for counter in range(1, 5):
        update = pack_weights([(name, counter * part) for name, part in parameters], WeightVersion(0, counter))
        asyncio.run(engine.update_weights(update))
        held, flat = update.flat.copy(), engine.decoder.flat
        update.flat[:] = np.nan  # the engine has its own
        assert flat is not None
        np.testing.assert_array_equal(flat, held)
        memory.append(flat)
    assert memory[0] is memory[2] is memory[4]
    assert memory[1] is memory[3]


def test_a_refused_update_leaves_the_weights_that_run_alone(checkpoint: Path) -> None:
    engine = TorchEngine.from_checkpoint(checkpoint, max_sequences=4, cache_slots=0)
    parameters = [(name, torch.tensor(part)) for name, part in load_weights(checkpoint).items()]
    asyncio.run(engine.update_weights(pack_weights(parameters, WeightVersion(0, 1))))
    running = engine.decoder.flat
    assert running is not None
    before = running.copy()
    bad = pack_weights([(name, 3 * part) for name, part in parameters], WeightVersion(0, 2))
    bad.flat[-1] = np.inf
    with pytest.raises(WeightsRejected):
        asyncio.run(engine.update_weights(bad))
    assert engine.decoder.flat is running
    np.testing.assert_array_equal(running, before)


def test_a_checkpoint_is_read_as_transformers_reads_it_and_a_broken_one_is_named(
    checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    expected = {name: p.detach().numpy() for name, p in trainable_parameters(load_policy(checkpoint))}
    found = load_weights(checkpoint)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"][:-1].clone()
    save_file(state, broken / "model.safetensors")
    with pytest.raises(AprError, match=r"model\.norm\.weight is \(63,\), its config\.json says \(64,\)"):
        TorchEngine.from_checkpoint(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(AprError, match=r"model\.safetensors is missing"):
        TorchEngine.from_checkpoint(broken)
