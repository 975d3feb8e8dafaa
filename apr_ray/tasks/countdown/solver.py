"""Symbolic solvers that write demonstrations: SoS+ (one thread) and APR (a parent that spawns children).

Best-first search with a beam: pop up to `beam` nodes, expand each, keep its `beam` best successors, write them in
shuffled order, push them. One coin per expansion decides whether all its successors are searched at once (SoS+: inside
the same text; APR: one child thread each) instead of being pushed. Every random choice comes from one generator seeded
by the problem and the solver seed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import JoinOutcome
from apr_ray.core.task import ChildResult
from apr_ray.tasks.countdown.arithmetic import combine, operation_text
from apr_ray.tasks.countdown.grammar import (
    EQUAL,
    NO_SOLUTION,
    ROOT,
    SUB_NO_SOLUTION,
    UNEQUAL,
    ExitSubSearch,
    Node,
    State,
    SubSearch,
    explore_line,
    generate_line,
    move_line,
    node_text,
    numbers_text,
    state_line,
)
from apr_ray.tasks.countdown.problem import CountdownProblem
from apr_ray.tasks.countdown.spawn_join import join_block, spawn_block


@dataclass(frozen=True, slots=True)
class SolverOptions:
    """Ranges the solver draws from; all ends included.

    Attributes:
        beam_low, beam_high: the parent's (or the only thread's) beam.
        child_beam_high: a child's beam is drawn from its parent's beam up to this.
        promising: probability that the search of a node spawns its successors as children; else they are searched in
            the same thread.
        usual_beam, usual_share: this share of the runs takes this one beam, the others draw theirs from the range. A
            policy that imitates them greedily searches as wide as is usual; how wide is best is left to reinforcement
            learning to find out. The paper draws uniformly (share 0).
        order: in which successors are written: the best first and shuffled, as in the paper, or as they are enumerated.
    """

    beam_low: int = 1
    beam_high: int = 10
    child_beam_high: int = 15
    promising: float = 0.9
    usual_beam: int = 1
    usual_share: float = 0.0
    order: Literal["heuristic", "enumerated"] = "heuristic"

    def __post_init__(self) -> None:
        if not 1 <= self.beam_low <= self.beam_high:
            raise AprError(
                f"task.options.solver.beam_low..beam_high is {self.beam_low}..{self.beam_high}",
                "Use 1 <= beam_low <= beam_high",
            )
        if self.child_beam_high < self.beam_high:
            raise AprError(
                f"task.options.solver.child_beam_high {self.child_beam_high} is below beam_high {self.beam_high}",
                "A child's beam is drawn from its parent's beam upwards: raise child_beam_high",
            )
        for name in ("promising", "usual_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise AprError(f"task.options.solver.{name} is {getattr(self, name)}", "Use a probability")
        if self.usual_share and not self.beam_low <= self.usual_beam <= self.beam_high:
            raise AprError(
                f"task.options.solver.usual_beam {self.usual_beam} is outside {self.beam_low}..{self.beam_high}",
                "Choose one of the range",
            )

    def draw_beam(self, rng: random.Random) -> int:
        """The beam of one run."""
        if self.usual_share and rng.random() < self.usual_share:
            return self.usual_beam
        return rng.randint(self.beam_low, self.beam_high)


_SCORE = itemgetter(0)
APR_PAPER = SolverOptions()
SOSP_PAPER = SolverOptions(beam_low=1, beam_high=5, child_beam_high=5, promising=0.5)


@dataclass(frozen=True, slots=True)
class AprTrace:
    """Output of the APR solver.

    Attributes:
        segments: the parent's calls as (prompt, completion); all but the last completion end in a spawn block.
        children: per spawn block, each child's (prompt, completion).
    """

    segments: tuple[tuple[str, str], ...]
    children: tuple[tuple[tuple[str, str], ...], ...]
    solved: bool


@dataclass(eq=False, slots=True)
class _Point:
    """A node of the search.

    Attributes:
        name, numbers_text, operations: texts of the node, of its numbers, and of the operations that led to it.
        generated: the two lines by which it was generated; a path that is restated has them again.
        trail: the nodes before this one, from the start of the thread.
    """

    node: Node
    name: str
    numbers: tuple[int, ...]
    numbers_text: str
    operations: str
    generated: tuple[str, str]
    trail: tuple[_Point, ...]

    def entered(self, target: int) -> tuple[str, str]:
        """The two lines with which the search goes to it, or a child begins from it."""
        return move_line(self.name), state_line(target, self.numbers_text, self.operations)


def _root(problem: CountdownProblem) -> _Point:
    return _Point(ROOT, node_text(ROOT), problem.numbers, numbers_text(problem.numbers), "", ("", ""), ())


def rng_for(problem: CountdownProblem, solver_seed: int) -> random.Random:
    """The one generator of a solver run; seeded by text, not by a hash, so it is the same anywhere."""
    return random.Random(f"{problem.key}#{solver_seed}")


def root_state(problem: CountdownProblem) -> State:
    """The state a search begins from."""
    return State(problem.target, problem.numbers, ())


def factor_distance(value: int, factors: Sequence[int]) -> int:
    """Distance to the nearest factor."""
    return min(abs(value - factor) for factor in factors)


@lru_cache(maxsize=4096)
def factors_of(target: int) -> tuple[int, ...]:
    """Factors >= 2 of a target; the target itself for targets below 2."""
    return tuple(f for f in range(2, target + 1) if target % f == 0) or (target,)


@lru_cache(maxsize=100_000)
def _below(value: int, target: int) -> int:
    """Distance of a value below the target; above, it is that to the target, which is its own largest factor."""
    return factor_distance(value, factors_of(target))


def _distance(value: int, target: int) -> int:
    return value - target if value >= target else _below(value, target)


Successor = tuple[int, str, tuple[int, ...]]
"""Heuristic (the sum over the numbers of the distance to the target's nearest factor: lower is more promising),
operation and numbers."""


def _successors(numbers: tuple[int, ...], target: int, beam: int, rng: random.Random, order: str) -> list[Successor]:
    """The `beam` best successors in the order they are written in."""
    found: list[Any] = []
    distances = [_distance(n, target) for n in numbers]
    total = sum(distances)
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
            base = total - distances[i] - distances[j]
            for a, op, b, result in combine(numbers[i], numbers[j]):
                distance = result - target if result >= target else _below(result, target)  # `_distance`, often
                found.append((base + distance, operation_text(a, op, b, result), (*rest, result)))
    if order == "heuristic":
        best = sorted(found, key=_SCORE)[:beam]
        rng.shuffle(best)
        return best
    if len(found) <= beam:
        return found
    return [found[i] for i in sorted(sorted(range(len(found)), key=lambda i: found[i][0])[:beam])]


def _restated(trail: Sequence[_Point], last: str, target: int) -> str:
    """The whole path again, from the first node of the trail to the equal line."""
    lines = [*trail[0].entered(target)]
    for point in trail[1:]:
        lines += point.generated
        lines += point.entered(target)
    lines.append(explore_line(last, numbers_text((target,))))
    lines.append(f"{target},{target}{EQUAL}")
    return "\n".join(lines) + "\n"


class _Search:
    """One thread's search, written line by line into `out`."""

    def __init__(self, start: _Point, target: int, beam: int, rng: random.Random, order: str) -> None:
        self.target = target
        self.beam = beam
        self.rng = rng
        self.order = order
        self.out: list[str] = []
        self.heap: list[tuple[int, int, _Point]] = [(0, 0, start)]
        self.pushed = 0

    def batches(self) -> list[_Point]:
        """Pop up to `beam` nodes, best first."""
        return [heapq.heappop(self.heap)[2] for _ in range(min(self.beam, len(self.heap)))]

    def push(self, successors: Sequence[tuple[int, _Point]]) -> None:
        """Put successors on the heap; equal ones come out in the order they went in."""
        for score, point in successors:
            self.pushed += 1
            heapq.heappush(self.heap, (score, self.pushed, point))

    def expand(self, point: _Point) -> tuple[list[tuple[int, _Point]], str | None]:
        """Write a node's expansion; returns the nodes generated, and the operation that reached the target, if one."""
        if len(point.numbers) == 2:
            return [], self._finish(point)
        generated: list[tuple[int, _Point]] = []
        target = self.target
        trail = (*point.trail, point)
        before = f"{point.operations}, " if point.operations else ""
        for score, operation, numbers in _successors(point.numbers, target, self.beam, self.rng, self.order):
            left = numbers_text(numbers)
            number = len(generated)
            name = f"{point.name},{number}"
            lines = explore_line(operation, left), generate_line(name, target, left, operation)
            self.out += lines
            node = (*point.node, number)
            generated.append((score, _Point(node, name, numbers, left, f"{before}'{operation}'", lines, trail)))
        return generated, None

    def _finish(self, point: _Point) -> str | None:
        """Write the expansion of a node of two numbers, after which one is left: most of a search's lines."""
        write, target = self.out.append, self.target
        for _, operation, (number,) in _successors(point.numbers, target, self.beam, self.rng, self.order):
            write(explore_line(operation, f"[{number}]"))
            if number == target:
                write(f"{target},{target}{EQUAL}")
                return operation
            write(f"{number},{target}{UNEQUAL}")
        return None

    def searched(self, generated: Sequence[tuple[int, _Point]]) -> list[_Point]:
        """Successors in the order in which they are searched or spawned."""
        if self.order == "heuristic":
            generated = sorted(generated, key=_SCORE)
        return [point for _, point in generated]

    def text(self) -> str:
        return "\n".join([*self.out, ""])


def _child_search(
    start: _Point, target: int, beam: int, rng: random.Random, order: str
) -> tuple[str, tuple[_Point, ...], str | None]:
    """A child's whole completion (without its two prompt lines), and the path and last operation of its solution."""
    search = _Search(replace(start, trail=()), target, beam, rng, order)
    first = True
    while search.heap:
        for point in search.batches():
            if not first:
                search.out += point.entered(target)
            first = False
            generated, last = search.expand(point)
            if last is not None:
                trail = (*point.trail, point)
                return search.text() + _restated(trail, last, target), trail, last
            search.push(generated)
    return search.text() + NO_SOLUTION + "\n", (), None


def solve_apr(problem: CountdownProblem, solver_seed: int, options: SolverOptions = APR_PAPER) -> AprTrace:
    """One APR demonstration: after a parent's expansion with more than one successor, with probability `promising`,
    one child per kept successor is spawned in ascending order of heuristic, and none of them is pushed."""
    rng = rng_for(problem, solver_seed)
    beam = options.draw_beam(rng)
    child_beam = rng.randint(beam, options.child_beam_high)
    return solve_apr_with(problem, beam, child_beam, options.promising, rng, options.order)


def solve_apr_with(
    problem: CountdownProblem,
    beam: int,
    child_beam: int,
    promising: float,
    rng: random.Random,
    order: str = "heuristic",
) -> AprTrace:
    """`solve_apr` with beams already drawn."""
    target = problem.target
    root = _root(problem)
    search = _Search(root, target, beam, rng, order)
    prompt = "\n".join(root.entered(target))
    context = prompt + "\n"  # what the parent's next call is given; the first prompt itself ends without a newline
    segments: list[tuple[str, str]] = []
    rounds: list[tuple[tuple[str, str], ...]] = []
    first = True
    while search.heap:
        for point in search.batches():
            if not first:
                search.out += point.entered(target)
            first = False
            generated, last = search.expand(point)
            if last is not None:
                trail = (*point.trail, point)
                segments.append((prompt, _after(prompt, search.text() + _restated(trail, last, target))))
                return AprTrace(tuple(segments), tuple(rounds), True)
            if len(generated) <= 1 or rng.random() >= promising:
                search.push(generated)
                continue
            spawned = search.searched(generated)
            nodes = [child.node for child in spawned]
            segments.append((prompt, _after(prompt, search.text() + spawn_block(nodes, 1))))
            searched = [_child_search(child, target, child_beam, rng, order) for child in spawned]
            prompts = ["\n".join(child.entered(target)) for child in spawned]
            rounds.append(tuple((p, "\n" + text) for p, (text, _, _) in zip(prompts, searched, strict=True)))
            results = [
                ChildResult(JoinOutcome.NO_SOLUTION)
                if won is None
                else ChildResult(JoinOutcome.SOLVED, _restated(trail, won, target).removesuffix("\n"))
                for _, trail, won in searched
            ]
            context += search.text() + join_block(nodes, results, 1)
            prompt = context
            search.out.clear()
            for child, (_, trail, won) in zip(spawned, searched, strict=True):
                if won is not None:
                    whole = (*child.trail, *trail)
                    text = f"{target},{target}{EQUAL}\n" + _restated(whole, won, target)
                    segments.append((prompt, text))
                    return AprTrace(tuple(segments), tuple(rounds), True)
    segments.append((prompt, _after(prompt, search.text() + NO_SOLUTION + "\n")))
    return AprTrace(tuple(segments), tuple(rounds), False)


def _after(prompt: str, text: str) -> str:
    """A completion's text: it begins with the newline that a first prompt ends without."""
    return text if prompt.endswith("\n") else "\n" + text


def solve_sosp(
    problem: CountdownProblem, solver_seed: int, options: SolverOptions = SOSP_PAPER
) -> tuple[str, str, bool]:
    """One SoS+ demonstration as (prompt, completion, solved); its prompt is the "Current State" line alone."""
    rng = rng_for(problem, solver_seed)
    beam = options.draw_beam(rng)
    root = _root(problem)
    out: list[str] = []
    solved = _search_sosp(root, problem.target, 0, beam, options, rng, out)
    return root.entered(problem.target)[1], "\n".join(["", *out, ""]), solved


def _search_sosp(
    start: _Point, target: int, level: int, beam: int, options: SolverOptions, rng: random.Random, out: list[str]
) -> bool:
    """Write one (sub) search after its "Current State" line; a failed one ends in "No solution found."."""
    search = _Search(start, target, beam, rng, options.order)
    search.out = out
    first = True
    while search.heap:
        for point in search.batches():
            if not first:
                out += point.entered(target)
            first = False
            generated, last = search.expand(point)
            if last is not None:
                out += _restated((*point.trail, point), last, target).removesuffix("\n").split("\n")
                return True
            if not generated or rng.random() >= options.promising:
                search.push(generated)
                continue
            for child in search.searched(generated):
                out += [SubSearch(level + 1, child.node).text(), child.entered(target)[1]]
                solved = _search_sosp(child, target, level + 1, beam, options, rng, out)
                out.append(ExitSubSearch(level + 1).text())
                if solved:
                    return True
                out.append(SUB_NO_SOLUTION)
    out.append(NO_SOLUTION)
    return False
