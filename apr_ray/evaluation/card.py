"""A policy to give away: its weights and tokenizer, the settings that it needs, and a card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from apr_ray import __version__
from apr_ray.config import Config, load_config, to_yaml
from apr_ray.core.errors import AprError
from apr_ray.metrics.intervals import Interval
from apr_ray.metrics.names import mode_title
from apr_ray.metrics.rows import read_rows
from apr_ray.model.llama import policy_fingerprint, read_config, read_task, replace_directory
from apr_ray.model.shipped import resolve_policy, shipped_names

LICENCE = "apache-2.0"
COLUMNS = {
    "accuracy": ("accuracy", 100, "%"),
    "accuracy_low": ("95 %, low", 100, "%"),
    "accuracy_high": ("high", 100, "%"),
    "false_claims": ("false claims", 1, "%"),
    "children": ("children", 1, ""),
    "sequential_tokens": ("sequential tokens", 1, ""),
}


def write_policy_folder(policy: Path, run: Path, results: Path, out: Path) -> None:
    """Write `out` whole: `config.yaml` without paths of this machine, `README.md`, and the policy in `final/`.

    Raises AprError where `out` exists, `results` is not what `apr-ray eval --json` wrote, or `run` holds no training.
    """
    if out.exists():
        raise AprError(f"{out} exists", "Choose another --out, or remove it")
    try:
        found = json.loads(results.read_text())
        found["metrics"], found["split"], found["problems"], found["targets_problems"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AprError(
            f"{results} holds no results: {error!r}", f"Make them: apr-ray eval {run} --json FILE"
        ) from error
    weights = policy_fingerprint(policy)
    if found.get("policy", weights) != weights:  # files before it was kept have none
        raise AprError(
            f"{results} is of other weights ({found['policy']}, the run's are {weights})",
            f"Evaluate the run's: apr-ray eval {run} --json FILE",
        )
    config = load_config([run / "config.yaml"])
    card = _card(out.name, policy, run, config, found)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(policy, partial / "final")
    (partial / "config.yaml").write_text(to_yaml(_portable(config)))
    (partial / "README.md").write_text(card)
    replace_directory(partial, out)


def _portable(config: Config) -> Config:
    """Without what belongs to one run or machine: names, places, how Ray is reached, what watches."""
    usual = Config()
    run = usual.run.model_copy(update={"seed": config.run.seed})
    return config.model_copy(update={"run": run, "ray": usual.ray, "tracking": usual.tracking, "init_from": None})


def _card(name: str, policy: Path, run: Path, config: Config, found: dict[str, Any]) -> str:
    shape = read_config(policy)
    task = read_task(policy)
    space = task.options.get("space", {})
    how = [
        ("architecture", f"Llama, {shape['num_hidden_layers']} layers of {shape['hidden_size']}, vocabulary"
         f" {shape['vocab_size']}, context {shape['max_position_embeddings']} tokens"),
        *_origin(run, config),
        ("weights", f"fingerprint `{policy_fingerprint(policy)}`"),
        ("problems", ", ".join(f"{key} {value}" for key, value in space.items())),
    ]  # fmt: skip
    modes = sorted(key.split("/")[1] for key in found["metrics"] if key.endswith("/accuracy"))
    head = " | ".join(title + (f", {unit}" if unit else "") for title, _, unit in COLUMNS.values())
    rows = []
    for mode in modes:
        values = [found["metrics"][f"eval/{mode}/{column}"] for column in COLUMNS]
        cells = (f"{scale * v:.1f}" for v, (_, scale, _) in zip(values, COLUMNS.values(), strict=True))
        rows.append(f"| {mode_title(mode)} | {' | '.join(cells)} |")
    return "\n".join(
        [
            "---", f"license: {LICENCE}", "library_name: apr-ray", "---", "", f"# {name}", "",
            f"A policy for the task `{task.name}` that reasons in threads: its children decode side by side.",
            "",
            "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in how), "",
            f"On {found['problems']} problems of the split `{found['split']}`, and {found['targets_problems']} with"
            " held-out targets; it was trained on none of them:", "",
            f"| decoded | {head} |", "|---" * (len(COLUMNS) + 1) + "|", *rows, "",
            *_comparison(found),
            "**Limits.** It knows texts of this task in the ranges above and nothing else. Problems beyond them are"
            " tried and mostly fail. Answers must be verified: some claim what is not true.",
            "",
            "**Licence.** Apache-2.0.", "",
        ]
    )  # fmt: skip


def _origin(run: Path, config: Config) -> list[tuple[str, str]]:
    """How a run trained its policy: on demonstrations, or by GRPO from another."""
    states = sorted((run / "checkpoints").glob("step-*/state.json"))
    state = json.loads(states[-1].read_text()) if states else {}
    if not state.get("data") and not state.get("policy"):
        raise AprError(f"{run} trained no policy", "Give one that did; of a quickstart's run, its folder sft or grpo")

    beside = f"with the `config.yaml` beside this card, seed {config.run.seed}, apr-ray {__version__}"
    minutes = f"{state['elapsed_s'] / 60:.1f} minutes"
    if state["data"]:
        speeds = [row["sft/tokens_per_s"] for row in read_rows(run) if "sft/tokens_per_s" in row]
        speed = f"{sum(speeds) / max(1, len(speeds)):,.0f} tokens/s"
        amount = f"{state['tokens']:,} tokens in {state['step']:,} steps, {state['precision']}"
        return [
            ("command", f"`apr-ray sft -c config.yaml --data DEMOS` {beside}"),
            ("trained on", f"{amount}, {speed}, {minutes}"),
            ("demonstrations", f"fingerprint `{state['data']}`"),
        ]
    shipped = {policy_fingerprint(resolve_policy(name) / "final"): name for name in shipped_names()}
    first = shipped.get(state["policy"], "POLICY")
    return [
        ("command", f"`apr-ray train -c config.yaml --init {first}` {beside}"),
        ("trained by", f"GRPO, {state['step']:,} steps, {state['sampled_tokens']:,} sampled tokens, {minutes}"),
        ("began with", f"weights `{state['policy']}`"),
    ]


def _comparison(found: dict[str, Any]) -> list[str]:
    """How far over the policy that it was compared with, if it was."""
    if not (over := found.get("over_yardstick")):
        return []
    modes = ", ".join(f"{mode_title(mode)} {Interval(**over[mode])}" for mode in sorted(over))
    best = mode_title(found["yardstick"])
    return [f"Percentage points over the policy before, decoded at its best temperature ({best}), paired: {modes}.", ""]
