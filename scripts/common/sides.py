"""Which examples are trained on, which are held out: by a hash of the prompt."""
from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.faults import UserError
from common.rows import RowReader, row_to_json

if TYPE_CHECKING:
    from common.data import Dataset

OTHER_SPACE = "".join(c for c in map(chr, range(128)) if c.isspace() and c != " ")  # of ASCII


def prompt_hash(prompt: str) -> int:
    """First 64 bits of sha256 of the normalised prompt (NFKC, case folded, runs of white space as one space)."""
    if prompt.isascii() and "  " not in prompt and not any(map(prompt.__contains__, OTHER_SPACE)):  # in half the time
        normal = prompt.strip(" ").lower()
    else:
        normal = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return int.from_bytes(hashlib.sha256(normal.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@dataclass
class Split:
    """Example indices of each data set on each side, and what had to be said about it."""

    train: list[np.ndarray]
    val: list[np.ndarray]
    test: list[np.ndarray]
    notes: list[str]


def split(datasets: list[Dataset], val_ratio: float, test_ratio: float, val_from: list[str] | None = None,
          val_groups: np.ndarray | None = None) -> Split:
    """Split by the hash of the first prompt alone: the same prompt is on one side, in all data sets and for ever.

    A hash below val_ratio (of the whole range) is validation, the next test_ratio is test, the rest is training.
    val_from: only these data sets give validation rows; the same prompts elsewhere are left out of training.
    val_groups: hashes of prompts in validation files of the user's own; they are left out of training too.
    A side that would be empty takes the prompt with the lowest hash.
    """
    notes: list[str] = []
    sources = [d for d in datasets if not val_from or d.name in val_from]
    own = np.unique(np.concatenate([d.groups for d in sources]))
    everything = np.unique(np.concatenate([d.groups for d in datasets]))
    share = own.astype(np.float64) / 2.0**64
    val, test = own[share < val_ratio], everything[:0]
    if val_ratio > 0 and val.size == 0:
        val = own[:1]
        notes.append(f"validation ratio {val_ratio:g} of {own.size} prompts is none: took the one with the lowest hash")
    if test_ratio > 0:
        share = everything.astype(np.float64) / 2.0**64
        test = np.setdiff1d(everything[(share >= val_ratio) & (share < val_ratio + test_ratio)], val)
        if test.size == 0:
            test = np.setdiff1d(everything, val)[:1]
            notes.append(f"test ratio {test_ratio:g} of {everything.size} prompts is none: took the one with the "
                         "lowest hash")
    held_out = np.union1d(val, test) if val_groups is None else np.union1d(np.union1d(val, test), val_groups)
    result = Split([], [], [], notes)
    for d in datasets:
        in_val = np.isin(d.groups, val) if d in sources else np.zeros(len(d), bool)
        in_test = np.isin(d.groups, test)
        out = np.isin(d.groups, held_out)
        left_out = int((out & ~in_val & ~in_test).sum())
        if left_out:
            notes.append(f"{d.name}: {left_out:,} examples left out of training, their prompts are held out elsewhere")
        result.train.append(np.flatnonzero(~out))
        result.val.append(np.flatnonzero(in_val))
        result.test.append(np.flatnonzero(in_test))
    if not any(len(x) for x in result.train):
        raise UserError(f"{', '.join(d.path for d in datasets)}: all {everything.size} distinct prompts are held out, "
                        "nothing is left to train on. Give more rows, or --val_split_ratio 0.")
    return result


def held_out_rows(datasets: list[Dataset], sides: list[np.ndarray], skip_bad_rows: bool = False,
                  role_map: dict[str, str | tuple] | None = None) -> Iterator[dict]:
    """The rows of one side as they go into val.jsonl or test.jsonl: messages, with the data set's name as source."""
    for dataset, side in zip(datasets, sides):
        wanted = set(dataset.lines[side].tolist())
        if wanted:
            for row in RowReader(dataset.path, skip_bad_rows=skip_bad_rows, role_map=role_map):
                if row.line in wanted:
                    yield {**row_to_json(row), "source": dataset.name, "line": row.line}
