"""The commands that make a policy: the whole pipeline, and its phases one by one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Optional

import typer

from apr_ray.cli.common import (
    Files,
    Overrides,
    Resume,
    app,
    begun,
    console,
    final_table,
    find_config,
    path_argument,
    path_option,
    print_table,
    read_config,
    require_writable,
    run_folder,
    say_next,
    short,
)
from apr_ray.core.errors import AprError, ConfigError


@app.command()
def quickstart(
    overrides: Overrides = None,
    fast: Annotated[bool, typer.Option("--fast", help="A smoke run of a few minutes; it does not learn.")] = False,
    long: Annotated[bool, typer.Option("--long", help="About an hour: more of everything.")] = False,
    begin: Annotated[
        Optional[Path],
        path_option("GRPO from this policy, without the supervised phase: a run, a checkpoint, apr-sft.", "--from"),
    ] = None,
    config: Files = None,
    resume: Resume = None,
) -> None:
    """The whole pipeline: demonstrations, supervised training, GRPO, a report."""
    from apr_ray.evaluation.report import write_report
    from apr_ray.tracking.progress import ProgressBars
    from apr_ray.training.quickstart import run_quickstart

    if fast and long:
        raise ConfigError("--fast and --long exclude each other", "Give one of them")
    presets = ["quickstart", *(["quickstart-long"] if long else []), *(config or [])]
    presets += ["quickstart-fast"] if fast else []  # last: whatever else is asked for, it is a smoke run
    run = run_folder(presets if resume is None else config, [*(overrides or []), *_init(begin)], resume, "quickstart")
    if fast:
        console().print("[yellow]--fast is a smoke run: it shows that every part works, not that the model learns.[/]")
    with begun(run):
        grpo = run_quickstart(run.config, run, ProgressBars())
    final_table(grpo)  # before the report: it is what the run was for
    page = write_report(run.path, run.path / "sft", grpo)
    tracking = run.config.tracking
    store = shlex.quote(tracking.uri or f"sqlite:///{run.path.parent}/mlflow.db")
    say_next(
        f"the report            {short(page)}",
        f"one tree as lanes     apr-ray trace {short(run.path)}",
        *([f"metrics and traces    mlflow ui --backend-store-uri {store}"] if tracking.tracker == "mlflow" else []),
    )


@app.command()
def data(
    out: Annotated[Path, path_option("Folder to write.")],
    overrides: Overrides = None,
    config: Files = None,
) -> None:
    """Solve training problems symbolically and write the demonstrations to Parquet."""
    from dataclasses import asdict

    from apr_ray.data.demonstrations import write_demonstrations
    from apr_ray.tasks.registry import load_task
    from apr_ray.training.session import ray_session

    settings = read_config(config, overrides)
    out = out.absolute()  # a task may run in another folder, or on another machine
    if out.exists():
        raise AprError(f"{out} exists", "Choose another --out, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AprError(f"cannot make {out.parent}: {error.strerror}", "Choose another --out") from error
    require_writable(out.parent, "--out")
    task = load_task(settings.task)
    problems = task.problems("train", settings.data.train_problems, settings.run.seed)
    with ray_session(settings):
        summary = write_demonstrations(problems, settings.task, settings.data, settings.run.seed, out)
    print_table("demonstrations", ("", ""), [(k, f"{v:,}") for k, v in asdict(summary).items()])
    say_next(f"apr-ray sft --data {short(out)}")


@app.command()
def sft(
    data: Annotated[Path, path_option("Folder that `apr-ray data` wrote.")],
    overrides: Overrides = None,
    config: Files = None,
    resume: Resume = None,
) -> None:
    """Train a policy on demonstrations."""
    from apr_ray.data.demonstrations import require_demonstrations
    from apr_ray.tracking.progress import ProgressBars
    from apr_ray.training.sft import run_sft

    require_demonstrations(data)
    run = run_folder(config, overrides, resume, "sft")
    with begun(run):
        policy = run_sft(run.config, run, data, ProgressBars())
    last = [row for row in run.metrics() if "sft/loss" in row][-1:]
    rows = [(k, f"{v:,.4g}") for row in last for k, v in row.items() if k != "time"]
    print_table("supervised training", ("metric", "last"), rows)
    say_next(f"apr-ray eval {short(policy)}", f"apr-ray train --init {short(policy)}")


@app.command()
def train(
    overrides: Overrides = None,
    init: Annotated[
        Optional[Path],
        path_option("Policy to begin with: a checkpoint or a run folder."),
    ] = None,
    config: Files = None,
    resume: Resume = None,
) -> None:
    """Train a policy with GRPO over whole thread trees."""
    from apr_ray.tracking.progress import ProgressBars
    from apr_ray.training.grpo import run_grpo
    from apr_ray.training.run_dir import find_policy

    run = run_folder(config, [*(overrides or []), *_init(init)], resume, "train")
    with begun(run):
        policy = run_grpo(run.config, run, find_policy(Path(run.config.init_from)), ProgressBars())
    final_table(run.path)
    say_next(f"apr-ray eval {short(policy)}", f"apr-ray trace {short(run.path)}")


def _init(policy: Path | None) -> list[str]:
    """A policy to begin with, as an override."""
    from apr_ray.training.run_dir import find_policy

    return [f"init_from={find_policy(policy).resolve()}"] if policy else []


@app.command()
def export(
    run: Annotated[
        Path,
        path_argument("The folder of a supervised or GRPO run; its policy is given away."),
    ],
    out: Annotated[Path, path_option("Folder to make; its name is the policy's.")],
    results: Annotated[Path, path_option("What `apr-ray eval RUN --json FILE` wrote.")],
) -> None:
    """Make a folder with a run's policy, its settings and a card that says how it was made and what it can do."""
    from apr_ray.evaluation.card import write_policy_folder
    from apr_ray.training.run_dir import RunDir, find_policy

    RunDir.config_file(run)
    write_policy_folder(find_policy(run), run, results, out)
    say_next(f'apr-ray trace {short(out)} --problem "3 5 7 -> 22"')


@app.command()
def controls(
    init: Annotated[
        Path,
        path_option("Policy that every arm begins with: a checkpoint or a run folder."),
    ],
    data: Annotated[Path, path_option("Demonstrations for the arm that goes on with them.")],
    overrides: Overrides = None,
    tokens: Annotated[
        int, typer.Option(help="For each arm and seed: sampled by GRPO, demonstrated to continued supervised training.")
    ] = 5_000_000,
    seeds: Annotated[int, typer.Option(help="Training seeds.", min=1)] = 3,
    arm: Annotated[
        Optional[list[str]], typer.Option(help="Compare GRPO with this arm only, or with `ahead`; may be repeated.")
    ] = None,
    config: Files = None,
) -> None:
    """GRPO beside its controls: continued supervised training, rejection sampling, sharpening alone, random rewards, a
    frozen engine."""
    from apr_ray.tracking.progress import ProgressBars
    from apr_ray.training.controls import CONTROLS, TABLE_HEAD, run_controls, table_rows
    from apr_ray.training.run_dir import find_policy

    files = [find_config(f) for f in config or []]
    policy, bars = find_policy(init), ProgressBars()
    outcomes = run_controls(
        files, overrides or [], policy, data, tokens=tokens, seeds=seeds, arms=arm or CONTROLS, bars=bars
    )
    print_table(f"{tokens:,} tokens each, {seeds} seeds", TABLE_HEAD, table_rows(outcomes))
