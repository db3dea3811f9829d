"""The ids of many texts in one array, from which rows are put together without an array for each part of each row."""
from __future__ import annotations

import numpy as np


def gather(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Stretches of values, one after the other: a b c d e, starts 3 0, lengths 2 1 -> d e a."""
    ends = np.cumsum(lengths)
    return values[np.repeat(starts - ends + lengths, lengths) + np.arange(lengths.sum())]


class Pool:
    """The ids of many texts in one array. where: text or control id -> from, to."""

    def __init__(self, keys: list[str | int], arrays: list[np.ndarray]):
        self._arrays = [np.concatenate(arrays)]
        self._content = self._arrays[0].tobytes()
        ends = np.cumsum([*map(len, arrays)]).tolist()
        self.where = dict(zip(keys, zip([0, *ends], ends)))
        self._end = ends[-1]

    def parts(self, texts: list[str]) -> list[tuple[int, int]]:
        """Where the parts of a run are, if the ids of what precedes each of them begin the ids of the whole, else [].

        texts: as from _boundary_texts.
        """
        start, end = whole = self.where[texts[0]]
        if len(texts) == 1:
            return [whole]
        content, cuts = self._content[4 * start:4 * end], [start]
        for text in texts[1:]:
            a, b = self.where[text]
            if not content.startswith(self._content[4 * a:4 * b]):
                return []
            cuts.append(start + b - a)
        return [*zip(cuts, [*cuts[1:], end])]

    def add(self, ids: np.ndarray) -> tuple[int, int]:
        self._arrays.append(ids)
        self._end += len(ids)
        return self._end - len(ids), self._end

    def ids(self) -> np.ndarray:
        return np.concatenate(self._arrays)
