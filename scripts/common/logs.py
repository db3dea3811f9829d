"""A person's own conversation logs -> conversations: gptme's folders, files of OpenAI messages, the ChatGPT export.

    gptme     LOGS/<name>/conversation.jsonl     a message a line: role, content, timestamp
    openai    *.jsonl                            a conversation a line: {"messages": [...], "tools": [...]}
    chatgpt   conversations.json                 an array; in each `mapping`, a tree of messages, and `current_node`

What a log says is kept: tool output, also where it comes as a system turn, calls of tools, the branch of a ChatGPT
conversation that was open last. A damaged line is a finding with file and line, and takes its conversation with it.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path

from common.faults import UserError
from common.messages import MessageReader, add_system, tools_of
from common.records import SHOWN, Bad, RecordReader, bad_rows, kind_of

LOG_FORMS = ("gptme", "openai", "chatgpt")
DATES = ("timestamp", "update_time", "updated_at", "create_time", "created_at", "created", "date")
DAMAGED_TEXT = re.compile(r"""\((?:in )?['"].*['"]\)|(?<=: )'.*'(?= follows)""", re.S)
HIDDEN = ("user_editable_context", "model_editable_context", "thoughts", "reasoning_recap", "app_pairing_content")


@dataclass(slots=True)
class Conversation:
    """One conversation. messages: as MessageReader reads them; places: of each; when: seconds since 1970, or None."""

    id: str
    messages: list[dict]
    places: list[str]
    tools: list | None = None
    when: float | None = None
    lost_after: int | None = None  # from this message on the answers rest on an image or a file that the log lacks

    def answers(self) -> int:
        return sum(m["role"] == "assistant" for m in self.messages)


@dataclass
class Filters:
    """Which conversations are left out; all off by default."""

    min_turns: int | None = None      # assistant messages
    require_user: bool = False        # at least one user message
    exclude: str | None = None        # a regular expression; a message that it is found in
    since: str | None = None          # year-month-day of the last message

    def reason(self, talk: Conversation) -> str | None:
        """Why a conversation is left out, or None."""
        if self.min_turns is not None and talk.answers() < self.min_turns:
            return f"fewer than {self.min_turns} assistant messages"
        if self.require_user and not any(m["role"] == "user" and m["content"].strip() for m in talk.messages):
            return "no user message"
        if self.since is not None:
            if talk.when is None:
                return "no date"
            if talk.when < datetime.combine(date.fromisoformat(self.since), datetime.min.time(), UTC).timestamp():
                return f"before {self.since}"
        if self.exclude is not None and any(re.search(self.exclude, text) for m in talk.messages for text in _texts(m)):
            return "excluded by the regular expression"
        return None

    def problems(self) -> list[str]:
        """What is wrong with the values, each with the name of its setting."""
        found = []
        try:
            re.compile(self.exclude or "")
        except re.error as fault:
            found.append(f"exclude: {self.exclude!r} is no regular expression ({fault}).")
        try:
            if self.since is not None and date.fromisoformat(self.since).isoformat() != self.since:
                raise ValueError
        except ValueError:
            found.append(f"since: {self.since!r} is no date. Write it as in 2025-01-31.")
        return found


def default_folder(form: str, raw_dir: str) -> Path | None:
    """Where the logs lie if nobody says: for gptme its own folder, which two variables of the environment can move."""
    if form == "gptme":
        if os.environ.get("GPTME_LOGS_HOME", "").strip():
            return Path(os.environ["GPTME_LOGS_HOME"].strip())
        if os.environ.get("XDG_DATA_HOME", "").strip():
            return Path(os.environ["XDG_DATA_HOME"].strip()) / "gptme" / "logs"
    return Path(raw_dir).expanduser() if raw_dir else None


def log_files(name: str, folder: Path | None, patterns: list[str]) -> list[Path]:
    """All log files in the folder, sorted by name. Raises UserError if there are none."""
    kinds = " or ".join(patterns)
    if folder is None:
        raise UserError(f"{name}: --raw_dir is missing. It takes the directory with your {kinds}.")
    if not folder.is_dir():
        raise UserError(f"{name}: {folder} is no directory. --raw_dir takes the one with your {kinds}.")
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not found:
        raise UserError(f"{name}: no {kinds} in {folder}. --raw_dir takes the directory that holds them.")
    return found


@dataclass
class LogReader:
    """Iterate over the conversations of log files; then hashes (file -> sha256), n_bad, bad and notes stand.

    Findings name the place under `folder`. Raises UserError at the end if lines are damaged, unless skip_bad_rows: then
    their conversations are left out, and `damaged` counts the assistant messages in what could be read of them;
    `on_other_branches` those of ChatGPT's conversations that are not on the branch that was open.
    """

    form: str
    folder: Path
    files: list[Path]
    skip_bad_rows: bool = False
    role_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hashes: dict[str, str] = {}
        self.bad: list[str] = []
        self.n_bad = self.n_read = self.damaged = self.on_other_branches = 0
        self.notes: Counter[str] = Counter()
        self.message_reader = MessageReader(self.role_map)

    def __iter__(self) -> Iterator[Conversation]:
        read = {"gptme": self._gptme, "openai": self._openai, "chatgpt": self._chatgpt}[self.form]
        for path in self.files:
            name = path.relative_to(self.folder).as_posix()
            if path.stat().st_size == 0:
                self.notes["empty files"] += 1
                self.hashes[name] = hashlib.sha256().hexdigest()
                continue
            records = RecordReader(path)
            try:
                yield from read(name, records)
            except UserError as fault:  # the file as a whole
                self.n_read += 1
                self._finding(str(fault))
            self.hashes[name] = records.sha256 or "not read to its end"
        if self.n_bad and (not self.skip_bad_rows or self.n_bad == self.n_read):
            raise bad_rows(self.folder, self.bad, self.n_bad, self.n_read)

    def _finding(self, text: str) -> None:
        self.n_bad += 1
        if self.n_bad <= SHOWN:
            self.bad.append(text)

    def _records(self, name: str, records: RecordReader) -> Iterator[tuple[str, dict | None]]:
        """(place, object), or (place, None) for what is not one."""
        for number, line, record in records:
            place = f"{name}:{line}" if records.line_is_row else f"{name}:{line} conversation {number}"
            self.n_read += 1
            if isinstance(record, Bad):  # its quotation of the damaged text could be half a secret
                self._finding(f"{records.path}:{line}: {DAMAGED_TEXT.sub('(…)', str(record))}")
            yield place, None if isinstance(record, Bad) else record

    # one method for each form

    def _gptme(self, name: str, records: RecordReader) -> Iterator[Conversation]:
        talk = Conversation(Path(name).parent.name or records.path.resolve().parent.name, [], [])
        damaged = False
        for place, record in self._records(name, records):
            if record is None:
                damaged = True
                continue
            if record.get("ui_only") is True:  # gptme shows it and never sends it to the model
                self.notes["messages for the screen only left out"] += 1
                continue
            try:
                message = self.message_reader.read(record, "the message")
                talk.when = _latest(talk.when, record)
            except Bad as fault:
                self._bad_at(records, place, fault)
                damaged = True
                continue
            if record.get("files"):  # gptme reads them when it asks the model
                self._lost(talk)
            talk.messages.append(message)
            talk.places.append(place)
        if damaged:
            self.damaged += talk.answers()
        else:
            yield talk

    def _openai(self, name: str, records: RecordReader) -> Iterator[Conversation]:
        for place, record in self._records(name, records):
            if record is None:
                continue
            values = record.get("messages")
            try:
                if not isinstance(values, list):
                    finding = kind_of(values) if "messages" in record else f"missing (keys: {', '.join(record)})"
                    raise Bad(f'"messages" is {finding}. A line is {{"messages": [{{role, content}}, …]}}.')
                messages = self.message_reader.read_all(values, "messages")
                told = len(messages)
                add_system(messages, record)
                tools = tools_of(record)
                dates = [_latest(None, part) for part in (record, *values)]
            except Bad as fault:
                self._bad_at(records, place, fault)
                self.damaged += _answers_of(values if isinstance(values, list) else [])
                continue
            stem, _, line = place.rpartition(":")
            number = record.get("id") if isinstance(record.get("id"), str) and record["id"] else f"{stem}:{line}"
            places = [f"{place} system"] * (len(messages) - told) + [
                f"{place} message {i}" for i in range(1, told + 1)]
            when = max((d for d in dates if d is not None), default=None)
            yield Conversation(number, messages, places, tools, when)

    def _chatgpt(self, name: str, records: RecordReader) -> Iterator[Conversation]:
        for place, record in self._records(name, records):
            if record is None:
                continue
            try:
                nodes = _open_branch(record)
                label = record.get("conversation_id") or record.get("id") or place
                talk = Conversation(str(label), [], [], when=_latest(None, record))
                for key, node in nodes:
                    self._add_node(talk, node, f"{place} message {key}")
                    talk.when = _latest(talk.when, node)
                open_ones = {key for key, _ in nodes}
                self.on_other_branches += sum(_is_answer(node.get("message")) for key, node in record["mapping"].items()
                                              if key not in open_ones)
            except Bad as fault:
                self._bad_at(records, place, fault)
                nodes = record["mapping"].values() if isinstance(record.get("mapping"), dict) else ()
                messages = (node.get("message") for node in nodes if isinstance(node, dict))
                self.damaged += _answers_of(m.get("author") for m in messages if isinstance(m, dict))
                continue
            yield talk

    def _bad_at(self, records: RecordReader, place: str, fault: Bad) -> None:
        self._finding(f"{records.path}:{place.partition(':')[2]}: {fault}")

    def _lost(self, talk: Conversation) -> None:
        """Answers from here on rest on what is not there."""
        self.notes["images and files that the log lacks"] += 1
        if talk.lost_after is None:
            talk.lost_after = len(talk.messages)

    def _add_node(self, talk: Conversation, node: dict, place: str) -> None:
        """Add a message of the export, if the conversation was built on it; raise Bad."""
        author, content = node.get("author"), node.get("content")
        role = author.get("role") if isinstance(author, dict) else None
        known = self.message_reader.roles.get(role) if isinstance(role, str) else None
        if known is None:
            raise Bad(f"a message has the unknown role {role!r} (known: {', '.join(self.message_reader.roles)}).")
        if not isinstance(content, dict):
            raise Bad(f'"content" of a message is {kind_of(content)}. It has to be an object.')
        more = node.get("metadata") if isinstance(node.get("metadata"), dict) else {}
        kind = content.get("content_type")
        if more.get("is_visually_hidden_from_conversation") or node.get("weight") == 0 or kind in HIDDEN:
            self.notes["hidden messages left out"] += 1
            return
        text, whole = _content_text(content)
        if "\0" in text:
            raise Bad("a NUL byte in a message. Remove it; the file may be damaged.")
        if not whole or more.get("attachments"):
            self._lost(talk)
        if known != "assistant" and not text.strip() and whole:
            return  # the export begins with an empty system turn
        message: dict = {"role": known, "content": text}
        if known == "assistant":
            message["train"] = node.get("status") != "finished_partial_completion"
            if not message["train"]:
                self.notes["interrupted answers not trained"] += 1
            recipient = node.get("recipient")
            if isinstance(recipient, str) and recipient != "all":
                call = {"type": "function", "function": {"name": recipient, "arguments": text}}
                message |= {"content": "", "tool_calls": [call]}
        elif known == "tool" and isinstance(author.get("name"), str):
            message["name"] = author["name"]
        talk.messages.append(message)
        talk.places.append(place)


def _answers_of(speakers: Iterable[object]) -> int:
    """How many of these objects, damaged ones too, have the role of the assistant."""
    return sum(isinstance(each, dict) and each.get("role") == "assistant" for each in speakers)


def _is_answer(message: object) -> bool:
    """Whether a message of an export is one of the assistant's that is shown."""
    if not isinstance(message, dict) or not _answers_of([message.get("author")]):
        return False
    content = message.get("content")
    return not (isinstance(content, dict) and content.get("content_type") in HIDDEN)


def _open_branch(record: dict) -> list[tuple[str, dict]]:
    """The messages from the root to `current_node` (or along the last children), with the ids of their nodes."""
    mapping, at = record.get("mapping"), record.get("current_node")
    if not isinstance(mapping, dict) or not all(map(_is_node, mapping.values())):
        finding = (f"is missing (keys: {', '.join(record)})" if "mapping" not in record else
                   "has a node without parent and children" if isinstance(mapping, dict) else f"is {kind_of(mapping)}")
        raise Bad(f'"mapping" {finding}. It has to be an object of nodes, as in the export of ChatGPT.')
    if at is None:
        at = next((key for key, node in mapping.items() if node.get("parent") is None), None)
        seen: set[str] = set()
        while at is not None and at not in seen and mapping[at].get("children"):
            seen.add(at)
            at = next((c for c in reversed(mapping[at]["children"]) if c in mapping), None) or at
    elif not isinstance(at, str) or at not in mapping:
        raise Bad(f'"current_node" names the node {at!r}, which is not in "mapping". Export the conversations again.')
    path: list[tuple[str, dict]] = []
    seen = set()
    while at is not None:
        if at in seen or at not in mapping:
            raise Bad(f'the parents of a node {"run in a circle" if at in seen else "are missing"} ({at!r}). '
                      "Export the conversations again.")
        seen.add(at)
        if isinstance(mapping[at].get("message"), dict):
            path.append((at, mapping[at]["message"]))
        at = mapping[at].get("parent")
    return path[::-1]


def _is_node(node: object) -> bool:
    return (isinstance(node, dict) and isinstance(node.get("parent"), str | None)
            and isinstance(node.get("children", []), list)
            and all(isinstance(child, str) for child in node.get("children", [])))


def _texts(message: dict) -> list[str]:
    """The texts of a message: its content, and its calls of tools as JSON."""
    calls = message.get("tool_calls")
    return [message["content"], *([json.dumps(calls, ensure_ascii=False)] if calls else [])]


def _content_text(content: dict) -> tuple[str, bool]:
    """The text of a message's content, and whether that is all of it."""
    parts = content.get("parts")
    if not isinstance(parts, list):
        text = next((content[k] for k in ("text", "result") if isinstance(content.get(k), str)), None)
        return text or "", text is not None
    texts, whole = [], True
    for part in parts:
        if isinstance(part, dict) and isinstance(part.get("text"), str):  # a transcript of speech
            part = part["text"]
        if isinstance(part, str):
            texts.append(part)
        elif part is not None and "audio" not in str(part.get("content_type") if isinstance(part, dict) else ""):
            whole = False
    return "\n".join(t for t in texts if t), whole


def _latest(when: float | None, record: object) -> float | None:
    """The later of `when` and the date in a record (seconds, or ISO 8601; without a zone it is taken as UTC)."""
    for key in DATES if isinstance(record, dict) else ():
        value = record.get(key)
        if isinstance(value, str) and value:
            try:
                moment = datetime.fromisoformat(value)
            except ValueError:
                continue
            value = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return max(value, when) if when is not None else value
    return when
