"""Files -> tokenised data sets, memory-mapped, cached by content.

A file is read once, in blocks of half a megabyte that all cores tokenise; besides them 33 bytes an example are held.

A data set in the cache is a directory `<file stem>-<first 7 of its key>/`: flat int32 token ids, one byte a token that
says whether it is trained, offsets, the line each example came from, and a hash of its first prompt. The key covers the
file's bytes, the tokenizer, the template, the lengths and the format; `meta.json` holds it in full.
"""
from __future__ import annotations

import gc
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.chat import Chat, Encoded
from common.faults import UserError
from common.forked import forked_map
from common.ranks import is_alive
from common.records import Lines, Record
from common.rows import Counts, Row, RowReader
from common.settings import dataset_name
from common.sides import prompt_hash

FORMAT = 6  # part of the key: raise it when what is stored changes
ARRAYS = {"offsets": 1, "lines": 0, "groups": 0, "trained_counts": 0}  # entries more than examples


@dataclass(frozen=True)
class Dataset:
    """The tokenised examples of one file. N examples, T tokens in all."""

    name: str  # file stem
    path: str
    input_ids: np.ndarray  # int32 (T,)
    trained: np.ndarray  # bool (T,): the token is a target of the loss
    offsets: np.ndarray  # int64 (N + 1,)
    lines: np.ndarray  # int64 (N,): line or row number in the file
    groups: np.ndarray  # uint64 (N,): hash of the normalised first prompt
    trained_counts: np.ndarray  # int32 (N,)
    meta: dict

    def __len__(self) -> int:
        return len(self.lines)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per example, int32 (N,)."""
        return np.diff(self.offsets).astype(np.int32)

    def example(self, index: int) -> Encoded:
        part = slice(self.offsets[index], self.offsets[index + 1])
        return Encoded(np.asarray(self.input_ids[part]), np.asarray(self.trained[part]))

    def place(self, index: int) -> str:
        """file:line of an example."""
        return f"{self.path}:{self.lines[index]}"


def load_dataset(path: str | Path, chat: Chat, *, max_seq_length: int, too_long: str = "split",
                 skip_bad_rows: bool = False, role_map: dict[str, str | tuple] | None = None, cache_dir: str | Path,
                 progress: Callable[[Iterable[Part]], Iterable[Part]] = iter) -> Dataset:
    """Tokenise a file once and open it memory-mapped; a cached copy is used only if its key is equal. A build that was
    killed leaves nothing that is used. progress: is given the Parts and passes each on.

    Raise UserError for bad rows (all counted, the first ones shown) and when no row with a trained token is left.
    """
    path, cache_dir, stem = Path(path), Path(cache_dir), dataset_name(str(path))
    key = {"name": path.name, "chat": chat.fingerprint(), "max_seq_length": max_seq_length, "too_long": too_long,
           "skip_bad_rows": skip_bad_rows, "role_map": role_map or {}, "format": FORMAT}

    def place_of(sha256: str) -> tuple[Path, str]:
        digest = hashlib.sha256(json.dumps(key | {"file": sha256}, sort_keys=True).encode()).hexdigest()
        return cache_dir / f"{stem}-{digest[:7]}", digest

    with _opened(path) as file:
        if any(cache_dir.glob(f"{glob.escape(stem)}-*")):  # else there is nothing to find: tens of GB are read once
            place, digest = place_of(hashlib.file_digest(file, "sha256").hexdigest())
            if _is_whole(place, digest):
                return _open(place, stem, str(path))
    here = _works_of(stem)
    work = cache_dir / f"{here}.{secrets.token_hex(4)}.{os.getpid()}"
    for left in cache_dir.glob(f"{glob.escape(here)}.*"):  # of builds that were killed, on this machine
        if left.suffix == work.suffix or not is_alive(int(left.suffix[1:])):  # in a container numbers are given anew
            shutil.rmtree(left, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        before, reader = os.stat(path), RowReader(path, skip_bad_rows=skip_bad_rows, role_map=role_map)
        meta = _tokenise(reader, chat, max_seq_length, too_long, work, progress)
        after = os.stat(path)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise UserError(f"{path}: the file changed while it was read. Start again when it is complete.")
        place, digest = place_of(reader.sha256)
        meta |= {"sha256": digest, "key": key | {"file": reader.sha256}, "file": str(path),
                 "settings": _described(chat)}
        (work / "chat_template.jinja").write_text(chat.template, encoding="utf-8")
        (work / "meta.json").write_text(json.dumps(meta, indent=1))
        _replace(work, place, digest)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _open(place, stem, str(path))


def _works_of(stem: str) -> str:
    """How the directories begin in which this machine builds."""
    return f".{stem}.{re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())}"


def _described(chat: Chat) -> dict:
    """What the key holds as a hash, in words, so that a person can see what made a directory of the cache."""
    return {"tokenizer": chat.tokenizer.name_or_path, "prompt_template": chat.template_name,
            "assistant_turns": chat.assistant_turns, "train_on_prompt": chat.train_on_prompt,
            "added_tokens": chat.added_tokens}


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory. Name the files in it.") from None
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}. Make it with scripts/prepare_sft_datasets.py, "
                        "or check the path.") from None


def _replace(work: Path, place: Path, digest: str) -> None:
    """Move a finished directory to its place. Another process may have been faster with the same content, and have it
    open."""
    if _is_whole(place, digest):
        return
    shutil.rmtree(place, ignore_errors=True)
    try:
        os.replace(work, place)
    except OSError:
        if not _is_whole(place, digest):
            raise


def _meta(place: Path) -> dict:
    try:
        return json.loads((place / "meta.json").read_text())
    except (OSError, ValueError):
        return {}


def _is_whole(place: Path, digest: str) -> bool:
    """Whether the cached data set has this key and files of the right size (a power cut can empty a renamed file)."""
    meta = _meta(place)
    if meta.get("sha256") != digest:
        return False
    examples, tokens = meta["examples"], meta["tokens"]
    try:
        flat = all((place / f"{name}.bin").stat().st_size == tokens * size
                   for name, size in (("input_ids", 4), ("trained", 1)))
        return flat and all(len(np.load(place / f"{name}.npy", mmap_mode="r")) == examples + extra
                            for name, extra in ARRAYS.items())
    except (OSError, ValueError):
        return False


def _open(place: Path, name: str, path: str) -> Dataset:
    arrays = {x: np.load(place / f"{x}.npy", mmap_mode="r") for x in ARRAYS}
    return Dataset(name, path, np.memmap(place / "input_ids.bin", np.int32, "r"),
                   np.memmap(place / "trained.bin", np.bool_, "r"), **arrays,
                   meta=_meta(place) | {"file": path})  # another's file with the same bytes may have filled the cache


@dataclass
class Part:
    """The examples of one block of a file, in the order of its rows. distinct: a hash of the ids of each row, which is
    the same in this process and those forked from it."""

    input_ids: np.ndarray  # int32 (tokens,)
    trained: np.ndarray  # bool (tokens,)
    rows: Counts
    lengths: array = field(default_factory=lambda: array("i"))
    lines: array = field(default_factory=lambda: array("q"))
    trained_counts: array = field(default_factory=lambda: array("i"))
    groups: array = field(default_factory=lambda: array("Q"))
    distinct: array = field(default_factory=lambda: array("q"))
    fitted: Counter[str] = field(default_factory=Counter)  # see fit
    apart: int = 0  # answers encoded apart


class Parts:
    """Iterate over the parts of a file, tokenised on all cores. position, size: bytes of the file read, and in all."""

    def __init__(self, reader: RowReader, chat: Chat, max_seq_length: int, too_long: str):
        self.reader, self.chat, self.max_seq_length, self.too_long = reader, chat, max_seq_length, too_long
        self.path, self.size = reader.path, os.path.getsize(reader.path)

    @property
    def position(self) -> int:
        return self.reader.position

    def __iter__(self) -> Iterator[Part]:
        blocks = self.reader.blocks()
        for block in blocks:
            yield self.part(block)
            if self.reader.form:  # the same for all rows from now on
                break
        yield from forked_map(self.part, blocks)

    def part(self, block: Lines | list[Record]) -> Part:
        """Decode, render, encode and fit the rows of a block."""
        collects, apart = gc.isenabled(), self.chat.encoded_apart
        gc.disable()  # rows are many small objects without cycles: a fifth of the time would go into looking for some
        try:
            rows = list(self.reader.rows_of(block))
            self.chat.left_out.clear()
            try:
                coded = list(zip(rows, self.chat.encode_rows(rows)))
            except UserError:
                self.chat.encoded_apart = apart
                self.chat.left_out.clear()
                coded = self._good_ones(rows)
            examples: list[Encoded] = []
            part = Part(np.empty(0, np.int32), np.empty(0, np.bool_), self.reader.take())
            part.rows.notes.update(self.chat.left_out)
            for row, encoded in coded:
                found = fit(row, encoded, self.chat, self.max_seq_length, self.too_long, part.fitted)
                if found:
                    examples += found
                    part.distinct.append(hash(encoded.input_ids.tobytes()))
                    part.lines.extend([row.line] * len(found))
                    part.groups.extend([prompt_hash(row.first_prompt())] * len(found))
            if examples:
                part.lengths.extend(len(example.input_ids) for example in examples)
                part.input_ids = np.concatenate([example.input_ids for example in examples])
                part.trained = np.concatenate([example.trained for example in examples])
                starts = np.cumsum(part.lengths) - part.lengths
                part.trained_counts.frombytes(np.add.reduceat(part.trained, starts, dtype=np.int32).tobytes())
            part.apart = self.chat.encoded_apart - apart
            return part
        finally:
            if collects:
                gc.enable()

    def _good_ones(self, rows: list[Row]) -> list[tuple[Row, Encoded]]:
        """Rows one by one; those that the template or the tokenizer cannot follow are bad rows."""
        good = []
        for row in rows:
            try:
                good.append((row, self.chat.encode_rows([row])[0]))
            except UserError as fault:
                self.reader.refuse(row, str(fault))
        return good


def _tokenise(reader: RowReader, chat: Chat, max_seq_length: int, too_long: str, place: Path,
              progress: Callable[[Iterable[Part]], Iterable[Part]]) -> dict:
    """Read, encode, fit to length and write the arrays of one data set; return the counts for meta.json."""
    started = time.perf_counter()
    rows, whole = Counts(), Part(np.empty(0, np.int32), np.empty(0, np.bool_), Counts())
    tokens = 0
    with open(place / "input_ids.bin", "wb") as ids_file, open(place / "trained.bin", "wb") as trained_file:
        for part in progress(Parts(reader, chat, max_seq_length, too_long)):
            ids_file.write(part.input_ids.data)
            trained_file.write(part.trained.data)
            tokens += len(part.input_ids)
            rows.add(part.rows)
            for name in ("lengths", "lines", "trained_counts", "groups", "distinct"):
                getattr(whole, name).extend(getattr(part, name))
            whole.fitted.update(part.fitted)
            whole.apart += part.apart
    reader.add(rows)
    reader.finish()
    dropped, counts = Counter(rows.dropped), whole.fitted
    dropped.update({k.removeprefix("dropped: "): n for k, n in counts.items() if k.startswith("dropped: ")})
    if not whole.lengths:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()) or "the file has no rows"
        raise UserError(f"{reader.path}: no row with anything to train on is left ({reasons}). "
                        "Give rows with answers, or a larger --max_seq_length.")
    lengths, lines, trained_counts, groups, distinct = (
        np.frombuffer(getattr(whole, name), dtype) for name, dtype in (
            ("lengths", np.int32), ("lines", np.int64), ("trained_counts", np.int32), ("groups", np.uint64),
            ("distinct", np.int64)))
    np.save(place / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    np.save(place / "lines.npy", lines)
    np.save(place / "groups.npy", groups)
    np.save(place / "trained_counts.npy", trained_counts)
    distinct.sort()
    seconds = time.perf_counter() - started
    return {"rows_in": rows.rows_in, "rows_bad": rows.n_bad, "rows_kept": _runs(lines),
            "rows_distinct": _runs(distinct), "examples": len(lengths), "tokens": tokens,
            "trained_tokens": int(trained_counts.sum(dtype=np.int64)), "dropped": dict(dropped),
            "rows_split": counts["rows split"], "rows_cut": counts["rows cut"],
            "answers_dropped": counts["answers dropped"], "encoded_apart": whole.apart, "form": reader.form,
            "notes": dict(rows.notes), "unread": dict(rows.unread),
            "seconds": round(seconds, 2), "rows_per_second": round(rows.rows_in / seconds)}


def _runs(values: np.ndarray) -> int:
    """Stretches of equal values: 1 1 2 5 5 -> 3; of sorted ones the number of different values."""
    return 1 + int(np.count_nonzero(values[1:] != values[:-1]))


def fit(row: Row, encoded: Encoded, chat: Chat, max_seq_length: int, too_long: str, counts: Counter) -> list[Encoded]:
    """Make a row fit: [] (dropped, counted), one example, or several windows of at most max_seq_length tokens.

    counts: "dropped: <reason>" rows, "rows cut", "rows split", "answers dropped" (too long, of rows that are split).
    """
    if not np.count_nonzero(encoded.trained):  # a third of the time of any()
        counts["dropped: no trained token"] += 1
        return []
    if len(encoded.input_ids) <= max_seq_length:
        return [encoded]
    if too_long == "drop":
        counts["dropped: too long"] += 1
        return []
    if too_long == "cut":
        cut = Encoded(encoded.input_ids[:max_seq_length], encoded.trained[:max_seq_length])
        if not cut.trained.any():
            counts["dropped: too long, the cut left no answer"] += 1
            return []
        counts["rows cut"] += 1
        return [cut]
    if row.messages is None:
        windows, lost = _text_windows(encoded, max_seq_length), 0
    else:
        windows, lost = _message_windows(row, chat, max_seq_length)
    counts["rows split"] += bool(windows)
    counts["answers dropped" if windows else "dropped: a single turn too long"] += lost if windows else 1
    return windows


def _text_windows(encoded: Encoded, size: int) -> list[Encoded]:
    """Windows that overlap by one token, so that each token but the very first is predicted exactly once.

    a b c d e, size 3 -> [a b c] [c d e], trained 0 1 1 and 0 1 1.
    """
    windows = []
    for start in range(0, len(encoded.input_ids) - 1, size - 1):
        trained = encoded.trained[start:start + size].copy()
        trained[0] = False
        windows.append(Encoded(encoded.input_ids[start:start + size], trained))
    return windows


def _message_windows(row: Row, chat: Chat, size: int) -> tuple[list[Encoded], int]:
    """Cut a conversation after answers; the leading system turns go into every window, each answer is trained once.

    Returns the windows and the number of answers lost because they do not fit with the turn that asks for them.
    Turns A to D, two of them fit -> [A B] [C D]; if only D is trained -> [C D]; if B is too long -> [A] [C D].
    """
    messages = row.messages
    if chat.assistant_turns == "last":  # the windows must not each train their own last answer
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        messages = [{**m, "train": m.get("train", True) and i == last} for i, m in enumerate(messages)]
    lead = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    system, exchanges = messages[:lead], _exchanges(messages[lead:])
    if len(exchanges) == 1 and messages[-1]["role"] == "assistant":  # the row itself, which is too long
        return [], 1

    def encode(parts: list[list[dict]]) -> Encoded | None:
        """A window, or None if it is too long or the template refuses it (as many do one that begins with a tool's)."""
        window = Row(row.line, system + [m for part in parts for m in part], None, row.tools, row.source, row.id)
        try:
            encoded = chat.encode_rows([window])[0]
        except UserError:
            return None
        return encoded if len(encoded.input_ids) <= size else None

    windows: list[Encoded] = []
    current: list[list[dict]] = []
    best: Encoded | None = None  # `current`, encoded
    lost = 0
    for exchange in exchanges:
        attempt = encode([*current, exchange])
        if attempt is None and best is not None and best.trained.any():
            windows.append(best)
            current = []
            attempt = encode([exchange])
        while attempt is None and current:  # only context so far: keep the latest of it
            current = current[1:]
            attempt = encode([*current, exchange])
        if attempt is None:
            lost += any(m.get("train", True) for m in exchange if m["role"] == "assistant")
            current, best = [], None
        else:
            current, best = [*current, exchange], attempt
    if best is not None and best.trained.any():
        windows.append(best)
    return windows, lost


def _exchanges(messages: list[dict]) -> list[list[dict]]:
    """user assistant tool assistant user -> [user assistant] [tool assistant]; what follows the last answer is left."""
    exchanges, start = [], 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            exchanges.append(messages[start:i + 1])
            start = i + 1
    return exchanges
