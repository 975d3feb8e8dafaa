"""The audit against the learners' maths on trees of a real engine, and against every kind of tampering."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from apr_ray.cli import app
from apr_ray.config import BoundsConfig, TaskConfig
from apr_ray.core.engine import FinishReason, VersionSpan
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import SOLVED, Ending, Group, Outcome, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.engines.torch_engine import TorchEngine
from apr_ray.evaluation.audit import audit_batch
from apr_ray.evaluation.audit_ledger import check_verdicts
from apr_ray.evaluation.kept_batch import KeptBatch, KeptStep, Reported, find_batch, keep_batch, read_batch
from apr_ray.model.llama import load_policy, save_policy
from apr_ray.reward.score import score, with_verdict
from apr_ray.rl.batches import GrpoBatch, grpo_batch
from apr_ray.rl.losses import grpo_loss, log_ratio, token_logprobs
from apr_ray.rl.mismatch import Correction, importance_weights, measure_mismatch, tree_sums
from apr_ray.tasks.countdown.task import CountdownTask
from apr_ray.threads.runtime import TreeRequest, run_tree

CLIP, KL, TEMPERATURE = 0.2, 0.05, 1.0


@pytest.fixture(scope="module")
def trees(checkpoint: Path, task: CountdownTask) -> tuple[ThreadTree, ...]:
    """Three groups of two, drawn by the embedded engine; an untrained policy solves nothing, so rewards are made up."""

    async def main() -> list[ThreadTree]:
        engine = TorchEngine.from_checkpoint(checkpoint, max_sequences=6, cache_slots=4)
        protocol = task.protocol(task.tokenizer())
        return await asyncio.gather(
            *(
                run_tree(
                    engine,
                    protocol,
                    TreeRequest(problem, sample, seed=10 * i + sample, temperature=TEMPERATURE),
                    BoundsConfig(max_call_tokens=60, max_tree_tokens=200),
                    tree_id=f"t{i}{sample}",
                )
                for i, problem in enumerate(task.problems("train", 3, 0))
                for sample in range(2)
            )
        )

    rewards = (0.0, 1.0, 1.0, 0.0, 1.0, 1.0)
    return tuple(
        replace(tree, reward=r, verdict=SOLVED if r else "wrong_value")
        for tree, r in zip(asyncio.run(main()), rewards, strict=True)
    )


@pytest.fixture(scope="module")
def reference(
    checkpoint: Path, task: CountdownTask, task_config: TaskConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Another policy, for the KL term to pull towards."""
    policy: Any = load_policy(checkpoint)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    folder = tmp_path_factory.mktemp("reference") / "policy"
    save_policy(policy, task.tokenizer(), task_config, folder)
    return folder


def learn(made: GrpoBatch, checkpoint: Path, step: KeptStep) -> Reported:
    """The first inner step by `rl/`, one sequence at a time."""
    policy: Any = load_policy(checkpoint)
    anchor: Any = load_policy(step.reference) if step.reference else None
    batch = made.batch
    columns = (batch.tokens, batch.targets, batch.behaviour_logprobs, batch.advantages, batch.loss_weights)
    rows = [[torch.from_numpy(c[a:b])[None] for c in columns] for a, b in itertools.pairwise(batch.offsets)]
    with torch.no_grad():
        starts = [token_logprobs(policy(tokens).logits, targets, TEMPERATURE) for tokens, targets, *_ in rows]
    deltas = [log_ratio(start, old, weights != 0) for start, (_, _, old, _, weights) in zip(starts, rows, strict=True)]
    flat = torch.cat(deltas, dim=1)[0].numpy()
    mismatch = measure_mismatch(flat, batch)
    sums = torch.from_numpy(tree_sums(flat, batch)[batch.trees])
    how = None
    if step.correction != "none" and mismatch.whole.delta_mean > step.correction_from:
        how = Correction(step.correction, step.correction_level, step.correction_cap)  # type: ignore[arg-type]
    parts, cut, slope = [], 0, 0.0
    for i, (tokens, targets, old, advantages, weights) in enumerate(rows):
        importance = importance_weights(deltas[i], how, sums[i : i + 1]) if how else None
        cut += int((importance.cut & (weights != 0)).sum()) if importance else 0
        with torch.no_grad():
            towards = token_logprobs(anchor(tokens).logits, targets, TEMPERATURE) if anchor else None
        logprobs = token_logprobs(policy(tokens).logits, targets, TEMPERATURE)
        logprobs.retain_grad()
        part = grpo_loss(
            logprobs,
            starts[i] if step.ratio == "proximal" else old,
            advantages,
            weights,
            torch.zeros_like(old),
            clip=CLIP,
            kl_coefficient=step.kl_coefficient,
            reference_logprobs=towards,
            importance_weights=importance.values if importance else None,
        )
        part.loss.backward()
        parts.append(part)
        assert logprobs.grad is not None
        slope += float((logprobs.grad * logprobs.detach()).sum())
    return Reported(
        loss=sum(float(p.loss.detach()) for p in parts),
        kl=sum(p.kl for p in parts),
        grad_norm=math.sqrt(sum(float(p.grad.square().sum()) for p in policy.parameters())),
        tokens=sum(p.tokens for p in parts),
        delta_mean=mismatch.whole.delta_mean,
        delta_max=mismatch.whole.delta_max,
        cut=cut,
        slope=slope,
    )


