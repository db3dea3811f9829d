"""Seeded orders, quotas, endless streams of examples, packing: what the plan is made of. numpy only.

Orders come from sorting the raw output of PCG64. numpy promises never to change that output, but makes no such promise
for `Generator.permutation`, and a run resumed under another numpy must see the same order.
"""
from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

CHOICE = 5  # a purpose, as those of plan.py


def shuffled(n: int, *seed: int) -> np.ndarray:
    """A random order of range(n), int64 (n,), the same for the same seed on every machine and numpy.

    Each number is put below random high bits and the whole is sorted. Equal high bits (of two numbers of 10 million:
    chance 2^-40) leave the two in order.
    """
    bits = max(n - 1, 1).bit_length()
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)
    keys >>= np.uint64(bits)
    return _sorted_positions(keys, bits)


def some_of(n: int, limit: int, seed: int) -> np.ndarray:
    """A seeded choice of at most `limit` of range(n), ascending."""
    return np.sort(shuffled(n, seed, CHOICE)[:limit])


def stable_order(values: np.ndarray) -> np.ndarray:
    """argsort(kind="stable") of non-negative integers below 2^32, int64 (n,); for 10 million 0.4 to 0.9 s, not 2."""
    if values.max(initial=0) < 1 << 16:
        return np.argsort(values.astype(np.uint16), kind="stable")  # radix sort, which numpy has for 16 bits only
    return _sorted_positions(values.astype(np.uint64), max(len(values) - 1, 1).bit_length())


def _sorted_positions(keys: np.ndarray, bits: int) -> np.ndarray:
    """Positions in the order of `keys` (uint64, overwritten), of equal keys the first first. bits: of a position."""
    keys <<= np.uint64(bits)
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    keys &= np.uint64((1 << bits) - 1)
    return keys.view(np.int64)


def largest_remainder(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that add up to `total`, each within 1 of its share of it (Hamilton's method; ties to the first).

    shares 1/2 1/3 1/6 of 10 -> 5 3.33 1.67 -> 5 3 2
    """
    parts = [share * total / sum(shares) for share in shares]
    quotas = [int(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: quotas[i] - parts[i])
    for i in by_remainder[:total - sum(quotas)]:
        quotas[i] += 1
    return quotas


def exact(x: float) -> Fraction:
    """The decimal number the user wrote: 0.1 is 1/10, so that no rounding error decides a tie."""
    return Fraction(str(float(x)))


class Stream:
    """The examples of one source, endlessly: pass after pass, each in its own seeded order.

    What was taken does not come back before the pass is used up. members: (M,) ascending numbers of examples.
    """

    def __init__(self, members: np.ndarray, *seed: int):
        self.members, self.seed, self.passes = members, seed, 0
        self.rest = members[:0]  # what is still to come of the passes begun

    def _next_pass(self) -> np.ndarray:
        self.passes += 1
        return self.members[shuffled(len(self.members), *self.seed, self.passes - 1)]

    def take(self, n: int) -> np.ndarray:
        """The next n entries."""
        parts = []
        while len(self.rest) < n:
            parts.append(self.rest)
            n -= len(self.rest)
            self.rest = self._next_pass()
        parts.append(self.rest[:n])
        self.rest = self.rest[n:]
        return np.concatenate(parts)

    def take_distinct(self, n: int) -> np.ndarray:
        """The next n different examples; an entry that is passed over keeps its place."""
        assert n <= len(self.members)
        if len(self.rest) == 0:
            return self.take(n)
        while len(first := np.unique(self.rest, return_index=True)[1]) < n:
            self.rest = np.concatenate([self.rest, self._next_pass()])
        chosen = np.sort(first)[:n]
        taken, self.rest = self.rest[chosen], np.delete(self.rest, chosen)
        return taken

    def take_units(self, quota: Fraction, units: np.ndarray) -> np.ndarray:
        """The next entries whose units (tokens) add up to the quota, to the nearest example. units: of all examples."""
        parts, left = [self.members[:0]], float(quota)
        while True:
            if len(self.rest) == 0:
                self.rest = self._next_pass()
            reached = np.cumsum(units[self.rest], dtype=np.int64)
            if reached[-1] > left:
                n = int(np.searchsorted(reached, left, side="right"))
                before = int(reached[n - 1]) if n else 0
                parts.append(self.take(n + (reached[n] - left < left - before)))
                return np.concatenate(parts)
            left -= int(reached[-1])
            parts.append(self.take(len(self.rest)))

    def give_back(self, entries: np.ndarray) -> None:
        """Of `entries`, those of this source come first again."""
        if len(self.members):
            mine = entries[(entries >= self.members[0]) & (entries <= self.members[-1])]
            self.rest = np.concatenate([mine, self.rest])


def pack(lengths: np.ndarray, max_seq_length: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: (row of each example int32 (n,), number of rows). lengths: (n,) 1 to max_seq_length tokens.

    The longest example first, into the row with the least space that still holds it, else into a new row; of equal rows
    the one that has had this space for longest.  lengths 5 3 2 2, max 7 -> 0 1 0 1: rows [5 2] [3 2]
    All examples of one length are placed together, over rows grouped by their space: a row with space r takes
    r // length of them in succession, because after each it is the tightest row that still fits.
    """
    n_of_length = np.bincount(lengths, minlength=1)
    longest_first = stable_order(max_seq_length - lengths)
    row_of = np.empty(len(lengths), np.int32)
    n_rows = done = 0
    spaces: list[int] = []  # sorted; the keys of `waiting`
    waiting: dict[int, list[np.ndarray]] = {}  # space -> rows with this space, in order of arrival

    def put(rows: np.ndarray, space: int) -> None:
        if len(rows) and space:
            if space not in waiting:
                insort(spaces, space)
            waiting.setdefault(space, []).append(rows)

    for length in map(int, np.flatnonzero(n_of_length)[::-1]):
        end = done + int(n_of_length[length])
        while done < end:
            tightest = bisect_left(spaces, length)
            if tightest < len(spaces):
                space = spaces.pop(tightest)
                chunks = waiting.pop(space)
                rows = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
            else:
                space = max_seq_length
                rows = np.arange(n_rows, n_rows + -(-(end - done) // (space // length)), dtype=np.int32)
                n_rows += len(rows)
            each = space // length
            used = min(len(rows), -(-(end - done) // each))
            placed = min(end - done, used * each)
            row_of[longest_first[done:done + placed]] = np.repeat(rows[:used], each)[:placed]
            done += placed
            in_last = placed - (used - 1) * each
            put(rows[used:], space)
            put(rows[:used - 1], space - each * length)
            put(rows[used - 1:used], space - in_last * length)
    return row_of, n_rows
