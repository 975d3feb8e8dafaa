"""One tree for a person: its lanes, its numbers, and its threads' text."""

from __future__ import annotations

from pathlib import Path

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.trees_io import read_trees
from apr_ray.evaluation.lanes import render_lanes
from apr_ray.model.llama import read_task
from apr_ray.tasks.registry import load_task

NO_TREES = ("metrics.jsonl", "samples.jsonl")


def recorded_tree(path: Path, number: int | None = None) -> tuple[ThreadTree, Path | None]:
    """A recorded tree of a run (its last evaluation at the highest temperature) or of a file, and the run's policy.

    Raises AprError where there is none.
    """
    patterns = ("eval/*.jsonl", "*/eval/*.jsonl", "*.jsonl")  # a run, a quickstart, what `eval --out` wrote
    found = (sorted(f for f in path.glob(p) if f.name not in NO_TREES) for p in patterns)
    files = [path] if path.is_file() else next(filter(None, found), [])
    if not files:
        raise AprError(
            f"no recorded trees in {path}", 'Record some with apr-ray train, or give --problem "3 5 7 -> 22"'
        )
    trees = list(read_trees(files[-1]))
    if not trees:
        raise AprError(f"{files[-1]} holds no tree", "Give another file or run")
    policy = files[-1].parent.parent / "final"
    where = policy if policy.is_dir() else None
    if number is not None:
        if not 0 <= number < len(trees):
            raise AprError(f"{files[-1]} has no tree {number}", f"Choose one of 0..{len(trees) - 1}")
        return trees[number], where
    return max(trees, key=lambda t: (t.solved and t.children > 0, t.children)), where


def describe_tree(tree: ThreadTree, policy: Path | None, text: bool = False) -> str:
    """Lanes and numbers; with `text`, what every call was given and what it wrote, where the policy is at hand."""
    lines = [
        f"problem   {tree.problem_key}",
        f"outcome   {tree.outcome.value}{f' ({tree.detail})' if tree.detail else ''}, verdict {tree.verdict}",
        f"tokens    {tree.total_tokens} in all, {tree.sequential_tokens} on the critical path",
        f"children  {tree.children} in {len(tree.spawns)} spawn rounds, depth {tree.depth}",
        f"time      {tree.latency_s * 1000:.0f} ms, weights {', '.join(sorted(map(str, tree.versions())))}",
        "",
        render_lanes(tree),
    ]
    if text:
        if policy is None:
            raise AprError("the policy of these trees is not beside them", "Give the run's folder")
        decode = load_task(read_task(policy)).load_tokenizer(str(policy)).decode
        for call in tree.calls:
            who = "parent" if not call.path else "child " + ".".join(map(str, call.path))
            shown = decode(call.prompt_ids if call.segment == 0 else ())
            lines += ["", f"--- {who}, call {call.segment}: {call.finish.value}", shown + decode(call.sampled_ids)]
    return "\n".join(lines)
