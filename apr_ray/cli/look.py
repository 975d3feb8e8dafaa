"""The commands that look at a policy, at a run, or at this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from apr_ray.cli.common import (
    Files,
    Overrides,
    app,
    config_app,
    console,
    path_argument,
    path_option,
    print_table,
    read_config,
    require_writable,
    say_next,
    short,
    speaks_utf,
)


@app.command("eval")
def evaluate_command(
    model: Annotated[Path, path_argument("A checkpoint or a run folder.")],
    overrides: Overrides = None,
    config: Files = None,
    out: Annotated[
        Optional[Path],
        path_option("Folder for the trees: a file of JSON lines for each mode."),
    ] = None,
    against: Annotated[
        Optional[Path],
        path_option("Compare with these trees, problem by problem: what --out wrote, or a run."),
    ] = None,
    as_json: Annotated[Optional[Path], path_option("Write the numbers here.", "--json")] = None,
) -> None:
    """Accuracy and cost of a policy on problems that it never trained on."""
    from apr_ray.config import config_of
    from apr_ray.core.errors import AprError
    from apr_ray.evaluation.comparison import COMPARISON_HEAD, comparison_rows, read_evaluation
    from apr_ray.evaluation.decisions import table_rows as decision_rows
    from apr_ray.evaluation.measure import measure_policy
    from apr_ray.metrics.names import mode_title
    from apr_ray.model.llama import read_task
    from apr_ray.tracking.progress import ProgressBars
    from apr_ray.training.run_dir import find_policy
    from apr_ray.training.session import ray_session, require_startable

    for option, file in (("--out", out), ("--json", as_json)):
        if file is not None and file.exists() and (option == "--out") != file.is_dir():
            raise AprError(f"{option} {file} is {'a folder' if file.is_dir() else 'a file'}", "Give another name")
        if file is not None and not file.absolute().parent.is_dir():
            raise AprError(f"{option} {file}: {file.absolute().parent} is no folder", "Make it first")
        if file is not None:
            require_writable(file if file.is_dir() else file.absolute().parent, option)
    before = read_evaluation(against) if against else None

    policy = find_policy(model)
    beside = config_of(policy)  # the run's own bounds and engine, unless told otherwise
    settings = read_config([*([str(beside)] if beside else []), *(config or [])], overrides)
    settings = settings.model_copy(update={"task": read_task(policy)})
    require_startable(settings, policy)
    with ray_session(settings):
        found = measure_policy(settings, policy, before, ProgressBars())

    asked = settings.evaluation
    print_table(f"{policy}, {asked.problems} {asked.split} problems", ("mode", "metric", "value"), found.rows())
    if found.decided:
        title = f"the decision to spawn, at the first one of {len(found.decided.spawn)} demonstrations"
        print_table(title, ("", ""), decision_rows(found.decided))
    if found.changes:
        best = mode_title(found.yardstick)
        title = f"against {against}, decoded at its best temperature ({best}): percentage points [95 %]"
        print_table(title, COMPARISON_HEAD, comparison_rows(found.changes))
    if as_json is not None:
        found.write_numbers(as_json)
    if out is not None:
        found.write_trees(out)
    say_next(f'apr-ray trace {short(policy)} --problem "3 5 7 -> 22"')


@app.command()
def trace(
    run: Annotated[Path, path_argument("A run folder, a checkpoint, or a file of trees.")],
    problem: Annotated[Optional[str], typer.Option(help='Solve this one now, e.g. "3 5 7 -> 22".')] = None,
    number: Annotated[
        Optional[int], typer.Option(help="Which recorded tree; by default a solved one that spawned.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="With --problem; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="With --problem.")] = 0,
    text: Annotated[bool, typer.Option("--text", help="Print every thread's text too.")] = False,
) -> None:
    """Print one tree as lanes: who decodes, who waits, what joins."""
    from apr_ray.core.errors import AprError
    from apr_ray.evaluation.lanes import ASCII
    from apr_ray.evaluation.show import describe_tree, recorded_tree

    if problem is not None and number is not None:
        raise AprError("--problem and --number exclude each other", "The one solves now, the other shows a record")
    if problem is not None:
        from apr_ray.local import solve
        from apr_ray.training.run_dir import find_policy

        policy = find_policy(run)
        beside: Path | None = policy
        tree = solve(problem, policy, temperature=temperature, seed=seed).tree
    else:
        tree, beside = recorded_tree(run, number)
    out = console(stderr=False)
    shown = describe_tree(tree, beside, text)
    out.print(shown if speaks_utf(out) else shown.translate(ASCII), highlight=False, markup=False, soft_wrap=True)


@app.command()
def audit(
    run: Annotated[Path, path_argument("A GRPO run's folder.")],
    step: Annotated[int, typer.Argument(help="A step whose batch was kept (grpo.keep_batches).")],
    tolerance: Annotated[float, typer.Option(help="Largest difference per logprob, in nats.")] = 1e-3,
) -> None:
    """Check one training batch: logprobs, versions, dispositions and loss, all computed again from the trees."""
    from apr_ray.evaluation.audit import audit_batch
    from apr_ray.evaluation.kept_batch import find_batch, read_batch

    report = audit_batch(read_batch(find_batch(run, step)), tolerance)
    print_table(f"audit of step {step} of {short(run)}", ("check", "found", "claimed", ""), report.rows())
    if not report.agrees:
        raise typer.Exit(1)


@app.command()
def vectors(
    folder: Annotated[Path, path_argument("Folder with *.jsonl.gz files.")],
) -> None:
    """Check a folder of traces, joins and verdicts against the grammar, the tokenizer and the verifier."""
    from apr_ray.tasks.countdown.vectors import check_folder

    report = check_folder(folder)
    print_table(f"vectors in {folder}", ("check", "agree", "differ"), report.rows())
    for difference in report.differences[:5]:
        console(stderr=False).print(difference, highlight=False, markup=False)
    if report.differences:
        raise typer.Exit(1)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="engine, gpu, learner, oracle, rollout, solver, step or sync.")],
    as_json: Annotated[bool, typer.Option("--json", help="Last line: one JSON object.")] = False,
    engine: Annotated[Optional[str], typer.Option(help="torch, sglang or, for sync and rollout, vllm.")] = None,
    checkpoint: Annotated[
        Optional[str], typer.Option(help="For rollout --engine: a trained policy of the quickstart's task.")
    ] = None,
    sizes: Annotated[Optional[str], typer.Option(help="For sync: of 4mb,50mb,900mb.")] = None,
    trees: Annotated[
        Optional[int], typer.Option(min=2, help="For engine, gpu, learner and rollout: how many trees.")
    ] = None,
    repeats: Annotated[
        Optional[int], typer.Option(min=1, help="Turns of each side, where there are sides; their median counts.")
    ] = None,
    device: Annotated[Optional[str], typer.Option(help="For sync: cpu or cuda.")] = None,
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="For gpu, learner, step and sync: overrides of the form a.b=value.")
    ] = None,
) -> None:
    """Measure one part against a baseline, side by side, in one run."""
    import json
    import math

    from apr_ray.bench import run_bench

    result = run_bench(
        name,
        engine=engine,
        checkpoint=checkpoint,
        sizes=tuple(sizes.split(",")) if sizes else (),
        trees=trees,
        repeats=repeats,
        device=device,
        overrides=tuple(overrides or ()),
    )
    print_table(
        f"bench {name}",
        ("measure", "value"),
        [(k, f"{v:,.4g}" if isinstance(v, float) else str(v)) for k, v in result.items()],
    )
    if as_json:
        told = {k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in result.items()}  # JSON has no NaN
        print(json.dumps(told, allow_nan=False))


@app.command()
def doctor() -> None:
    """What this machine has, and what is missing for what."""
    from apr_ray.doctor import examine

    rows = examine()
    print_table("apr-ray doctor", ("part", "state", "what for"), rows)
    if any(state.startswith("missing") for _, state, _ in rows):
        raise typer.Exit(1)


@config_app.command("show")
def config_show(overrides: Overrides = None, config: Files = None) -> None:
    """Print the whole configuration as YAML, the task's own options included."""
    from apr_ray.config import to_yaml
    from apr_ray.tasks.registry import all_options

    settings = read_config(config, overrides)
    task = settings.task.model_copy(update={"options": all_options(settings.task)})
    print(to_yaml(settings.model_copy(update={"task": task})), end="")


@config_app.command("validate")
def config_validate(overrides: Overrides = None, config: Files = None) -> None:
    """Check a configuration, the task's own options included, without starting anything."""
    from apr_ray.tasks.registry import load_task

    load_task(read_config(config, overrides).task)
    console(stderr=False).print("the configuration is valid")
