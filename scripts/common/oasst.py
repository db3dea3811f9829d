"""Message trees (OASST) -> rows: one for each reply worth learning, with the conversation that leads to it.

    root: prompter "Hi"                       context:  Hi -> Hello                     (Hello trained)
      ├ assistant "Hello"  rank 0                       Hi -> Hello -> And you? -> Fine (Fine trained, Hello context)
      │   └ prompter "And you?"                         Hi -> Hey                       (Hey trained)
      │       └ assistant "Fine"              pairs:    Hi -> Hello · And you? -> Fine · Hi -> Hey
      └ assistant "Hey"    rank 1

The three published forms (flat messages, nested trees, parquet) give the same rows in the same order.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.records import SHOWN, Bad, RecordReader, bad_rows, kind_of
from common.rows import Row

KEYS = {"message_id": str, "text": str, "role": str, "lang": str}
NULLABLE = {"parent_id": str, "deleted": bool, "review_result": bool, "rank": int}
COLUMNS = {*KEYS, *NULLABLE}


@dataclass(slots=True)
class Message:
    """One message of a tree. rank: 0 is the best of its siblings, None where nobody ranked them."""

    line: int
    id: str
    parent: str | None
    text: str
    role: str
    lang: str
    deleted: bool
    passed: bool | None
    rank: int | None


class TreeReader:
    """Iterate over rows made from one file of messages or trees; afterwards the counts stand as in RowReader.

    rows_in counts candidate replies, that is assistant messages. form: "context" (the whole conversation, earlier
    answers not trained) or "pairs" (parent and reply).
    """

    def __init__(self, path: str | Path, *, form: str = "context", lang: str = "en", reviewed: bool = True,
                 top_k: int | None = None, skip_bad_rows: bool = False):
        self.path, self.form, self.lang, self.reviewed, self.top_k = Path(path), form, lang, reviewed, top_k
        self.skip_bad_rows = skip_bad_rows
        self.bad: list[str] = []
        self.n_bad = self.rows_in = self.rows_kept = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.sha256: str | None = None

    def __iter__(self) -> Iterator[Row]:
        messages = self._read()
        children: dict[str | None, list[Message]] = {}
        for message in messages.values():
            children.setdefault(message.parent, []).append(message)
        for siblings in children.values():
            siblings.sort(key=lambda m: (m.rank is None, m.rank or 0, m.id))  # best first, unranked last
        self.rows_in = sum(m.role == "assistant" for m in messages.values())
        reached = 0
        roots = [m for m in messages.values() if m.parent is None]  # in the order of the file
        for root in roots:
            stack = [[root]]
            while stack:
                path = stack.pop()
                replies = children.get(path[-1].id, [])
                stack.extend([*path, reply] for reply in reversed(replies))
                if path[-1].role == "assistant":
                    reached += 1
                    reason = self._reason(path, children)
                    if reason:
                        self.dropped[reason] += 1
                    else:
                        self.rows_kept += 1
                        yield self._row(path)
        if self.rows_in > reached:
            self.dropped["the conversation before it is missing"] += self.rows_in - reached

    def _row(self, path: list[Message]) -> Row:
        turns = path[-2:] if self.form == "pairs" else path
        messages = [{"role": "user", "content": m.text} if m.role == "prompter" else
                    {"role": "assistant", "content": m.text, "train": m is path[-1]} for m in turns]
        return Row(path[-1].line, messages, id=path[-1].id)

    def _reason(self, path: list[Message], children: dict) -> str | None:
        """Why the reply at the end of the path is left out, or None."""
        reason = self._own_reason(path[-1])
        if reason:
            return reason
        if len(path) < 2 or path[-2].role != "prompter":
            return "not a reply to a prompt"
        before = path[-2:-1] if self.form == "pairs" else path[:-1]
        for message in before:
            if message.lang != self.lang:
                return "another language before it"
            if message.deleted:
                return "a deleted message before it"
            if self.reviewed and message.passed is False:
                return "a rejected message before it"
        if self.top_k is not None:
            good = [m for m in children[path[-1].parent] if m.role == "assistant" and not self._own_reason(m)]
            if good.index(path[-1]) >= self.top_k:
                return f"not among the best {self.top_k}"
        return None

    def _own_reason(self, message: Message) -> str | None:
        if message.lang != self.lang:
            return "another language"
        if message.deleted:
            return "deleted"
        if self.reviewed and not message.passed:
            return "rejected in review" if message.passed is False else "not reviewed"
        return None if message.text.strip() else "empty answer"

    def _read(self) -> dict[str, Message]:
        """All messages by id, in the order of the file (a tree: parents first)."""
        messages: dict[str, Message] = {}
        records = RecordReader(self.path, columns=COLUMNS)
        n_records = 0
        for number, line, record in records:
            n_records += 1
            try:
                if isinstance(record, Bad):
                    raise record
                found: dict[str, Message] = {}
                for message in self._flat(record, number):
                    if message.id in messages or message.id in found:
                        raise Bad(f"the message_id {message.id} is there twice. Keep one of the messages.")
                    found[message.id] = message
                messages |= found
            except Bad as fault:
                self.n_bad += 1
                if self.n_bad <= SHOWN:
                    self.bad.append(f"{self.path}:{line}: {fault}")
        self.sha256 = records.sha256
        if self.n_bad and (not self.skip_bad_rows or not messages):
            raise bad_rows(self.path, self.bad, self.n_bad, n_records)
        return messages

    def _flat(self, record: dict, line: int) -> Iterator[Message]:
        """The one message of a record, or all messages of a tree."""
        stack = [(record.get("prompt"), None)] if "message_tree_id" in record and "prompt" in record else \
            [(record, record.get("parent_id"))]
        nested = stack[0][0] is not record
        while stack:
            value, parent = stack.pop()
            if not isinstance(value, dict):
                raise Bad(f"a message of the tree is {kind_of(value)} instead of an object. Fetch the file again.")
            for key, kind in KEYS.items():
                if not isinstance(value.get(key), kind):
                    finding = f"is {kind_of(value[key])}" if key in value else f"is missing (keys: {', '.join(value)})"
                    raise Bad(f'"{key}" {finding}. A message needs {", ".join(KEYS)}.')
            for key, kind in NULLABLE.items():
                if value.get(key) is not None and type(value[key]) is not kind:
                    raise Bad(f'"{key}" is {kind_of(value[key])}. It has to be '
                              f'{ {str: "a text", bool: "true or false", int: "a whole number"}[kind]} or null.')
            if value["role"] not in ("prompter", "assistant"):
                raise Bad(f'unknown role {value["role"]!r}. Roles of messages in trees are prompter and assistant.')
            yield Message(line, value["message_id"], parent, value["text"], value["role"], value["lang"],
                          bool(value.get("deleted")), value.get("review_result"), value.get("rank"))
            replies = value.get("replies") or [] if nested else []
            if not isinstance(replies, list):
                raise Bad(f'"replies" is {kind_of(replies)}. It has to be a list.')
            stack.extend((reply, value["message_id"]) for reply in reversed(replies))
