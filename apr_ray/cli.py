"""The `apr-ray` command. It wires parts together and holds no logic; heavy imports wait until a command needs them."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from apr_ray.core.errors import AprError, ConfigError

if TYPE_CHECKING:
    from apr_ray.config import Config
    from apr_ray.core.ledger import ThreadTree

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adaptive parallel reasoning on Ray: train, evaluate and run models that spawn and join threads.",
    epilog="Add --debug to any command for the traceback of an error.",
)
config_app = typer.Typer(no_args_is_help=True, help="Show or check a configuration.")
app.add_typer(config_app, name="config")

Files = Annotated[
    Optional[list[str]],
    typer.Option("--config", "-c", help="YAML file or preset name (quickstart, paper-apr, …); later ones override."),
]
Overrides = Annotated[Optional[list[str]], typer.Argument(help="Overrides of the form a.b=value.", show_default=False)]
Resume = Annotated[Optional[Path], typer.Option(help="Go on with this run folder.")]


def _config(files: Sequence[str] | None, overrides: Sequence[str] | None) -> Config:
    from apr_ray.config import load_config

    return load_config([_find_config(f) for f in files or []], overrides or [])


def _find_config(name: str) -> Path:
    presets = Path(__file__).parent / "presets"
    preset = presets / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml") or not preset.is_file():
        if not Path(name).is_file():
            known = ", ".join(sorted(p.stem for p in presets.glob("*.yaml")))
            raise ConfigError(f"no config file or preset {name!r}", f"Presets: {known}")
        return Path(name)
    return preset


@app.command()
def quickstart(
    overrides: Overrides = None,
    fast: Annotated[bool, typer.Option("--fast", help="A smoke run of a few minutes; it does not learn.")] = False,
    long: Annotated[bool, typer.Option("--long", help="About an hour: more of everything.")] = False,
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
    run = _run(presets if resume is None else config, overrides, resume, "quickstart")
    if fast:
        _console().print("[yellow]--fast is a smoke run: it shows that every part works, not that the model learns.[/]")
    grpo = run_quickstart(run.config, run, ProgressBars())
    page = write_report(run.path, run.path / "sft", grpo)
    _final_table(grpo)
    tracking = run.config.tracking
    store = tracking.uri or f"sqlite:///{run.path.parent}/mlflow.db"
    _next(
        f"the report            {page}",
        f"one tree as lanes     apr-ray trace {_short(run.path)}",
        *([f"metrics and traces    mlflow ui --backend-store-uri {store}"] if tracking.tracker == "mlflow" else []),
    )


@app.command()
def data(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    overrides: Overrides = None,
    config: Files = None,
) -> None:
    """Solve training problems symbolically and write the demonstrations to Parquet."""
    from dataclasses import asdict

    from apr_ray.data.demonstrations import write_demonstrations
    from apr_ray.tasks.registry import load_task
    from apr_ray.training.session import ray_session

    settings = _config(config, overrides)
    if out.exists():
        raise AprError(f"{out} exists", "Choose another --out, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AprError(f"cannot make {out.parent}: {error.strerror}", "Choose another --out") from error
    task = load_task(settings.task)
    problems = task.problems("train", settings.data.train_problems, settings.run.seed)
    with ray_session(settings):
        summary = write_demonstrations(problems, settings.task, settings.data, settings.run.seed, out)
    _table("demonstrations", ("", ""), [(k, f"{v:,}") for k, v in asdict(summary).items()])
    _next(f"apr-ray sft --data {out}")


@app.command()
def sft(
    data: Annotated[Path, typer.Option(help="Folder that `apr-ray data` wrote.")],
    overrides: Overrides = None,
    config: Files = None,
    resume: Resume = None,
) -> None:
    """Train a policy on demonstrations."""
    from apr_ray.data.demonstrations import require_demonstrations
    from apr_ray.tracking.progress import ProgressBars
    from apr_ray.training.sft import train_sft

    require_demonstrations(data)
    run = _run(config, overrides, resume, "sft")
    policy = train_sft(run.config, run, data, ProgressBars())
    last = [row for row in run.metrics() if "sft/loss" in row][-1:]
    _table("supervised training", ("metric", "last"), [(k, f"{v:.4g}") for row in last for k, v in row.items()])
    _next(f"apr-ray eval {_short(policy)}", f"apr-ray train --init {_short(policy)}")


@app.command()
def train(
    overrides: Overrides = None,
    init: Annotated[Optional[Path], typer.Option(help="Policy to begin with: a checkpoint or a run folder.")] = None,
    config: Files = None,
    resume: Resume = None,
) -> None:
    """Train a policy with GRPO over whole thread trees."""
    from apr_ray.tracking.progress import ProgressBars
    from apr_ray.training.grpo import train_grpo
    from apr_ray.training.run_dir import find_policy

    begin = [f"init_from={find_policy(init).resolve()}"] if init else []
    run = _run(config, [*(overrides or []), *begin], resume, "train")
    policy = train_grpo(run.config, run, find_policy(Path(run.config.init_from)), ProgressBars())
    _final_table(run.path)
    _next(f"apr-ray eval {_short(policy)}", f"apr-ray trace {_short(run.path)}")


@app.command()
def controls(
    init: Annotated[Path, typer.Option(help="Policy that every arm begins with: a checkpoint or a run folder.")],
    data: Annotated[Path, typer.Option(help="Demonstrations for the arm that goes on with them.")],
    overrides: Overrides = None,
    minutes: Annotated[float, typer.Option(help="Of training, for each arm and seed.")] = 10.0,
    seeds: Annotated[int, typer.Option(help="Training seeds.", min=1)] = 3,
    arm: Annotated[
        Optional[list[str]], typer.Option(help="Compare GRPO with this arm only, or with `overlap`; may be repeated.")
    ] = None,
    config: Files = None,
) -> None:
    """GRPO beside its controls: continued supervised training, rejection sampling, random rewards, a frozen engine."""
    from apr_ray.tracking.progress import ProgressBars
    from apr_ray.training.controls import CONTROLS, run_controls, table_rows
    from apr_ray.training.run_dir import find_policy

    files = [_find_config(f) for f in config or []]
    policy, bars = find_policy(init), ProgressBars()
    outcomes = run_controls(
        files, overrides or [], policy, data, minutes=minutes, seeds=seeds, arms=arm or CONTROLS, bars=bars
    )
    head = ("arm", "mode", "before, %", "after, %", "gain [95 % over seeds and problems]", "GRPO is ahead by", "steps")
    _table(f"{minutes:g} minutes each, {seeds} seeds", head, table_rows(outcomes))


@app.command("eval")
def evaluate_command(
    model: Annotated[Path, typer.Argument(help="A checkpoint or a run folder.")],
    overrides: Overrides = None,
    config: Files = None,
    out: Annotated[Optional[Path], typer.Option(help="Write the trees here, as JSON lines.")] = None,
) -> None:
    """Accuracy and cost of a policy on held-out problems."""
    from apr_ray.config import config_of
    from apr_ray.core.trees_io import write_trees
    from apr_ray.evaluation.evaluate import evaluate
    from apr_ray.metrics.names import mode_name
    from apr_ray.model.llama import read_task
    from apr_ray.reward.actor import RewardClient
    from apr_ray.rollout.pool import RolloutPool
    from apr_ray.tasks.registry import load_task
    from apr_ray.tracking.progress import ProgressBars
    from apr_ray.training.run_dir import find_policy
    from apr_ray.training.session import ray_session, require_startable

    policy = find_policy(model)
    beside = config_of(policy)  # the run's own bounds and engine, unless told otherwise
    settings = _config([*([str(beside)] if beside else []), *(config or [])], overrides)
    settings = settings.model_copy(update={"task": read_task(policy)})
    require_startable(settings, policy)
    what = settings.evaluation
    problems = load_task(settings.task).problems(what.split, what.problems, settings.run.seed)
    rows: list[tuple[str, str, str]] = []
    trees: list[ThreadTree] = []
    with ray_session(settings):
        pool, reward = RolloutPool.start(settings, str(policy)), RewardClient(settings.task)
        for temperature in what.temperatures:
            count = len(problems) * (1 if temperature == 0 else what.samples)
            with ProgressBars().bar(f"evaluate, {mode_name(temperature)}", count) as bar:
                result = evaluate(
                    pool,
                    reward,
                    problems,
                    temperature=temperature,
                    samples=what.samples,
                    seed=settings.run.seed,
                    budget=settings.rollout.budget,
                    bar=bar,
                )
            prefix = f"eval/{mode_name(temperature)}/"
            rows += [(mode_name(temperature), k.removeprefix(prefix), f"{v:.4g}") for k, v in result.metrics().items()]
            trees += result.trees
    if out is not None:
        write_trees(out, trees)
    _table(f"{policy}, {len(problems)} {what.split} problems", ("mode", "metric", "value"), rows)
    _next(f'apr-ray trace {_short(policy)} --problem "3 5 7 -> 22"')


@app.command()
def trace(
    run: Annotated[Path, typer.Argument(help="A run folder, a checkpoint, or a file of trees.")],
    problem: Annotated[Optional[str], typer.Option(help='Solve this one now, e.g. "3 5 7 -> 22".')] = None,
    number: Annotated[
        Optional[int], typer.Option(help="Which recorded tree; by default a solved one that spawned.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="With --problem; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="With --problem.")] = 0,
    text: Annotated[bool, typer.Option("--text", help="Print every thread's text too.")] = False,
) -> None:
    """Print one tree as lanes: who decodes, who waits, what joins."""
    from apr_ray.evaluation.show import describe_tree, recorded_tree

    if problem is not None:
        from apr_ray.local import solve
        from apr_ray.training.run_dir import find_policy

        policy = find_policy(run)
        beside: Path | None = policy
        tree = solve(problem, policy, temperature=temperature, seed=seed).tree
    else:
        tree, beside = recorded_tree(run, number)
    _console(stderr=False).print(describe_tree(tree, beside, text), highlight=False, markup=False, soft_wrap=True)


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="A GRPO run's folder.")],
    step: Annotated[int, typer.Argument(help="A step whose batch was kept (grpo.keep_batches).")],
    tolerance: Annotated[float, typer.Option(help="Largest difference per logprob, in nats.")] = 1e-3,
) -> None:
    """Check one training batch: logprobs, versions, dispositions and loss, all computed again from the trees."""
    from apr_ray.evaluation.audit import audit_batch
    from apr_ray.evaluation.kept_batch import find_batch, read_batch

    report = audit_batch(read_batch(find_batch(run, step)), tolerance)
    _table(f"audit of step {step} of {_short(run)}", ("check", "found", "claimed", ""), report.rows())
    if not report.agrees:
        raise typer.Exit(1)


@app.command()
def vectors(folder: Annotated[Path, typer.Argument(help="Folder with *.jsonl.gz files.")]) -> None:
    """Check a folder of traces, joins and verdicts against the grammar, the tokenizer and the verifier."""
    from apr_ray.tasks.countdown.vectors import check_folder

    report = check_folder(folder)
    _table(f"vectors in {folder}", ("check", "agree", "differ"), report.rows())
    for difference in report.differences[:5]:
        _console(stderr=False).print(difference, highlight=False, markup=False)
    if report.differences:
        raise typer.Exit(1)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="engine, gpu, learner, oracle, rollout, solver, step or sync.")],
    as_json: Annotated[bool, typer.Option("--json", help="Last line: one JSON object.")] = False,
    engine: Annotated[Optional[str], typer.Option(help="For sync and rollout: torch, sglang or vllm.")] = None,
    checkpoint: Annotated[
        Optional[str], typer.Option(help="For rollout --engine: a trained policy of the quickstart's task.")
    ] = None,
    sizes: Annotated[Optional[str], typer.Option(help="For sync: of 4mb,50mb,900mb.")] = None,
    trees: Annotated[
        Optional[int], typer.Option(min=2, help="For engine, learner and rollout: how many trees.")
    ] = None,
    repeats: Annotated[
        Optional[int], typer.Option(min=1, help="Turns of each side, where there are sides; their median counts.")
    ] = None,
) -> None:
    """Measure one part against a baseline, side by side, in one run."""
    import json

    from apr_ray.bench import run_bench

    result = run_bench(
        name,
        engine=engine,
        checkpoint=checkpoint,
        sizes=tuple(sizes.split(",")) if sizes else (),
        trees=trees,
        repeats=repeats,
    )
    _table(
        f"bench {name}",
        ("measure", "value"),
        [(k, f"{v:,.4g}" if isinstance(v, float) else str(v)) for k, v in result.items()],
    )
    if as_json:
        print(json.dumps(result))


@app.command()
def doctor() -> None:
    """What this machine has, and what is missing for what."""
    from apr_ray.doctor import examine

    rows = examine()
    _table("apr-ray doctor", ("part", "state", "what for"), rows)
    if any(state.startswith("missing") for _, state, _ in rows):
        raise typer.Exit(1)


@config_app.command("show")
def config_show(overrides: Overrides = None, config: Files = None) -> None:
    """Print the whole configuration as YAML, the task's own options included."""
    from apr_ray.config import to_yaml
    from apr_ray.tasks.registry import all_options

    settings = _config(config, overrides)
    task = settings.task.model_copy(update={"options": all_options(settings.task)})
    print(to_yaml(settings.model_copy(update={"task": task})), end="")


