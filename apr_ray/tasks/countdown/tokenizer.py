"""The Countdown tokenizer: the grammar's fixed phrases are single tokens, digits stay digits.

It is an ordinary `transformers` fast tokenizer, saved in and loaded from checkpoints. Text outside the grammar's words
is an error, never an unknown token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apr_ray.core.errors import AprError
from apr_ray.tasks.countdown.grammar import (
    BUDGET_KINDS,
    EQUAL,
    JOIN_CLOSE,
    JOIN_OPEN,
    NO_SOLUTION,
    SPAWN_CLOSE,
    SPAWN_OPEN,
    SUB_NO_SOLUTION,
    UNEQUAL,
)

PAD, EOS = "<|pad|>", "<|end|>"
TAGS = (SPAWN_OPEN, SPAWN_CLOSE, JOIN_OPEN, JOIN_CLOSE)

PHRASES = (
    *TAGS,
    "<Start Sub Search ",
    "<No Solution in Sub Search ",
    "<Goal Reached in Sub Search ",
    "<Cancelled Sub Search ",
    " at level ",
    " at Node #",
    "> Moving to Node #",
    ">",
    "Moving to Node #",
    "Current State: ",
    "Exploring Operation: ",
    "Generated Node #",
    ", Operations: []",
    "], Operations: []",
    "], Operations: ['",
    "', '",
    "']",
    ", Resulting Numbers: [",
    "] Operation: ",
    EQUAL,
    UNEQUAL,
    NO_SOLUTION,
    SUB_NO_SOLUTION,
    "Start Sub Search at level ",
    "Exit Sub Search at level ",
    ": Moving to Node #",
    *(f"{kind}: " for kind in BUDGET_KINDS),
    ":[",
    ": ",
    ":",
    ", ",
    ",",
    "]",
    " ",
    "\n",
    *"+-*/=",
    *"0123456789",
)


class CountdownTokenizer:
    """Adapter over a fast tokenizer (`backend`) that satisfies `core.task.Tokenizer`.

    Raises:
        AprError: from the constructor, where a tag is not an isolated token; spawn recognition and the splice of a
            join are done on token ids, so a tag that merges with its neighbours could not be found.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.vocab_size = len(backend)
        self.eos_id = _special(backend.eos_token_id, "eos_token")
        self.pad_id = _special(backend.pad_token_id, "pad_token")
        self.tag_ids = {tag: _isolated(backend, tag) for tag in TAGS}
        self._pieces: list[str] | None = None
        vocab = backend.get_vocab()
        if set(vocab) == {PAD, EOS, *PHRASES}:  # our own: decoding is concatenation, without the library's overhead
            self._pieces = [""] * len(vocab)
            for piece, index in vocab.items():
                self._pieces[index] = "" if piece in (PAD, EOS) else piece

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens. Raises AprError on text outside the vocabulary."""
        try:
            ids: list[int] = self.backend(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # the Rust library raises a bare Exception for an unknown word
            raise AprError(
                f"text outside the Countdown grammar: {text[:80]!r}", "Check it with apr-ray vectors or parse_trace"
            ) from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        if self._pieces is not None:
            return "".join(map(self._pieces.__getitem__, ids))
        text: str = self.backend.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def save(self, directory: str) -> None:
        """Write `tokenizer.json` and its config."""
        self.backend.save_pretrained(directory)


def _special(token_id: int | None, name: str) -> int:
    if token_id is None:
        raise AprError(f"the tokenizer has no {name}", "Add one before training")
    return int(token_id)


def _isolated(backend: Any, tag: str) -> int:
    unknown = backend.unk_token_id
    ids = backend(tag, add_special_tokens=False)["input_ids"]
    inside = backend(f"\n{tag}\n", add_special_tokens=False)["input_ids"] if len(ids) == 1 else []
    if len(ids) != 1 or ids[0] == unknown or inside.count(ids[0]) != 1:
        raise AprError(
            f"the tag {tag!r} is not one isolated token in this tokenizer ({len(ids)} ids)",
            "Add the four spawn/join tags with add_tokens(..., special_tokens=False) and resize the embeddings",
        )
    return int(ids[0])


def build_tokenizer() -> CountdownTokenizer:
    """The tokenizer of the grammar; the same ids on every machine."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate((PAD, EOS, *PHRASES))}
    backend = Backend(models.WordLevel(vocab, unk_token="<|unknown|>"))  # not in the vocabulary: unknown text raises
    longest_first = sorted(PHRASES, key=len, reverse=True)
    pattern = "|".join(re.escape(phrase).replace("\n", r"\n") for phrase in longest_first)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    return CountdownTokenizer(fast)


def load_tokenizer(directory: str) -> CountdownTokenizer:
    """The tokenizer saved in a checkpoint. Raises AprError where it is missing or cannot carry the protocol."""
    from transformers import PreTrainedTokenizerFast

    if not (Path(directory) / "tokenizer.json").is_file():
        raise AprError(f"no tokenizer.json in {directory}", "Give a checkpoint folder that apr-ray wrote")
    return CountdownTokenizer(PreTrainedTokenizerFast.from_pretrained(directory))
