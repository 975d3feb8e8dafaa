"""The Countdown tokenizer: the grammar's fixed phrases are single tokens, digits stay digits.

It is saved in checkpoints as an ordinary `transformers` fast tokenizer. Text outside the grammar's words is an error,
never an unknown token.
"""

from __future__ import annotations

import json
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


_PATTERN = "|".join(re.escape(p).replace("\\\n", r"\n") for p in sorted(PHRASES, key=len, reverse=True))
"""The longest phrase wins."""
_PHRASE = re.compile("[0-9]|" + "|".join(p for p in _PATTERN.split("|") if not p.isdigit()))
"""The same with digits first, which are half of a text and of which no phrase begins with one."""


class CountdownTokenizer:
    """A fast tokenizer (`backend`, of the `tokenizers` library) as a `core.task.Tokenizer`.

    Raises:
        AprError: from the constructor, where a tag is not an isolated token; spawn recognition and the splice of a
            join are done on token ids, so a tag that merges with its neighbours could not be found.
    """

    def __init__(self, backend: Any, eos: str, pad: str) -> None:
        self.backend = backend
        self.vocab_size = backend.get_vocab_size()
        self.eos, self.pad = eos, pad
        self.eos_id, self.pad_id = _id_of(backend, eos), _id_of(backend, pad)
        self.tag_ids = {tag: _isolated(backend, tag) for tag in TAGS}
        self._pieces: list[str] | None = None
        vocab = backend.get_vocab()
        if set(vocab) == {PAD, EOS, *PHRASES}:
            # Our own: a lookup per phrase and a concatenation, without the library's overhead, which is most of the
            # time that demonstrations take (`apr-ray bench solver`).
            self._ids = vocab
            self._pieces = [""] * len(vocab)
            for piece, index in vocab.items():
                self._pieces[index] = "" if piece in (PAD, EOS) else piece

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens. Raises AprError on text outside the vocabulary."""
        if self._pieces is not None:
            found = _PHRASE.findall(text)
            if sum(map(len, found)) == len(text):
                return list(map(self._ids.__getitem__, found))
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the Rust library raises a bare Exception for an unknown word
            raise AprError(
                f"text outside the Countdown grammar: {text[:80]!r}", "Check it with apr-ray vectors or parse_trace"
            ) from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        if self._pieces is not None:
            return "".join(map(self._pieces.__getitem__, ids))
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text

    def save(self, directory: str) -> None:
        """Write the files of a `transformers` fast tokenizer."""
        from transformers import PreTrainedTokenizerFast

        PreTrainedTokenizerFast(
            tokenizer_object=self.backend,
            eos_token=self.eos,
            pad_token=self.pad,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(directory)


def _id_of(backend: Any, token: str) -> int:
    index = backend.token_to_id(token)
    if index is None:
        raise AprError(f"the tokenizer has no token {token!r}", "Add it before training")
    return int(index)


def _isolated(backend: Any, tag: str) -> int:
    index = backend.token_to_id(tag)
    inside = backend.encode(f"\n{tag}\n", add_special_tokens=False).ids
    if index is not None and backend.decode([index], skip_special_tokens=True) != tag:
        raise AprError(
            f"the tag {tag!r} is a special token in this tokenizer: texts would be decoded without it",
            "Add the four spawn/join tags as ordinary tokens (add_tokens, not add_special_tokens)",
        )
    if index is None or inside.count(index) != 1:
        raise AprError(
            f"the tag {tag!r} is not one isolated token in this tokenizer ({len(inside) - 2} ids)",
            "Add the four spawn/join tags as tokens of their own and resize the model's embeddings",
        )
    return int(index)


def build_tokenizer() -> CountdownTokenizer:
    """The tokenizer of the grammar; the same ids on every machine."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocab = {token: index for index, token in enumerate((PAD, EOS, *PHRASES))}
    backend = Backend(models.WordLevel(vocab, unk_token="<|unknown|>"))  # not in the vocabulary: unknown text raises
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([PAD, EOS])
    return CountdownTokenizer(backend, EOS, PAD)


def load_tokenizer(directory: str) -> CountdownTokenizer:
    """The tokenizer saved in a checkpoint. Raises AprError where it is missing or cannot carry the protocol."""
    from tokenizers import Tokenizer as Backend

    folder = Path(directory)
    if not (folder / "tokenizer.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        raise AprError(f"no tokenizer in {directory}", "Give a checkpoint folder that apr-ray wrote")
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        raise AprError(f"the tokenizer in {directory} is damaged: {error}", "Copy the checkpoint again") from error
    names = {}
    for key in ("eos_token", "pad_token"):
        token = config.get(key)
        names[key] = token["content"] if isinstance(token, dict) else token
        if not isinstance(names[key], str):
            raise AprError(f"the tokenizer in {directory} has no {key}", "Add one before training")
    return CountdownTokenizer(backend, names["eos_token"], names["pad_token"])
