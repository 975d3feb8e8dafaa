"""Thread trees whose every token is known beforehand, so that two systems can be timed on the very same tokens.

The trees are the symbolic solver's, which a trained policy imitates: the lengths, the rounds and the children of real
trees, without a policy to train first. `ReplayEngine` decodes them with any weights: it computes everything that
`TorchEngine` does, then takes the recorded token.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from apr_ray.config import Config, load_config
from apr_ray.core.engine import Engine, GenerateRequest, SamplingParams
from apr_ray.core.ledger import Call, Path, ThreadTree
from apr_ray.engines.scripted_engine import Reply, ScriptedEngine
from apr_ray.engines.torch_engine.decoder import DecoderShape
from apr_ray.engines.torch_engine.engine import TorchEngine
from apr_ray.engines.torch_engine.rows import Running
from apr_ray.model.llama import new_policy
from apr_ray.model.state import trainable_parameters
from apr_ray.tasks.registry import load_task
from apr_ray.threads.events import CallEnded, Listener, Spawned, ThreadEvent, TokensSampled
from apr_ray.threads.runtime import TreeRequest, run_tree

Replies = Mapping[tuple[int, ...], tuple[int, ...]]
"""The reply to each prompt."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Trees, and what makes them again: requests for the runtime, replies for a `ReplayEngine`."""

    config: Config
    requests: tuple[TreeRequest, ...]
    replies: Replies
    trees: tuple[ThreadTree, ...]

    @property
    def sampled_tokens(self) -> int:
        """Over all trees."""
        return sum(tree.total_tokens for tree in self.trees)


def bench_config(overrides: Sequence[str] = ()) -> Config:
    """The quickstart's settings, which all benches of trees use."""
    return load_config([str(files("apr_ray") / "presets" / "quickstart.yaml")], overrides)


def record(trees: int, config: Config | None = None) -> Recording:
    """One tree per problem of the training split, by the solver's text and the runtime's rules."""
    config = config or bench_config()
    task = load_task(config.task)
    tokenizer = task.tokenizer()
    replies: dict[tuple[int, ...], tuple[int, ...]] = {}
    requests: list[TreeRequest] = []
    for problem in task.problems("train", 2 * trees, config.run.seed):
        made = {
            tuple(tokenizer.encode(s.prompt)): (*tokenizer.encode(s.completion), tokenizer.eos_id)
            for s in task.demonstrate(problem, 0).sequences
        }
        if len(requests) < trees and not made.keys() & replies.keys():  # a prompt must have one reply
            replies |= made
            requests.append(TreeRequest(problem, seed=len(requests)))
    context = config.model.context_tokens
    engine = ScriptedEngine(lambda asked: Reply(replies[asked.prompt_ids]), context)

    async def run() -> list[ThreadTree]:
        return [
            await run_tree(engine, task.protocol(tokenizer), request, config.bounds, tree_id=f"recorded-{i:06d}")
            for i, request in enumerate(requests)
        ]

    return Recording(config, tuple(requests), replies, tuple(asyncio.run(run())))


class ReplayEngine(TorchEngine):
    """Decodes like `TorchEngine`, then takes the recorded token in place of the one drawn.

    Set `replies` before the first request; a prompt without a reply, or one whose reply has ended, draws as usual.
    """

    replies: Replies

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._reply_of: WeakKeyDictionary[Running, tuple[int, ...]] = WeakKeyDictionary()

    def _submit(self, request: GenerateRequest) -> Running:
        running = super()._submit(request)
        self._reply_of[running] = self.replies.get(request.prompt_ids, ())  # hashing a prompt at every step would show
        return running

    def _drawn(self, tokens: torch.Tensor) -> torch.Tensor:
        taken = tokens.tolist()
        for row, running in enumerate(self.rows.active):
            reply = self._reply_of[running]
            sampled = int(self.rows.lengths[row]) - len(running.request.prompt_ids)
            if sampled < len(reply):
                taken[row] = reply[sampled]
        return torch.tensor(taken, device=tokens.device)


def new_engine(config: Config, replies: Replies, *, max_sequences: int, cache_slots: int) -> ReplayEngine:
    """A replaying engine with fresh weights of the config's model."""
    engine = ReplayEngine(*fresh_weights(config), max_sequences=max_sequences, cache_slots=cache_slots)
    engine.replies = replies
    return engine


def fresh_policy(config: Config) -> Any:
    """A policy of the config's model, untrained; the same each time."""
    return new_policy(config.model, load_task(config.task).tokenizer(), config.run.seed)


