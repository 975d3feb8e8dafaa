"""The trace grammar: byte-exact both ways, errors that say where and why."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_ray.tasks.countdown import grammar as g
from apr_ray.tasks.countdown.arithmetic import Operation

PARENT = """Sub Call Budget: 10 Moving to Node #0
Current State: 27:[22, 26, 31, 53], Operations: []
Exploring Operation: 53-26=27, Resulting Numbers: [22, 31, 27]
Generated Node #0,0: 27:[22, 31, 27] Operation: 53-26=27
Moving to Node #0,0
Current State: 27:[22, 31, 27], Operations: ['53-26=27']
<Calling Sub Searches>
<Start Sub Search 0 at level 1> Moving to Node #0,0
<End Calling Sub Searches>
<Sub Searches>
<No Solution in Sub Search 0 at level 1 at Node #0,0>
<Cancelled Sub Search 1 at level 1 at Node #0,1>
<Goal Reached in Sub Search 2 at level 1 at Node #0,2>
3,27 unequal: No Solution
<End Sub Searches>
27,27 equal: Goal Reached
No solution found.
"""

SOSP = """Token Budget: 2048 Current State: 22:[67, 1], Operations: []
Start Sub Search at level 1: Moving to Node #0,0
Current State: 22:[1, 2], Operations: ['67-34=33', '33-31=2']
No solution found.
Exit Sub Search at level 1
No solution found in sub search"""


@pytest.mark.parametrize("text", [PARENT, SOSP])
def test_text_is_reprinted_byte_for_byte(text: str) -> None:
    assert g.parse_trace(text).text() == text


numbers = st.integers(0, 10**9)
operations = st.builds(Operation, numbers, st.sampled_from("+-*/"), numbers, numbers)
nodes = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple)
several = st.lists(numbers, min_size=1, max_size=6).map(tuple)
small = st.integers(0, 99)
free_events = st.one_of(
    st.builds(g.Move, nodes),
    st.builds(g.State, numbers, several, st.lists(operations, max_size=4).map(tuple)),
    st.builds(g.Generate, nodes, numbers, several, operations),
    st.builds(g.Compare, numbers, numbers, st.booleans()),
    st.builds(g.Fixed, st.sampled_from([g.SPAWN_OPEN, g.SPAWN_CLOSE, g.JOIN_OPEN, g.JOIN_CLOSE, g.NO_SOLUTION])),
    st.builds(g.SpawnChild, small, small, nodes),
    st.builds(g.JoinChild, st.sampled_from(["No Solution in", "Goal Reached in", "Cancelled"]), small, small, nodes),
    st.builds(g.SubSearch, small, nodes),
    st.builds(g.ExitSubSearch, small),
)
budgets = st.none() | st.builds(g.Budget, st.sampled_from(g.BUDGET_KINDS), st.integers(1, 99999))


@settings(max_examples=300)
@given(st.builds(g.Trace, budgets, st.lists(free_events, min_size=1, max_size=8).map(tuple), st.booleans()))
def test_events_survive_printing_and_parsing(trace: g.Trace) -> None:
    assert g.parse_trace(trace.text()) == trace


@settings(max_examples=300)
@given(st.text(max_size=300))
def test_whatever_parses_is_reprinted_and_the_rest_is_an_error_with_a_line(text: str) -> None:
    line = 0
    try:
        trace: g.Trace | None = g.parse_trace(text)
    except g.TraceError as error:
        trace, line = None, error.line
    assert line >= 1 if trace is None else trace.text() == text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Moving to Node #0\nMoving to Node 0,1", 2),
        ("Moving to Node #0\n\nMoving to Node #0", 2),
        ("Current State: 27:[22, 26], Operations: [53-26=27]", 1),
        ("Current State: 027:[22, 26], Operations: []", 1),
        ("Exploring Operation: 1+2=3, Resulting Numbers: [3]\nMoving to Node #0", 2),
        ("Moving to Node #0 ", 1),
        ("<Sub Searches>\n<Goal Reached in Sub Search 1 at level 1>", 2),
        ("__import__('os').system('true')", 1),
    ],
)
def test_a_line_outside_the_grammar_is_named(text: str, line: int) -> None:
    with pytest.raises(g.TraceError) as caught:
        g.parse_trace(text)
    assert caught.value.line == line


def test_a_text_that_is_too_long_is_refused_unread() -> None:
    with pytest.raises(g.TraceError, match="characters"):
        g.parse_trace("x" * (g.MAX_TEXT_CHARS + 1))


def test_a_number_with_too_many_digits_is_no_number() -> None:
    assert g.parse_line("9" * 19 + ",1 equal: Goal Reached") is None
