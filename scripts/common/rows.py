"""Files -> rows. A row is a conversation (`messages`) or a plain text; every published form becomes one of the two.

    {"prompt": "Hi", "response": "Hello"}                   or "completion"; each a text or a list of messages
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "tools": [...]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    {"instruction": "Translate", "input": "Hallo", "output": "Hello"}        input is joined by a blank line; "history"
    {"text": "plain text, all of it trained"}

One form per file, that of its first good row. Where keys of several forms meet in a row the first of messages,
conversations, prompt, instruction, text stands, and the rest are extra keys, which are allowed and not read.
A row that cannot be used is a finding with file and line; an empty answer is dropped and counted.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from common.faults import UserError
from common.messages import NOTHING, MessageReader, add_system, checked_text, tools_of
from common.records import SHOWN, Bad, Lines, Record, RecordReader, bad_rows, kind_of, parse

FORMS = {  # form -> keys that show it; the first key of the first form that is there and not null decides
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "response", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
NEEDED = {"messages": ("messages",), "conversations": ("conversations",), "prompt": ("prompt", "response"),
          "instruction": ("instruction", "output"), "text": ("text",)}
WAY_OUT = {
    "messages": "Rows need messages, a list of {role, content}.",
    "conversations": "Rows need conversations, a list of {from, value}.",
    "prompt": "Rows need prompt and response, or messages.",
    "instruction": "Rows need instruction and output, or prompt and response, or messages.",
    "text": "Rows need text, or prompt and response, or messages.",
}
ANY_FORM = ("system", "source", "id", "tools", "functions", "first_prompt")
OPTIONAL = {"prompt": ("completion", "history"), "instruction": ("input", "history")}  # keys of one form
READ = {form: {*NEEDED[form], *OPTIONAL.get(form, ()), *ANY_FORM} for form in FORMS}
HINTS = {  # keys of rows that need another step first -> that step
    ("mapping",): "This is ChatGPT's export; scripts/prepare_sft_datasets.py --dataset chatgpt reads it.",
    ("chosen",): "To learn the better answer of a preference pair, rename chosen to response, or to messages if it is "
                 "a list with the prompt in it.",
    ("role", "content"): "One message a line is a log; scripts/prepare_sft_datasets.py --dataset gptme reads those of "
                         "gptme."}


@dataclass(slots=True)
class Row:
    """One row. line: the line for JSONL and CSV (where the row starts), the row's number for JSON arrays and parquet.

    messages: as MessageReader reads them. Or None, and text is the plain text.
    """

    line: int
    messages: list[dict] | None
    text: str | None = None
    tools: list | None = None
    source: str | None = None
    id: str | None = None
    prompt: str | None = None  # "first_prompt" of the file: of the conversation that this row is a later part of

    def first_prompt(self) -> str:
        """The text that decides on which side of the split the row is: the first user message, or the plain text."""
        if self.prompt is not None:
            return self.prompt
        if self.messages is None:
            return self.text
        for message in self.messages:
            if message["role"] == "user":
                return message["content"]
        return self.messages[0]["content"]


def row_to_json(row: Row) -> dict:
    """The row in a form that RowReader reads back as an equal row ("train" is written where it is false)."""
    if row.messages is None:
        out: dict = {"text": row.text}
    else:
        out = {"messages": [{k: v for k, v in m.items() if k != "train" or not v} for m in row.messages]}
    more = (("tools", row.tools), ("source", row.source), ("id", row.id), ("first_prompt", row.prompt))
    return out | {k: v for k, v in more if v is not None}


@dataclass
class Counts:
    """What became of the rows of a file, or of a part of it: rows_in = rows_kept + n_bad + sum(dropped).

    bad: the first 20 findings "file:line: reason"; dropped: reason -> rows; notes: what was kept but changed -> count;
    unread: keys that hold something and are not read -> count of rows or messages.
    """

    rows_in: int = 0
    rows_kept: int = 0
    n_bad: int = 0
    bad: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Add those of the part that follows."""
        for name in (f.name for f in fields(Counts)):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad = self.bad[:SHOWN]

    def take(self) -> Counts:
        """Return the counts and begin again at nothing."""
        taken = Counts(*(getattr(self, f.name) for f in fields(Counts)))
        vars(self).update(vars(Counts()))
        return taken


