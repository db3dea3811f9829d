"""BPE word by word: a word that was met before is looked up, not encoded again; the ids are those of the whole text.

    "the cat the cat"  ->  words ▁the ▁cat ▁the ▁cat  ->  two of them encoded, four looked up

SentencePiece merges neighbours anywhere in a text, with a queue over all of it: ten times the work of the rest of the
preparation. But where no piece holds a space after another character, no merge reaches over the beginning of a word,
and words do not depend on each other. (Not so for unigram models: sums of scores are rounded, ties fall otherwise.)
"""
from __future__ import annotations

import re
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "▁"  # U+2581, which stands for a space in pieces
NORMAL, BPE = 1, 2  # of SentencePiece: kind of a piece, kind of a model
REMEMBERED = 8 << 20  # characters of words; then all are forgotten
_WORD = re.compile(" ( *[^ ]*)")


def are_independent(proto: object) -> bool:
    """Whether the words of a text can be encoded one by one."""
    normaliser = proto.normalizer_spec
    return (proto.trainer_spec.model_type == BPE and not proto.trainer_spec.treat_whitespace_as_suffix
            and normaliser.add_dummy_prefix and normaliser.escape_whitespaces
            and not (normaliser.remove_extra_whitespaces or normaliser.precompiled_charsmap)
            and any(p.piece == SPACE and p.type == NORMAL for p in proto.pieces)
            and not any(SPACE in p.piece.lstrip(SPACE) for p in proto.pieces))


def _cut(text: str) -> list[str]:
    """Words without the space before each, but with those before that one: a piece may hold several spaces.

    "a b" -> "a" "b"      " a  b " -> " a" " b" ""      (the text begins with a space of its own, the dummy prefix)
    """
    return _WORD.findall(" " + text) if "  " in text or text[0] == " " else text.split(" ")


class _Numbers(dict):
    """Word -> its number, in the order of first meeting."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


class Words:
    """The words met so far, without the space before each, and their ids: word i has ids[starts[i]:starts[i + 1]]."""

    def __init__(self, native: SentencePieceProcessor):
        self.native = native
        self._forget()

    def _forget(self) -> None:
        self.numbers, self.size = _Numbers({"": 0}), 0  # native gives nothing for ""; as a word it is a lone space
        self.ids = np.array([self.native.piece_to_id(SPACE)], dtype=np.int32)
        self.starts = np.array([0, 1])

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The int32 ids of each text, as native.encode gives them."""
        if self.size > REMEMBERED:
            self._forget()
        words = [_cut(text.replace(SPACE, " ")) if text else [] for text in texts]
        known = len(self.numbers)
        found = map(self.numbers.__getitem__, chain.from_iterable(words))
        numbers = np.fromiter(found, np.int64, sum(map(len, words)))
        self._learn(list(islice(self.numbers, known, None)))
        lengths = self.starts[numbers + 1] - self.starts[numbers]
        ends = np.cumsum(lengths)
        ids = self.ids[np.repeat(self.starts[numbers] - ends + lengths, lengths) + np.arange(lengths.sum())]
        bounds = np.concatenate([[0], ends])[np.cumsum([0, *map(len, words)])].tolist()
        return [ids[start:end] for start, end in zip(bounds, bounds[1:])]

    def _learn(self, new: list[str]) -> None:
        if new:
            found = self.native.encode(new, num_threads=1, return_type="numpy")
            self.starts = np.concatenate([self.starts, self.starts[-1] + np.cumsum([len(ids) for ids in found])])
            self.ids = np.concatenate([self.ids, *found])
            self.size += sum(map(len, new))
