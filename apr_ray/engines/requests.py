"""Checks of a request that every engine makes before it decodes."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from apr_ray.core.engine import GenerateRequest
from apr_ray.core.errors import AprError, ConfigError


def token_limit(request: GenerateRequest, context_tokens: int, vocab: int, running: Collection[str]) -> int:
    """How many tokens a request may sample: what it asks for, as far as the context reaches.

    Args:
        request: what was asked.
        context_tokens: prompt and sampled tokens together, at most.
        vocab: token ids lie below it.
        running: ids of the requests that run or wait.

    Raises:
        AprError: the prompt is empty or leaves no room, it or the stop ids hold ids outside the vocabulary, or the
            request's id is taken.
    """
    prompt = request.prompt_ids
    if not prompt:
        raise AprError(f"request {request.request_id} has an empty prompt", "Give at least one token")
    if len(prompt) >= context_tokens:
        raise AprError(
            f"prompt of {len(prompt)} tokens leaves no room in a context of {context_tokens}",
            "Shorten it, or raise engine.context_tokens",
        )
    if min(prompt) < 0 or max(prompt) >= vocab:
        raise AprError(f"prompt holds token ids outside 0..{vocab - 1}", "Use the checkpoint's tokenizer")
    if any(not 0 <= i < vocab for i in request.sampling.stop_ids):
        raise AprError(f"stop_ids hold token ids outside 0..{vocab - 1}", "Use the checkpoint's tokenizer")
    if request.request_id in running:
        raise AprError(f"request id {request.request_id!r} is already running", "Give each request its own id")
    return min(request.sampling.max_new_tokens, context_tokens - len(prompt))


def context_limit(asked: int | None, model: int) -> int:
    """The context to serve: the model's, or less. Raises ConfigError where more is asked for."""
    if asked is not None and asked > model:
        raise ConfigError(
            f"engine.context_tokens is {asked}, the model was built for {model}",
            "Lower it, or use a model with a longer context",
        )
    return asked or model


def refuse_unknown(arguments: Iterable[str], known: Collection[str], engine: str) -> None:
    """Raise ConfigError, with the nearest name, for a key of `engine.server_args` that an engine does not know."""
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"engine.server_args.{name} is not an argument of {engine}'s engine",
                f"Did you mean {near[0]!r}?" if near else f"See {engine}'s own list of arguments",
            )