@config_app.command("validate")
def config_validate(overrides: Overrides = None, config: Files = None) -> None:
    """Check a configuration, the task's own options included, without starting anything."""
    from apr_ray.tasks.registry import load_task

    load_task(_config(config, overrides).task)
    _console(stderr=False).print("the configuration is valid")


def _run(files: Sequence[str] | None, overrides: Sequence[str] | None, resume: Path | None, command: str) -> Any:
    """The run folder to go on with, or a new one, which is made only for a run that can start."""
    from apr_ray.training.run_dir import RunDir, find_policy
    from apr_ray.training.session import require_startable

    saved = [] if resume is None else [str(RunDir.config_file(resume))]
    if resume is not None and command != "quickstart" and (resume / "grpo" / "config.yaml").is_file():
        raise AprError(f"{resume} is a quickstart's folder", f"Give {resume / 'grpo'}, or apr-ray quickstart --resume")
    settings = _config([*saved, *(files or [])], overrides)
    policy = find_policy(Path(settings.init_from)) if settings.init_from else None
    if policy is None and command == "train":
        raise ConfigError("no policy to begin with", "Give --init CHECKPOINT; make one with apr-ray sft")
    require_startable(settings, policy)
    return RunDir.create(settings, command) if resume is None else RunDir.resume(resume, settings)


