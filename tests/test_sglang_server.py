"""What the client of an SGLang server makes of its answers, good and bad, with a scripted server in place of SGLang.

A real server is held to the same interface as every engine in `test_engine_conformance.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from safetensors.numpy import load_file

from apr_ray.config import EngineConfig, parse_config
from apr_ray.core.engine import Chunk, FinishReason, GenerateRequest, SamplingParams
from apr_ray.core.errors import AprError, ConfigError, PartDied
from apr_ray.core.weights import WeightVersion
from apr_ray.engines.registry import build_engine
from apr_ray.engines.sglang_server import SGLangServer
from apr_ray.model.llama import load_policy
from apr_ray.model.state import pack_weights, trainable_parameters

KEY = "a key of the test"


class ScriptedServer:
    """Answers `/generate` with `events`, then stays silent, ends the stream or breaks it; keeps what it was asked."""

    def __init__(self) -> None:
        self.info: dict[str, Any] = {"enable_priority_scheduling": True, "context_length": 768, "version": "0.5.23"}
        self.events: list[Any] = []
        self.end = "done"
        self.asked: list[tuple[str, Any]] = []
        self.loaded: list[dict[str, Any]] = []
        self.refuses = ""
        self.key = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.path, body))
        if request.path == "/server_info":
            return web.json_response(self.info)
        if request.path == "/generate":
            return await self.stream(request)
        if request.path == "/update_weights_from_disk" and body["weight_version"] != "0.0":
            self.loaded.append(dict(load_file(Path(body["model_path"]) / "model.safetensors")))
        if request.path == "/update_weights_from_disk" and body["weight_version"] == self.refuses:
            return web.json_response({"success": False, "message": "disk on fire"}, status=400)
        return web.json_response({"success": True, "message": ""})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for event in self.events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if self.end == "done":
            await response.write(b"data: [DONE]\n\n")
        elif self.end == "broken":
            assert request.transport is not None
            request.transport.abort()
        else:
            await asyncio.sleep(60)
        return response

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


def with_client(
    server: ScriptedServer, checkpoint: Path, work: Callable[[SGLangServer], Awaitable[Any]], **options: Any
) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(60), server.running() as url:
            engine = await asyncio.to_thread(SGLangServer, url, checkpoint, **options)
            try:
                return await work(engine)
            finally:
                await engine.close()

    return asyncio.run(main())


async def nothing(engine: SGLangServer) -> None:
    pass


def event(ids: list[int], finish: dict[str, Any] | None = None) -> dict[str, Any]:
    meta = {"finish_reason": finish, "cached_tokens": 2, "output_token_logprobs": [[-float(i), i, None] for i in ids]}
    return {"output_ids": ids, "meta_info": meta}


def request(name: str = "a") -> GenerateRequest:
    return GenerateRequest(name, (5, 6, 7), SamplingParams(1.0, max_new_tokens=8, stop_ids=frozenset({9})), priority=1)


async def collect(engine: SGLangServer, asked: GenerateRequest | None = None) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(asked or request())]


def test_it_begins_with_the_runs_policy_and_streams(checkpoint: Path) -> None:
    server = ScriptedServer()
    server.events = [event([3]), event([3, 4, 9], {"type": "stop", "matched": 9})]
    chunks = with_client(server, checkpoint, collect)
    assert [c.token_ids for c in chunks] == [(3,), (4, 9)]
    assert [c.logprobs for c in chunks] == [(-3.0,), (-4.0, -9.0)]
    assert (chunks[0].cached_tokens, chunks[-1].finish) == (2, FinishReason.STOP)
    (_, info), (pause, _), (path, load), (go_on, _), (_, asked) = server.asked[:5]
    assert info is None
    assert (pause, path, go_on) == ("/pause_generation", "/update_weights_from_disk", "/continue_generation")
    assert load["model_path"] == str(checkpoint.absolute())
    assert (asked["input_ids"], asked["priority"], asked["stream"]) == ([5, 6, 7], 1, True)


def test_weights_go_through_a_folder_that_is_gone_afterwards(checkpoint: Path) -> None:
    server = ScriptedServer()
    update = pack_weights([(n, p * 2) for n, p in trainable_parameters(load_policy(checkpoint))], WeightVersion(0, 1))

    async def work(engine: SGLangServer) -> None:
        await engine.update_weights(update)
        assert engine.version == update.version

    others = set(checkpoint.parent.glob("served-*"))  # of workers that were killed
    with_client(server, checkpoint, work)
    (loaded,) = server.loaded
    assert loaded.keys() == update.state_dict().keys()
    for name, array in update.state_dict().items():
        np.testing.assert_array_equal(loaded[name], array)
    assert [path for path, _ in server.asked[4:]] == [
        "/pause_generation", "/update_weights_from_disk", "/continue_generation"
    ]  # fmt: skip
    assert set(checkpoint.parent.glob("served-*")) == others


def test_a_refused_update_and_a_broken_stream_end_the_engine(checkpoint: Path) -> None:
    update = pack_weights(trainable_parameters(load_policy(checkpoint)), WeightVersion(0, 1))
    told: list[str] = []

    async def refused(engine: SGLangServer) -> None:
        with pytest.raises(PartDied, match="update_weights_from_disk: disk on fire"):
            await engine.update_weights(update)
        with pytest.raises(PartDied, match="disk on fire"):
            await collect(engine)

    async def broken(engine: SGLangServer) -> None:
        chunks = await collect(engine)
        assert (chunks[-1].finish, [i for c in chunks for i in c.token_ids]) == (FinishReason.ERROR, [3])
        assert "does not answer" in chunks[-1].error

    server = ScriptedServer()
    server.refuses = "0.1"
    with_client(server, checkpoint, refused, on_death=told.append)
    server = ScriptedServer()
    server.events, server.end = [event([3])], "broken"
    with_client(server, checkpoint, broken, on_death=told.append)
    assert len(told) == 2


def test_an_abort_names_every_request(checkpoint: Path) -> None:
    server = ScriptedServer()
    server.events, server.end = [event([3])], "silent"

    async def work(engine: SGLangServer) -> None:
        tasks = [asyncio.create_task(collect(engine, request(name))) for name in ("t-1/0", "t-1/1", "t-2/0")]
        while engine.stats().active_requests < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await engine.abort("t-1/")
        asked = sorted(body["rid"] for path, body in server.asked if path == "/abort_request")
        assert asked == ["t-1/0#000#", "t-1/1#000#"]
        for task in tasks:
            task.cancel()

    with_client(server, checkpoint, work)


@pytest.mark.parametrize(
    ("info", "what"),
    [
        ({"context_length": 500, "enable_priority_scheduling": True}, "a context of 500 tokens, 600 are asked for"),
        ({"incremental_streaming_output": True}, "without --incremental-streaming-output"),
        ({}, "with --enable-priority-scheduling"),
        ({"stream_interval": 1, "enable_priority_scheduling": True}, "Start it with --stream-interval 16"),
        ({"version": "0.5.17"}, r"is 0.5.17, which does not tell .* Use SGLang 0.5.23 or newer"),
    ],
)
def test_a_server_that_was_started_otherwise_is_refused(checkpoint: Path, info: dict[str, Any], what: str) -> None:
    server = ScriptedServer()
    server.info = info
    with pytest.raises(ConfigError, match=what):
        with_client(server, checkpoint, nothing, context_tokens=600)


def test_no_server_and_no_key_are_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AprError, match=r"no SGLang server at http://127\.0\.0\.1:9.*engine\.server_urls"):
        SGLangServer("http://127.0.0.1:9", checkpoint)
    with pytest.raises(ConfigError, match="Write it as http"):
        SGLangServer("localhost:30000", checkpoint)
    server = ScriptedServer()
    server.key = KEY
    with pytest.raises(AprError, match=r"answered 401.*set SGLANG_API_KEY"):
        with_client(server, checkpoint, nothing)
    monkeypatch.setenv("SGLANG_API_KEY", KEY)
    with_client(server, checkpoint, nothing)


def test_each_worker_has_its_own_server(checkpoint: Path) -> None:
    engine = {"name": "sglang_server", "server_urls": ["http://a:1"]}
    with pytest.raises(ConfigError, match=r"rollout\.workers is 2, engine\.server_urls names 1"):
        parse_config({"engine": engine, "rollout": {"workers": 2}})
    with pytest.raises(ConfigError, match="names a server twice"):
        parse_config({"engine": {**engine, "server_urls": ["http://a:1", "http://a:1"]}})
    with pytest.raises(ConfigError, match="a server needs both"):
        parse_config({"engine": {"name": "sglang_server"}})
    config = EngineConfig.model_validate({**engine, "server_urls": ["http://a:1", "http://127.0.0.1:9"]})
    with pytest.raises(AprError, match=r"no SGLang server at http://127\.0\.0\.1:9"):
        build_engine(config, str(checkpoint), place=1)


def test_a_key_never_goes_to_a_proxy(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults 24: requests at its start obeyed http_proxy, and had the key with them."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("SGLANG_API_KEY", KEY)
    server = ScriptedServer()
    server.key = KEY
    with_client(server, checkpoint, nothing)


@pytest.mark.parametrize("option", [{"max_sequences": 8}, {"stream_interval": 4}])
def test_what_a_server_was_started_with_is_not_set_here(option: dict[str, int]) -> None:
    engine = {"name": "sglang_server", "server_urls": ["http://a:1"], **option}
    with pytest.raises(ConfigError, match="which engine sglang_server knows nothing of"):
        parse_config({"engine": engine, "rollout": {"workers": 1}})
