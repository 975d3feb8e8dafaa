"""`SGLangServer`: a client of an SGLang server that someone already runs, behind `core.engine.Engine`.

    this process ──HTTP──▶ the server:  /generate (a stream), /abort_request
         │                              /pause_generation, /update_weights_from_disk, /continue_generation
         └── a folder both see ◀── reads the weights from there

SGLang need not be installed here. The server's weights are this client's to change: at its start it loads the policy it
was given, then each new version, so a server serves one rollout worker at a time. Server and worker must see `run.root`
at the same path.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from safetensors.numpy import save_file

from apr_ray.core.engine import FinishReason
from apr_ray.core.errors import AprError, ConfigError, PartDied
from apr_ray.core.weights import FIRST_VERSION, WeightUpdate, WeightVersion
from apr_ray.engines.sglang_base import SPARE_TOKENS, SGLangBase, require_success
from apr_ray.model.llama import read_config

API_KEY = "SGLANG_API_KEY"
"""The environment variable with the key of servers that ask for one (`--api-key`)."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without the environment's proxies, as the requests that follow: the key is the server's alone."""
CONNECT_S = 10.0
UPDATE_S = 600.0
LEAST_INTERVAL = 4
"""Tokens of a server's event. Each event repeats all tokens so far, so reading a call is quadratic in its events."""
MAX_LINE_BYTES = 64 << 20
"""Of the stream's events; each holds all tokens of its request so far."""
TELLS_VERSIONS = (0, 5, 23)
"""The first SGLang known to tell which weights drew which token; 0.5.17 does not."""


