"""Trees of one problem on a scripted engine: the texts that its threads write, and what runs them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from apr_ray.config import BoundsConfig
from apr_ray.core.engine import GenerateRequest
from apr_ray.core.ledger import ThreadTree
from apr_ray.engines.scripted_engine import Reply, ScriptedEngine
from apr_ray.tasks.countdown.problem import CountdownProblem
from apr_ray.tasks.countdown.protocol import CountdownProtocol
from apr_ray.tasks.countdown.tokenizer import build_tokenizer
from apr_ray.threads.events import ThreadEvent
from apr_ray.threads.runtime import TreeRequest, run_tree

TOKENIZER = build_tokenizer()
PROBLEM = CountdownProblem((3, 5, 7), 22)
ROOT = "Moving to Node #0\nCurrent State: 22:[3, 5, 7], Operations: []"
OPEN = """
Exploring Operation: 3*5=15, Resulting Numbers: [7, 15]
Generated Node #0,0: 22:[7, 15] Operation: 3*5=15
Exploring Operation: 3+5=8, Resulting Numbers: [7, 8]
Generated Node #0,1: 22:[7, 8] Operation: 3+5=8
"""
SOLVED = """
Exploring Operation: 7+15=22, Resulting Numbers: [22]
22,22 equal: Goal Reached
Moving to Node #0,0
Current State: 22:[7, 15], Operations: ['3*5=15']
Exploring Operation: 7+15=22, Resulting Numbers: [22]
22,22 equal: Goal Reached
"""
FINAL = """22,22 equal: Goal Reached
Moving to Node #0
Current State: 22:[3, 5, 7], Operations: []
Exploring Operation: 3*5=15, Resulting Numbers: [7, 15]
Generated Node #0,0: 22:[7, 15] Operation: 3*5=15
Moving to Node #0,0
Current State: 22:[7, 15], Operations: ['3*5=15']
Exploring Operation: 7+15=22, Resulting Numbers: [22]
22,22 equal: Goal Reached
"""
NOTHING = "\nNo solution found.\n"


def spawn(*nodes: str, level: int = 1) -> str:
    lines = [f"<Start Sub Search {i} at level {level}> Moving to Node {node}" for i, node in enumerate(nodes)]
    return "\n".join(["<Calling Sub Searches>", *lines, "<End Calling Sub Searches>"]) + "\n"


def ids(text: str) -> list[int]:
    return [*TOKENIZER.encode(text), TOKENIZER.eos_id]


class Script:
    """Replies by what the prompt is: `rules` are (test on the prompt's text, reply), the first that fits is used up
    unless it is the last of its kind."""

    def __init__(self, *rules: tuple[Callable[[str], bool], Reply]) -> None:
        self.rules = list(rules)

    def __call__(self, request: GenerateRequest) -> Reply:
        text = TOKENIZER.decode(request.prompt_ids)
        for fits, reply in self.rules:
            if fits(text):
                return reply
        raise AssertionError(f"no rule for {text!r}")


def root(text: str) -> bool:
    return text == ROOT


def child(node: str) -> Callable[[str], bool]:
    return lambda text: text.startswith(f"Moving to Node {node}\n")


def resumed(times: int) -> Callable[[str], bool]:
    return lambda text: text.startswith(ROOT) and text.count("<End Sub Searches>") == times


def run(
    script: Callable[[GenerateRequest], Reply],
    bounds: BoundsConfig | None = None,
    max_depth: int = 1,
    context_tokens: int = 4096,
    events: list[ThreadEvent] | None = None,
) -> tuple[ThreadTree, ScriptedEngine]:
    engine = ScriptedEngine(script, context_tokens)
    protocol = CountdownProtocol(TOKENIZER, max_depth=max_depth)
    tree = asyncio.run(
        run_tree(
            engine,
            protocol,
            TreeRequest(PROBLEM),
            bounds or BoundsConfig(),
            tree_id="t",
            listener=None if events is None else events.append,
        )
    )
    assert engine.active == {}, "a request was left in the engine"
    assert sum(tree.dispositions().values()) == tree.total_tokens == engine.sampled
    return tree, engine


HAPPY = (
    (root, Reply(ids(OPEN + spawn("#0,1", "#0,0")))),
    (child("#0,0"), Reply(ids(SOLVED))),
    (child("#0,1"), Reply(ids(NOTHING))),
    (resumed(1), Reply(ids(FINAL))),
)