def keep(
    run: Path, trees: tuple[ThreadTree, ...], checkpoint: Path, reference: Path, kl: float, number: int, **options: Any
) -> Path:
    groups = [Group(trees[i].problem_key, trees[i : i + 2]) for i in range(0, len(trees), 2)]
    made = grpo_batch(
        groups,
        skip_zero_advantage=not kl,
        loss_mean=options.get("loss_mean", "call"),
        advantage_kind=options.get("advantage", "group"),
        credit=options.get("credit", "tree"),
    )
    plain = {"version": "0.0", "max_staleness": 0}
    step = KeptStep(
        step=number,
        group_size=2,
        clip=CLIP,
        kl_coefficient=kl,
        temperature=TEMPERATURE,
        reference=str(reference) if kl else "",
        dispositions={d.value: n for d, n in made.dispositions.items()},
        reported=None,
        **(plain | options),
    )
    step = replace(step, reported=learn(made, checkpoint, step))
    return keep_batch(run, step, trees, checkpoint, only_newest=False)


@pytest.fixture(scope="module")
def run(
    trees: tuple[ThreadTree, ...], checkpoint: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that kept step 1, with a KL term, and step 2, without one."""
    folder = tmp_path_factory.mktemp("run")
    keep(folder, trees, checkpoint, reference, KL, 1)
    keep(folder, trees, checkpoint, reference, 0.0, 2)
    return folder


@pytest.fixture(scope="module")
def kept(run: Path) -> KeptBatch:
    return read_batch(find_batch(run, 1))


def test_a_batch_comes_back_from_disk_as_it_was(kept: KeptBatch, trees: tuple[ThreadTree, ...]) -> None:
    assert kept.trees == trees
    assert kept.version == WeightVersion(0, 0)


@pytest.mark.parametrize("step", [1, 2])
def test_two_ways_to_the_same_loss_and_gradient(run: Path, step: int) -> None:
    """The learners' maths (packed weights, `rl/`) and the audit's (the paper's sentence, call by call) agree."""
    batch = read_batch(find_batch(run, step))
    report = audit_batch(batch)
    assert report.agrees, report.rows()
    found = {finding.check: finding.found for finding in report.findings}
    calls = sum(len(tree.calls) for tree in batch.trees)
    assert found["calls drawn under these weights"] == f"{calls} of {calls}"
    assert float(found["gradient norm"]) > 0.05
    assert ("zero_advantage" in found["dispositions"]) == (step == 2)
    assert (float(found["KL term"]) > 0.001) == (step == 1)


@pytest.mark.parametrize("loss_mean", ["call", "token"])
@pytest.mark.parametrize(
    "objective",
    [{"advantage": "leave_one_out"}, {"advantage": "success"}, {"advantage": "leave_one_out", "credit": "causal"}],
)
def test_other_advantages_and_means_are_audited_too(
    objective: dict[str, str], loss_mean: str, trees: tuple[ThreadTree, ...], checkpoint: Path, tmp_path: Path
) -> None:
    priced = tuple(replace(tree, reward=tree.reward or -0.2) for tree in trees)
    prices = {ending.value: float(ending is Ending.SOLVED) or -0.2 for ending in Ending}
    found = keep(tmp_path, priced, checkpoint, checkpoint, 0.0, 1, loss_mean=loss_mean, prices=prices, **objective)
    report = audit_batch(read_batch(found))
    assert report.agrees, report.rows()
    paid = replace(read_batch(found), trees=(replace(priced[0], reward=0.5), *priced[1:]))
    assert next(f.check for f in audit_batch(paid).findings if not f.agrees) == "rewards that are their ending's price"


def test_a_batch_that_moves_nothing_agrees_but_for_rounding(kept: KeptBatch, checkpoint: Path) -> None:
    """A KL term against the policy itself, whose sum may round to below 0, and no differing rewards."""
    trees = tuple(replace(tree, reward=1.0) for tree in kept.trees)
    told = kept.step.reported
    assert told is not None
    none = replace(told, loss=1e-16, kl=-1e-12, grad_norm=1e-10, slope=-1e-10)
    batch = replace(kept, trees=trees, step=replace(kept.step, reference=str(checkpoint), reported=none))
    report = audit_batch(batch)
    assert report.agrees, report.rows()


def test_a_tree_whose_engine_failed_is_left_out_on_both_sides(
    trees: tuple[ThreadTree, ...], checkpoint: Path, reference: Path, tmp_path: Path
) -> None:
    failed = (replace(trees[0], outcome=Outcome.ENGINE_ERROR), *trees[1:])
    keep(tmp_path, failed, checkpoint, reference, KL, 1)
    report = audit_batch(read_batch(find_batch(tmp_path, 1)))
    assert report.agrees, report.rows()
    found = {finding.check: finding.found for finding in report.findings}
    assert f"error {trees[0].total_tokens}" in found["dispositions"]


@pytest.fixture(scope="module")
def moved(
    checkpoint: Path, task: CountdownTask, task_config: TaskConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The policy one version later than the one that drew the trees."""
    policy: Any = load_policy(checkpoint)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.98)
    folder = tmp_path_factory.mktemp("moved") / "policy"
    save_policy(policy, task.tokenizer(), task_config, folder)
    return folder


@pytest.fixture(scope="module")
def threaded(trees: tuple[ThreadTree, ...]) -> tuple[ThreadTree, ...]:
    """The same, but the first tree of a group has its sibling's call as a child: an untrained policy spawns none."""
    return tuple(
        replace(tree, calls=(*tree.calls, *(replace(call, path=(0,)) for call in trees[i + 1].calls)))
        if i % 2 == 0
        else tree
        for i, tree in enumerate(trees)
    )


DECOUPLED = {"ratio": "proximal", "correction": "truncate", "correction_cap": 1.02}


@pytest.mark.parametrize(
    "options",
    [
        {"loss_mean": "tree"},
        {"loss_mean": "token"},
        {"ratio": "proximal"},
        DECOUPLED,
        DECOUPLED | {"correction_level": "call"},
        DECOUPLED | {"correction_level": "tree", "loss_mean": "tree"},
        DECOUPLED | {"correction_level": "token", "correction": "mask"},
        DECOUPLED | {"correction_level": "call", "correction": "mask", "correction_cap": 1.05, "loss_mean": "token"},
        DECOUPLED | {"correction_level": "tree", "correction": "mask", "correction_cap": 1.5},
        DECOUPLED | {"correction_from": 9.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kl", [KL, 0.0])
def test_every_option_of_the_loss_is_known_to_the_audit(
    threaded: tuple[ThreadTree, ...],
    moved: Path,
    reference: Path,
    options: dict[str, Any],
    kl: float,
    tmp_path: Path,
) -> None:
    """On trees one version old, so that engine and learner differ; under other options the same batch differs."""
    stale = {"version": "0.1", "max_staleness": 1}
    batch = read_batch(keep(tmp_path, threaded, moved, reference, kl, 1, **stale, **options))
    report = audit_batch(batch)
    assert report.agrees, report.rows()
    told = batch.step.reported
    assert told is not None
    applied = "correction" in options and "correction_from" not in options
    assert (0 < told.cut < told.tokens) == applied, told
    if "correction_from" in options:
        return  # the same as without a correction
    defaults = {f.name: f.default for f in fields(KeptStep) if f.name in options}
    other = audit_batch(replace(batch, step=replace(batch.step, **defaults)))
    assert {"loss", "gradient norm"} & {f.check for f in other.findings if not f.agrees}, other.rows()


def test_a_batch_without_anything_to_learn_has_no_weights_to_correct(kept: KeptBatch) -> None:
    trees = tuple(replace(tree, reward=1.0) for tree in kept.trees)
    counts = {"zero_advantage" if name == "trained" else name: n for name, n in kept.step.dispositions.items()}
    step = replace(
        kept.step, kl_coefficient=0.0, reported=None, dispositions=counts, ratio="proximal", correction="mask"
    )
    report = audit_batch(replace(kept, trees=trees, step=step))
    assert report.agrees, report.rows()
    assert report.findings[-1].check == "step"


def edit(kept: KeptBatch, **changes: object) -> KeptBatch:
    """The batch with its first tree's longest call changed."""
    tree = kept.trees[0]
    longest = max(tree.calls, key=lambda c: len(c.sampled_ids))
    calls = tuple(replace(c, **changes) if c is longest else c for c in tree.calls)  # type: ignore[arg-type]
    return replace(kept, trees=(replace(tree, calls=calls), *kept.trees[1:]))


def test_tampering_is_named(kept: KeptBatch) -> None:
    call = max(kept.trees[0].calls, key=lambda c: len(c.sampled_ids))
    place = next(i for i in range(len(call.sampled_ids)) if i not in call.forced)
    wrong = (*call.sampled_ids[:place], (call.sampled_ids[place] + 7) % 57, *call.sampled_ids[place + 1 :])
    told = kept.step.reported
    assert told is not None

    def claim(**changes: float) -> KeptBatch:
        return replace(kept, step=replace(kept.step, reported=replace(told, **changes)))  # type: ignore[arg-type]

    cases = {
        "a token": (edit(kept, sampled_ids=wrong), "max |Δ logprob|, engine"),
        "logprobs": (edit(kept, logprobs=tuple(lp - 0.1 for lp in call.logprobs)), "mean |Δ logprob|, learner"),
        "a logprob too many": (edit(kept, logprobs=(*call.logprobs, 0.0)), "calls with faults in the ledger"),
        "a logprob missing": (edit(kept, logprobs=call.logprobs[1:]), "calls with faults in the ledger"),
        "no such token": (edit(kept, sampled_ids=(999, *call.sampled_ids[1:])), "calls with faults in the ledger"),
        "cut": (edit(kept, finish=FinishReason.ABORTED), "trained tokens"),
        "the future": (
            edit(kept, versions=(VersionSpan(WeightVersion(0, 9), 0, len(wrong)),)),
            "tokens by weight version",
        ),
        "stale": (edit(kept, versions=(VersionSpan(WeightVersion(1, 0), 0, len(wrong)),)), "dispositions"),
        "rewards": (
            replace(kept, trees=tuple(replace(t, reward=float(i % 2)) for i, t in enumerate(kept.trees))),
            "gradient norm",
        ),
        "rewards turned over": (
            replace(kept, trees=tuple(replace(t, reward=1.0 - (t.reward or 0.0)) for t in kept.trees)),
            "slope",
        ),
        "counts": (replace(kept, step=replace(kept.step, dispositions={"trained": 5})), "… add up to"),
        "tokens": (claim(tokens=told.tokens + 1), "trained tokens"),
        "loss": (claim(loss=told.loss + 0.01), "loss"),
        "KL": (claim(kl=told.kl * 1.2), "KL term"),
        "gradient": (claim(grad_norm=told.grad_norm * 1.01), "gradient norm"),
        "direction": (claim(slope=-(told.slope or 0.0)), "slope"),
        "cut weights": (claim(cut=1), "importance weights cut"),
        "difference": (claim(delta_max=told.delta_max + 0.01), "max |Δ logprob|, learner"),
    }
    for name, (changed, check) in cases.items():
        report = audit_batch(changed)
        assert check in {f.check for f in report.findings if not f.agrees}, (name, report.rows())


def test_the_command_exits_1_where_anything_differs(run: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["audit", str(run), "1"])
    assert good.exit_code == 0, good.output
    assert "gradient norm" in good.output
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "batches" / "step-000001" / "trees.jsonl"
    lines = file.read_text().replace('"reward":1.0', '"reward":0.0', 1)
    file.write_text(lines)
    bad = runner.invoke(app, ["audit", str(copy), "1"])
    assert bad.exit_code == 1
    assert "DIFFERS" in bad.output


def test_what_is_missing_or_damaged_is_an_error_that_names_it(run: Path, kept: KeptBatch, tmp_path: Path) -> None:
    with pytest.raises(AprError, match=r"no batch of step 7.*Kept are steps 1, 2"):
        find_batch(run, 7)
    with pytest.raises(AprError, match="None is kept"):
        find_batch(tmp_path, 7)
    gone = replace(kept, step=replace(kept.step, reference="nowhere"))
    with pytest.raises(AprError, match="reference policy 'nowhere' is not there"):
        audit_batch(gone)
    source = find_batch(run, 1)
    reward = source.joinpath("trees.jsonl").read_text().replace('"reward":1.0', '"reward":null')
    for number, (name, damage, what) in enumerate(
        (
            ("step.json", '{"format": 1}', "malformed"),
            ("step.json", '{"format": 99}', "format 99"),
            ("trees.jsonl", "", "holds 0 trees"),
            ("trees.jsonl", '{"format"', "not JSON"),
            ("trees.jsonl", reward, "without a reward"),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        (folder / name).write_text(damage)
        with pytest.raises(AprError, match=what):
            read_batch(folder)
    shutil.rmtree(folder / "policy")
    with pytest.raises(AprError, match=r"has no policy/config\.json"):
        read_batch(folder)


def test_a_batch_of_the_first_format_had_no_options(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step"
    shutil.copytree(find_batch(run, 1), folder)
    data = json.loads((folder / "step.json").read_text())
    for name in ("loss_mean", "ratio", "correction", "correction_level", "correction_cap", "correction_from"):
        del data[name]
    del data["reported"]["cut"], data["reported"]["slope"]
    (folder / "step.json").write_text(json.dumps(data | {"format": 1}))
    new, old = read_batch(find_batch(run, 1)), read_batch(folder)
    assert new.step.reported is not None
    same = replace(new.step, reported=replace(new.step.reported, slope=None))
    assert old == replace(new, step=same, policy=folder / "policy")
    assert "slope" not in {finding.check for finding in audit_batch(old).findings}


def test_only_the_newest_is_kept_where_asked(kept: KeptBatch, tmp_path: Path) -> None:
    for number in (3, 4):
        keep_batch(tmp_path, replace(kept.step, step=number), kept.trees, kept.policy, only_newest=True)
    assert [p.name for p in (tmp_path / "batches").iterdir()] == ["step-000004"]


def with_problems(kept: KeptBatch, task: CountdownTask) -> KeptBatch:
    """As training keeps it: with the problems, and the verifier's verdicts."""
    by_key = {problem.key: problem for problem in task.problems("train", 40, 0)}
    groups = kept.trees[:: kept.step.group_size]
    judged = tuple(
        with_verdict(tree, score(task, by_key[tree.problem_key], tree.outcome, tree.final_text)) for tree in kept.trees
    )
    problems = [dict(by_key[tree.problem_key].to_json()) for tree in groups]
    return replace(kept, trees=judged, step=replace(kept.step, problems=problems))


def test_answers_are_verified_again(kept: KeptBatch, task: CountdownTask) -> None:
    """Faults 14c: rewards were taken as given, so a group without variance could be flipped."""
    honest = with_problems(kept, task)
    assert all(finding.agrees for finding in check_verdicts(honest)), check_verdicts(honest)

    flipped = tuple(replace(tree, verdict=SOLVED, reward=1.0) for tree in honest.trees[:2]) + honest.trees[2:]
    [_, verdicts] = check_verdicts(replace(honest, trees=flipped))
    assert not verdicts.agrees

    other = replace(honest.trees[0], outcome=Outcome.ANSWERED, final_text="another text")
    [texts, _] = check_verdicts(replace(honest, trees=(other, *honest.trees[1:])))
    assert not texts.agrees


def test_tokens_with_older_kv_are_no_false_alarm(kept: KeptBatch) -> None:
    """Faults 13: with `weights.mode: in_flight` a token of these weights may stand on KV of older ones."""
    tree = kept.trees[0]
    longest = max(tree.calls, key=lambda c: len(c.sampled_ids))
    older = (VersionSpan(kept.version, 0, len(longest.sampled_ids), WeightVersion(0, 9)),)
    off = tuple(lp - 1.0 for lp in longest.logprobs)
    fresh = audit_batch(edit(kept, logprobs=off))
    stale = audit_batch(edit(kept, logprobs=off, versions=older))
    name = "max |Δ logprob|, engine"
    assert [f.agrees for f in fresh.findings if f.check == name] == [False]
    assert [f.agrees for f in stale.findings if f.check == name] == [True]


def test_a_batch_whose_slow_trees_counted_as_failures_is_refused(kept: KeptBatch, tmp_path: Path) -> None:
    slow = (replace(kept.trees[0], outcome=Outcome.BOUND_TIME), *kept.trees[1:])
    folder = keep_batch(tmp_path, kept.step, slow, kept.policy, only_newest=False)
    assert read_batch(folder).trees == slow
    data = json.loads((folder / "step.json").read_text())
    (folder / "step.json").write_text(json.dumps(data | {"format": 5}))
    with pytest.raises(AprError, match="format 5: trees that the clock ended"):
        read_batch(folder)