def fresh_weights(config: Config) -> tuple[DecoderShape, dict[str, np.ndarray[Any, Any]]]:
    """`fresh_policy` as the embedded engine takes it."""
    policy = fresh_policy(config)
    state = {name: tensor.detach().numpy() for name, tensor in trainable_parameters(policy)}
    return DecoderShape.from_config(policy.config.to_dict()), state


async def replay_trees(engine: Engine, trees: Sequence[ThreadTree], concurrent: int) -> dict[tuple[str, Path], float]:
    """The engine's part of recorded trees and nothing else: every call as soon as those it waits for have ended.

    An engine draws as many tokens as were recorded, not the same ones unless it replays; a later prompt of a thread
    holds what was drawn here in their place, so that the prefix cache serves what it served when they were recorded.

    Returns:
        The sum of each thread's logprobs, by problem and path: two engines with the same weights agree on it.
    """
    places = asyncio.Semaphore(concurrent)
    sums: dict[tuple[str, Path], float] = defaultdict(float)

    async def one(number: int, tree: ThreadTree) -> None:
        calls: dict[Path, list[Call]] = defaultdict(list)
        for call in tree.calls:
            calls[call.path].append(call)
        children = {(spawn.path, spawn.segment): spawn.children for spawn in tree.spawns}

        async def thread(path: Path) -> None:
            recorded: tuple[int, ...] = ()
            context: list[int] = []  # what stands here in the place of `recorded`
            for call in calls[path]:
                kept = common_prefix(recorded, call.prompt_ids)
                context = [*context[:kept], *call.prompt_ids[kept:]]
                name = f"{number:06d}/{'.'.join(map(str, path))}/{call.segment}"
                sampling = SamplingParams(max_new_tokens=len(call.sampled_ids), seed=call.seed)
                asked = GenerateRequest(name, tuple(context), sampling, call.segment, not path)
                if call.sampled_ids:  # else it had no room for any
                    async for chunk in engine.generate(asked):
                        sums[tree.problem_key, path] += sum(chunk.logprobs)
                        context += chunk.token_ids
                recorded = (*call.prompt_ids, *call.sampled_ids)
                await asyncio.gather(*(thread(child) for child in children.get((path, call.segment), ())))

        async with places:
            await thread(())

    await asyncio.gather(*(one(number, tree) for number, tree in enumerate(trees)))
    return dict(sums)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def thread_sums(trees: Sequence[ThreadTree]) -> dict[tuple[str, Path], float]:
    """What `replay_trees` returns, from trees that an engine has made."""
    sums: dict[tuple[str, Path], float] = defaultdict(float)
    for tree in trees:
        for call in tree.calls:
            sums[tree.problem_key, call.path] += sum(call.logprobs)
    return dict(sums)


def largest_difference(a: Mapping[tuple[str, Path], float], b: Mapping[tuple[str, Path], float]) -> float:
    """Largest |a - b| over threads; infinite where they are not of the same threads."""
    if a.keys() != b.keys():
        return float("inf")
    return max(abs(a[key] - b[key]) for key in a)


Moment = tuple[float, float]
"""Seconds, and the engine's steps (0 where it does not tell them)."""


@dataclass(slots=True)
class Waits:
    """How long threads wait for each other: from a spawn to each child's first token, and from the end of the last
    child to its parent's next token. What the engine and the runtime do in between is all in it."""

    spawn_to_child: list[Moment] = field(default_factory=list)
    join_to_parent: list[Moment] = field(default_factory=list)

    def listener(self, clock: Callable[[], Moment]) -> Listener:
        """Hears the events of one tree, as they happen."""
        spawned: dict[Path, Moment] = {}
        joined: dict[Path, Moment] = {}  # by parent: when its last child so far ended

        def hear(event: ThreadEvent) -> None:
            now = clock()
            if isinstance(event, Spawned):
                spawned.update(dict.fromkeys(event.children, now))
            elif isinstance(event, CallEnded) and event.path:
                joined[event.path[:-1]] = now
            elif isinstance(event, TokensSampled):
                for begun, waits in ((spawned, self.spawn_to_child), (joined, self.join_to_parent)):
                    if (since := begun.pop(event.path, None)) is not None:
                        waits.append((now[0] - since[0], now[1] - since[1]))

        return hear

    def medians(self, step_s: float | None = None) -> dict[str, float]:
        """In ms and in steps of the engine, counted, or each of `step_s` where it counts none. Empty where no tree
        spawned."""
        result = {}
        for name, waits in (("spawn_to_child_token", self.spawn_to_child), ("join_to_token", self.join_to_parent)):
            if waits:
                seconds, steps = (statistics.median(column) for column in zip(*waits, strict=True))
                result[f"{name}_ms"] = 1000 * seconds
                result[f"{name}_steps"] = steps if step_s is None else seconds / step_s
        return result
