"""Spawn blocks, child prompts, join blocks: as text and on token ids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import JoinOutcome, Outcome
from apr_ray.core.task import ChildResult, SpawnRequest, ThreadEnd
from apr_ray.tasks.countdown import spawn_join as sj
from apr_ray.tasks.countdown.problem import CountdownProblem
from apr_ray.tasks.countdown.protocol import CountdownProtocol
from apr_ray.tasks.countdown.tokenizer import EOS, PHRASES, CountdownTokenizer, build_tokenizer, load_tokenizer

OWN = """Moving to Node #0
Current State: 22:[3, 5, 7], Operations: []
Exploring Operation: 3*5=15, Resulting Numbers: [7, 15]
Generated Node #0,0: 22:[7, 15] Operation: 3*5=15
Exploring Operation: 3+5=8, Resulting Numbers: [7, 8]
Generated Node #0,1: 22:[7, 8] Operation: 3+5=8
"""
CHILD = "Moving to Node #0,0\nCurrent State: 22:[7, 15], Operations: ['3*5=15']"
SOLVED = """
Exploring Operation: 7+15=22, Resulting Numbers: [22]
22,22 equal: Goal Reached
Moving to Node #0,0
Current State: 22:[7, 15], Operations: ['3*5=15']
Exploring Operation: 7+15=22, Resulting Numbers: [22]
22,22 equal: Goal Reached
"""
PROBLEM = CountdownProblem((3, 5, 7), 22)


@pytest.fixture(scope="module")
def tokenizer() -> CountdownTokenizer:
    return build_tokenizer()


def block(*lines: str) -> str:
    return "\n".join(["<Calling Sub Searches>", *lines, "<End Calling Sub Searches>"]) + "\n"


def start(index: int, node: str, level: int = 1) -> str:
    return f"<Start Sub Search {index} at level {level}> Moving to Node {node}"


def test_child_sees_only_its_message() -> None:
    (child,) = sj.read_spawn_block(block(start(0, "#0,0")), OWN, 1)
    assert child.prompt == CHILD


def test_a_node_spawned_twice_is_two_children() -> None:
    """Regression: duplicate ids kill the released code's tree."""
    children = sj.read_spawn_block(block(start(0, "#0,0"), start(1, "#0,0")), OWN, 1)
    assert [c.prompt for c in children] == [CHILD, CHILD]


def test_the_first_definition_of_a_node_wins() -> None:
    again = OWN + "Generated Node #0,0: 22:[9, 9] Operation: 3*3=9\n"
    (child,) = sj.read_spawn_block(block(start(0, "#0,0")), again, 1)
    assert child.prompt == CHILD


def test_a_joined_childs_words_define_nothing() -> None:
    joined = OWN + "<Sub Searches>\nGenerated Node #0,2: 22:[1, 2] Operation: 3-2=1\n<End Sub Searches>\n"
    with pytest.raises(sj.SpawnError, match="spawn_unknown_node"):
        sj.read_spawn_block(block(start(0, "#0,2")), joined, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (block(start(0, "#0,5")), "spawn_unknown_node"),
        (block(), "spawn_empty"),
        (block(start(1, "#0,0")), "spawn_malformed"),
        (block(start(0, "#0,0", level=2)), "spawn_malformed"),
        (block("Moving to Node #0,0"), "spawn_malformed"),
        (block(start(0, "#0,0")) + "No solution found.\n", "spawn_malformed"),
        ("<Calling Sub Searches>\n" + start(0, "#0,0") + "\n", "spawn_unclosed"),
    ],
)
def test_a_spawn_that_cannot_be_followed_has_a_named_reason(text: str, reason: str) -> None:
    with pytest.raises(sj.SpawnError) as caught:
        sj.read_spawn_block(text, OWN, 1)
    assert caught.value.reason == reason


def test_a_spawn_in_the_middle_of_a_line_is_malformed() -> None:
    """Else the parent's later context would hide where the join begins, and its children's nodes would be its own."""
    with pytest.raises(sj.SpawnError) as caught:
        sj.read_spawn_block(block(start(0, "#0,0")), OWN + "Exploring", 1)
    assert caught.value.reason == "spawn_malformed"


def test_a_solved_child_joins_with_its_restated_path_and_nothing_else() -> None:
    result = sj.child_result(CHILD + SOLVED)
    assert result.outcome is JoinOutcome.SOLVED
    assert result.message == SOLVED.split("Goal Reached\n", 1)[1].removesuffix("\n")


def test_a_child_cannot_forge_the_runtimes_words() -> None:
    forged = CHILD + SOLVED.replace("Moving to Node #0,0\n", "<End Sub Searches>\n")
    assert sj.child_result(forged) == ChildResult(JoinOutcome.NO_SOLUTION, reason="bad_message")


@pytest.mark.parametrize("ending", ["\n", "\n\n"])
def test_an_empty_line_after_a_childs_path_is_no_message(ending: str, tokenizer: CountdownTokenizer) -> None:
    """Regression: it joined, and the join block could not be tokenised: one such child ended the whole run."""
    assert sj.child_result(CHILD + SOLVED + ending) == ChildResult(JoinOutcome.NO_SOLUTION, reason="bad_message")
    assert tokenizer.decode(tokenizer.encode(ending)) == ending
    assert len(tokenizer.encode(ending)) == len(ending)


def test_a_child_cannot_begin_its_message_with_a_budget() -> None:
    budget = SOLVED.replace("Moving to Node #0,0\n", "Token Budget: 512 Moving to Node #0,0\n")
    assert sj.child_result(CHILD + budget) == ChildResult(JoinOutcome.NO_SOLUTION, reason="bad_message")


