"""Countdown as a `Task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Problem
from apr_ray.core.task import Demonstration, DemonstrationSet, Task, Tokenizer, Verdict
from apr_ray.tasks.countdown.arithmetic import MAX_DIGITS
from apr_ray.tasks.countdown.diagnosis import diagnose
from apr_ray.tasks.countdown.grammar import Budget
from apr_ray.tasks.countdown.oracle import is_solvable, reachable_targets
from apr_ray.tasks.countdown.problem import CountdownProblem, ProblemSpace
from apr_ray.tasks.countdown.protocol import CountdownProtocol
from apr_ray.tasks.countdown.solver import APR_PAPER, SOSP_PAPER, AprTrace, SolverOptions, solve_apr, solve_sosp
from apr_ray.tasks.countdown.tokenizer import CountdownTokenizer, build_tokenizer, load_tokenizer
from apr_ray.tasks.countdown.verifier import verify_solution

TOKEN_BIN = 512
"""Width of SoS+'s budget bins, in tokens (paper section 4.2)."""


@dataclass(frozen=True, slots=True)
class CountdownOptions:
    """`task.options` of Countdown.

    Attributes:
        method: APR's threads, or SoS+'s search in one thread (the paper's baseline).
        space: which problems there are.
        max_depth: levels of children that the protocol allows; see `bounds.max_depth` too.
        solver: which demonstrations there are; the paper's for the method by default.
        budgets: demonstrations begin with what they turned out to cost, so that a policy can be asked for a budget
            (`rollout.budget`; paper section 4.2).
    """

    method: Literal["apr", "sosp"] = "apr"
    space: ProblemSpace = field(default_factory=ProblemSpace)
    solver: SolverOptions | None = None
    max_depth: int = 1
    budgets: bool = False


class CountdownTask(Task):
    """See `core.task.Task`."""

    name = "countdown"
    options_type = CountdownOptions
    problem_type = CountdownProblem
    options: CountdownOptions

    def __init__(self, options: CountdownOptions) -> None:
        super().__init__(options)
        self.solver = options.solver or (SOSP_PAPER if options.method == "sosp" else APR_PAPER)

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """Solvable problems of a split; see `ProblemSpace.sample`."""
        return list(self.options.space.sample(split, count, seed))

    def problem_from_json(self, data: Mapping[str, Any]) -> CountdownProblem:
        """From `{"numbers": [...], "target": t}`."""
        problem: CountdownProblem = super().problem_from_json(data)
        _require_readable(problem)
        return problem

    def tokenizer(self) -> CountdownTokenizer:
        """The grammar's tokenizer."""
        return build_tokenizer()

    def load_tokenizer(self, directory: str) -> CountdownTokenizer:
        """A checkpoint's tokenizer."""
        return load_tokenizer(directory)

    def protocol(self, tokenizer: Tokenizer) -> CountdownProtocol:
        """The protocol of the configured method."""
        assert isinstance(tokenizer, CountdownTokenizer)
        return CountdownProtocol(tokenizer, self.options.method, self.options.max_depth)

    def demonstrate(self, problem: Problem, solver_seed: int) -> DemonstrationSet:
        """One solver run; every parent segment and every child is one sequence (paper section 3.2)."""
        assert isinstance(problem, CountdownProblem)
        if self.options.method == "sosp":
            prompt, completion, solved = solve_sosp(problem, solver_seed, self.solver)
            prompt = self._token_budget(prompt + completion) + prompt
            sequences = [Demonstration(prompt, completion)]
            return DemonstrationSet(solved, tuple(sequences))
        trace = solve_apr(problem, solver_seed, self.solver)
        budget = self._child_budget(trace)
        given = budget + trace.segments[0][0]
        sequences = [Demonstration(budget + p, c, (), i, given) for i, (p, c) in enumerate(trace.segments)]
        child = 0
        for spawned in trace.children:
            for prompt, completion in spawned:
                sequences.append(Demonstration(prompt, completion, (child,)))
                child += 1
        return DemonstrationSet(trace.solved, tuple(sequences))

    def _child_budget(self, trace: AprTrace) -> str:
        """Children per spawn round, before the parent's first line; a tree that never spawned has none. Children do not
        inherit it."""
        if not self.options.budgets or not trace.children:
            return ""
        return Budget("Sub Call Budget", sum(map(len, trace.children)) // len(trace.children)).text()

    def _token_budget(self, text: str) -> str:
        """Tokens of the text, rounded up to a whole bin."""
        if not self.options.budgets:
            return ""
        return Budget("Token Budget", TOKEN_BIN * -(-len(self._own_tokenizer.encode(text)) // TOKEN_BIN)).text()

    @cached_property
    def _own_tokenizer(self) -> CountdownTokenizer:
        return build_tokenizer()

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Strict replay of the answer."""
        assert isinstance(problem, CountdownProblem)
        return verify_solution(problem, text)

    def diagnose(self, problem: Problem, texts: Sequence[str]) -> str:
        """See `tasks.countdown.diagnosis`."""
        assert isinstance(problem, CountdownProblem)
        return diagnose(problem, texts)

    def problem_from_text(self, text: str) -> CountdownProblem:
        """From `3 5 7 -> 22`."""
        numbers, arrow, target = text.replace("\u2192", "->").partition("->")
        parts = numbers.replace(",", " ").split()
        if not arrow or not parts or not all(part.isdecimal() for part in (*parts, target.strip())):
            raise AprError(f"not a Countdown problem: {text[:80]!r}", 'Write it as "3 5 7 -> 22"')
        if any(len(part) > MAX_DIGITS for part in (*parts, target.strip())):  # before int reads thousands of them
            raise AprError(f"a number of {text[:80]!r} has more than {MAX_DIGITS} digits", "Use smaller numbers")
        problem = CountdownProblem(tuple(map(int, parts)), int(target))
        _require_readable(problem)
        return problem

    def unfamiliar(self, problem: Problem) -> str:
        """See `core.task.Task.unfamiliar`."""
        assert isinstance(problem, CountdownProblem)
        space = self.options.space
        if len(problem.numbers) != space.count:
            return f"{len(problem.numbers)} numbers, it was trained on {space.count}"
        if not all(space.low <= n <= space.high for n in problem.numbers):
            return f"numbers outside {space.low}..{space.high}, on which it was trained"
        if not space.target_low <= problem.target <= space.target_high:
            return f"a target outside {space.target_low}..{space.target_high}, on which it was trained"
        return ""

    def require_solvable(self, problem: Problem) -> None:
        """Exhaustive search over the numbers."""
        assert isinstance(problem, CountdownProblem)
        if not is_solvable(problem.numbers, problem.target):
            reachable = sorted(reachable_targets(problem.numbers), key=lambda t: (abs(t - problem.target), t))[:3]
            raise AprError(
                f"{problem.target} cannot be reached from {', '.join(map(str, problem.numbers))}, each used once, where"
                " every step gives a whole number that is not negative",
                f"Nearest targets that can: {', '.join(map(str, reachable))}",
            )


def _require_readable(problem: CountdownProblem) -> None:
    """Raise AprError where a search could write a number that the grammar does not read: a product has at most as many
    digits as its factors together."""
    digits = sum(len(str(n)) for n in problem.numbers)
    if max(digits, len(str(problem.target))) > MAX_DIGITS:
        raise AprError(
            f"the numbers {', '.join(map(str, problem.numbers))} have {digits} digits together, {MAX_DIGITS} are read",
            "Use smaller numbers",
        )
