"""What tests share: a tiny task, a tiny checkpoint, one Ray for all tests that need it."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest
from _pytest.terminal import TerminalReporter

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(  # Ray's workers import the second task from here
    filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
)

from apr_ray.config import Config, ModelConfig, TaskConfig, parse_config
from apr_ray.tasks.countdown.task import CountdownTask
from apr_ray.tasks.registry import load_task

# How long a test takes says what else the machine does. `make test` looks at the same examples of a property each time,
# `make test-slow` at further ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("further", deadline=None)

SGLANG_CPU = Path(__file__).parent / "sglang_cpu"
TASK = {
    "space": {"count": 3, "low": 1, "high": 12, "target_low": 1, "target_high": 60, "heldout_fraction": 0.2},
    "solver": {"beam_low": 1, "beam_high": 3, "child_beam_high": 4, "promising": 0.7},
}
MODEL = ModelConfig(hidden_size=64, layers=2, heads=2, ffn_size=48, context_tokens=768)


@pytest.fixture(scope="session")
def task_config() -> TaskConfig:
    return TaskConfig(options=TASK)


@pytest.fixture(scope="session")
def task(task_config: TaskConfig) -> CountdownTask:
    loaded = load_task(task_config)
    assert isinstance(loaded, CountdownTask)
    return loaded


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, task: CountdownTask, task_config: TaskConfig) -> Path:
    """An untrained policy with large weights, so that its distributions are far from uniform."""
    import torch

    from apr_ray.model.llama import new_policy, save_policy

    torch.set_num_threads(1)
    policy = new_policy(MODEL.model_copy(update={"initializer_range": 0.15}), task.tokenizer(), seed=7)
    folder = tmp_path_factory.mktemp("checkpoint") / "policy"
    save_policy(policy, task.tokenizer(), task_config, folder)
    return folder


@pytest.fixture(scope="session")
def small_config() -> Config:
    """The whole pipeline at the smallest size that still does everything."""
    return parse_config(
        {
            "task": {"options": TASK},
            "model": MODEL.model_dump(),
            "data": {"train_problems": 60, "max_sequence_tokens": 768},
            "learner": {"ranks": 2},
            "sft": {"tokens": 26_000, "batch_tokens": 2000, "log_every": 2, "save_every": 4, "eval_every": 6},
            "grpo": {
                "steps": 3,
                "problems_per_step": 3,
                "group_size": 2,
                "eval_every": 1,
                "save_every": 1,
                "kl_coefficient": 0.001,
                "optimizer": {"learning_rate": 1e-3},
            },
            "bounds": {"max_call_tokens": 120, "max_tree_tokens": 600},
            "rollout": {"workers": 2, "concurrent_trees": 4},
            "evaluation": {"problems": 4, "during_training_problems": 3, "traced_trees": 1, "temperatures": [0.0, 1.0]},
        }
    )


@pytest.fixture(scope="session")
def single_config(small_config: Config) -> Config:
    """One learner rank and one rollout worker, for what does not depend on how many there are."""
    learner = small_config.learner.model_copy(update={"ranks": 1})
    rollout = small_config.rollout.model_copy(update={"workers": 1})
    return small_config.model_copy(update={"learner": learner, "rollout": rollout})


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One private Ray for the whole test session. Its GPUs are only counted: nothing computes on them."""
    import ray

    ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def pytest_configure(config: pytest.Config) -> None:
    gc.set_threshold(100_000)  # imports of whole libraries make much and no garbage
    if not config.getoption("--hypothesis-profile"):
        hypothesis.settings.load_profile("same")
    # vLLM's folder holds other versions of some packages; for a GPU, SGLang is installed with its own kernels.
    if "vllm" not in config.getoption("--engines").split(",") and config.getoption("--device") == "cpu":
        allow_sglang_on_a_cpu()


def allow_sglang_on_a_cpu() -> None:
    """Let this process and all it starts import SGLang without its CUDA kernels; see `tests/sglang_cpu/`."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SGLANG_CPU), os.environ.get("PYTHONPATH"))))
    sys.path.append(str(SGLANG_CPU))
    spec = importlib.util.spec_from_file_location("sglang_cpu_hook", SGLANG_CPU / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engines", metavar="NAMES", default="torch,sglang", help="engines to hold to the interface")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where those of them compute that can")
    parser.addoption("--conformance-table", metavar="FILE", help="also write the engines' table to a Markdown file")
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped has failed, as in CI")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest's own, which makes a skip of an expected failure
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return not_skipped(item.config, (yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return not_skipped(collector.config, (yield))


R = TypeVar("R", pytest.TestReport, pytest.CollectReport)


def not_skipped(config: pytest.Config, report: R) -> R:
    """With `--no-skips`, a skip as a failure, which is made where the test runs: pytest-xdist then knows of it."""
    if report.skipped and not hasattr(report, "wasxfail") and config.getoption("--no-skips"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"{reason} (--no-skips)"
    return report


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    """The conformance table: every check of `test_engine_conformance.py` by engine."""
    table = conformance_table(terminalreporter)
    if table:
        terminalreporter.section("engine conformance")
        terminalreporter.write_line(table)
        if file := config.getoption("--conformance-table"):
            Path(file).write_text(table + "\n")


def conformance_table(reporter: TerminalReporter) -> str:
    """Markdown; "" where no such test ran. A check with several cases passes if all do."""
    cells: dict[str, dict[str, str]] = {}
    deltas: dict[str, float] = {}
    engines: list[str] = []
    for outcome in ("passed", "failed", "error"):
        for report in reporter.stats.get(outcome, []):
            properties = dict(getattr(report, "user_properties", ()))  # a file that is not collected has none
            if "check" not in properties or (outcome == "passed" and report.when != "call"):
                continue
            check, engine = str(properties["check"]), str(properties["engine"])
            row = cells.setdefault(check, {})
            row[engine] = (
                "n/a" if outcome == "passed" and "n/a" in properties else {"passed": "pass"}.get(outcome, "FAIL")
            )
            if engine not in engines:
                engines.append(engine)
            deltas[engine] = max(deltas.get(engine, 0.0), float(properties.get("delta", 0.0)))
    if not cells:
        return ""
    lines = ["| check | " + " | ".join(engines) + " |", "|---|" + "---|" * len(engines)]
    lines += [
        f"| {check} | " + " | ".join(row.get(e, "not run") for e in engines) + " |" for check, row in cells.items()
    ]
    largest = " | ".join(f"{deltas[e]:.1e}" for e in engines)
    lines.append(f"| largest \\|Δ logprob\\| to transformers in float64 | {largest} |")
    return "\n".join(lines)


LONGEST = (
    "pipeline", "engine_conformance", "deaths", "weights", "engine_pool", "placement", "jobs", "learner", "bench"
)  # fmt: skip
"""Files that take minutes begin first: two processes share the files, and neither should end long after the other."""


@pytest.hookimpl(tryfirst=True)  # marks before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test of which `--engines` leaves no case is not skipped: it is not asked for."""
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("property")
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
    empty = [
        i for i in items if any("empty parameter set" in str(m.kwargs.get("reason")) for m in i.iter_markers("skip"))
    ]
    if empty:
        items[:] = [item for item in items if item not in empty]
        config.hook.pytest_deselected(items=empty)
