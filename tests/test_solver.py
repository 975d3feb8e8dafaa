"""The symbolic solvers: format, seeds, the released code's defects, and its statistics."""

from __future__ import annotations

import gzip
import json
import random
import statistics
from pathlib import Path

import pytest

from apr_ray.core.errors import AprError
from apr_ray.tasks.countdown import grammar as g
from apr_ray.tasks.countdown.oracle import is_solvable
from apr_ray.tasks.countdown.problem import CountdownProblem
from apr_ray.tasks.countdown.solver import (
    SOSP_PAPER,
    AprTrace,
    SolverOptions,
    solve_apr,
    solve_apr_with,
    solve_sosp,
)
from apr_ray.tasks.countdown.spawn_join import child_result, join_block, read_spawn_block
from apr_ray.tasks.countdown.task import CountdownOptions, CountdownTask

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"


def problems(count: int) -> list[CountdownProblem]:
    rng = random.Random(3)
    made = [CountdownProblem(tuple(rng.randint(1, 99) for _ in range(4)), rng.randint(10, 100)) for _ in range(count)]
    return [p for p in made if is_solvable(p.numbers, p.target)]


def texts(trace: AprTrace) -> list[str]:
    return [p + c for p, c in trace.segments] + [p + c for spawned in trace.children for p, c in spawned]


def test_what_the_solver_writes_is_what_the_runtime_would_build() -> None:
    """Child prompts, join messages and resumed contexts of a demonstration are exactly the runtime's."""
    rounds = 0
    for problem in problems(300):
        trace = solve_apr(problem, 1)
        for index, spawned in enumerate(trace.children):
            whole = "".join(trace.segments[index])
            cut = whole.index(g.SPAWN_OPEN)
            asked = read_spawn_block(whole[cut:], whole[:cut], 1)
            assert [c.prompt for c in asked] == [prompt for prompt, _ in spawned]
            results = [child_result(prompt + text) for prompt, text in spawned]
            resumed = whole[:cut] + join_block([c.node for c in asked], results, 1)
            assert trace.segments[index + 1][0] == resumed
            rounds += 1
    assert rounds > 20


def test_every_state_has_its_move_line() -> None:
    """Regression: a shadowed variable in the released solver drops "Moving to Node" after a failed join."""
    several_rounds = 0
    for problem in problems(400):
        trace = solve_apr(problem, 0)
        several_rounds += len(trace.children) > 1
        for text in texts(trace):
            events = g.parse_trace(text).events
            for before, event in zip((None, *events), events, strict=False):
                assert not isinstance(event, g.State) or isinstance(before, g.Move)
    assert several_rounds > 1


def test_the_seed_decides_and_nothing_else() -> None:
    """Regression: seeds do nothing in the released code's worker processes."""
    problem = problems(50)[0]
    assert solve_apr(problem, 1) == solve_apr(problem, 1)
    assert len({texts(solve_apr(problem, seed))[0] for seed in range(8)}) > 4
    assert solve_sosp(problem, 1) == solve_sosp(problem, 1)


def test_a_leaf_is_never_spawned() -> None:
    for problem in problems(200):
        for spawned in solve_apr(problem, 2).children:
            assert len(spawned) > 1
            for prompt, _ in spawned:
                state = g.parse_trace(prompt).events[1]
                assert isinstance(state, g.State)
                assert len(state.numbers) > 1


def test_statistics_match_the_released_solver() -> None:
    """The same 80 problems and beams as in the vectors, 12 seeds each: solved share, children, rounds, lengths."""
    if not VECTORS.is_dir():
        pytest.skip(f"the released code's traces are not at {VECTORS}")
    with gzip.open(VECTORS / "apr_traces.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    theirs = [
        (
            len(row["trace"]["main_calls"][-1].split("equal: Goal Reached")) > 2,
            sum(map(len, row["trace"]["sub_calls"])),
            len(row["trace"]["sub_calls"]),
            len(row["trace"]["main_calls"][-1]),
        )
        for row in rows
    ]
    ours = []
    for row in rows:
        problem = CountdownProblem(tuple(row["numbers"]), row["target"])
        for seed in range(12):
            trace = solve_apr_with(problem, row["beam"], row["child_beam"], 0.9, random.Random(seed))
            children = sum(map(len, trace.children))
            ours.append((trace.solved, children, len(trace.children), len("".join(trace.segments[-1]))))
    for column, tolerance in ((0, 0.08), (1, 1.6), (2, 0.25)):
        assert abs(statistics.mean(t[column] for t in theirs) - statistics.mean(t[column] for t in ours)) < tolerance
    assert statistics.median(t[3] for t in ours) == pytest.approx(statistics.median(t[3] for t in theirs), rel=0.15)


