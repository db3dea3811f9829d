"""BPE word by word: a word that was met before is looked up, not encoded again; the ids are those of the whole text.

    "the cat the cat"  ->  words ▁the ▁cat ▁the ▁cat  ->  two of them encoded, four looked up

Such a model merges neighbours anywhere in a text, with a queue over all of it: ten times the work of the rest of the
preparation. But where no piece holds a space after another character, no merge reaches over the beginning of a word,
and words do not depend on each other. (Not so for unigram models: sums of scores are rounded, ties fall otherwise.)
"""
from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np

from common.word_cache import WordCache

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerFast

SPACE = "▁"  # U+2581, which stands for a space in pieces
NORMAL, BPE = 1, 2  # of SentencePiece: kind of a piece, kind of a model
NORMALISER = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, {
    "type": "Replace", "pattern": {"String": " "}, "content": SPACE}]}
REMEMBERED = 8 << 20  # characters of words; then all are forgotten
FEW = 1 << 15  # characters of texts whose words are looked up one by one
PORTION = 1 << 18  # characters at a time: a word takes 150 bytes meanwhile, and is asked for at each place it is new in
_WORD = re.compile(" ( *[^ ]*)")


def of_sentencepiece(native: SentencePieceProcessor, proto: object) -> Words | None:
    """Words of a SentencePiece model, or None where its words depend on each other."""
    normaliser, trainer = proto.normalizer_spec, proto.trainer_spec
    usable = (trainer.model_type == BPE and not trainer.treat_whitespace_as_suffix
              and normaliser.add_dummy_prefix and normaliser.escape_whitespaces
              and not (normaliser.remove_extra_whitespaces or normaliser.precompiled_charsmap))
    if not usable or not _apart({p.piece for p in proto.pieces if p.type == NORMAL}):
        return None
    return Words(lambda words: [array("i", ids).tobytes() for ids in native.encode(words, num_threads=1)],
                 native.piece_to_id(SPACE))  # arrays of numpy take twice as long where texts are words


def of_fast(tokenizer: PreTrainedTokenizerFast, encode: Callable[[list[str]], list[bytes]]) -> Words | None:
    """The same for a tokenizer.json of that kind, as Llama 2 and Mistral have it. encode: texts -> int32 ids."""
    backend = tokenizer.backend_tokenizer
    model = backend.model
    usable = (type(model).__name__ == "BPE" and backend.pre_tokenizer is None and backend.normalizer is not None
              and not (model.dropout or model.ignore_merges)
              and not (model.continuing_subword_prefix or model.end_of_word_suffix)
              and json.loads(backend.normalizer.__getstate__()) == NORMALISER
              and all(token.special for token in tokenizer.added_tokens_decoder.values()))  # else found in any text
    vocabulary = backend.get_vocab(with_added_tokens=False) if usable else {}
    return Words(encode, vocabulary[SPACE]) if _apart(vocabulary.keys()) else None


def _apart(pieces: Collection[str]) -> bool:
    """Whether words begin with a piece of its own, and no piece reaches into the next one."""
    return SPACE in pieces and not any(SPACE in piece.lstrip(SPACE) for piece in pieces)


def _cut(text: str) -> list[str]:
    """Words without the space before each, but with those before that one: a piece may hold several spaces.

    "a b" -> "a" "b"      " a  b " -> " a" " b" ""      (the text begins with a space of its own, the dummy prefix)
    """
    return _WORD.findall(" " + text) if "  " in text or text[0] == " " else text.split(" ")


def _portions(texts: list[str]) -> Iterator[list[str]]:
    begin = size = 0
    for i, text in enumerate(texts):
        if size and size + len(text) > PORTION:
            yield texts[begin:i]
            begin, size = i, 0
        size += len(text)
    yield texts[begin:]


class _Known(dict):
    """Word -> its ids. new: words that were asked for and are not there yet -> what is to hold their ids."""

    def __init__(self, space: bytes):
        super().__init__({"": space})  # as a text "" has no ids; as a word it is a lone space
        self.new: dict[str, bytearray] = {}

    def __missing__(self, word: str) -> bytearray:
        return self.new.setdefault(word, bytearray())


class Words:
    """The words met so far, without the space before each, and their ids."""

    def __init__(self, encode: Callable[[list[str]], list[bytes]], space: int):
        """encode: texts -> int32 ids of each; space: the id of a lone space."""
        self._encode, self._space = encode, np.int32(space).tobytes()
        self._cache = WordCache(self._look_up)
        self._forget()

    def _forget(self) -> None:
        self._known, self._size = _Known(self._space), 0

    def encode(self, texts: list[str]) -> list[bytes]:
        """The int32 ids of each text, as it gives them for the whole text."""
        if self._size > REMEMBERED:
            self._forget()
        found: list[bytes] = []
        for portion in _portions([text.replace(SPACE, " ") for text in texts]):
            at_once = self._cache.encode(portion) if sum(map(len, portion)) > FEW else None
            found += self._one_by_one(portion) if at_once is None else at_once
        return found

    def _one_by_one(self, texts: list[str]) -> list[bytes]:
        ids_of = self._known.__getitem__
        words = [[*map(ids_of, _cut(text))] if text else [] for text in texts]
        self._learn()
        return [*map(b"".join, words)]

    def _look_up(self, words: list[str]) -> list[bytes]:
        found = [*map(self._known.__getitem__, words)]
        self._learn()
        return found

    def _learn(self) -> None:
        """Encode the new words."""
        new, self._known.new = self._known.new, {}  # also if their encoding fails
        if new:
            known = dict(zip(new, self._encode([*new])))
            for word, ids in known.items():
                new[word][:] = ids
            self._known.update(known)
            self._size += sum(map(len, new))
