"""The released code's way of running thread trees: a server, a thread and a request for every call, text both ways."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_ray.bench.sglang_process import Server, sglang_server
from apr_ray.config import Config
from apr_ray.core.engine import Capabilities, Chunk, FinishReason, GenerateRequest
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.weights import FIRST_VERSION
from apr_ray.tasks.registry import load_task
from apr_ray.threads.runtime import TreeRequest, run_tree

REDACTED = "<redacted>"
RunTrees = Callable[[Sequence[TreeRequest]], list[ThreadTree]]


def same_server(config: Config, checkpoint: str) -> AbstractContextManager[Server]:
    """A server with the tokenizer, and with the worker's arguments."""
    what = config.engine
    return sglang_server(
        Path(checkpoint),
        max_sequences=what.max_sequences,
        stream_interval=what.stream_interval,
        kv_tokens=what.kv_tokens,
        text=True,
    )


def server_args(worker: Any) -> dict[str, str]:
    """SGLang's arguments as it resolved them, as text."""
    return {name: str(value) for name, value in worker.engine._engine.server_args.resolved_dict().items()}


def differing_arguments(ours: Mapping[str, str], theirs: Mapping[str, Any]) -> str:
    """Names of SGLang's arguments that two engines differ in, and their values; a server keeps some to itself."""
    pairs = {name: (value, str(theirs.get(name))) for name, value in sorted(ours.items())}
    return ", ".join(f"{name} {a} and {b}" for name, (a, b) in pairs.items() if b not in (a, REDACTED))


@dataclass(frozen=True, slots=True)
class Answer:
    """To one call.

    Attributes:
        ids: its text as tokens again.
        meta: SGLang's own account of it.
        http_s: from the request to the answer; SGLang had it for a part of that.
        tokenizer_s: to text before, to tokens afterwards.
        changed: SGLang had another number of tokens before it, or drew another number.
    """

    ids: list[int]
    meta: Mapping[str, Any]
    http_s: float
    tokenizer_s: float
    changed: bool


class TextCalls:
    """An engine as the released code has it: each call blocks a thread on one HTTP request, text in and text out.

    Attributes:
        answers: to the calls that ended.
    """

    capabilities = Capabilities(seeds=False, deterministic=False, keeps_kv=False, sleeps=False)

    def __init__(self, url: str, tokenizer: Any, context_tokens: int, threads: ThreadPoolExecutor) -> None:
        self.url = url
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.threads = threads
        self.answers: list[Answer] = []

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """One chunk with all tokens, in the end."""
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self.threads, self._call, request)
        self.answers.append(answer)
        finish = FinishReason.STOP if answer.meta["finish_reason"]["type"] == "stop" else FinishReason.LENGTH
        yield Chunk(tuple(answer.ids), (0.0,) * len(answer.ids), FIRST_VERSION, finish=finish)

    def _call(self, request: GenerateRequest) -> Answer:
        """In a thread."""
        sampling = request.sampling
        begun = time.perf_counter()
        body = {
            "text": self.tokenizer.decode(request.prompt_ids),
            "sampling_params": {
                "temperature": sampling.temperature,
                "max_new_tokens": sampling.max_new_tokens,
                "stop_token_ids": sorted(sampling.stop_ids),
                "no_stop_trim": True,
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
            },
        }
        asked = urllib.request.Request(
            f"{self.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        sent = time.perf_counter()
        with urllib.request.urlopen(asked, timeout=600) as response:
            answer = json.loads(response.read())
        came = time.perf_counter()
        ids: list[int] = self.tokenizer.encode(answer["text"])
        meta = answer["meta_info"]
        finish = meta["finish_reason"]
        if finish["type"] == "stop" and ids[-1:] != [finish["matched"]]:  # an end token has no text
            ids.append(int(finish["matched"]))
        tokenizer_s = time.perf_counter() - came + sent - begun
        changed = (len(request.prompt_ids), len(ids)) != (meta["prompt_tokens"], meta["completion_tokens"])
        return Answer(ids, meta, came - sent, tokenizer_s, changed)

    async def abort(self, request_id_prefix: str) -> None:
        """Nothing: the released code cannot."""

    def counts(self) -> tuple[int, int]:
        """Prompt tokens, and those of them from the cache, as SGLang counts them."""
        meta = [answer.meta for answer in self.answers]
        return sum(m["prompt_tokens"] for m in meta), sum(m["cached_tokens"] for m in meta)

    def per_call(self) -> dict[str, float]:
        """Means over calls, and how many of them text has changed."""
        told = self.answers
        return {
            "http_ms_per_call": 1000 * statistics.fmean(a.http_s - a.meta["e2e_latency"] for a in told),
            "tokenizer_ms_per_call": 1000 * statistics.fmean(a.tokenizer_s for a in told),
            "changed_calls": float(sum(a.changed for a in told)),
        }


@contextmanager
def released_way(config: Config, checkpoint: str, url: str, concurrent: int) -> Iterator[tuple[RunTrees, TextCalls]]:
    """Runs trees on the server there, so many at a time, and keeps the results of its calls."""
    task = load_task(config.task)
    tokenizer = task.load_tokenizer(checkpoint)
    protocol = task.protocol(tokenizer)
    with ThreadPoolExecutor(concurrent * (1 + config.bounds.max_children)) as threads:
        calls = TextCalls(url, tokenizer, config.model.context_tokens, threads)

        async def run_all(requests: Sequence[TreeRequest]) -> list[ThreadTree]:
            places = asyncio.Semaphore(concurrent)

            async def one(number: int, request: TreeRequest) -> ThreadTree:
                async with places:
                    bounds = config.bounds
                    return await run_tree(calls, protocol, request, bounds, tree_id=f"text-{number}")  # type: ignore[arg-type]

            return list(await asyncio.gather(*(one(n, request) for n, request in enumerate(requests))))

        yield lambda requests: asyncio.run(run_all(requests)), calls
