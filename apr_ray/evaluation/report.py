"""A run's report: the table before and after, three plots, one real tree; HTML with PNG files beside it."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apr_ray.config import load_config
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import ThreadTree
from apr_ray.core.trees_io import read_trees
from apr_ray.evaluation.claims import claims_by_confidence
from apr_ray.evaluation.comparison import compare, read_evaluation
from apr_ray.evaluation.lanes import lanes_of, render_lanes
from apr_ray.metrics.intervals import Interval
from apr_ray.metrics.names import mode_title
from apr_ray.metrics.rows import read_rows


@dataclass(frozen=True, slots=True)
class Summary:
    """The last full evaluation of a phase, per mode (greedy first, then by temperature): value by metric name, without
    prefix."""

    label: str
    step: int
    modes: Mapping[str, Mapping[str, float]]


def summarise(grpo: Path) -> tuple[Summary, ...]:
    """The full evaluations before (step 0) and after GRPO; the last alone where there was none before. A full one wrote
    its trees to `eval/`."""
    files = [p.stem.split("-", 2)[1:] for p in (grpo / "eval").glob("step-*.jsonl")]
    steps = sorted({int(step) for step, _ in files})
    rows = read_rows(grpo)

    def at(step: int) -> Summary:
        modes = {}
        for mode in sorted({mode for of, mode in files if int(of) == step}):  # "greedy" before "t…"
            prefix = f"eval/{mode}/"
            found = [r for r in rows if r["step"] == step and prefix + "accuracy" in r]
            if found:
                modes[mode] = {k.removeprefix(prefix): v for k, v in found[-1].items() if k.startswith(prefix)}
        return Summary(f"after {step} GRPO steps" if step else "before GRPO", step, modes)

    return tuple(at(step) for step in (*steps[:1], *steps[1:][-1:]))


TABLE_HEAD = (
    "mode",
    "policy",
    "accuracy [95 %]",
    "over the yardstick [95 %]",
    "false claims",
    "children",
    "total tokens",
    "sequential tokens",
)


def yardstick(grpo: Path, summaries: Sequence[Summary]) -> tuple[str, Mapping[str, Interval]]:
    """The best mode before, and by mode how far the policy after is over it; nothing without an evaluation before."""
    if len(summaries) < 2:
        return "", {}
    before, after = (read_evaluation(grpo, summary.step) for summary in (summaries[0], summaries[-1]))
    best, changes = compare(before, after)
    return best, {change.mode: change.over_yardstick for change in changes}


def table_rows(summaries: Sequence[Summary], gains: Mapping[str, Interval]) -> list[tuple[str, ...]]:
    """Rows of the final table, under `TABLE_HEAD`."""
    rows: list[tuple[str, ...]] = []
    for mode in sorted({mode for summary in summaries for mode in summary.modes}):
        for summary in summaries:
            m = summary.modes.get(mode)
            if m:
                interval = (
                    f"{100 * m['accuracy']:.1f} % [{100 * m['accuracy_low']:.1f}, {100 * m['accuracy_high']:.1f}]"
                )
                rows.append(
                    (
                        mode_title(mode),
                        summary.label,
                        interval,
                        str(gains.get(mode, "")) if summary is summaries[-1] else "",
                        f"{m['false_claims']:.1f} %",
                        f"{m['children']:.2f}",
                        f"{m['total_tokens']:.0f}",
                        f"{m['sequential_tokens']:.0f}",
                    )
                )
    return rows


def pick_tree(trees: Sequence[ThreadTree]) -> ThreadTree | None:
    """A tree worth drawing: solved, with the most children; else the one with the most children."""
    return max(trees, key=lambda t: (t.solved and t.children > 0, t.children), default=None)


def write_report(run: Path, sft: Path, grpo: Path) -> Path:
    """Write `report.html` and its pictures into the run's folder; returns the page's path."""
    summaries = summarise(grpo)
    if not summaries:
        raise AprError(f"{grpo} holds no whole evaluation", "Go on with apr-ray quickstart --resume")
    after = summaries[-1]
    _plot_accuracy(run / "accuracy.png", summaries)
    _plot_curves(run / "curves.png", read_rows(sft), read_rows(grpo))
    trees = list(read_trees(sorted((grpo / "eval").glob(f"step-{after.step:06d}-*.jsonl"))[-1]))  # the highest one
    tree = pick_tree(trees)
    if tree is not None:
        _plot_tree(run / "tree.png", tree)
    page = run / "report.html"
    config = load_config([grpo / "config.yaml"])
    asked = f"{config.evaluation.problems} held-out problems, seed {config.run.seed}"
    asked += f", sampled at temperature {config.grpo.temperature:g} in training"
    about = f"{run.name}, {time.strftime('%Y-%m-%d')}: {asked}"
    _plot_claims(run / "claims.png", read_rows(grpo), trees, config.grpo.reward.claim_threshold)
    best, gains = yardstick(grpo, summaries)
    table = table_rows(summaries, gains)
    page.write_text(_page(about, table, best, summaries, tree, read_rows(grpo)), encoding="utf-8")
    return page


def _page(
    about: str,
    table: Sequence[Sequence[str]],
    best: str,
    summaries: Sequence[Summary],
    tree: ThreadTree | None,
    rows: Sequence[Mapping[str, float]],
) -> str:
    cells = "".join(f"<th>{h}</th>" for h in TABLE_HEAD)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in table)
    measured = ""
    if best:
        measured = (
            f"<p>The yardstick is the policy before at its best temperature ({mode_title(best)}), problem by problem;"
            " on held-out targets it is the same mode before.</p>"
        )
    failures = ""
    for summary in summaries:
        for mode, found in summary.modes.items():
            reasons = {k.removeprefix("failure/"): v for k, v in found.items() if k.startswith("failure/")}
            listed = ", ".join(f"{r} {v:.1f} %" for r, v in sorted(reasons.items(), key=lambda i: -i[1]))
            failures += f"<li>{html.escape(summary.label)}, {mode_title(mode)}: {html.escape(listed) or 'none'}</li>"
    steps = [r for r in rows if "time/step_s" in r]
    phases = ""
    if steps:
        mean = {
            k: sum(r[f"time/{k}_s"] for r in steps) / len(steps) for k in ("rollout", "reward", "learn", "sync", "step")
        }
        phases = (
            f"<p>A GRPO step took {mean['step']:.1f} s: rollouts {mean['rollout']:.1f} s, rewards"
            f" {mean['reward']:.2f} s, learning {mean['learn']:.1f} s, weight sync {mean['sync']:.2f} s.</p>"
        )
    drawn = ""
    if tree is not None:
        drawn = (
            f"<h2>One tree</h2><p>{html.escape(tree.problem_key)}: {html.escape(tree.verdict)},"
            f" {tree.children} children, {tree.total_tokens} tokens, {tree.sequential_tokens} of them"
            f" on the critical path.</p>"
            f'<img src="tree.png" alt="lanes of one tree"><p>Blue: the parent; green: a child that solved; grey: one'
            f" without a solution; amber: cancelled; red: cut off or failed. Dotted: waiting.</p><pre>"
            f"{html.escape(render_lanes(tree))}</pre>"
            f"<details><summary>The parent's context</summary><pre>{html.escape(tree.final_text)}</pre></details>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(about)}</title>"
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left}"
        ".wide{overflow-x:auto}img{display:block;max-width:100%;margin:1.5rem 0}"
        "pre{overflow:auto;background:#f6f6f6;padding:1rem;font-size:12px}</style>"
        f"<h1>Adaptive parallel reasoning: before and after GRPO</h1><p>{html.escape(about)}</p>"
        f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>{measured}'
        f'<img src="accuracy.png" alt="accuracy"><img src="curves.png" alt="training curves">'
        f'<img src="claims.png" alt="how the policy claims, and its entropy">'
        f"<h2>Failures, of all trees</h2><ul>{failures}</ul>{phases}{drawn}</html>"
    )


def _figure(columns: int, width: float = 9.0, height: float = 3.4):  # type: ignore[no-untyped-def]
    from matplotlib.figure import Figure  # and not pyplot, which keeps every figure and asks for a screen

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _plot_accuracy(path: Path, summaries: Sequence[Summary]) -> None:
    figure, (accuracy, cost) = _figure(2)
    for offset, (summary, colour) in enumerate(zip(summaries, ("#9aa5b1", "#2563eb")[-len(summaries) :], strict=True)):
        names = [mode_title(mode).replace(", ", ",\n") for mode in summary.modes]
        found = list(summary.modes.values())
        at = [i + 0.38 * offset - 0.19 for i in range(len(names))]
        values = [100 * m["accuracy"] for m in found]
        errors = [
            [v - 100 * m["accuracy_low"] for v, m in zip(values, found, strict=True)],
            [100 * m["accuracy_high"] - v for v, m in zip(values, found, strict=True)],
        ]
        accuracy.bar(at, values, 0.36, yerr=errors, capsize=4, color=colour, label=summary.label)
        accuracy.set_xticks(range(len(names)), names)
        cost.bar(at, [m["total_tokens"] for m in found], 0.36, color=colour, alpha=0.5)
        cost.bar(at, [m["sequential_tokens"] for m in found], 0.36, color=colour)
        cost.set_xticks(range(len(names)), names)
    accuracy.set_ylabel("accuracy, % (95 % interval)")
    accuracy.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2)
    cost.set_ylabel("tokens per tree (dark: sequential)")
    figure.savefig(path, dpi=120)


def _plot_curves(path: Path, sft: Sequence[Mapping[str, float]], grpo: Sequence[Mapping[str, float]]) -> None:
    trained = [r for r in sft if "sft/loss" in r]  # none where GRPO began with a policy that was there
    figure, (*supervised, reward, size) = _figure(3 if trained else 2, 11.0, 3.0)
    for loss in supervised:
        loss.plot([r["sft/tokens"] / 1e6 for r in trained], [r["sft/loss"] for r in trained], color="#2563eb")
        loss.set(xlabel="million tokens", ylabel="supervised loss, nats", yscale="log")

    rows = [r for r in grpo if "rollout/reward" in r]
    steps = [r["step"] for r in rows]
    reward.plot(steps, [r["rollout/reward"] for r in rows], color="#2563eb", label="reward")
    solved = [r for r in rows if "rollout/accuracy" in r]
    reward.plot([r["step"] for r in solved], [r["rollout/accuracy"] for r in solved], color="#7c3aed", label="solved")
    reward.plot(steps, [r["rollout/zero_variance_groups"] for r in rows], color="#9aa5b1", label="zero-variance groups")
    decided = [r for r in rows if "rollout/p_spawn" in r]
    reward.plot(
        [r["step"] for r in decided],
        [r["rollout/p_spawn"] for r in decided],
        color="#16a34a",
        label="spawns at the first decision",
    )
    reward.set(xlabel="GRPO step", ylabel="mean over the sampled trees", ylim=(None, 1))
    reward.legend(frameon=False, fontsize=8)
    size.plot(steps, [r["rollout/children"] for r in rows], color="#2563eb")
    size.set(xlabel="GRPO step", ylabel="children per tree")
    figure.savefig(path, dpi=120)


def _plot_claims(
    path: Path, grpo: Sequence[Mapping[str, float]], trees: Sequence[ThreadTree], threshold: float
) -> None:
    """The rule that the prices imply, and how the policy keeps it; how trees end; how sure the policy is."""
    rows = [r for r in grpo if "rollout/accuracy" in r]
    figure, (claims, endings, sure) = _figure(3, 11.0, 3.0)
    found = claims_by_confidence(trees)
    claims.plot([c.confidence for c in found], [100 * c.right for c in found], "o-", color="#2563eb", label="claims")
    claims.axhline(100 * threshold, color="#9aa5b1", ls="--", label="a claim pays above")
    claims.set(xlabel="least likely token of the claim", ylabel="% of claims that are right", ylim=(0, 100))
    claims.legend(frameon=False, fontsize=8)

    steps = [r["step"] for r in rows]
    for name, key, colour in (
        ("no answer", "rollout/failure/no_answer", "#9aa5b1"),
        ("false claim", "rollout/false_claims", "#dc2626"),
        ("cut off", "rollout/truncated", "#f59e0b"),
        ("invalid spawn", "rollout/failure/invalid_spawn", "#7c3aed"),
    ):
        endings.plot(steps, [r.get(key, 0.0) for r in rows], color=colour, label=name)
    endings.set(xlabel="GRPO step", ylabel="% of trees", ylim=(0, None))
    endings.legend(frameon=False, fontsize=8)

    trained = [r for r in rows if "train/entropy" in r]
    steps = [r["step"] for r in trained]
    sure.plot(steps, [r["train/entropy"] for r in trained], color="#2563eb")
    sure.set(xlabel="GRPO step", ylabel="entropy, nats")
    scale = sure.twinx()
    scale.plot(steps, [r["train/logit_scale"] for r in trained], color="#f59e0b")
    scale.set_ylabel("logits' scale (amber)")
    figure.savefig(path, dpi=120)


def _plot_tree(path: Path, tree: ThreadTree) -> None:
    lanes = lanes_of(tree)
    figure, (axis,) = _figure(1, 9.0, 0.9 + 0.38 * len(lanes))
    colours = {"solved": "#16a34a", "no_solution": "#9aa5b1", "cancelled": "#f59e0b"}
    for row, lane in enumerate(lanes):
        colour = "#2563eb" if not lane.path else colours.get(lane.outcome, "#dc2626")
        if lane.stretches:
            axis.plot(
                [lane.stretches[0].start, lane.stretches[-1].end], [row, row], color="#cbd5e1", lw=1.5, ls=":", zorder=0
            )
        for stretch in lane.stretches:
            axis.barh(row, stretch.end - stretch.start, left=stretch.start, height=0.6, color=colour)
    axis.set_yticks(range(len(lanes)), [lane.label if not lane.path else f"child {lane.label}" for lane in lanes])
    axis.invert_yaxis()
    axis.set_xlabel("tokens on the causal path")
    axis.set_title(f"{tree.problem_key}: {tree.verdict}", fontsize=10, loc="left")
    figure.savefig(path, dpi=120)