def test_sosp_statistics_match_the_released_solver() -> None:
    if not VECTORS.is_dir():
        pytest.skip(f"the released code's traces are not at {VECTORS}")
    with gzip.open(VECTORS / "sosp_traces.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    ours = []
    for row in rows:
        problem = CountdownProblem(tuple(row["numbers"]), row["target"])
        options = SolverOptions(row["beam"], row["beam"], row["beam"], 0.5)
        ours += [solve_sosp(problem, seed, options) for seed in range(8)]
    theirs_solved = statistics.mean(row["text"].count("equal: Goal Reached") > 1 for row in rows)
    assert abs(theirs_solved - statistics.mean(solved for _, _, solved in ours)) < 0.08
    lengths = statistics.median(len(p + c) for p, c, _ in ours)
    assert lengths == pytest.approx(statistics.median(len(row["text"]) for row in rows), rel=0.25)


def test_the_usual_beam_takes_its_share_of_the_runs() -> None:
    options = SolverOptions(beam_low=1, beam_high=10, child_beam_high=10, usual_beam=4, usual_share=0.5)
    drawn = [options.draw_beam(random.Random(i)) for i in range(4000)]
    assert drawn.count(4) / 4000 == pytest.approx(0.5 + 0.5 / 10, abs=0.03)
    assert drawn.count(9) / 4000 == pytest.approx(0.5 / 10, abs=0.02)
    assert set(drawn) == set(range(1, 11))
    with pytest.raises(AprError, match=r"usual_beam 4 is outside 5\.\.10"):
        SolverOptions(beam_low=5, usual_beam=4, usual_share=0.5)


def test_budgets_say_what_a_demonstration_came_to() -> None:
    """Paper section 4.2: APR's parent names children per round, its children nothing; SoS+ names a token bin."""
    for problem in problems(60):
        made = CountdownTask(CountdownOptions(budgets=True)).demonstrate(problem, 0)
        plain = CountdownTask(CountdownOptions()).demonstrate(problem, 0)
        children = sum(s.kind == "child" for s in made.sequences)
        rounds = len({s.segment for s in made.sequences if s.kind == "parent"}) - 1
        head = f"Sub Call Budget: {children // rounds} " if rounds else ""
        for ours, theirs in zip(made.sequences, plain.sequences, strict=True):
            assert ours.prompt == (head if ours.kind == "parent" else "") + theirs.prompt
            assert ours.completion == theirs.completion
    sosp = CountdownTask(CountdownOptions(method="sosp", budgets=True))
    assert sosp.solver == SOSP_PAPER
    bins = set()
    for problem in problems(20):
        (sequence,) = sosp.demonstrate(problem, 0).sequences
        budget, body = g.split_budget(sequence.prompt + sequence.completion)
        assert budget is not None
        assert 0 <= budget.amount - len(sosp.tokenizer().encode(body)) < 512
        bins.add(budget.amount % 512)
    assert bins == {0}


def test_enumerated_order_leaves_only_the_width_to_chance() -> None:
    """The same text whatever the seed, once beams are drawn; wider searches contain the narrower ones' operations."""

    def explored(text: str) -> list[str]:
        return [line for line in text.split("\n") if line.startswith("Exploring")]

    for problem in problems(60):
        made = {
            beam: {
                solve_apr_with(problem, beam, 15, 1.0, random.Random(seed), "enumerated").segments[0][1]
                for seed in range(3)
            }
            for beam in (3, 6)
        }
        assert all(len(texts) == 1 for texts in made.values())
        narrow, wide = (explored(next(iter(made[beam]))) for beam in (3, 6))
        assert [line for line in wide if line in narrow] == narrow
        block = [line for line in next(iter(made[6])).split("\n") if line.startswith("<Start Sub Search")]
        assert block == [f"<Start Sub Search {i} at level 1> Moving to Node #0,{i}" for i in range(len(block))]
