"""Every bench at its smallest: what it returns, and that both sides computed the same. Never how fast."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from apr_ray.bench import BENCHES, Result, run_bench
from apr_ray.bench.recording import fresh_policy, record
from apr_ray.bench.released import TextCalls, differing_arguments
from apr_ray.bench.timing import MACHINE, cpu_seconds
from apr_ray.bench.trees import Turn, Way, profile
from apr_ray.cli import app
from apr_ray.core.engine import FinishReason, GenerateRequest, SamplingParams
from apr_ray.core.errors import AprError
from apr_ray.model.llama import save_policy
from apr_ray.tasks.countdown.task import CountdownTask
from apr_ray.tasks.registry import load_task
from apr_ray.threads.runtime import run_tree


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
    text, parquet = numbers(result, "text_trees_per_s", "parquet_trees_per_s")
    assert result["ratio"] == pytest.approx(parquet / text)
    assert result["differing_trees"] == 0


def test_learner_and_plain_torch_take_the_same_step(ray_local: None) -> None:
    from apr_ray.bench.learner import run

    small = ("model.hidden_size=32", "model.layers=2", "model.heads=2", "model.ffn_size=48")
    result = run(trees=6, overrides=small, repeats=1)
    numbers(result, "ratio", "preset_ratio", "grpo_ratio")
    numbers(result, *(f"{side}_tokens_per_s" for side in ("plain", "sft", "preset", "grpo")))
    numbers(result, "trees_learner_tokens_per_s", "trees_plain_tokens_per_s", "peak_share", "matmul_peak_gflops")
    assert result["deepspeed_overhead"] > -1  # type: ignore[operator]
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
        "spawn_to_child_token_ms",
        "join_to_token_ms",
        "local_of_spread_latency",
    )
    for steps in numbers(result, "spawn_to_child_token_steps", "join_to_token_steps"):
        assert 1 <= steps <= 4  # of the embedded engine, which counts them; the ideal is the next one
    assert result["max_delta_logprob_per_thread"] < 1e-2  # type: ignore[operator]


def test_a_step_is_broken_down_whole(ray_local: None) -> None:
    from apr_ray.bench.step import TIMED, run

    result = run(problems=2, group_size=2, steps=1, overrides=("learner.ranks=1", "rollout.workers=1"))
    numbers(result, "step_s", "tokens", "rollout_tokens_per_s")
    shares = [float(result[f"{name}_share"]) for name in (*TIMED, "rest")]
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


# --- the released code's way ------------------------------------------------------------------------------------------


@contextmanager
def text_server(reply: Callable[[str], tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Answers `/generate` as SGLang does, with a text and its meta information; where, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            text, meta = reply(body["text"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"text": text, "meta_info": meta}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # all calls may come at once

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_trees_by_text_are_those_by_tokens() -> None:
    """The recorded trees, drawn by a server that knows only text, with a blocked thread for every call."""
    recording = record(6)
    task: Any = load_task(recording.config.task)
    tokenizer = task.tokenizer()
    replies = {tokenizer.decode(prompt): (prompt, ids) for prompt, ids in recording.replies.items()}

    def reply(text: str) -> tuple[str, dict[str, Any]]:
        prompt, ids = replies[text]
        at = next(i for i, token in enumerate(ids) if token in task.protocol(tokenizer).stop_ids)
        meta = {"finish_reason": {"type": "stop", "matched": ids[at]}, "completion_tokens": at + 1}
        return tokenizer.decode(ids[: at + 1]), {
            **meta,
            "prompt_tokens": len(prompt),
            "cached_tokens": 7,
            "e2e_latency": 0.0,
        }

    with text_server(reply) as (url, asked), ThreadPoolExecutor(32) as threads:
        calls = TextCalls(url, tokenizer, recording.config.model.context_tokens, threads)

        async def run() -> list[Any]:
            protocol, bounds = task.protocol(tokenizer), recording.config.bounds
            return await asyncio.gather(
                *(run_tree(calls, protocol, r, bounds, tree_id=f"text-{i}") for i, r in enumerate(recording.requests))  # type: ignore[arg-type]
            )

        made = asyncio.run(run())
    for tree, recorded in zip(made, recording.trees, strict=True):
        assert [c.sampled_ids for c in tree.calls] == [c.sampled_ids for c in recorded.calls]
        assert (tree.outcome, tree.final_text) == (recorded.outcome, recorded.final_text)
    assert {body["sampling_params"]["no_stop_trim"] for body in asked} == {True}
    assert calls.counts() == (sum(len(c.prompt_ids) for t in made for c in t.calls), 7 * len(asked))
    assert calls.per_call()["changed_calls"] == 0
    assert calls.per_call()["http_ms_per_call"] > 0


def test_a_call_by_text_says_where_it_was_cut_and_whether_text_changed_it(task: CountdownTask) -> None:
    tokenizer = task.tokenizer()
    prompt = next(iter(record(2).replies))
    text = tokenizer.decode(prompt)
    meta = {"finish_reason": {"type": "length"}, "prompt_tokens": len(prompt), "cached_tokens": 0, "e2e_latency": 0.0}
    with (
        text_server(lambda _: (text, {**meta, "completion_tokens": len(prompt) + 1})) as (url, _),
        ThreadPoolExecutor(1) as threads,
    ):
        calls = TextCalls(url, tokenizer, 1024, threads)
        request = GenerateRequest("cut", prompt, SamplingParams(max_new_tokens=len(prompt)))

        async def ask() -> list[Any]:
            return [chunk async for chunk in calls.generate(request)]

        (chunk,) = asyncio.run(ask())
    assert chunk.token_ids == prompt
    assert chunk.finish is FinishReason.LENGTH
    assert calls.per_call()["changed_calls"] == 1  # SGLang says that it drew one more


def test_arguments_that_two_engines_differ_in_are_named() -> None:
    ours = {"port": "30000", "dtype": "float32", "watermark_key": "None", "max_total_tokens": "60000"}
    theirs = {"port": 1234, "dtype": "float32", "watermark_key": "<redacted>", "max_total_tokens": 60000}
    assert differing_arguments(ours, theirs) == "port 30000 and 1234"


# --- where the time goes ----------------------------------------------------------------------------------------------


def test_a_profile_tells_each_parts_cores_and_microseconds_a_token() -> None:
    trees = record(4).trees
    tokens = sum(tree.total_tokens for tree in trees)
    cpu_s = {"worker": 1.0, "worker_scheduler": 8.0, "driver": 0.5, "ray": 0.5, "server": 3.0, "server_scheduler": 4.0}
    turns = [
        Turn(10.0, trees, {**cpu_s, MACHINE: 19.0}, 1000, 250),
        Turn(10.0, trees, {**cpu_s, MACHINE: 17.0}, 1000, 350),
    ]
    way = Way(lambda: None, lambda _: [], lambda: (0, 0), ("worker", "driver", "ray"), turns)
    told = profile(way)
    cores = {name: value for name, value in told.items() if name.endswith("_cores")}
    assert cores == pytest.approx(
        {"worker_cores": 0.1, "scheduler_cores": 0.8, "driver_cores": 0.05, "ray_cores": 0.05, "others_cores": 0.8}
    )
    assert told["scheduler_us_per_token"] == pytest.approx(8e6 / tokens)
    assert told["all_us_per_token"] == pytest.approx(10e6 / tokens)
    assert told["tokens_per_s"] == pytest.approx(tokens / 10)
    assert told["cached_share"] == pytest.approx(0.3)


def test_a_process_that_computes_is_seen_to() -> None:
    code = "import time; e = time.process_time() + 0.3\nwhile time.process_time() < e: pass\nprint(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        names = {os.getpid(): "here", process.pid: "there"}
        before = cpu_seconds(names)
        assert process.stdout is not None
        process.stdout.readline()
        after = cpu_seconds(names)
        process.kill()
    assert 0.2 < after["there"] < 5
    assert after[MACHINE] - before[MACHINE] >= 0.2
    assert after["here"] >= before["here"] > 0


def test_trees_of_a_policy_run_through_the_pool_and_on_the_engine_alone(ray_local: None, checkpoint: Path) -> None:
    result = run_bench("rollout", engine="torch", checkpoint=str(checkpoint), trees=2, repeats=1)
    numbers(result, "pool_tokens_per_s", "alone_tokens_per_s", "pool_worker_cores", "pool_calls_at_once")
    assert result["engine_errors"] == 0
    assert "join_to_token_ms" not in result  # its engine streams in chunks


# --- the command ------------------------------------------------------------------------------------------------------


def strictly(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    told = json.loads(line, parse_constant=refuse)
    assert isinstance(told, dict)
    return told


def test_the_last_line_of_the_command_is_one_strict_json_object() -> None:
    command = [sys.executable, "-m", "apr_ray.cli", "bench", "oracle", "--repeats", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert strictly(done.stdout.splitlines()[-1])["ratio"] > 0


def test_what_is_no_number_is_null_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"ratio": 2.0, "gpu": "none", "worst": float("inf"), "unknown": float("nan")}
    monkeypatch.setattr("apr_ray.bench.run_bench", lambda name, **_: made)
    done = CliRunner().invoke(app, ["bench", "oracle", "--json"])
    assert strictly(done.stdout.splitlines()[-1]) == {"ratio": 2.0, "gpu": "none", "worst": None, "unknown": None}