class RowReader(Counts):
    """Iterate over the good rows of a file; then the counts stand.

    columns: our key -> the file's key, e.g. {"input": "context", "output": "response"}.
    role_map: further role names -> role, or (role, what the template calls the speaker).
    edit: sees every readable object under our keys; may change it, or give a reason to drop it. edited: further
    columns of a parquet file that it looks at.
    form: read the rows in this form, even if keys of an earlier one are there. mixed: rows of several forms may meet,
    as in the val.jsonl of a run over several files.
    sha256 of the file, form: known at the end.
    Raises UserError at the end if rows are bad, unless skip_bad_rows; at once if the file as a whole cannot be read.

    Or block by block: blocks(), for each rows_of(block), which another process may do once `form` is known, then
    finish().
    """

    def __init__(self, path: str | Path, *, skip_bad_rows: bool = False, role_map: dict[str, str | tuple] | None = None,
                 columns: dict[str, str] | None = None, edit: Callable[[dict], str | None] | None = None,
                 edited: Iterable[str] = (), form: str | None = None, mixed: bool = False):
        self.path, self.skip_bad_rows, self.columns = Path(path), skip_bad_rows, columns or {}
        self.edit, self.edited, self.asked_form, self.mixed = edit, set(edited), form, mixed
        self.message_reader = MessageReader(role_map, lambda keys: self.unread.update(keys))
        self._read = {form: getattr(self, f"_{form}") for form in FORMS if form != "text"}
        self._start()

    def _start(self) -> None:
        super().__init__()
        self.sha256: str | None = None
        self.form: str | None = None
        self._form_line = 0
        self._tabular = False  # CSV: lists arrive as JSON text
        self._columns_checked = False
        ours = {key for keys in [*FORMS.values(), *READ.values()] for key in keys}
        self._records = RecordReader(self.path, columns=ours | set(self.columns.values()) | self.edited)

    def __iter__(self) -> Iterator[Row]:
        self._start()
        yield from self._rows(self._records)
        self.sha256 = self._records.sha256
        self.finish()

    def blocks(self) -> Iterator[Lines | list[Record]]:
        """The file in portions, in order."""
        self._start()
        yield from self._records.blocks()
        self.sha256 = self._records.sha256

    def rows_of(self, block: Lines | list[Record]) -> Iterator[Row]:
        """The good rows of a portion; what was counted is added to the counts."""
        return self._rows(self._records.decoded(block))

    @property
    def position(self) -> int:
        """Bytes of the file read so far."""
        return self._records.position

    def finish(self) -> None:
        """After the last row: raise UserError if rows are bad, unless skip_bad_rows and others are good."""
        if self.n_bad and (not self.skip_bad_rows or self.n_bad == self.rows_in):
            raise bad_rows(self.path, self.bad, self.n_bad, self.rows_in)

    def _rows(self, records: Iterable[Record]) -> Iterator[Row]:
        for number, line, record in records:
            if not self._columns_checked:
                self._check_columns(self._records)
                self._columns_checked = True
            self.rows_in += 1
            try:
                if type(record) is not dict:
                    raise record
                row = self._row(number, record)
            except Bad as fault:
                self.n_bad += 1
                if self.n_bad <= SHOWN:
                    place = "" if number == line and self._records.line_is_row else f"row {number}: "
                    self.bad.append(f"{self.path}:{line}: {place}{fault}")
                continue
            if row is not None:
                self.rows_kept += 1
                yield row

    def refuse(self, row: Row, finding: str) -> None:
        """Count a row that was given as good as a bad one."""
        self.rows_kept -= 1
        self.n_bad += 1
        if self.n_bad <= SHOWN:
            is_line = self._records.column_names is None and self._records.line_is_row
            self.bad.append(f"{self.path}{':' if is_line else ': row '}{row.line}: {finding}")

    def _check_columns(self, records: RecordReader) -> None:
        """CSV and parquet: a needed column that is missing is one finding, not one for each row."""
        names = records.column_names
        if names is None:
            return
        self._tabular = self.path.suffix != ".parquet"
        self.unread.update(records.left)
        present = self._renamed(dict.fromkeys(names, ""))
        form = self.asked_form or next((f for f, keys in FORMS.items() if any(k in present for k in keys)), None)
        if form == "prompt" and "completion" in present:
            present["response"] = ""
        missing = [self.columns.get(k, k) for k in NEEDED.get(form, ()) if k not in present]
        if form is None or missing:
            finding = f'column "{missing[0]}" is missing' if missing else "no column of a known form"
            raise UserError(f"{self.path}:1: {finding} (columns: {', '.join(names)}). "
                            f"{WAY_OUT[form or 'prompt']}")

    def _renamed(self, record: dict) -> dict:
        if not self.columns:
            return record
        named = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
        taken = set(self.columns.values())
        return {k: v for k, v in record.items() if k not in taken and k not in self.columns} | named

    def _row(self, number: int, record: dict) -> Row | None:
        """Return the row, or None if it is useless (counted); raise Bad."""
        if self.columns:
            record = self._renamed(record)
        reason = self.edit(record) if self.edit else None
        if reason:
            self.dropped[reason] += 1
            return None
        form = self.asked_form or _form_of(record)
        if form is None:
            raise Bad(f"no known form (keys: {', '.join(record) or 'none'}). {_way_out(record, 'prompt')}")
        if self.form is not None and form != self.form and not self.mixed:
            raise Bad(f"two forms in a file: this row is of the form {form}, the file began with {self.form} "
                      f"(row {self._form_line}). Put the rows in two files.")
        if form == "text":
            messages, text = None, self._text(record, "text", form)
        else:
            messages, text = self._read[form](record), None
        row = Row(number, messages, text)
        if len(record) > len(NEEDED[form]):  # most have nothing else
            self._add_optional(row, record, form)
        if self.form is None:
            self.form, self._form_line = form, number
        return row if self._useful(row) else None

    def _add_optional(self, row: Row, record: dict, form: str) -> None:
        if row.messages is not None:
            add_system(row.messages, record, self._name("system"))
            row.tools = tools_of(record)
        row.source, row.id, row.prompt = (_label(record, key) for key in ("source", "id", "first_prompt"))
        self.unread.update([key for key in record if key not in READ[form] and record[key] not in NOTHING])

    def _useful(self, row: Row) -> bool:
        if row.messages is None:
            if row.text and not row.text.isspace():
                return True
            self.dropped["empty text"] += 1
            return False
        trained = empty = 0
        for message in row.messages:
            if message["role"] == "assistant" and message["train"]:
                content = message["content"]
                if content and not content.isspace() or "tool_calls" in message:
                    trained += 1
                else:  # training it would teach to end at once
                    message["train"] = False
                    empty += 1
        if not trained:
            self.dropped["empty answer" if empty else "no answer to train"] += 1
        elif empty:
            self.notes["empty assistant turns not trained"] += empty
        return trained > 0

    # one method for each form: record -> messages

    def _prompt(self, record: dict) -> list[dict]:
        key = "response" if record.get("response") is not None or "completion" not in record else "completion"
        prompt, response = record.get("prompt"), record.get(key)
        if self._tabular:
            prompt, response = map(_messages_or_text, (prompt, response))
        if (type(prompt) is str and type(response) is str and "\0" not in prompt and "\0" not in response
                and "history" not in record):
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response, "train": True}]
        if isinstance(prompt, list):
            before = self.message_reader.read_all(prompt, self._name("prompt"))
            for message in before:
                if message["role"] == "assistant":
                    message["train"] = False  # context; a trained earlier turn belongs in the messages form
        else:
            before = [{"role": "user", "content": self._text(record, "prompt", "prompt")}]
        before = [*self._history(record.get("history")), *before]
        if isinstance(response, list):
            after = self.message_reader.read_all(response, self._name(key))
            if not any(m["role"] == "assistant" for m in after):
                raise Bad(f'no assistant message in "{key}". There is nothing to learn from the row.')
        else:
            after = [{"role": "assistant", "content": self._text(record, key, "prompt"), "train": True}]
        return before + after

    def _instruction(self, record: dict) -> list[dict]:
        instruction = self._text(record, "instruction", "instruction")
        more = self._text(record, "input", "instruction") if record.get("input") is not None else ""
        return [*self._history(record.get("history")), {"role": "user", "content": join_input(instruction, more)},
                {"role": "assistant", "content": self._text(record, "output", "instruction"), "train": True}]

    def _history(self, pairs: object) -> list[dict]:
        """[[instruction, output], …], the turns before an instruction, learnt as well; raise Bad."""
        if self._tabular and isinstance(pairs, str) and pairs:
            pairs = parse(pairs)
        if not pairs:
            return []
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise Bad('"history" is no list of pairs. It has to be [[instruction, output], …].')
        turns = [turn for asked, answered in pairs for turn in (
            {"role": "user", "content": asked}, {"role": "assistant", "content": answered})]
        return self.message_reader.read_all(turns, self._name("history"))

    def _messages(self, record: dict, key: str = "messages") -> list[dict]:
        value = record.get(key)
        if value is None and key not in record:
            raise Bad(f'"{self._name(key)}" is missing (keys: {", ".join(record)}). {WAY_OUT[key]}')
        if self._tabular and isinstance(value, str):
            value = parse(value)
        if not isinstance(value, list):
            raise Bad(f'"{self._name(key)}" is {kind_of(value)}. {WAY_OUT[key]}')
        messages = self.message_reader.read_all(value, self._name(key))
        if "assistant" not in [m["role"] for m in messages]:
            raise Bad("no assistant message. There is nothing to learn from the row.")
        return messages

    def _conversations(self, record: dict) -> list[dict]:
        return self._messages(record, "conversations")

    def _text(self, record: dict, key: str, form: str) -> str:
        if key not in record:
            raise Bad(f'"{self._name(key)}" is missing (keys: {", ".join(record)}). {_way_out(record, form)}')
        return checked_text(record[key], self._name(key), WAY_OUT[form])

    def _name(self, key: str) -> str:
        return self.columns.get(key, key)


def _messages_or_text(cell: object) -> object:
    """The cell of a CSV file; a list of messages, which is there as JSON text, as the list."""
    if not isinstance(cell, str) or not re.match(r"\s*\[\s*\{", cell):
        return cell
    try:
        found = parse(cell.strip())
    except Bad:  # a text that begins so
        return cell
    messages = isinstance(found, list) and all(isinstance(m, dict) and any(
        keys <= m.keys() for keys in ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})) for m in found)
    return found if messages else cell


def join_input(instruction: str, more: str) -> str:
    """Instruction and its input or context, with a blank line between where both hold something."""
    if not more or more.isspace():
        return instruction
    return f"{instruction}\n\n{more}" if instruction else more


def _way_out(record: dict, form: str) -> str:
    return next((hint for keys, hint in HINTS.items() if all(key in record for key in keys)), WAY_OUT[form])


def _form_of(record: dict) -> str | None:
    for form, keys in FORMS.items():
        for key in keys:
            if record.get(key) is not None:
                return form
    return next((form for form, keys in FORMS.items() for key in keys if key in record), None)


def _label(record: dict, key: str) -> str | None:
    value = record.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Bad(f'"{key}" is {kind_of(value)}. It has to be a text, a number or null.')
    return str(value)
