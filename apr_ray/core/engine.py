"""The interface of an inference engine: token ids in, a stream of token ids with logprobs out."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from apr_ray.core.errors import AprError
from apr_ray.core.weights import WeightUpdate, WeightVersion

LEAST_TEMPERATURE = 1e-3
"""Below it logits are divided by so little that float32 ends; greedy decoding is what such a temperature means."""


class FinishReason(StrEnum):
    """Why a decoding ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy. Logprobs are those of the distribution at this temperature over the whole vocabulary
            (at temperature 1 when greedy).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        max_new_tokens: tokens sampled at most.
        stop_ids: a sampled token in this set ends the call; it is part of the output.
        seed: seeds this request's draws where the engine has `Capabilities.seeds`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 512
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise AprError(
                f"temperature is {self.temperature:g}", f"Use 0 (greedy) or a number from {LEAST_TEMPERATURE:g} on"
            )
        if not 0 < self.top_p <= 1:
            raise AprError(f"top_p is {self.top_p}", "Use a number in (0, 1]")
        if self.top_k < 0:
            raise AprError(f"top_k is {self.top_k}", "Use 0 (off) or a positive count")
        if self.max_new_tokens < 1:
            raise AprError(f"max_new_tokens is {self.max_new_tokens}", "Use at least 1")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One decoding.

    Attributes:
        priority: higher is admitted first (a resumed parent goes before new roots).
        resumes: whether a later request may begin with this one's tokens; where not, an engine need not keep their KV.
        thread: whose request it is, as a path in its tree; () is the root.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    resumes: bool = True
    thread: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Sampled tokens [start, end) of a call were drawn under `version`; `kv`: see `Chunk.kv_version`."""

    version: WeightVersion
    start: int
    end: int
    kv: WeightVersion | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Newly sampled tokens of a request, in order; the last chunk of a request carries `finish`.

    Attributes:
        token_ids, logprobs: equal lengths; may be empty in the last chunk.
        version: the weights these tokens were drawn under (a chunk never spans two versions).
        cached_tokens: prompt tokens that needed no prefill; set in the first chunk.
        finish: None until the request ends.
        error: what failed, when finish is ERROR.
        kv_version: the weights under which the KV before these tokens was computed, where they are not `version`: after
            an update that kept the KV.
        engine_id: which engine drew them, where it is not the one that was asked.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version: WeightVersion
    cached_tokens: int = 0
    finish: FinishReason | None = None
    error: str = ""
    kv_version: WeightVersion | None = None
    engine_id: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Capabilities of an engine; what it lacks is "n/a" to its users, never faked.

    Attributes:
        seeds: a request's draws depend on its seed alone.
        deterministic: a request's tokens do not depend on what else is in the batch.
        keeps_kv: an update may leave the KV of running requests as it is (`Chunk.kv_version` names its weights).
        sleeps: it can give its memory back between requests (`Engine.sleep`).
        cache_block: KV of a prefix is reused in whole blocks of this many tokens.
    """

    seeds: bool
    deterministic: bool
    keeps_kv: bool
    sleeps: bool
    cache_block: int = 1


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started. `steps` is None where the engine does not tell."""

    prompt_tokens: int
    cached_tokens: int
    sampled_tokens: int
    steps: int | None
    active_requests: int
    waiting_requests: int


@runtime_checkable
class Engine(Protocol):
    """An inference engine. All methods are called from one asyncio loop."""

    capabilities: Capabilities
    context_tokens: int
    """Prompt and sampled tokens of one request together, at most."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Stream a request. Closing the iterator (or cancelling its task) aborts the request.

        Raises AprError where the prompt leaves no room in the context or holds ids outside the vocabulary.
        """
        ...

    async def abort(self, request_id_prefix: str) -> None:
        """End every request whose id starts with the prefix; each yields a last chunk with ABORTED."""
        ...

    async def update_weights(self, update: WeightUpdate, *, keep_kv: bool = False) -> None:
        """Swap all weights between two steps; running requests go on under them.

        No KV of older weights is used afterwards: that of running requests is computed again. With `keep_kv` (where
        the engine has `Capabilities.keeps_kv`) running requests go on from the KV they have; new requests never see it.

        Raises WeightsRejected, with nothing applied, if any tensor is missing, unknown, of another shape or dtype, not
        finite, or if the checksum or the order of versions is wrong; AprError for `keep_kv` without the capability."""
        ...

    async def sleep(self) -> None:
        """Give back the memory of all KV, and of the weights where the engine can, until `wake`.

        Meanwhile requests and updates are refused (EngineAsleep). Nothing happens where it sleeps already.

        Raises AprError where a request runs or waits, or without `Capabilities.sleeps`; the engine is then awake."""
        ...

    async def wake(self) -> None:
        """Take the memory back: the weights are those from before, KV is empty. Nothing happens where it is awake."""
        ...

    def stats(self) -> EngineStats:
        """Counters since start."""
        ...

    async def close(self) -> None:
        """Abort what runs, and end what it started. Nothing may be asked of it afterwards."""
        ...