def test_each_outcome_has_its_own_words() -> None:
    results = [
        ChildResult(JoinOutcome.NO_SOLUTION),
        ChildResult(JoinOutcome.CANCELLED),
        ChildResult(JoinOutcome.SOLVED, "22,22 equal: Goal Reached"),
    ]
    assert sj.join_block([(0, 0), (0, 1), (0, 2)], results, 1) == (
        "<Sub Searches>\n<No Solution in Sub Search 0 at level 1 at Node #0,0>\n"
        "<Cancelled Sub Search 1 at level 1 at Node #0,1>\n<Goal Reached in Sub Search 2 at level 1 at Node #0,2>\n"
        "22,22 equal: Goal Reached\n<End Sub Searches>\n"
    )


def test_the_protocol_keeps_the_parents_ids_up_to_the_spawn(tokenizer: CountdownTokenizer) -> None:
    protocol = CountdownProtocol(tokenizer)
    context = protocol.root_prompt(PROBLEM)
    text = "\n" + OWN.split("\n", 2)[2]
    sampled = [*tokenizer.encode(text + block(start(0, "#0,1"), start(1, "#0,0"))), tokenizer.eos_id]
    asked = protocol.read_call(context, sampled, 0)
    assert isinstance(asked, SpawnRequest)
    assert tokenizer.decode(sampled[: asked.keep_tokens]) == text
    assert [c.label for c in asked.children] == ["#0,1", "#0,0"]
    assert tokenizer.decode(asked.children[1].prompt_ids) == CHILD
    joined = protocol.join_ids(asked, [ChildResult(JoinOutcome.NO_SOLUTION)] * 2, 1)
    assert tokenizer.decode(joined).startswith("<Sub Searches>\n<No Solution in Sub Search 0 at level 1 at Node #0,1>")


def test_the_protocol_names_the_end_of_a_call(tokenizer: CountdownTokenizer) -> None:
    protocol = CountdownProtocol(tokenizer)
    context = protocol.root_prompt(PROBLEM)
    none = [*tokenizer.encode("\nNo solution found.\n"), tokenizer.eos_id]
    assert protocol.read_call(context, none, 0) == ThreadEnd(Outcome.NO_ANSWER)
    unknown = [*tokenizer.encode("\n" + block(start(0, "#0,9"))), tokenizer.eos_id]
    assert protocol.read_call(context, unknown, 0) == ThreadEnd(Outcome.INVALID_SPAWN, "spawn_unknown_node")


def test_budget_prefixes_stand_on_the_first_line(tokenizer: CountdownTokenizer) -> None:
    def prompt(method: str) -> str:
        return tokenizer.decode(CountdownProtocol(tokenizer, method).root_prompt(PROBLEM, budget=10))

    assert prompt("apr").startswith("Sub Call Budget: 10 Moving to Node #0\nCurrent State: 22:[3, 5, 7]")
    assert prompt("sosp").startswith("Token Budget: 10 Current State: 22:[3, 5, 7]")


def test_text_outside_the_grammar_is_an_error_not_an_unknown_token(tokenizer: CountdownTokenizer) -> None:
    for text in ("hello", "Moving to node #0", "3 x 5", "Goal"):
        with pytest.raises(AprError, match="outside the Countdown grammar"):
            tokenizer.encode(text)


PIECES = st.sampled_from([*PHRASES, *(p[:-1] for p in PHRASES), "x", "é", EOS])


@given(st.lists(PIECES, max_size=30).map("".join))
def test_ids_are_the_librarys(text: str) -> None:
    """Phrases side by side, cut short, between what is no phrase: the same ids, or an error from both."""
    tokenizer = build_tokenizer()
    try:
        expected = tokenizer.backend.encode(text, add_special_tokens=False).ids
    except Exception:  # noqa: BLE001  # as the library raises it
        with pytest.raises(AprError):
            tokenizer.encode(text)
    else:
        assert tokenizer.encode(text) == expected


def test_a_tokenizer_survives_its_checkpoint(tokenizer: CountdownTokenizer, tmp_path: object) -> None:
    tokenizer.save(str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode(OWN) == tokenizer.encode(OWN)
    assert (loaded.eos_id, loaded.pad_id, loaded.tag_ids) == (tokenizer.eos_id, tokenizer.pad_id, tokenizer.tag_ids)
    assert loaded.decode(loaded.encode(OWN)) == OWN

    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs(OWN, add_special_tokens=False)["input_ids"] == tokenizer.encode(OWN)


def test_every_phrase_is_one_token_and_digits_stay_digits(tokenizer: CountdownTokenizer) -> None:
    for tag in ("<Calling Sub Searches>", "<End Calling Sub Searches>", "<Sub Searches>", "<End Sub Searches>"):
        assert len(tokenizer.encode(tag)) == 1
    assert len(tokenizer.encode("1234567890")) == 10


def test_a_foreign_tokenizer_that_merges_tags_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    foreign = Tokenizer(models.BPE())
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>", "<pad>"], show_progress=False)
    foreign.train_from_iterator([OWN, block(start(0, "#0,0"))], trainer)
    with pytest.raises(AprError, match="not one isolated token"):
        CountdownTokenizer(foreign, "<eos>", "<pad>")
    foreign.add_tokens(["<Calling Sub Searches>", "<End Calling Sub Searches>", "<Sub Searches>", "<End Sub Searches>"])
    assert CountdownTokenizer(foreign, "<eos>", "<pad>").tag_ids


def test_a_tokenizer_whose_tags_are_special_is_refused() -> None:
    """Faults 4: it passed, texts were decoded without the tags, and every spawn was `spawn_unclosed`."""
    own = build_tokenizer()
    own.backend.add_special_tokens(list(own.tag_ids))
    with pytest.raises(AprError, match="is a special token in this tokenizer"):
        CountdownTokenizer(own.backend, own.eos, own.pad)
