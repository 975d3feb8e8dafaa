"""The policies in the package: found by name, as good as its card says, and what others load is what we run."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import apr_ray
from apr_ray.config import EngineConfig, load_config
from apr_ray.core.errors import AprError
from apr_ray.core.ledger import SOLVED, Problem, ThreadTree
from apr_ray.core.task import Verdict
from apr_ray.engines.registry import build_engine
from apr_ray.evaluation.card import write_policy_folder
from apr_ray.model.llama import policy_fingerprint, read_task
from apr_ray.model.shipped import SHIPPED, resolve_policy, shipped_names
from apr_ray.tasks.registry import load_task
from apr_ray.threads.runtime import TreeRequest, run_tree
from apr_ray.training.run_dir import find_policy

NAME, AFTER_RL = "apr-sft", "apr-rl"
NAMES = [AFTER_RL, NAME]
README = Path(__file__).parents[1] / "README.md"
POLICY = SHIPPED / NAME / "final"
PROBLEMS = 60
MOST_BYTES = 4_000_000


def test_a_name_stands_for_the_policy_where_nothing_lies_at_that_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shipped_names() == NAMES
    assert find_policy(Path(NAME)) == POLICY
    assert resolve_policy("nothing") == Path("nothing")
    with pytest.raises(AprError, match="or one of: apr-rl, apr-sft"):
        find_policy(Path("nothing"))
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir()
    assert resolve_policy(NAME) == Path(NAME)


def test_the_shipped_policy_solves_the_readmes_problem() -> None:
    (problem,) = re.findall(rf'apr-ray trace {AFTER_RL} --problem "([^"]+)"', README.read_text())
    solution = apr_ray.solve(problem, AFTER_RL)
    assert solution, solution.verdict
    assert solution.tree.children > 0


def test_solve_writes_the_same_verdict_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the task's own word for it."""
    monkeypatch.setattr("apr_ray.tasks.countdown.task.CountdownTask.verify", lambda *_: Verdict(True, "right"))
    solution = apr_ray.solve("4 8 18 -> 36", AFTER_RL)
    assert solution.verdict.reason == solution.tree.verdict == SOLVED


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_of_these_weights_and_names_no_place(name: str) -> None:
    card = (SHIPPED / name / "README.md").read_text()
    assert f"`{policy_fingerprint(SHIPPED / name / 'final')}`" in card
    for part in ("Limits", "Licence", "| greedy |", "| temperature 0.6 |"):
        assert part in card
    config = load_config([SHIPPED / name / "config.yaml"])
    assert (config.run.root, config.run.name, config.init_from) == ("runs", None, None)
    assert sum(f.stat().st_size for f in (SHIPPED / name).rglob("*") if f.is_file()) < MOST_BYTES


def test_the_cards_say_how_the_policies_were_trained() -> None:
    supervised, after = ((SHIPPED / name / "README.md").read_text() for name in (NAME, AFTER_RL))
    for part in ("apr-ray sft -c config.yaml", "fingerprint", "tokens in"):
        assert part in supervised
    for part in (f"apr-ray train -c config.yaml --init {NAME}", f"weights `{policy_fingerprint(POLICY)}`", "sampled"):
        assert part in after
    assert re.search(r"over the policy before, decoded at its best temperature \(.*\), paired: greedy [+-]", after)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_policy_is_about_as_good_as_its_card_says(name: str) -> None:
    """Greedily, on validation problems: the card's are others, so by four standard deviations."""
    policy = SHIPPED / name / "final"
    (stated,) = re.findall(r"\| greedy \| ([\d.]+) \|", (SHIPPED / name / "README.md").read_text())
    config = load_config([SHIPPED / name / "config.yaml"])
    task = load_task(read_task(policy))
    problems = task.problems("validation", PROBLEMS, 0)
    protocol = task.protocol(task.load_tokenizer(str(policy)))

    async def solve_all() -> list[ThreadTree]:
        engine = build_engine(EngineConfig(max_sequences=64, cache_slots=64), str(policy))

        async def solve(number: int, problem: Problem) -> ThreadTree:
            request = TreeRequest(problem, temperature=0.0)
            return await run_tree(engine, protocol, request, config.bounds, tree_id=f"t{number:04d}")

        try:
            return list(await asyncio.gather(*(solve(i, p) for i, p in enumerate(problems))))
        finally:
            await engine.close()

    trees = asyncio.run(solve_all())
    solved = sum(bool(task.verify(p, t.final_text)) for p, t in zip(problems, trees, strict=True)) / PROBLEMS
    rate = float(stated) / 100
    assert abs(solved - rate) < 4 * (rate * (1 - rate) / PROBLEMS) ** 0.5
    assert sum(bool(tree.spawns) for tree in trees) > PROBLEMS / 2, "it spawns"
    assert not any(call.replaced for tree in trees for call in tree.calls), "by the one tag that is its own"


def test_transformers_loads_the_policy_and_decodes_the_same_tokens() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    assert model.config.use_cache is True, "without it every token computes its whole prefix again"
    assert model.generation_config.use_cache is not False
    tokenizer: Any = AutoTokenizer.from_pretrained(POLICY)
    tree = apr_ray.solve("3 5 7 -> 22", NAME).tree
    child = next(call for call in tree.calls if call.path)
    text = load_task(read_task(POLICY)).tokenizer().decode(child.prompt_ids)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert ids[0].tolist() == list(child.prompt_ids)
    made = model.generate(ids, max_new_tokens=len(child.sampled_ids), do_sample=False)
    assert made[0, ids.shape[1] :].tolist() == list(child.sampled_ids)


def test_an_export_needs_results_and_a_new_folder(tmp_path: Path) -> None:
    run = SHIPPED / NAME
    (tmp_path / "results.json").write_text(json.dumps({"metrics": {}}))
    with pytest.raises(AprError, match=r"results\.json holds no results.*apr-ray eval .* --json FILE"):
        write_policy_folder(POLICY, run, tmp_path / "results.json", tmp_path / "out")
    with pytest.raises(AprError, match="exists"):
        write_policy_folder(POLICY, run, tmp_path / "results.json", tmp_path)
    whole = {"metrics": {}, "split": "heldout", "problems": 1, "targets_problems": 0}
    (tmp_path / "results.json").write_text(json.dumps(whole))
    with pytest.raises(AprError, match=r"trained no policy.*its folder sft or grpo"):
        write_policy_folder(POLICY, run, tmp_path / "results.json", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_plain_pipeline_of_transformers_runs_the_policy_with_its_cache() -> None:
    """Faults 14h: every checkpoint said `use_cache: false`, and whoever loaded it computed each prefix again."""
    from transformers import pipeline

    folder = SHIPPED / "apr-sft" / "final"
    generate = pipeline("text-generation", model=str(folder), tokenizer=str(folder), device="cpu")
    assert generate.model.config.use_cache
    assert generate.model.generation_config.use_cache
    problem = "Moving to Node #0\nCurrent State: 22:[3, 5, 7], Operations: []"
    [answer] = generate(problem, max_new_tokens=20, do_sample=False)
    assert answer["generated_text"].startswith(problem + "\n")
