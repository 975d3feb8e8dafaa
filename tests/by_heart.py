"""A policy whose trees spawn, for tests: trained in seconds on the very problems that it will meet."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apr_ray.config import Config
from apr_ray.core.ledger import Problem
from apr_ray.data.demonstrations import solve_rows
from apr_ray.model.llama import new_policy, save_policy
from apr_ray.tasks.registry import load_task


def learn_by_heart(problems: Sequence[Problem], config: Config, folder: Path) -> Path:
    """Train on one short demonstration with children of each problem; returns the policy's folder."""
    tokenizer = load_task(config.task).tokenizer()
    rows = short_trees(problems, config)
    ids = torch.zeros(len(rows), max(len(row["ids"]) for row in rows), dtype=torch.long)
    wanted = torch.full_like(ids, -100)  # no loss there
    for i, row in enumerate(rows):
        ids[i, : len(row["ids"])] = torch.tensor(row["ids"])
        wanted[i, row["prompt_tokens"] : len(row["ids"])] = torch.tensor(row["ids"][row["prompt_tokens"] :])
    policy: Any = new_policy(config.model.model_copy(update={"initializer_range": 0.05}), tokenizer, seed=7)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=4e-3)
    for _ in range(300):
        logits = policy(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.01:
            break
    save_policy(policy, tokenizer, config.task, folder)
    return folder


def short_trees(problems: Sequence[Problem], config: Config) -> list[dict[str, Any]]:
    """The rows of each problem's shortest demonstration that has children, of eight."""
    task = load_task(config.task)
    items = [
        {"index": i, "solver_seed": seed, "problem": json.dumps(dict(problem.to_json()))}
        for i, problem in enumerate(problems)
        for seed in range(8)
    ]
    trees: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in solve_rows(task, task.tokenizer(), items, max_tokens=250, seed=0):
        trees[row["index"], row["solver_seed"]].append(row)
    shortest: dict[int, list[dict[str, Any]]] = {}
    for (i, _), rows in sorted(trees.items(), key=lambda tree: sum(len(row["ids"]) for row in tree[1])):
        if any(row["kind"] == "child" for row in rows):
            shortest.setdefault(i, rows)
    return [row for rows in shortest.values() for row in rows]
