"""Demonstrations per second on one core at the paper's settings: text alone, and the whole way to Parquet.

The paper's released solver does not run beside it: its code is no part of this project.
"""

from __future__ import annotations

import json
import random
import tempfile
from typing import Any

from apr_ray.bench.timing import REPEATS, Result, in_turn
from apr_ray.config import TaskConfig
from apr_ray.data.demonstrations import rows_to_table, solve_rows
from apr_ray.tasks.countdown.problem import CountdownProblem
from apr_ray.tasks.countdown.solver import solve_apr
from apr_ray.tasks.registry import load_task


def run(problems: int = 400, repeats: int = REPEATS) -> Result:
    """`ratio`: trees/s to Parquet over those of text alone."""
    import pyarrow.parquet as pq

    rng = random.Random(0)
    made = [
        CountdownProblem(tuple(rng.randint(1, 99) for _ in range(4)), rng.randint(10, 100)) for _ in range(problems)
    ]
    items = [{"index": i, "solver_seed": 0, "problem": json.dumps(dict(p.to_json()))} for i, p in enumerate(made)]
    task: Any = load_task(TaskConfig())
    tokenizer = task.tokenizer()

    def text() -> list[bool]:
        return [solve_apr(problem, 0).solved for problem in made]

    with tempfile.TemporaryDirectory() as folder:

        def parquet() -> None:
            pq.write_table(rows_to_table(solve_rows(task, tokenizer, items, 10**9, 0)), f"{folder}/rows.parquet")

        times = in_turn({"text": text, "parquet": parquet}, repeats)
        rows = pq.read_table(f"{folder}/rows.parquet", columns=["index", "order", "solved"]).to_pylist()
    first = {row["index"]: row["solved"] for row in rows if row["order"] == 0}
    return {
        "ratio": times["text"] / times["parquet"],
        "text_trees_per_s": problems / times["text"],
        "parquet_trees_per_s": problems / times["parquet"],
        "differing_trees": float(sum(first.get(i) != solved for i, solved in enumerate(text()))),
    }
