"""The ids of all words of many texts at once.

    texts -> _cut: words -> _keys: each word as 16 bytes, and its slot -> those that the slot does not hold are asked
    for -> the ids of all of them, joined

A block of rows has a hundred thousand words: a few passes of numpy over all of them compare them with a direct-mapped
cache. One look-up of a Python dictionary after the other takes twice as long where words are short, and less time where
many of them are long (program code; eight Cyrillic letters are 16 bytes).
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

WIDTH = 2  # machine words of a key: three take a fifth more time for every word
LONG = 8 * WIDTH  # bytes; a word of as many and more is in no slot
MOST_LONG = 0.15  # share of long words; with more, a dictionary is as fast (code) or faster (Cyrillic, by a third)
SLOT_BITS = 18  # 262,144 slots of 24 bytes
MOST_IDS = 1 << 20  # then all slots are empty again
SLOT = np.dtype([("key", "<u8", WIDTH), ("start", np.int32), ("count", np.int32)])  # start: in the ids
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd: multiply-shift hashing
# by length: which bytes of a key are the word's, and its last byte, the length + 1, so that zeros are no word
_LENGTHS = np.arange(LONG + 1)[:, None]
_OWN = np.where(np.arange(LONG) < np.minimum(_LENGTHS, LONG - 1), 255, 0).astype(np.uint8).view("<u8").T.copy()
_LAST = (_LENGTHS[:, 0] + 1).astype("<u8") << np.uint64(56)


class WordCache:
    """Words met lately -> their ids. A slot holds one word, that of its hash which was asked for last."""

    def __init__(self, ids_of: Callable[[list[str]], list[bytes]]):
        """ids_of: words -> int32 ids of each; is asked for those that no slot holds."""
        self._ids_of = ids_of
        self._clear()

    def _clear(self) -> None:
        self._slots = np.zeros(1 << SLOT_BITS, SLOT)
        self._ids = np.empty(0, np.int32)

    def encode(self, texts: list[str]) -> list[bytes] | None:
        """The int32 ids of the words of each text side by side; an empty text has no word. None: too many are long."""
        if len(self._ids) > MOST_IDS:
            self._clear()
        content, begin, length, last, empty = _cut(texts)
        if np.count_nonzero(length >= LONG) > MOST_LONG * len(length):
            return None
        key, slot = _keys(content, begin, length)
        held = self._slots.take(slot)
        differs = np.logical_or.reduce([held["key"][:, i] != part for i, part in enumerate(key)])
        start, count, ids = held["start"].copy(), held["count"].copy(), self._ids
        if differs.any():
            short = length < LONG
            kept, long = np.flatnonzero(differs & short), np.flatnonzero(differs & ~short)
            new = np.concatenate([kept, long])  # in this order: the ids of what is kept are a beginning of all
            found, at, count[new] = self._ask([
                content[a:b] for a, b in zip(begin[new].tolist(), (begin[new] + length[new]).tolist())])
            start[new] = len(ids) + at
            ids = np.concatenate([ids, found])
            if len(kept):
                held = np.empty(len(kept), SLOT)
                held["key"] = np.stack([part[kept] for part in key], 1)
                held["start"], held["count"] = start[kept], count[kept]
                self._ids = ids[:(start[kept] + count[kept]).max()].copy()  # before the slots that point there
                self._slots[slot[kept]] = held
        count[empty] = 0
        upto = np.cumsum(count)
        flat = ids.take(np.repeat(start - (upto - count), count) + np.arange(upto[-1])).tobytes()
        ends = (4 * upto[last]).tolist()
        return [flat[a:b] for a, b in zip([0, *ends], ends)]

    def _ask(self, words: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of the different words side by side, and for each word where in them its own begin and how many they
        are."""
        numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
        found = self._ids_of([word.decode() for word in numbers])
        count = np.array([len(own) // 4 for own in found], np.int32)
        which = [numbers[word] for word in words]
        return np.frombuffer(b"".join(found), np.int32), (np.cumsum(count) - count)[which], count[which]


def _cut(texts: list[str]) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(content, begin and length of each word in it, number of the last word of each text, numbers of empty texts).

    A word ends at the first space of several; the others belong to the next word: "a  b" -> "a" " b". A space that
    begins a text belongs to its first word, as if there were one before it. An empty text is an empty word here.
    """
    content = " ".join(["", *texts, "\0" * LONG]).encode()  # so that LONG bytes can be read from the begin of each word
    sizes = np.fromiter(map(len, texts if content.isascii() else [text.encode() for text in texts]), np.intp)
    ends = np.cumsum(np.append(0, sizes + 1))  # the space before each text, and behind all
    space = np.frombuffer(content, np.uint8)[:ends[-1] + 1] == ord(" ")
    cut = space.copy()
    cut[1:] &= ~space[:-1]
    cut[ends] = True
    cuts = np.flatnonzero(cut)
    last = np.searchsorted(cuts, ends[1:]) - 1
    return content, cuts[:-1] + 1, np.diff(cuts) - 1, last, last[sizes == 0]


def _keys(content: bytes, begin: np.ndarray, length: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The parts of each word's key (its bytes, zeros behind its end, its length in the last byte), and its slot."""
    read = np.ndarray(len(content) - LONG + 1, f"V{LONG}", content, strides=(1,))[begin].view("<u8").reshape(-1, WIDTH)
    size = np.minimum(length, LONG)
    key = [read[:, i] & own.take(size) for i, own in enumerate(_OWN)]
    key[-1] |= _LAST.take(size)
    mixed = np.bitwise_xor.reduce([part * odd for part, odd in zip(key, MIX)])
    return key, (mixed >> np.uint64(64 - SLOT_BITS)).astype(np.intp)
