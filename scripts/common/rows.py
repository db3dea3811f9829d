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

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

from common.calls import tool_calls
from common.faults import UserError
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
READ_OF_MESSAGE = {"role", "content", "from", "value", "train", "training", "loss", "weight", "tool_calls",
                   "function_call", "name", "tool_call_id", "speaker", "reasoning_content"}
ROLES = ("system", "user", "assistant", "tool")
ROLE_MAP = {"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant",
            "bing": "assistant", "bard": "assistant", "developer": "system", "function": "tool", "observation": "tool",
            "function_call": "assistant"}
NOTHING = (None, "", [], {})  # values that say nothing
HINTS = {  # keys of rows that need another step first -> that step
    ("mapping",): "This is ChatGPT's export; scripts/prepare_sft_datasets.py --dataset chatgpt reads it.",
    ("chosen",): "To learn the better answer of a preference pair, rename chosen to response, or to messages if it is "
                 "a list with the prompt in it.",
    ("role", "content"): "One message a line is a log; scripts/prepare_sft_datasets.py --dataset gptme reads those of "
                         "gptme."}


@dataclass(slots=True)
class Row:
    """One row. line: the line for JSONL and CSV (where the row starts), the row's number for JSON arrays and parquet.

    messages: [{"role": system|user|assistant|tool, "content": str}], assistant ones also "train": bool, and where given
    tool_calls, name, tool_call_id, speaker (the template's name for the role). Or None, and text is the plain text.
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
        given = {name: role if isinstance(role, str) else role[0] for name, role in (role_map or {}).items()}
        for name, role in given.items():
            if role not in ROLES:
                raise UserError(f'role map: "{name}" is mapped to "{role}", which is no role. '
                                f'Roles: {", ".join(ROLES)}.')
        self.path, self.skip_bad_rows, self.columns = Path(path), skip_bad_rows, columns or {}
        self.edit, self.edited, self.asked_form, self.mixed = edit, set(edited), form, mixed
        self.roles = {r: r for r in ROLES} | ROLE_MAP | given
        self.speakers = {name: role[1] for name, role in (role_map or {}).items() if not isinstance(role, str)}
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
            row.tools = self.complete(row.messages, record, form)
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
        if (type(prompt) is str and type(response) is str and "\0" not in prompt and "\0" not in response
                and "history" not in record):
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response, "train": True}]
        if isinstance(prompt, list):
            before = self.messages_of(prompt, "prompt")
            for message in before:
                if message["role"] == "assistant":
                    message["train"] = False  # context; a trained earlier turn belongs in the messages form
        else:
            before = [{"role": "user", "content": self._text(record, "prompt", "prompt")}]
        before = [*self._history(record.get("history")), *before]
        if isinstance(response, list):
            after = self.messages_of(response, key)
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
        """[[instruction, output], …] before an instruction, as context; raise Bad."""
        if self._tabular and isinstance(pairs, str) and pairs:
            pairs = parse(pairs)
        if not pairs:
            return []
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise Bad('"history" is no list of pairs. It has to be [[instruction, output], …].')
        turns = [turn for asked, answered in pairs for turn in (
            {"role": "user", "content": asked}, {"role": "assistant", "content": answered, "train": False})]
        return self.messages_of(turns, "history")

    def _messages(self, record: dict, key: str = "messages") -> list[dict]:
        value = record.get(key)
        if value is None and key not in record:
            raise Bad(f'"{self._name(key)}" is missing (keys: {", ".join(record)}). {WAY_OUT[key]}')
        if self._tabular and isinstance(value, str):
            value = parse(value)
        if not isinstance(value, list):
            raise Bad(f'"{self._name(key)}" is {kind_of(value)}. {WAY_OUT[key]}')
        messages = self.messages_of(value, key)
        if "assistant" not in [m["role"] for m in messages]:
            raise Bad("no assistant message. There is nothing to learn from the row.")
        return messages

    def _conversations(self, record: dict) -> list[dict]:
        return self._messages(record, "conversations")

    def messages_of(self, values: list, key: str) -> list[dict]:
        """Checked messages as in Row; `key` is named in findings. Raises Bad."""
        if not values:
            raise Bad(f'"{self._name(key)}" is an empty list. Rows need at least one user and one assistant message.')
        name = self._name(key)
        return [self.message(value, _place(i, name)) for i, value in enumerate(values, 1)]

    def message(self, value: object, place: str) -> dict:
        """One checked message as in Row. Raises Bad."""
        if not isinstance(value, dict):
            raise Bad(f"{place} is {kind_of(value)}. A message is {{role, content}}.")
        role_key, content_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
        role, content = value.get(role_key), value.get(content_key)
        if role is None:
            raise Bad(f'{place} has no "{role_key}" (keys: {", ".join(value)}). A message is {{role, content}}.')
        known = self.roles.get(role) if isinstance(role, str) else None
        if known is None:
            raise Bad(f'{place} has the unknown role {role!r} (known: {", ".join(self.roles)}). Rename it, or map it '
                      "to one of them in role_map.")
        message = {"role": known, "content": self._content(content, content_key, value, place)}
        if known == "assistant":
            message["train"] = True
        if role == "function_call":
            message |= {"content": "", "tool_calls": tool_calls(message["content"], place)}
            if not message["tool_calls"]:
                raise Bad(f'{place} is no function call. It has to be {{"name": …, "arguments": …}} or a list of them.')
        if role in self.speakers:
            message["speaker"] = self.speakers[role]
        if len(value) > 2 or content is None:
            self._add_extras(message, value, place)
        return message

    def _content(self, content: object, key: str, message: dict, place: str) -> str:
        if isinstance(content, str):
            if "\0" in content:
                raise Bad(f"a NUL byte in {place}. Remove it; the file may be damaged.")
            return content
        if content is None:
            if message.get("tool_calls") or message.get("function_call"):
                return ""
            finding = "is null" if key in message else f"is missing (keys: {', '.join(message)})"
            raise Bad(f'"{key}" of {place} {finding}. Give it a text, or tool_calls.')
        if not isinstance(content, list):
            raise Bad(f'"{key}" of {place} is {kind_of(content)}. It has to be a text or a list of text parts.')
        for part in content:
            what = part.get("type") or "text" if isinstance(part, dict) else None
            if what != "text" or not isinstance(part.get("text"), str):
                raise Bad(f'"{key}" of {place} has a part that is no text ({what or kind_of(part)}). '
                          'Only parts {"type": "text", "text": …} can be used.')
        return self._content("".join(part["text"] for part in content), key, message, place)

    def _add_extras(self, message: dict, value: dict, place: str) -> None:
        train, assistant = value.get("train"), message["role"] == "assistant"
        if train is None and assistant:  # as Axolotl and ms-swift call it
            train = next((value[name] for name in ("training", "loss") if isinstance(value.get(name), bool)), None)
        if value.get("train_detail"):  # Axolotl's
            raise Bad(f'"train_detail" of {place} marks parts of an answer, which is not read. Mark whole answers with '
                      '"train".')
        if train is not None and not isinstance(train, bool):
            raise Bad(f'"train" of {place} is {kind_of(train)} ({train!r}). It has to be true or false.')
        if assistant and value.get("weight") is not None:  # OpenAI's name for it
            train = _of_weight(value["weight"], train, place)
        if assistant:
            message["train"] = train is not False
        elif train:
            raise Bad(f'"train" of {place} is true, but its role is {message["role"]}. Only assistant messages are '
                      "trained.")
        calls = tool_calls(value.get("tool_calls"), place) or tool_calls(value.get("function_call"), place)
        if calls:
            if not assistant:
                raise Bad(f'"tool_calls" in {place}, whose role is {message["role"]}. Only the assistant calls tools.')
            message["tool_calls"] = calls
        for key in ("name", "tool_call_id", "speaker", "reasoning_content"):
            if isinstance(value.get(key), str):
                message[key] = value[key]
        if not value.keys() <= READ_OF_MESSAGE:
            self.unread.update([f"{key} of messages" for key in value
                                if key not in READ_OF_MESSAGE and value[key] not in NOTHING])

    def complete(self, messages: list[dict], record: dict, form: str = "messages") -> list | None:
        """Add the system text that stands beside the messages, and return the tools; raise Bad."""
        if record.get("system") not in NOTHING:
            system = self._text(record, "system", form)
            if messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": system})
            elif messages[0]["content"] != system:
                raise Bad('"system" and the system message differ. Keep one of them.')
        tools, older = record.get("tools"), record.get("functions")
        if not tools and isinstance(older, list):  # OpenAI's older form
            tools = [{"type": "function", "function": function} for function in older]
        if isinstance(tools, str) and tools:  # parquet and CSV cannot hold free objects: the list comes as JSON text
            tools = parse(tools)
        if not tools and (tools is None or isinstance(tools, (str, list))):
            return None
        if not isinstance(tools, list):
            raise Bad(f'"tools" is {kind_of(tools)}. It has to be a list of tool descriptions.')
        return tools

    def _text(self, record: dict, key: str, form: str) -> str:
        value = record.get(key)
        if isinstance(value, str):
            if "\0" in value:
                raise Bad(f'a NUL byte in "{self._name(key)}". Remove it; the file may be damaged.')
            return value
        finding = f"is {kind_of(value)}" if key in record else f"is missing (keys: {', '.join(record)})"
        raise Bad(f'"{self._name(key)}" {finding}. {WAY_OUT[form] if key in record else _way_out(record, form)}')

    def _name(self, key: str) -> str:
        return self.columns.get(key, key)


@lru_cache(1000)
def _place(number: int, key: str) -> str:
    return f'message {number} of "{key}"'


def join_input(instruction: str, more: str) -> str:
    """Instruction and its input or context, with a blank line between where both hold something."""
    if not more or more.isspace():
        return instruction
    return f"{instruction}\n\n{more}" if instruction else more


def _way_out(record: dict, form: str) -> str:
    return next((hint for keys, hint in HINTS.items() if all(key in record for key in keys)), WAY_OUT[form])


def _of_weight(weight: object, train: bool | None, place: str) -> bool:
    """Whether an answer of this weight is trained; raise Bad."""
    if weight not in (0, 1) or train not in (None, weight == 1):
        finding = "0 or 1" if weight not in (0, 1) else 'as "train" says, or away'
        raise Bad(f'"weight" of {place} is {weight!r}. It has to be {finding}.')
    return weight == 1


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
