"""Demonstrations: the solver's texts, tokenised, in Parquet; one row a sequence.

problems ─▶ ray.data: solve and tokenise in parallel ─▶ Parquet ─▶ Demonstrations (flat arrays)
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import xxhash

from apr_ray.config import DataConfig, TaskConfig
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Problem
from apr_ray.tasks.registry import load_task

SUMMARY = "summary.json"
PART_TREES = 512
"""Solver runs of a task, whose rows are one file."""
HOST = re.sub(r"\W", "_", socket.gethostname())


@dataclass(frozen=True, slots=True)
class DataSummary:
    """Contents of a demonstration set.

    Attributes:
        trees: solver runs kept; `solved` of them reached the target; `dropped` were longer than the context.
        sequences, children: rows, and those of them written by a child.
        tokens: over all rows, end tokens included.
    """

    trees: int
    solved: int
    dropped: int
    sequences: int
    children: int
    tokens: int
    seed: int


def write_demonstrations(
    problems: Sequence[Problem], task: TaskConfig, data: DataConfig, seed: int, out: Path
) -> DataSummary:
    """Solve every problem with every solver seed and write `out`, complete or not at all.

    The rows do not depend on the number of workers: each is made from (problem, solver seed) alone.
    """
    import ray
    import ray.data

    for left in out.parent.glob(f".{out.name}.partial-{HOST}-*"):  # of commands that were killed
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    partial = out.with_name(f".{out.name}.partial-{HOST}-{os.getpid()}")
    partial.mkdir(parents=True)
    cores: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = data.workers or max(2, int(cores.get("CPU", 2)))
    items = [
        {"index": i, "solver_seed": s, "problem": json.dumps(dict(problem.to_json()))}
        for s in range(data.solver_seeds)
        for i, problem in enumerate(problems)
    ]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray.data", "ray.data._internal.progress"):  # it would warn that its own bars are off
        logging.getLogger(name).setLevel(logging.ERROR)
    options = {"task": task, "max_tokens": data.max_sequence_tokens, "seed": seed, "folder": str(partial)}
    parts = (
        ray.data.from_items(items, override_num_blocks=2 * workers)
        .map_batches(
            cast(Any, _write_part),
            batch_format="pyarrow",
            batch_size=PART_TREES,
            fn_kwargs=options,
            compute=ray.data.TaskPoolStrategy(size=workers),
            num_cpus=0.5,
        )
        .take_all()
    )
    _require_parts(partial, parts, len(items), data.max_sequence_tokens)
    summary = _summarise(partial, len(items), seed)
    (partial / SUMMARY).write_text(json.dumps(asdict(summary), indent=1))
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    return summary


def _write_part(batch: Any, task: TaskConfig, max_tokens: int, seed: int, folder: str) -> Any:
    """Solve some items and write their rows; gives the file's name and its rows. Done again, it writes the same."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    the_task, tokenizer = _tools(task.model_dump_json())
    items = batch.to_pylist()
    rows = solve_rows(the_task, tokenizer, items, max_tokens, seed)
    name = f"part-{items[0]['solver_seed']:03d}-{items[0]['index']:09d}.parquet"
    if rows:
        Path(folder).mkdir(parents=True, exist_ok=True)
        hidden = Path(folder) / f".{name}.{os.getpid()}"
        pq.write_table(rows_to_table(rows), hidden)
        os.replace(hidden, Path(folder) / name)
    return pa.table({"name": [name], "rows": [len(rows)]})


def _require_parts(folder: Path, parts: Sequence[dict[str, Any]], asked: int, max_tokens: int) -> None:
    """Raise AprError, with nothing left, where no row was written, or not all that were written are here."""
    import pyarrow.parquet as pq

    written = {part["name"]: part["rows"] for part in parts if part["rows"]}
    here = {path.name: pq.read_metadata(path).num_rows for path in folder.glob("*.parquet")}
    if written and here == written:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if not written:
        raise AprError(
            f"no demonstration of {asked} fits into data.max_sequence_tokens={max_tokens}",
            "Raise it, or make the searches smaller (task.options.solver)",
        )
    raise AprError(
        f"{len(written.keys() - here.keys())} of {len(written)} files of demonstrations are not in {folder}: other"
        " machines wrote them",
        "Write them to storage that all nodes share",
    )


def rows_to_table(rows: Sequence[dict[str, Any]]) -> Any:
    """Rows of `solve_rows` as an Arrow table in the Parquet files' schema."""
    import pyarrow as pa

    schema = _schema()
    columns = {name: pa.array([row[name] for row in rows], schema.field(name).type) for name in schema.names[:-1]}
    # As one array: list by list, this would take as long as the search.
    ends = np.cumsum([0, *(len(row["ids"]) for row in rows)], dtype=np.int64)
    ids = np.fromiter(itertools.chain.from_iterable(row["ids"] for row in rows), np.int32, int(ends[-1]))
    columns["ids"] = pa.LargeListArray.from_arrays(ends, ids)
    return pa.table(columns, schema)