class SGLangServer(SGLangBase):
    """An engine on the other side of HTTP. Use it from one event loop.

    Args:
        url: the server, as `http://host:30000`.
        checkpoint: the folder of the policy that it is to serve; the server must see it at the same path.
        context_tokens: as for `SGLangBase`; by default no more than the server's.
        on_death: as for `SGLangBase`; told also when the server does not answer any more.

    Raises:
        AprError: nobody answers there, or the server cannot read the folder.
        ConfigError: the server's context is too short, or it was started in a way that this client cannot read.
    """

    def __init__(
        self,
        url: str,
        checkpoint: str | Path,
        *,
        context_tokens: int | None = None,
        on_death: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(checkpoint, context_tokens, on_death)
        if urlsplit(url).scheme not in ("http", "https"):
            raise ConfigError(f"engine.server_urls holds {url!r}", "Write it as http://host:port")
        self.url = url.rstrip("/")
        self.checkpoint = Path(checkpoint).absolute()
        # The server's own, so that whoever serves it next removes what a killed worker left.
        self._folder = self.checkpoint.parent / ("served-" + re.sub(r"\W+", "-", self.url.partition("://")[2]))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._session: aiohttp.ClientSession | None = None
        self._require_suitable(self._ask_once("GET", "/server_info"), context_tokens)
        load = {"model_path": str(self.checkpoint), "weight_version": str(FIRST_VERSION), "flush_cache": True}
        # Paused like any update, and afterwards running, in whatever state a worker that died left it.
        self._ask_once("POST", "/pause_generation", {"mode": "retract"})
        done = self._ask_once("POST", "/update_weights_from_disk", load, UPDATE_S)
        self._ask_once("POST", "/continue_generation", {})
        if not done.get("success"):
            raise AprError(
                f"the SGLang server at {self.url} did not load {self.checkpoint}: {done.get('message')}",
                "It must see the run's folder at the same path, and serve a policy of the same shape",
            )

    def _require_suitable(self, info: Mapping[str, Any], asked: int | None) -> None:
        version = str(info.get("version", ""))
        if version and tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < TELLS_VERSIONS:
            raise ConfigError(
                f"the SGLang server at {self.url} is {version}, which does not tell which weights drew a token",
                f"Use SGLang {'.'.join(map(str, TELLS_VERSIONS))} or newer",
            )
        limit = int(info.get("context_length") or read_config(self.checkpoint)["max_position_embeddings"])
        if asked is None:
            self.context_tokens = min(self.context_tokens, limit - SPARE_TOKENS)
        elif asked + SPARE_TOKENS > limit:
            raise ConfigError(
                f"the SGLang server at {self.url} has a context of {limit} tokens, {asked} are asked for and"
                f" {SPARE_TOKENS} are its own",
                f"Start it with --context-length {asked + SPARE_TOKENS}, or lower engine.context_tokens",
            )
        if info.get("incremental_streaming_output"):
            raise ConfigError(
                f"the SGLang server at {self.url} streams what is new alone",
                "Start it without --incremental-streaming-output",
            )
        if int(info.get("stream_interval") or LEAST_INTERVAL) < LEAST_INTERVAL:
            raise ConfigError(
                f"the SGLang server at {self.url} has a stream interval of {info['stream_interval']}: each of its"
                " events repeats all tokens of a request, which costs more than decoding them",
                f"Start it with --stream-interval 16, or at least {LEAST_INTERVAL}",
            )
        if not info.get("enable_priority_scheduling"):
            raise ConfigError(
                f"the SGLang server at {self.url} knows no priorities",
                "Start it with --enable-priority-scheduling: a resumed parent goes before new roots",
            )

    # --- what the server is asked -----------------------------------------------------------------------------------

    async def _outputs(self, request: dict[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        try:
            async with self._open_session().post(f"{self.url}/generate", json=request) as response:
                if response.status != 200:
                    raise RuntimeError(f"the server answered {response.status}: {(await response.text())[:500]}")
                async for line in response.content:
                    if not line.startswith(b"data:"):
                        continue
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    output = json.loads(data)
                    if "error" in output:
                        raise RuntimeError(str(output["error"].get("message", output["error"]))[:500])
                    yield output
                raise aiohttp.ServerDisconnectedError("its stream ended in the middle")
        except (aiohttp.ClientError, OSError) as error:
            self._die(f"{self.url} does not answer: {type(error).__name__}: {error}")
            raise PartDied(f"the SGLang server is gone: {self._death}", "Restart it") from error

    async def _abort_in_sglang(self, prefix: str, ids: Sequence[str]) -> None:
        """One call for each: over HTTP, SGLang ends requests by their whole ids only."""
        with contextlib.suppress(RuntimeError):  # if the server is gone, so is what runs there
            await asyncio.gather(*(self._post("/abort_request", {"rid": one}) for one in ids))

    @contextlib.asynccontextmanager
    async def _staged(self, update: WeightUpdate) -> AsyncIterator[Path]:
        """See `SGLangBase._staged`: a folder that the server reads."""
        try:
            yield await asyncio.to_thread(self._write, update)
        finally:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _apply(self, staged: Path, version: WeightVersion) -> None:
        """See `SGLangBase._apply`."""
        await self._post("/pause_generation", {"mode": "retract"})
        load = {"model_path": str(staged), "weight_version": str(version), "flush_cache": True}
        answer = await self._post("/update_weights_from_disk", load)
        require_success("update_weights_from_disk", bool(answer.get("success")), str(answer.get("message")))
        await self._post("/continue_generation", {})

    def _write(self, update: WeightUpdate) -> Path:
        """The weights as a checkpoint that SGLang can load: the policy's own files, but for the tensors."""
        folder = self._folder / str(update.version)
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.checkpoint.glob("*.json"):
            if not path.name.endswith(".index.json"):
                shutil.copy(path, folder)
        save_file(update.state_dict(), folder / "model.safetensors")
        return folder

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer; RuntimeError, with the engine dead, where none comes."""
        try:
            async with self._open_session().post(
                f"{self.url}{path}", json=body, timeout=aiohttp.ClientTimeout(UPDATE_S)
            ) as response:
                text = await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._die(f"{self.url} does not answer: {type(error).__name__}: {error}")
            raise RuntimeError(self._death) from error
        answer = _parsed(text)
        if response.status >= 400 and "success" not in answer:
            raise RuntimeError(f"{path} answered {response.status}: {text[:500]}")
        return answer

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=_headers(),
                # As many requests as trees have threads, each on a connection of its own: one that is used again may
                # have been closed by the server just then, which looks as if the server were gone.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                read_bufsize=MAX_LINE_BYTES,
            )
        return self._session

    def _ask_once(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = CONNECT_S
    ) -> dict[str, Any]:
        """Before there is a loop. Raises AprError where nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **_headers()}, method=method
        )
        try:
            with DIRECT.open(request, timeout=timeout_s) as response:
                return _parsed(response.read().decode())
        except urllib.error.HTTPError as error:
            answer = _parsed(error.read().decode(errors="replace"))
            if "success" in answer:
                return answer
            raise AprError(
                f"the SGLang server at {self.url} answered {error.code} to {path}",
                f"If it asks for a key, set {API_KEY}" if error.code in (401, 403) else "Is it an SGLang 0.5.23?",
            ) from error
        except OSError as error:
            raise AprError(
                f"no SGLang server at {self.url}: {error}", "Start one, or correct engine.server_urls"
            ) from error

    # --- memory and life --------------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Raises AprError: the server's memory is not ours to take."""
        raise AprError("an SGLang server that someone else runs cannot sleep", "Use placement.mode=disaggregated")

    async def wake(self) -> None:
        """Nothing happens: it never sleeps."""

    async def close(self) -> None:
        """End every request with ABORTED; the server goes on. Idempotent."""
        if self._closing:
            return
        self._closing = True
        if not self._death:
            await self.abort("")
        self._death = self._death or "the engine was closed"
        await self._end_all(FinishReason.ABORTED, "")
        if self._session is not None:
            await self._session.close()


def _headers() -> dict[str, str]:
    key = os.environ.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _parsed(text: str) -> dict[str, Any]:
    """A JSON object; empty where an answer is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
