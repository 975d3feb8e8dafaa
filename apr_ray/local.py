"""Solving one problem in this process, without Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_ray.config import BoundsConfig, EngineConfig, config_of, load_config
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Problem, ThreadTree
from apr_ray.core.task import Verdict
from apr_ray.engines.registry import build_engine
from apr_ray.model.llama import read_task, require_vocabulary
from apr_ray.model.shipped import resolve_policy
from apr_ray.reward.score import score, with_verdict
from apr_ray.tasks.registry import load_task
from apr_ray.threads.events import Listener
from apr_ray.threads.runtime import TreeRequest, run_tree

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Solution:
    """One attempt: truthy iff verified. `text` is the root parent's whole reasoning, joins included."""

    problem: Problem
    tree: ThreadTree
    verdict: Verdict

    def __bool__(self) -> bool:
        return self.verdict.solved

    @property
    def text(self) -> str:
        return self.tree.final_text


def solve(
    problem: str | Mapping[str, Any],
    model: str | Path,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    bounds: BoundsConfig | None = None,
    listener: Listener | None = None,
) -> Solution:
    """Let a trained model solve a problem, spawning threads as it sees fit.

    Args:
        problem: as text (`"3 5 7 -> 22"`) or as the task's JSON (`{"numbers": [3, 5, 7], "target": 22}`).
        model: a checkpoint folder that apr-ray wrote, or the name of a policy that comes with the package (`apr-sft`).
        temperature: 0 is greedy.
        bounds: of the tree; those of the run that the model lies in by default, else the default ones.
        listener: told of every spawn, token, join and end as it happens.

    Raises:
        AprError: no such checkpoint, another vocabulary, a malformed problem, or one without a solution.
    """
    if not isinstance(model, str | Path):
        raise AprError(f"model is {model!r}", "Give a checkpoint folder or the name of a shipped policy")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise AprError(f"temperature is {temperature!r}", "Give a number; 0 is greedy")
    if bounds is not None and not isinstance(bounds, BoundsConfig):
        raise AprError(f"bounds are {bounds!r}", "Give an apr_ray.config.BoundsConfig, e.g. BoundsConfig(max_depth=1)")
    model = resolve_policy(model)
    if (model / "final").is_dir():
        model = model / "final"
    task = load_task(read_task(model))
    the_problem = task.problem_from_text(problem) if isinstance(problem, str) else task.problem_from_json(problem)
    task.require_solvable(the_problem)
    if strange := task.unfamiliar(the_problem):
        log.warning("the policy has not seen such a problem: %s", strange)
    tokenizer = task.load_tokenizer(str(model))
    require_vocabulary(model, tokenizer)
    engine = build_engine(EngineConfig(max_sequences=32, cache_slots=16, stream_interval=1), str(model))
    if bounds is None:
        run = config_of(Path(model))
        bounds = load_config([run]).bounds if run else BoundsConfig()
    request = TreeRequest(the_problem, seed=seed, temperature=temperature)

    async def think() -> ThreadTree:
        try:
            protocol = task.protocol(tokenizer)
            return await run_tree(engine, protocol, request, bounds, tree_id="solve", listener=listener)
        finally:
            await engine.close()

    tree = _in_a_loop(think)
    verdict = score(task, the_problem, tree.outcome, tree.final_text)
    return Solution(the_problem, with_verdict(tree, verdict), verdict)


def _in_a_loop(work: Callable[[], Coroutine[Any, Any, ThreadTree]]) -> ThreadTree:
    """Run a coroutine in an event loop of its own; Ctrl-C cancels it, wherever the loop runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())

    # A loop runs in this thread already, as in a notebook.
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def cancellable() -> ThreadTree:
        task = asyncio.current_task()
        assert task is not None
        begun.set_result((asyncio.get_running_loop(), task))
        return await work()

    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(asyncio.run, cancellable())
        try:
            return answer.result()
        except BaseException:
            loop, task = begun.result()
            if not answer.done():
                loop.call_soon_threadsafe(task.cancel)
            raise
