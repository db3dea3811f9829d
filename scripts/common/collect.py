"""Rows -> the file of a data set, written as they come, without exact duplicates; own logs are filtered, redacted and
cut into windows before.

No text stays in memory, only 16 bytes of each row's hash. Counts of logs are of assistant messages: those of the logs
are those trained in exactly one line and those dropped, by reason.
"""
from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from common.faults import UserError
from common.logs import Conversation, Filters, LogReader
from common.redact import redact_all
from common.rows import Row, row_to_json
from common.windows import cut

if TYPE_CHECKING:
    from common.chat import Chat


class Aside:
    """Files written aside and moved into place together, the last one last: whoever sees it sees complete files.

    As a context; what is not published when it ends is removed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
            Path(file.name).unlink(missing_ok=True)

    def open(self, name: str) -> BinaryIO:
        """A new file, to be written and read. Raises UserError if the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[name] = (self.folder / f".{name}.{os.uname().nodename}.{os.getpid()}.tmp").open("w+b")
        except (FileExistsError, NotADirectoryError, PermissionError) as fault:
            raise UserError(f"--output_dir {self.folder}: {fault.strerror}. Name a directory that can be written."
                            ) from None
        return self._files[name]

    def publish(self) -> None:
        """Move all files into place."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        (self.folder / list(self._files)[-1]).unlink(missing_ok=True)
        for name, file in self._files.items():
            os.replace(file.name, self.folder / name)
        directory = os.open(self.folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


class Digests:
    """A set of hashes at 16 bytes each (Python's own takes 100): 14 of them behind each other, by the first two."""

    def __init__(self) -> None:
        self._rests = [bytearray() for _ in range(1 << 16)]

    def add(self, content: bytes) -> bool:
        """Add the hash of the content; False if it was there. By chance alone: never in 10**13 rows."""
        digest = hashlib.sha256(content).digest()
        rests, rest = self._rests[int.from_bytes(digest[:2])], digest[2:16]
        if rest in rests:
            return False
        rests += rest
        return True


@dataclass
class Collected:
    """Rows of a data set, in a file aside from the first one on, and what was counted.

    units: what each row counts for (rows: 1; logs: trained answers). groups: the number of each row's conversation.
    """

    aside: Aside
    name: str  # of the file
    file: BinaryIO | None = None
    units: array = field(default_factory=lambda: array("I"))
    groups: array = field(default_factory=lambda: array("I"))
    rows_in: int = 0
    n_bad: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    hashes: dict[str, str] = field(default_factory=dict)
    more: dict = field(default_factory=dict)  # further keys of the manifest
    seen: Digests = field(default_factory=Digests)

    def add(self, out: dict, units: int = 1, group: int = 0) -> None:
        """Add a row, unless an equal one is there: two that differ in their id alone teach the same."""
        row_id = {"id": out.pop("id")} if "id" in out else {}
        content = json.dumps(out, ensure_ascii=False).encode()
        if not self.seen.add(content):
            self.dropped["exact duplicate"] += units
            return
        if self.file is None:
            self.file = self.aside.open(self.name)
        self.file.write((json.dumps(out | row_id, ensure_ascii=False).encode() if row_id else content) + b"\n")
        self.units.append(units)
        self.groups.append(group)

    def choose(self, n: int, seed: int) -> None:
        """Leave n rows, by a hash of seed and line, in their order: the same seed chooses the same rows again."""
        if len(self.units) <= n:
            return
        import numpy as np

        salt, keys = f"{seed}:".encode(), bytearray()
        self.file.seek(0)
        for line in self.file:
            keys += hashlib.sha256(salt + line).digest()[:16]
        numbers = np.frombuffer(keys, "S16")
        chosen = (numbers <= np.sort(numbers)[n - 1]).tolist()
        with open(self.file.name, "rb") as rows:  # what is written never overtakes what is read
            self.file.seek(0)
            self.file.writelines(compress(rows, chosen))
        self.file.truncate()
        before, self.units = sum(self.units), array("I", compress(self.units, chosen))
        self.groups = array("I", compress(self.groups, chosen))
        self.dropped["not chosen by --max_samples"] += before - sum(self.units)


def collect_logs(result: Collected, reader: LogReader, source: str, filters: Filters, *, redact: bool,
                 chat: Chat | None, size: int | None) -> None:
    """Add all conversations; with `chat`, cut them into windows of at most `size` tokens. Raises UserError."""
    places, n_talks = [], 0
    for talk in reader:
        n_talks += 1
        result.rows_in += talk.answers()
        reason = filters.reason(talk)
        if reason:
            result.dropped[reason] += talk.answers()
            continue
        if redact:
            places += _without_secrets(talk)
        _mark(talk, result.dropped)
        prompt = next((m["content"] for m in talk.messages if m["role"] == "user"), None)
        parts = cut(talk.messages, talk.tools, chat, size)
        result.dropped.update(parts.dropped)
        for i, (messages, answers) in enumerate(parts.windows, 1):
            row = Row(0, messages, None, talk.tools, source, talk.id if chat is None else f"{talk.id}#{i}")
            if prompt is not None and row.first_prompt() != prompt:
                row.prompt = prompt  # so that all windows of a conversation are on one side of the split
            result.add(row_to_json(row), answers, n_talks)
    if reader.damaged:
        result.rows_in += reader.damaged
        result.dropped["in a damaged log"] += reader.damaged
    if reader.on_other_branches:
        result.rows_in += reader.on_other_branches
        result.dropped["on another branch than the open one"] += reader.on_other_branches
    result.n_bad, result.changed = reader.n_bad, reader.notes
    result.hashes = redact_all(reader.hashes, []) if redact else reader.hashes
    result.more = {"conversations_in": n_talks, "secrets": _report(places, redact)}


def _without_secrets(talk: Conversation) -> list[tuple[str, str]]:
    """Redact a conversation in place; return (place, kind) of what was found."""
    found = []
    for i, (message, place) in enumerate(zip(talk.messages, talk.places)):
        kinds: list[str] = []
        talk.messages[i] = {k: v if k == "role" else redact_all(v, kinds) for k, v in message.items()}
        found += [(place, kind) for kind in kinds]
    kinds = []
    talk.tools = redact_all(talk.tools, kinds)
    talk.id = redact_all(talk.id, kinds)
    return found + [(f"{talk.id} (tools or name)", kind) for kind in kinds]


def _mark(talk: Conversation, dropped: Counter[str]) -> None:
    """Set "train" to false on assistant messages that teach nothing, or something wrong; count them."""
    for i, message in enumerate(talk.messages):
        if message["role"] != "assistant":
            continue
        if not message["train"]:
            dropped['marked "train": false'] += 1
        elif not message["content"].strip() and not message.get("tool_calls"):
            dropped["empty answer"] += 1
        elif talk.lost_after is not None and i >= talk.lost_after:
            dropped["after an image or a file that the log lacks"] += 1
        else:
            continue
        message["train"] = False


def _report(places: list[tuple[str, str]], redact: bool) -> dict:
    """What was redacted: how many, of which kinds, and where; never what."""
    if not redact:
        return {"redacted": False}
    counted = Counter((redact_all(place, []), kind) for place, kind in places)  # names of files, too, can hold a key
    return {"redacted": True, "found": len(places), "by_kind": dict(sorted(Counter(k for _, k in places).items())),
            "places": [{"place": place, "kind": kind, "count": n} for (place, kind), n in counted.items()]}


def secrets_text(secrets: dict, shown: int = 20) -> list[str]:
    """Lines for the end of a run: how many secrets of which kind were redacted, and the first places."""
    if not secrets["redacted"]:
        return ["secrets: not looked for (--no_redact)"]
    if not secrets["found"]:
        return ["secrets: none found"]
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in secrets["by_kind"].items())
    places = secrets["places"]
    more = [f"… and {len(places) - shown:,} more places, in the manifest"] if len(places) > shown else []
    return [f"secrets redacted: {kinds}", *(f"{p['place']}: {p['count']} {p['kind']}" for p in places[:shown]), *more]
