"""Every bench at its smallest: what it returns, and that both sides computed the same. Never how fast."""

from __future__ import annotations

from pathlib import Path

import pytest

from apr_ray.bench import BENCHES, Result, run_bench
from apr_ray.bench.recording import fresh_policy, record
from apr_ray.core.errors import AprError
from apr_ray.model.llama import save_policy
from apr_ray.tasks.registry import load_task


def numbers(result: Result, *names: str) -> list[float]:
    """Named parts, all of them positive and finite."""
    found = [result[name] for name in ("ratio", *names)]
    assert all(isinstance(value, float) and 0 < value < float("inf") for value in found), result
    return found[1:]  # type: ignore[return-value]


def test_an_unknown_bench_is_refused() -> None:
    with pytest.raises(AprError, match=", ".join(BENCHES)):
        run_bench("nope")
    with pytest.raises(AprError, match=r"bench oracle takes no --trees\. It takes --repeats"):
        run_bench("oracle", trees=4, sizes=(), repeats=None)


def test_engine_loop_and_generate_agree_on_every_token() -> None:
    from apr_ray.bench.engine import run

    result = run(sequences=6, prompt_tokens=9, new_tokens=12, trees=5, repeats=1)
    numbers(result, "engine_tokens_per_s", "bare_loop_tokens_per_s", "generate_ratio")
    assert result["max_delta_logprob"] < 1e-4  # type: ignore[operator]
    assert result["trees_max_delta_logprob_per_thread"] < 1e-2  # type: ignore[operator]


def test_a_wave_holds_only_calls_whose_predecessors_are_in_earlier_ones() -> None:
    from apr_ray.bench.engine import waves
    from apr_ray.bench.recording import record

    recording = record(20)
    placed = {(key, c.path, c.segment): n for n, wave in enumerate(waves(recording)) for key, c in wave}
    assert len(placed) == sum(len(tree.calls) for tree in recording.trees)
    for tree in recording.trees:
        for spawn in tree.spawns:
            here = placed[tree.problem_key, spawn.path, spawn.segment]
            for child in spawn.children:
                assert here < placed[tree.problem_key, child, 0]
                assert placed[tree.problem_key, child, 0] < placed[tree.problem_key, spawn.path, spawn.segment + 1]
    assert any(tree.spawns for tree in recording.trees)


def test_oracle_tables_equal_the_sets() -> None:
    from apr_ray.bench.oracle import run

    result = run(quadruples=400, repeats=1)
    numbers(result, "quadruples_per_s", "one_by_one_quadruples_per_s", "compared_quadruples")
    assert result["differing_quadruples"] == 0


def test_solver_rows_are_those_of_the_texts() -> None:
    from apr_ray.bench.solver import run

    result = run(problems=6, repeats=1)
    numbers(result, "text_trees_per_s", "parquet_trees_per_s", "of_released")
    assert result["differing_trees"] == 0


def test_learner_and_plain_torch_take_the_same_step() -> None:
    from apr_ray.bench.learner import run

    small = ("model.hidden_size=32", "model.layers=2", "model.heads=2", "model.ffn_size=48")
    result = run(trees=6, overrides=small, repeats=1)
    numbers(result, "length_sorted_ratio", "learner_tokens_per_s", "peak_share", "matmul_peak_gflops")
    assert result["max_delta_weight"] < 2e-5  # type: ignore[operator]
    assert result["padding_share"] < result["sampling_order_padding_share"]  # type: ignore[operator]


def test_sampling_order_batches_hold_every_sequence_and_keep_to_the_budget() -> None:
    from apr_ray.bench.learner import batch_of, in_sampling_order
    from apr_ray.bench.recording import record

    lengths = batch_of(record(12).trees).lengths.tolist()
    plan = in_sampling_order(lengths, 1500)
    assert [i for part in plan for i in part] == list(range(len(lengths)))
    assert all(len(part) * max(lengths[i] for i in part) <= 1500 for part in plan)


def test_every_way_of_sending_weights_brings_the_same_bytes(ray_local: None) -> None:
    from apr_ray.bench.sync import TRANSPORTS, run

    small = ("model.hidden_size=32", "model.layers=2", "model.heads=2", "model.ffn_size=48")
    result = run(sizes=("4mb",), overrides=small, repeats=1)
    numbers(result, "of_per_tensor", "gloo_ms_4mb", "per_tensor_ms_4mb", "decode_without_update_ms_4mb")
    numbers(result, *(f"{name}_ms_4mb" for name in TRANSPORTS))
    assert result["differing_receivers_4mb"] == 0


def test_pool_and_engine_alone_decode_the_same_tokens(ray_local: None) -> None:
    from apr_ray.bench.rollout import run

    result = run(trees=6, repeats=1, alone_trees=1)
    numbers(
        result,
        "pool_tokens_per_s",
        "engine_alone_tokens_per_s",
        "joins",
        "join_to_first_chunk_median_ms",
        "local_of_spread_latency",
    )
    assert result["max_delta_logprob_per_thread"] < 1e-2  # type: ignore[operator]


def test_a_step_is_broken_down_whole(ray_local: None) -> None:
    from apr_ray.bench.step import PHASES, run

    result = run(problems=2, group_size=2, steps=1, overrides=("learner.ranks=1", "rollout.workers=1"))
    numbers(result, "step_s", "tokens", "rollout_tokens_per_s")
    shares = [float(result[f"{name}_share"]) for name in (*PHASES, "rest")]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    assert float(result["delta_logprob_mean"]) < 1e-3


def test_the_engine_of_the_gpu_bench_says_what_transformers_says(tmp_path: Path) -> None:
    from apr_ray.bench import gpu

    small = ("model.hidden_size=64", "model.layers=2", "model.heads=2", "model.ffn_size=48", "engine.dtype=float32")
    config = gpu._config((*small, "engine.device=cpu", "rollout.gpus_per_worker=0", "weights.transport=shared_memory"))
    save_policy(fresh_policy(config), load_task(config.task).tokenizer(), config.task, tmp_path)
    trees = record(4, config).trees
    exact, rough = (
        {key: value for part in gpu._engine(config, dtype, trees, str(tmp_path)) for key, value in part.items()}
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < exact["engine_float32_max_delta_logprob"] < 1e-4  # type: ignore[operator]
    assert exact["engine_float32_max_delta_logprob"] < rough["engine_bfloat16_max_delta_logprob"]  # type: ignore[operator]
    assert rough["engine_1_trees_tokens_per_s"] > 0  # type: ignore[operator]
