"""A request as SGLang sees it, and what has come of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from apr_ray.core.engine import Chunk, GenerateRequest
from apr_ray.core.weights import FIRST_VERSION, WeightVersion

ID_END = "#"
"""Ends every id that SGLang sees. Request ids may not hold it, so no id is another's prefix."""


@dataclass(eq=False)
class Running:
    """A request and what has come of it.

    Attributes:
        limit: tokens it may sample in all.
        ids: sampled so far, over all parts.
        part: how many times it was sent to SGLang, less one.
        back: set while SGLang does not have it.
        held: weights changed while it ran; its tokens are kept until SGLang tells their versions.
        interrupted: SGLang is told to end its present part, for weights to change before the next.
        version: the weights in force when its present part was sent.
        ended: its last chunk is out.
    """

    request: GenerateRequest
    limit: int
    chunks: asyncio.Queue[Chunk] = field(default_factory=asyncio.Queue)
    ids: list[int] = field(default_factory=list)
    cached: int | None = None
    part: int = 0
    back: asyncio.Event = field(default_factory=asyncio.Event)
    held: bool = False
    interrupted: bool = False
    aborted: bool = False
    ended: bool = False
    version: WeightVersion = FIRST_VERSION
    pump: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.back.set()

    @property
    def sent(self) -> bool:
        return not self.back.is_set()

    @property
    def sglang_id(self) -> str:
        return f"{self.request.request_id}{ID_END}{self.part:03d}{ID_END}"


def sglang_request(running: Running) -> dict[str, Any]:
    """The rest of a request, in the form of SGLang's native interface."""
    sampling = running.request.sampling
    return {
        "rid": running.sglang_id,
        "input_ids": [*running.request.prompt_ids, *running.ids],
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "max_new_tokens": running.limit - len(running.ids),
            "stop_token_ids": sorted(sampling.stop_ids),
            "ignore_eos": not sampling.stop_ids,  # with stop ids it would ignore those too
        },
        "return_logprob": True,
        "stream": True,
        "priority": running.request.priority,
    }
