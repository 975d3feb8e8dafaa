"""The on-disk form of trees: JSON lines, one tree a line, each line naming its format version.

The version grows when a reader of the old form would misread the new one; readers refuse what they do not know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from apr_ray.core.engine import FinishReason, VersionSpan
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Call, Join, JoinOutcome, Outcome, Replaced, Spawn, ThreadTree
from apr_ray.core.weights import WeightVersion

FORMAT_VERSION = 1


def tree_to_json(tree: ThreadTree) -> dict[str, Any]:
    """A tree as a JSON object; `tree_from_json` gives an equal tree back."""
    return {
        "format": FORMAT_VERSION,
        "problem_key": tree.problem_key,
        "sample": tree.sample,
        "outcome": tree.outcome.value,
        "detail": tree.detail,
        "invalid_spawns": tree.invalid_spawns,
        "reward": tree.reward,
        "verdict": tree.verdict,
        "form": tree.form,
        "final_text": tree.final_text,
        "calls": [_call_to_json(call) for call in tree.calls],
        "spawns": [
            {"path": s.path, "segment": s.segment, "children": s.children, "labels": s.labels} for s in tree.spawns
        ],
        "joins": [
            {
                "path": j.path,
                "segment": j.segment,
                "outcomes": [o.value for o in j.outcomes],
                "reasons": j.reasons,
                "joined_ids": j.joined_ids,
                "kept_tokens": j.kept_tokens,
                "messages": j.messages,
            }
            for j in tree.joins
        ],
    }


def _call_to_json(call: Call) -> dict[str, Any]:
    return {
        "path": call.path,
        "segment": call.segment,
        "prompt_ids": call.prompt_ids,
        "sampled_ids": call.sampled_ids,
        "logprobs": call.logprobs,
        "forced": call.forced,
        "replaced": [[r.position, r.token_id, r.logprob] for r in call.replaced],
        "finish": call.finish.value,
        "versions": [[str(s.version), s.start, s.end, *([str(s.kv)] if s.kv else [])] for s in call.versions],
        "kv_version": str(call.kv_version),
        "seed": call.seed,
        "cached_tokens": call.cached_tokens,
        "start_s": call.start_s,
        "first_token_s": call.first_token_s,
        "end_s": call.end_s,
        "engine_id": call.engine_id,
        "error": call.error,
    }


def tree_from_json(data: Any) -> ThreadTree:
    """Inverse of `tree_to_json`. Raises AprError on another format version or a malformed object."""
    if not isinstance(data, dict):
        raise AprError(f"not a tree: {str(data)[:80]!r}", "A line holds one JSON object, as apr-ray writes them")
    if data.get("format") != FORMAT_VERSION:
        raise AprError(
            f"tree format is {data.get('format')!r}, this version reads {FORMAT_VERSION}",
            "Give a file of trees (eval/*.jsonl); another version's is read by that version of apr-ray",
        )
    try:
        return ThreadTree(
            problem_key=data["problem_key"],
            sample=data["sample"],
            calls=tuple(_call_from_json(c) for c in data["calls"]),
            spawns=tuple(
                Spawn(tuple(s["path"]), s["segment"], tuple(tuple(c) for c in s["children"]), tuple(s["labels"]))
                for s in data["spawns"]
            ),
            joins=tuple(
                Join(
                    tuple(j["path"]),
                    j["segment"],
                    tuple(JoinOutcome(o) for o in j["outcomes"]),
                    tuple(j["reasons"]),
                    tuple(j["joined_ids"]),
                    j["kept_tokens"],
                    tuple(j.get("messages", ())),  # files before it was kept have none
                )
                for j in data["joins"]
            ),
            final_text=data["final_text"],
            outcome=Outcome(data["outcome"]),
            detail=data["detail"],
            invalid_spawns=data["invalid_spawns"],
            reward=data["reward"],
            verdict=data["verdict"],
            form=data.get("form", ""),  # files before it was kept have none
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AprError(f"malformed tree: {error!r}", "The file may be cut off or edited") from error


def _call_from_json(data: dict[str, Any]) -> Call:
    return Call(
        path=tuple(data["path"]),
        segment=data["segment"],
        prompt_ids=tuple(data["prompt_ids"]),
        sampled_ids=tuple(data["sampled_ids"]),
        logprobs=tuple(data["logprobs"]),
        forced=tuple(data["forced"]),
        replaced=tuple(Replaced(p, t, lp) for p, t, lp in data["replaced"]),
        finish=FinishReason(data["finish"]),
        versions=tuple(
            VersionSpan(WeightVersion.parse(version), start, end, *map(WeightVersion.parse, kv))
            for version, start, end, *kv in data["versions"]
        ),
        kv_version=WeightVersion.parse(data["kv_version"]),
        seed=data["seed"],
        cached_tokens=data["cached_tokens"],
        start_s=data["start_s"],
        first_token_s=data["first_token_s"],
        end_s=data["end_s"],
        engine_id=data["engine_id"],
        error=data["error"],
    )


def write_trees(path: Path, trees: Iterable[ThreadTree]) -> None:
    """Write trees as JSON lines; the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        for tree in trees:
            file.write(json.dumps(tree_to_json(tree), separators=(",", ":")) + "\n")
    os.replace(partial, path)


def read_trees(path: Path) -> Iterator[ThreadTree]:
    """Read what `write_trees` wrote. Raises AprError naming the line that cannot be read."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                data = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise AprError(f"{path}:{number} is not JSON: {error}", "The file may be cut off") from error
            try:
                tree = tree_from_json(data)
            except AprError as error:
                raise AprError(f"{path}:{number}: {error.what}", error.remedy) from error
            yield tree
