"""An SGLang server in a process of its own, as someone else would run it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_ray.core.errors import AprError
from apr_ray.engines.process_guard import ProcessGuard
from apr_ray.engines.sglang_base import SPARE_TOKENS
from apr_ray.model.llama import read_config

START_S = 240.0


@dataclass
class Server:
    """Where it listens, and its process."""

    url: str
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return json.loads(response.read())

    def flush_cache(self) -> None:
        """No KV of earlier requests is served. Raises OSError where it still runs any after a while."""
        asked = urllib.request.Request(f"{self.url}/flush_cache?timeout=10", method="POST")
        urllib.request.urlopen(asked, timeout=30).close()

    def scheduled(self) -> int:
        """Requests that its scheduler runs or has waiting."""
        loads = self.get("/v1/loads")["loads"]
        return sum(int(load["num_running_reqs"]) + int(load["num_waiting_reqs"]) for load in loads)


@contextmanager
def sglang_server(
    checkpoint: Path,
    *,
    max_sequences: int = 8,
    stream_interval: int = 16,
    kv_tokens: int | None = None,
    device: str = "cpu",
    text: bool = False,
) -> Iterator[Server]:
    """Start it, wait until it answers, and end it with all its processes. With `text` it has the tokenizer too.

    Its KV is of `kv_tokens`, or of `max_sequences` full contexts. Raises AprError where it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = int(read_config(checkpoint)["max_position_embeddings"]) + SPARE_TOKENS
    arguments = {
        "model-path": checkpoint, "host": "127.0.0.1", "port": port, "device": device, "dtype": "float32",
        "context-length": context, "max-running-requests": max_sequences,
        "max-total-tokens": kv_tokens or max_sequences * context,
        "stream-interval": stream_interval, "log-level": "error",
        **({"attention-backend": "torch_native"} if device == "cpu" else {}),
    }  # fmt: skip
    command = [sys.executable, "-m", "sglang.launch_server", "--enable-priority-scheduling"]
    command += ["--disable-priority-preemption", "--sleep-on-idle"]
    # A server with a tokenizer warms up on an English sentence, which the task's alphabet does not have.
    command += ["--skip-server-warmup"] if text else ["--skip-tokenizer-init"]
    command += [str(x) for k, v in arguments.items() for x in (f"--{k}", v)]
    own = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    guard = ProcessGuard()  # they die with this process too, however it ends
    with guard.marking():
        process = subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        _wait_until_it_answers(server)
        yield server
    finally:
        guard.close()
        process.wait()


def _wait_until_it_answers(server: Server) -> None:
    end = time.monotonic() + START_S
    while server.process.poll() is None and time.monotonic() < end:
        try:
            server.get("/server_info")
            return
        except OSError:
            time.sleep(0.5)
    raise AprError("the SGLang server did not start", "Its own log above names the cause")