@lru_cache(maxsize=1)
def _tools(task: str) -> tuple[Any, Any]:
    """Task and tokenizer, once per worker process."""
    the_task = load_task(TaskConfig.model_validate_json(task))
    return the_task, the_task.tokenizer()


def solve_rows(
    task: Any, tokenizer: Any, items: Sequence[dict[str, Any]], max_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """The rows of some (problem, solver seed) items; a tree with a sequence over `max_tokens` is dropped whole."""
    rows = []
    for item in items:
        problem = task.problem_from_json(json.loads(item["problem"]))
        made = task.demonstrate(problem, seed * 1_000_003 + item["solver_seed"])
        encode = cache(tokenizer.encode)  # what a thread was given is often the whole prompt
        encoded = [(s, encode(s.prompt), encode(s.completion)) for s in made.sequences]
        if any(len(p) + len(c) + 1 > max_tokens for _, p, c in encoded):
            continue
        for order, (sequence, prompt, completion) in enumerate(encoded):
            rows.append(
                {
                    "index": item["index"],
                    "solver_seed": item["solver_seed"],
                    "order": order,
                    "kind": sequence.kind,
                    "solved": made.solved,
                    "given_tokens": len(encode(sequence.given)),
                    "prompt_tokens": len(prompt),
                    "ids": [*prompt, *completion, tokenizer.eos_id],
                }
            )
    return rows


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("index", pa.int64()),
            ("solver_seed", pa.int32()),
            ("order", pa.int32()),
            ("kind", pa.string()),
            ("solved", pa.bool_()),
            ("given_tokens", pa.int32()),
            ("prompt_tokens", pa.int32()),
            ("ids", pa.large_list(pa.int32())),  # 2**31 of them may be too few
        ]
    )


def _summarise(directory: Path, asked: int, seed: int) -> DataSummary:
    import pyarrow.compute as pc

    table = _read(directory, ["order", "kind", "solved"])
    first = table.filter(pc.equal(table["order"], 0))
    return DataSummary(
        trees=first.num_rows,
        solved=int(pc.sum(first["solved"]).as_py() or 0),
        dropped=asked - first.num_rows,
        sequences=table.num_rows,
        children=int(pc.sum(pc.equal(table["kind"], "child")).as_py() or 0),
        tokens=_tokens_in(directory),
        seed=seed,
    )


def _tokens_in(directory: Path) -> int:
    """Ids in all files, of which one row group at a time is in memory."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    total = 0
    for path in directory.glob("*.parquet"):
        with pq.ParquetFile(str(path)) as file:
            for batch in file.iter_batches(columns=["ids"]):
                total += int(pc.sum(pc.list_value_length(batch["ids"])).as_py() or 0)
    return total


def require_demonstrations(directory: Path) -> list[Path]:
    """The files of a set. Raises AprError where there is none."""
    files = sorted(directory.glob("*.parquet"))
    if not files:
        raise AprError(f"no Parquet files in {directory}", "Make them: apr-ray data")
    return files


def _read(directory: Path, columns: list[str]) -> Any:
    import pyarrow.parquet as pq

    files = require_demonstrations(directory)
    return pq.read_table([str(f) for f in files], columns=columns)


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """A demonstration set in memory; sequence i is `ids[offsets[i]:offsets[i + 1]]`, its first `prompts[i]` the prompt,
    the first `given[i]` of those what no thread wrote.

    Attributes:
        ids: int32 [N]; offsets: int64 [S + 1]; given, prompts: int32 [S]; child: bool [S].
    """

    ids: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    given: np.ndarray[Any, Any]
    prompts: np.ndarray[Any, Any]
    child: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.prompts)

    def fingerprint(self) -> str:
        """A checksum of all arrays: other demonstrations have another."""
        running = xxhash.xxh3_64()
        for column in (self.ids, self.offsets, self.given, self.prompts, self.child):
            running.update(np.ascontiguousarray(column).data)
        return running.hexdigest()

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens per sequence."""
        return np.diff(self.offsets)

    def first_prompts(self, count: int) -> list[tuple[int, ...]]:
        """Those of the first sequences."""
        starts = self.offsets[:-1][:count]
        return [tuple(self.ids[start : start + n].tolist()) for start, n in zip(starts, self.prompts, strict=False)]

    @classmethod
    def load(cls, directory: Path) -> Demonstrations:
        """Read a set, in the order (solver seed, problem, sequence) whatever order it was written in."""
        place = ["solver_seed", "index", "order"]
        table = _read(directory, [*place, "kind", "given_tokens", "prompt_tokens", "ids"])
        table = table.sort_by([(column, "ascending") for column in place])
        column = table["ids"].combine_chunks()
        lengths = column.value_lengths().to_numpy()
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(
            ids=column.flatten().to_numpy(),
            offsets=offsets,
            given=table["given_tokens"].to_numpy(),
            prompts=table["prompt_tokens"].to_numpy(),
            child=np.asarray(table["kind"].to_pylist()) == "child",
        )
