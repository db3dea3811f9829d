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
from collections.abc import Callable, Collection
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from common.pool import gather

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerFast

SPACE = "▁"  # U+2581, which stands for a space in pieces
NORMAL, BPE = 1, 2  # of SentencePiece: kind of a piece, kind of a model
NORMALISER = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, {
    "type": "Replace", "pattern": {"String": " "}, "content": SPACE}]}
REMEMBERED = 8 << 20  # characters of words; then all are forgotten
_WORD = re.compile(" ( *[^ ]*)")


def of_sentencepiece(native: SentencePieceProcessor, proto: object) -> Words | None:
    """Words of a SentencePiece model, or None where its words depend on each other."""
    normaliser, trainer = proto.normalizer_spec, proto.trainer_spec
    usable = (trainer.model_type == BPE and not trainer.treat_whitespace_as_suffix
              and normaliser.add_dummy_prefix and normaliser.escape_whitespaces
              and not (normaliser.remove_extra_whitespaces or normaliser.precompiled_charsmap))
    if not usable or not _apart({p.piece for p in proto.pieces if p.type == NORMAL}):
        return None
    return Words(lambda words: native.encode(words, num_threads=1, return_type="numpy"), native.piece_to_id(SPACE))


def of_fast(tokenizer: PreTrainedTokenizerFast, encode: Callable[[list[str]], list[np.ndarray]]) -> Words | None:
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


class _Numbers(dict):
    """Word -> its number, in the order of first meeting. new: words met since it was last emptied."""

    def __init__(self) -> None:
        super().__init__({"": 0})  # as a text "" has no ids; as a word it is a lone space
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self.new.append(word)
        return number


class Words:
    """The words met so far, without the space before each, and their ids: word i has ids[starts[i]:starts[i + 1]]."""

    def __init__(self, encode: Callable[[list[str]], list[np.ndarray]], space: int):
        """encode: texts -> int32 ids of each; space: the id of a lone space."""
        self._encode, self._space = encode, space
        self._forget()

    def _forget(self) -> None:
        self.numbers, self.size = _Numbers(), 0
        self.ids, self.starts = array("i", [self._space]), array("q", [0, 1])

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The int32 ids of each text, as it gives them for the whole text."""
        if self.size > REMEMBERED:
            self._forget()
        words = [_cut(text.replace(SPACE, " ")) if text else [] for text in texts]
        found = map(self.numbers.__getitem__, chain.from_iterable(words))
        numbers = np.fromiter(found, np.int64, sum(map(len, words)))
        self._learn(self.numbers.new)
        all_starts = np.frombuffer(self.starts, np.int64)
        starts = all_starts[numbers]
        lengths = all_starts[numbers + 1] - starts
        ids = gather(np.frombuffer(self.ids, np.int32), starts, lengths)
        bounds = np.concatenate([[0], np.cumsum(lengths)])[np.cumsum([0, *map(len, words)])].tolist()
        return [ids[start:end] for start, end in zip(bounds, bounds[1:])]

    def _learn(self, new: list[str]) -> None:
        if new:
            try:
                found = self._encode(new)
            except BaseException:  # ids of the words that are numbered already would be missing
                self._forget()
                raise
            self.starts.extend((self.starts[-1] + np.cumsum([*map(len, found)])).tolist())
            self.ids.frombytes(np.concatenate(found).tobytes())
            self.size += sum(map(len, new))
            new.clear()
