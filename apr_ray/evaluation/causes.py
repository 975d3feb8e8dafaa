"""Why trees fail, counted: the endings that speak for themselves, and the task's own diagnosis of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from apr_ray.core.ledger import Call, Ending, Path, Problem, ThreadTree
from apr_ray.core.task import Task, Tokenizer

NAMED = frozenset({Ending.CUT_OFF, Ending.INVALID_SPAWN, Ending.FAILED_ENGINE})


def thread_texts(tree: ThreadTree, tokenizer: Tokenizer) -> list[str]:
    """The whole text of each thread at its end, read and written; the root parent's first."""
    last: dict[Path, Call] = {}
    for call in tree.calls:  # in the order (path, segment)
        last[call.path] = call
    return [tokenizer.decode([*call.prompt_ids, *call.sampled_ids]) for _, call in sorted(last.items())]


def causes(
    task: Task, tokenizer: Tokenizer, problems: Sequence[Problem], trees: Sequence[ThreadTree]
) -> dict[str, float]:
    """Percent of all judged trees that failed for each cause; `problems[i]` is tree i's."""
    found: Counter[str] = Counter()
    for problem, tree in zip(problems, trees, strict=True):
        if tree.solved:
            continue
        named = tree.ending in NAMED
        found[tree.ending.value if named else task.diagnose(problem, thread_texts(tree, tokenizer))] += 1
    return {cause: 100 * n / len(trees) for cause, n in sorted(found.items())}
