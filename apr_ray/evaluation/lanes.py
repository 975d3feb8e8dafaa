"""A tree as lanes, one a thread, along causal time: how many tokens had to be decoded, one after another, before."""

from __future__ import annotations

from dataclasses import dataclass

from apr_ray.core.ledger import JoinOutcome, Path, ThreadTree


@dataclass(frozen=True, slots=True)
class Stretch:
    """One call of a thread: causal tokens [start, end)."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Lane:
    """One thread.

    Attributes:
        label: "parent", or the child's label and path.
        stretches: its calls, in order; between two of them it waits for its children.
        outcome: how it ended ("solved", "no_solution", …).
        tokens: that it sampled.
    """

    path: Path
    label: str
    stretches: tuple[Stretch, ...]
    outcome: str
    tokens: int


def lanes_of(tree: ThreadTree) -> list[Lane]:
    """Lanes in the order parent, its children, their children; the last one's end is `tree.sequential_tokens`."""
    tokens = {(c.path, c.segment): c.sampled_tokens for c in tree.calls}
    spawns = {(s.path, s.segment): s for s in tree.spawns}
    joins = {(j.path, j.segment): j for j in tree.joins}
    lanes: list[Lane] = []

    def walk(path: Path, label: str, start: int, outcome: str) -> int:
        stretches: list[Stretch] = []
        place = len(lanes)
        now, segment = start, 0
        while (path, segment) in tokens:
            stretches.append(Stretch(now, now + tokens[path, segment]))
            now = stretches[-1].end
            spawn = spawns.get((path, segment))
            if spawn is not None:
                join = joins.get((path, segment))
                ends = [
                    walk(child, name, now, join.outcomes[i].value if join else JoinOutcome.CANCELLED.value)
                    for i, (child, name) in enumerate(zip(spawn.children, spawn.labels, strict=True))
                ]
                now = max(ends, default=now)
            segment += 1
        own = sum(s.end - s.start for s in stretches)
        lanes.insert(place, Lane(path, label, tuple(stretches), outcome, own))
        return now

    walk((), "parent", 0, tree.verdict or tree.outcome.value)
    return lanes


ASCII = str.maketrans("█·│", "#.|")
"""Lanes for terminals that know no more than ASCII."""


def render_lanes(tree: ThreadTree, width: int = 72) -> str:
    """Lanes as text: `█` decodes, `·` waits; one column is about sequential_tokens / width tokens."""
    lanes = lanes_of(tree)
    total = max(1, tree.sequential_tokens)

    def column(at: int) -> int:
        return round(at * width / total)

    labels = [lane.label if not lane.path else "  " * len(lane.path) + f"child {lane.label}" for lane in lanes]
    pad = max(map(len, labels))
    lines = []
    for lane, label in zip(lanes, labels, strict=True):
        bar = [" "] * width
        if lane.stretches:
            for at in range(column(lane.stretches[0].start), column(lane.stretches[-1].end)):
                bar[at] = "·"
        for stretch in lane.stretches:
            begin = min(column(stretch.start), width - 1)
            for at in range(begin, max(begin + 1, column(stretch.end))):
                bar[min(at, width - 1)] = "█"
        lines.append(f"{label:<{pad}} │{''.join(bar)}│ {lane.tokens:>5} tokens  {lane.outcome}")
    return "\n".join(lines)