def _console(stderr: bool = True) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in head:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: [sglang] is no markup
    _console(stderr=False).print(table)


def _final_table(grpo: Path) -> None:
    from apr_ray.evaluation.report import summarise, table_rows

    head = ("mode", "policy", "accuracy [95 %]", "children", "total tokens", "sequential")
    _table("before and after GRPO", head, table_rows(summarise(grpo)))


def _next(*lines: str) -> None:
    console = _console(stderr=False)
    console.print("next:", highlight=False)
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def _short(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def explain(error: BaseException) -> str | None:
    """An error in one line with its remedy, or None for one that needs its traceback."""
    cause = getattr(error, "cause", None)  # Ray wraps what an actor raised
    if isinstance(cause, BaseException):
        inner = explain(cause)
        if inner is not None:
            return inner
    if isinstance(error, AprError):
        return str(error)
    if _says_disk_full(error):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"the disk is full{where}. Free space and go on with --resume: the last complete checkpoint is untouched"
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return f"no permission for {error.filename}. Choose another run.root"
    return None


def _says_disk_full(error: BaseException) -> bool:
    """Python, Arrow and DeepSpeed raise OSError; safetensors and SQLite errors of their own, and Ray may know only the
    text of what an actor raised."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(text in str(error) for text in (os.strerror(errno.ENOSPC), "database or disk is full"))


def main() -> None:
    """Entry point: errors in one line with the remedy, `--debug` for the traceback, Ctrl-C ends everything."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning of Ray's about GPUs
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(args=arguments)  # usage errors and Ctrl-C end here, with an exit status
    except Exception as error:
        line = explain(error)
        if "--debug" in sys.argv or line is None:
            traceback.print_exc()
        print(f"error: {line or 'unexpected, see above; please report it'}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
