"""Shared by the commands: the application, their options, and how they print."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from apr_ray.core.errors import AprError, ConfigError

if TYPE_CHECKING:
    from apr_ray.config import Config

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


def user_path(text: str) -> Path:
    """A path as somebody types it: `--out=~/x` is not expanded by the shell."""
    if not text:
        raise typer.BadParameter("the path is empty")
    return Path(os.path.expanduser(text))  # which leaves ~nobody as it is


def path_argument(help: str) -> Any:
    """An argument that is a path."""
    return typer.Argument(parser=user_path, metavar="PATH", help=help)


def path_option(help: str, *names: str) -> Any:
    """An option that is a path."""
    return typer.Option(*names, parser=user_path, metavar="PATH", help=help)


Resume = Annotated[Optional[Path], path_option("Go on with this run folder.")]
WIDE = 160
"""Columns of what goes to a file or a pipe: a table in a log is not folded."""


def read_config(files: Sequence[str] | None, overrides: Sequence[str] | None) -> Config:
    """Files and presets, later ones on top, then the overrides."""
    from apr_ray.config import load_config

    return load_config([find_config(f) for f in files or []], overrides or [])


def find_config(name: str) -> Path:
    """A YAML file, or a preset by its name. Raises ConfigError naming the presets."""
    presets = Path(__file__).parents[1] / "presets"
    preset = presets / f"{name}.yaml"
    if preset.is_file() and Path(name).suffix not in (".yaml", ".yml"):
        return preset
    file = user_path(name)
    if not file.exists():
        known = ", ".join(sorted(p.stem for p in presets.glob("*.yaml")))
        raise ConfigError(f"no config file or preset {name!r}", f"Presets: {known}")
    if file.is_dir():
        raise ConfigError(f"{name} is a folder", "Give a YAML file in it")
    return file  # or a pipe


def run_folder(files: Sequence[str] | None, overrides: Sequence[str] | None, resume: Path | None, command: str) -> Any:
    """The run folder to go on with, or a new one, which is made only for a run that can start."""
    from apr_ray.training.run_dir import RunDir, find_policy
    from apr_ray.training.session import require_startable

    saved = [] if resume is None else [str(RunDir.config_file(resume))]
    if resume is not None and command != "quickstart" and (resume / "grpo" / "config.yaml").is_file():
        phase = resume / ("sft" if command == "sft" else "grpo")
        raise AprError(f"{resume} is a quickstart's folder", f"Give {phase}, or apr-ray quickstart --resume")
    settings = read_config([*saved, *(files or [])], overrides)
    policy = find_policy(Path(settings.init_from)) if settings.init_from else None
    if policy is None and command == "train":
        raise ConfigError("no policy to begin with", "Give --init CHECKPOINT; make one with apr-ray sft")
    require_startable(settings, policy)
    if resume is not None:
        return RunDir.resume(resume, settings)
    if policy is not None:  # a run's folder stands for the policy in it, wherever it is gone on from
        settings = settings.model_copy(update={"init_from": str(policy.resolve())})
    return RunDir.create(settings, command)


def console(stderr: bool = True) -> Any:
    """A rich console, as wide as the terminal, as COLUMNS says, or as a log should be."""
    from rich.console import Console

    made = Console(stderr=stderr)
    columns = os.environ.get("COLUMNS", "")
    if not columns.isdecimal() or int(columns) < 1:  # of which rich makes a console that shows nothing
        made.width = made.width if made.is_terminal else WIDE
    return made


@contextmanager
def begun(run: Any) -> Iterator[None]:
    """Around a run's work: where it ends before anything but its settings was written, its folder goes too."""
    try:
        yield
    except BaseException:
        run.remove_if_bare()
        raise


def speaks_utf(out: Any) -> bool:
    """Whether a console can write more than ASCII."""
    return str(out.encoding).lower().startswith("utf")


def require_writable(folder: Path, option: str) -> None:
    """Raise AprError where no file can be made in a folder, before the work whose result goes there."""
    try:
        with tempfile.TemporaryFile(dir=folder):  # os.access says yes to root for /proc
            pass
    except OSError as error:
        raise AprError(f"{option}: cannot write in {folder}: {error.strerror}", "Give another path") from error


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """To stdout; title and cells are printed as they are, `[sglang]` is no markup."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title), title_justify="left")
    for column in head:
        made.add_column(Text(column))
    for row in rows:
        made.add_row(*map(Text, row))
    console(stderr=False).print(made)


def final_table(grpo: Path) -> None:
    """A GRPO run's accuracy and cost, before and after."""
    from apr_ray.evaluation.report import TABLE_HEAD, summarise, table_rows, yardstick
    from apr_ray.metrics.names import mode_title

    summaries = summarise(grpo)
    best, gains = yardstick(grpo, summaries)
    title = f"before and after GRPO; yardstick: the policy before, {mode_title(best)}" if best else "after GRPO"
    print_table(title, TABLE_HEAD, table_rows(summaries, gains))


def say_next(*lines: str) -> None:
    """Commands that a person may want to run next."""
    out = console(stderr=False)
    out.print("next:", highlight=False)
    for line in lines:
        out.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def short(path: Path) -> str:
    """A path to type: from here, where it lies below and "here" still is, and quoted where a shell needs it."""
    try:
        return shlex.quote(str(path.resolve().relative_to(Path.cwd())))
    except (ValueError, OSError):
        return shlex.quote(str(path))
