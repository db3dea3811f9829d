"""A Jinja chat template -> pieces: template text, places of messages, control tokens; the answers are marked.

A template is rendered with placeholders in place of everything a user wrote; what comes out is cut at the control
tokens and at the placeholders, and only then the texts are put in. So control ids come from the template alone:
`<|im_end|>` or `</s>` inside a message stays text, and the trained part is known without searching for markers.

    <|im_start|>  "user\\n"  (0)  <|im_end|>  "\\n"  <|im_start|>  "assistant\\n"  (1)  <|im_end|>  "\\n"
    the answer of message 1                                                     ^^^^^^^^^^^^^^^
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

from common.faults import UserError

OPEN, CLOSE = "\ue000", "\ue001"  # private-use characters around a placeholder
PLACEHOLDER = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}")
REMEMBERED = 10_000  # structures; rows with tool calls are rarely alike and must not be kept for ever
_today: datetime | None = None  # what templates are told, instead of the time (`set_today`)
PLAIN_KEYS = frozenset(("role", "content", "train"))
PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})  # shows how an answer is asked for


@dataclass(slots=True, frozen=True)
class Piece:
    """Template text, the place of message `message`'s content, or a control token; `turn` is the assistant message
    (by index) whose answer it belongs to, None outside answers."""

    text: str = ""
    control: int | None = None
    message: int | None = None
    turn: int | None = None


@dataclass(slots=True)
class Structure:
    """A template rendered with placeholders: `parts` alternate between text and placeholder, without block marks."""

    parts: list[str]
    names: list[str]  # control strings of tool calls and tool lists, which the placeholders s0, s1, ... stand for
    pieces: list[Piece]
    common: bool  # of roles alone, so that many rows share it; tool calls are rarely alike
    shows: frozenset[int]  # the messages whose content the template puts in
    hides_calls: bool = False  # it says nothing of tool calls
    plans: dict[object, list] = field(default_factory=dict)  # of Layouts, by trained turns and contents that are empty


class Template:
    """A compiled template. controls: token -> id. trusted: it puts contents in as they are and tags its answers."""

    def __init__(self, name: str, source: str, controls: dict[str, int], special_tokens: dict, trusted: bool):
        """Raise UserError if the source is no Jinja template."""
        self.name, self.special_tokens, self.trusted = name, special_tokens, trusted
        self.controls = controls
        by_length = sorted(controls, key=len, reverse=True)
        self.control_pattern = re.compile("|".join(map(re.escape, by_length)))
        self._structures: dict[object, Structure] = {}
        if OPEN in source or CLOSE in source:
            raise UserError(f"template {name}: it holds the private-use character U+E000 or U+E001, which the scripts "
                            "need for themselves. Remove it.")
        try:
            self._compiled = _environment().from_string(source)
        except Exception as fault:  # a syntax error, or anything that compiling a strange file can raise
            line = f" (line {fault.lineno})" if getattr(fault, "lineno", None) else ""
            raise UserError(f"template {name}: not a Jinja template{line}: {_first_line(fault)}. Mend it, or use a "
                            "built-in template.") from None

    def render(self, messages: list[dict], tools: list | None = None, generation_prompt: bool = False,
               marks: bool = False) -> str:
        """The text of a conversation. marks: with placeholders + and - around generation blocks."""
        begin, end = (f"{OPEN}+{CLOSE}", f"{OPEN}-{CLOSE}") if marks else ("", "")
        try:
            return self._compiled.render(**self.special_tokens, messages=messages, tools=tools,
                                         add_generation_prompt=generation_prompt, generation_begins=begin,
                                         generation_ends=end)
        except Exception as fault:  # the template is a program of the user's: any exception can come out of it
            roles = " ".join(m["role"] for m in messages)
            raise UserError(f"template {self.name}: cannot render turns {roles}: {_first_line(fault)}. "
                            "Change the rows or the template.") from None

    def follow(self, messages: list[dict], tools: list | None = None,
               generation_prompt: bool = False) -> tuple[Structure, list[str]]:
        """What the template makes of a conversation, and the messages' contents as it puts them in (it may trim them).

        Raise UserError if the template changes contents in another way.
        """
        contents = [m["content"] or "" for m in messages]
        if self.trusted:
            return self._structure(messages, tools, generation_prompt, False), contents
        truth = self.render(as_written(messages), tools, generation_prompt)
        for hold_empty in (True, False):  # a template may ask whether there is a content
            structure = self._structure(messages, tools, generation_prompt, hold_empty)
            found = _follow(structure, truth, contents)
            if found is not None:
                return structure, found
        apart = [_thought_apart(m) for m in messages]
        if apart != messages and self.render(as_written(apart), tools, generation_prompt) == truth:
            return self.follow(apart, tools, generation_prompt)
        changed = next((text for text in contents if text.strip() not in truth), contents[0])
        raise UserError(f"template {self.name}: it changes the text of a message ({changed!r:.60} …) in a way that "
                        "cannot be followed token by token. Use a template that inserts contents as they are.")

    @cached_property
    def before_answer(self) -> tuple[str, str]:
        """What stands before the answer in the whole of PROBE, and the generation prompt that asks for it, both with
        placeholders."""
        shape = _shape([*PROBE], self.control_pattern, [], True)
        return self.render(shape).partition(f"{OPEN}1{CLOSE}")[0], self.render(shape[:-1], None, True)

    def _structure(self, messages: list[dict], tools: list | None, generation_prompt: bool,
                   hold_empty: bool) -> Structure:
        """Render with placeholders and cut. Depends on roles and tool calls, not on contents, so it is remembered."""
        names: list[str] = []
        plain = all(map(PLAIN_KEYS.issuperset, messages))
        if self.trusted and not plain:  # none of the built-in ones shows thoughts
            messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
            plain = all(map(PLAIN_KEYS.issuperset, messages))
        if tools is None and plain:
            key: object = (generation_prompt, hold_empty, *[(m["role"], m["content"] and "text") for m in messages])
        else:
            shape = _shape(messages, self.control_pattern, names, hold_empty)
            protected = _protect(tools, self.control_pattern, names)
            key = json.dumps([shape, protected, names, generation_prompt, hold_empty])
        known = self._structures.get(key)
        if known is None:
            if isinstance(key, tuple):
                shape, protected = _shape(messages, self.control_pattern, names, hold_empty), None
            if len(self._structures) >= REMEMBERED:
                self._structures.clear()
            text = self.render(shape, protected, generation_prompt, True)
            hides_calls = not self.trusted and self._hides_calls(text, shape, protected, generation_prompt)
            text = self._mark_silent_answers(text, shape, protected)
            known = self._structures[key] = self._cut(text, messages, names, isinstance(key, tuple))
            known.hides_calls = hides_calls
        return known

    def _hides_calls(self, text: str, shape: list[dict], tools: list | None, generation_prompt: bool) -> bool:
        """Whether the text is the same without the calls of tools."""
        if not any("tool_calls" in m for m in shape):
            return False
        try:
            without = self.render([{k: v for k, v in m.items() if k != "tool_calls"} for m in shape], tools,
                                  generation_prompt, True)
        except UserError:  # it asks for a content where there is no call
            return False
        return text == without

    def _mark_silent_answers(self, text: str, shape: list[dict], tools: list | None) -> str:
        """Without generation blocks an answer begins at its content. One of tool calls alone, and those before whose
        content the template has something to say (an empty thought), begin where their generation prompt ends: put a
        placeholder there."""
        if f"{OPEN}+{CLOSE}" in text:
            return text
        for i in reversed(range(len(shape))):
            if shape[i]["role"] != "assistant":
                continue
            calls = "tool_calls" in shape[i]
            if calls:
                text = self._mark_end(text, shape, tools, i)
            silent = f"{OPEN}{i}{CLOSE}" not in text
            if not (calls and silent) and not self.lead_in:
                continue
            try:
                before = self.render(shape[:i], tools, True)
            except UserError:  # a template may refuse a conversation that ends here
                if calls and silent:
                    raise
                continue
            if text.startswith(before):
                text = f"{before}{OPEN}={i}{CLOSE}{text[len(before):]}"
            elif calls and silent:
                raise UserError(f"template {self.name}: cannot tell where an answer of tool calls begins. Put "
                                "{% generation %} and {% endgeneration %} around answers in the template.")
        return text

    @cached_property
    def lead_in(self) -> str:
        """What the template writes between generation prompt and answer, as Qwen3's does (an empty thought): the model
        has to say it, so it is trained."""
        before, prompt = self.before_answer
        said = before[len(prompt):] if before.startswith(prompt) else ""
        whole = self.render(_shape([*PROBE], self.control_pattern, [], True), None, False, True)
        unasked, marked, _ = whole.partition(f"{OPEN}+{CLOSE}")
        if marked and unasked[len(prompt):].strip():  # before a generation block: neither asked for nor trained
            return ""
        return said if said.strip() else ""

    def _mark_end(self, text: str, shape: list[dict], tools: list | None, i: int) -> str:
        """A call may hold control tokens ([TOOL_CALLS]); its answer ends at the last one that the conversation has when
        it ends there: put a placeholder behind it."""
        try:
            upto = self.render(shape[:i + 1], tools, False, True)
        except UserError:  # a template that wants the result of the call as well
            return text
        ends = [match.end() for match in self.control_pattern.finditer(upto)]
        if not ends or not text.startswith(upto):
            return text
        return f"{text[:ends[-1]]}{OPEN}.{i}{CLOSE}{text[ends[-1]:]}"

    def _cut(self, text: str, messages: list[dict], names: list[str], common: bool) -> Structure:
        """Cut rendered text at placeholders and control tokens; mark the answers: generation blocks, or where there
        are none the content of an assistant's message and what follows through the first control token, or the
        placeholder of its end."""
        assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        split = PLACEHOLDER.split(text)
        tagged = "+" in split[1::2]
        ended = {int(part[1:]) for part in split[1::2] if part.startswith(".")}
        marks = set(split[1::2])
        pieces: list[Piece] = []
        parts, turn, block = [""], None, 0
        ahead: int | None = None  # the message whose content is still to come in its answer
        for i, part in enumerate(split):
            if i % 2 == 0:
                parts[-1] += part
                for plain, control in self._split_controls(part):
                    pieces.append(Piece(text=plain, control=control, turn=turn))
                    turn = turn if tagged or control is None or turn in ended or ahead is not None else None
            elif part == "+":
                inside = (int(p) for p in split[i + 2:split.index("-", i):2] if p.isdigit())
                turn, block = next(inside, assistants[block] if block < len(assistants) else None), block + 1
            elif part == "-" or part.startswith("."):
                turn = None
            elif part.startswith("="):
                turn = int(part[1:])
                ahead = turn if part[1:] in marks else None
            else:
                parts += [part, ""]
                ahead = None if part == str(ahead) else ahead
                if part.startswith("s"):
                    pieces.append(Piece(text=names[int(part[1:])], turn=turn))
                else:
                    turn = turn if tagged else int(part) if int(part) in assistants else None
                    pieces.append(Piece(message=int(part), turn=turn))
        return Structure(parts, names, pieces, common, frozenset(int(part) for part in marks if part.isdigit()))

    def _split_controls(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Template text -> (text, None) and ("", control id)."""
        start = 0
        for match in self.control_pattern.finditer(text):
            if match.start() > start:
                yield text[start:match.start()], None
            yield "", self.controls[match.group()]
            start = match.end()
        if start < len(text):
            yield text[start:], None


def _first_line(fault: Exception) -> str:
    text = str(fault).strip()
    return text.splitlines()[0][:200] if text else type(fault).__name__


def _shape(messages: list[dict], controls: re.Pattern, names: list[str], hold_empty: bool) -> list[dict]:
    """Messages with placeholders for their contents; an empty content has one only if asked (hold_empty)."""
    shape = []
    for i, m in enumerate(messages):
        extras = {k: _protect(v, controls, names) for k, v in m.items() if k not in PLAIN_KEYS and v is not None}
        content = m["content"]
        held = content is not None and (hold_empty or content)
        shape.append({"role": m["role"], "content": f"{OPEN}{i}{CLOSE}" if held else content,
                      **_with_thinking(extras)})
    return shape


def _thought_apart(message: dict) -> dict:
    """<think>…</think> before an answer as the key of its own that templates have for it, as Qwen3's itself does."""
    thought, end, answer = (message["content"] or "").lstrip().partition("</think>")
    if message["role"] != "assistant" or not end or not thought.startswith("<think>"):
        return message
    thought = thought.removeprefix("<think>").strip("\n")
    return {**message, "reasoning_content": thought, "content": answer.lstrip("\n")}


def _protect(value: object, controls: re.Pattern, names: list[str]) -> object:
    """Replace control strings in the strings of tool calls and tool lists by placeholders; `names` collects them."""
    if isinstance(value, str):
        def keep(match: re.Match) -> str:
            names.append(match.group())
            return f"{OPEN}s{len(names) - 1}{CLOSE}"
        return re.sub(f"{controls.pattern}|[{OPEN}{CLOSE}]", keep, value)
    if isinstance(value, dict):
        return {_protect(k, controls, names): _protect(v, controls, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_protect(v, controls, names) for v in value]
    return value


def _follow(structure: Structure, truth: str, contents: list[str]) -> list[str] | None:
    """Read the true text along the parts: how each content was put in (as it is, or trimmed), or None.

    parts "<u>" (0) "<e>", truth "<u>Hi<e>", contents [" Hi "] -> ["Hi"]
    """
    parts, found = structure.parts, list(contents)
    if not truth.startswith(parts[0]):
        return None
    at = len(parts[0])
    for mark, text in zip(parts[1::2], parts[2::2]):
        if mark.startswith("s"):
            ways = [structure.names[int(mark[1:])]]
        else:
            content = contents[int(mark)]
            ways = [content, content.strip(), content.lstrip(), content.rstrip()]
        way = next((w for w in ways if truth.startswith(w + text, at)), None)
        if way is None:
            return None
        if not mark.startswith("s"):
            found[int(mark)] = way
        at += len(way) + len(text)
    return found if at == len(truth) else None


def as_written(messages: list[dict]) -> list[dict]:
    """Messages as a template sees them: without "train", which is for us."""
    return [_with_thinking({k: v for k, v in m.items() if k != "train"}) for m in messages]


def _with_thinking(message: dict) -> dict:
    """A thought under its other name as well (gpt-oss' template reads that), as transformers does it."""
    return {"thinking": message["reasoning_content"], **message} if "reasoning_content" in message else message


def today() -> datetime:
    """The time that a template is told: the first start of a run, where that is known (`set_today`)."""
    return _today or datetime.now()


def set_today(time: datetime) -> None:
    """Let templates be told this time: rows that are rendered on the next day are to be the same."""
    global _today
    _today = time


def as_of_today(source: str) -> str:
    """A template to which transformers would tell the present day, with `today()` in it instead."""
    return re.sub(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", lambda found: json.dumps(today().strftime(found[2])),
                  source)


def _environment() -> object:
    """A sandboxed Jinja environment like the one `transformers` uses, whose generation blocks leave placeholders."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: object) -> list:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            begin, end = (nodes.Output([nodes.Name(f"generation_{x}", "load")]).set_lineno(line)
                          for x in ("begins", "ends"))
            return [begin, *body, end]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, separators: tuple | None = None,
               sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return today().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    functions: dict[str, Callable] = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals.update(functions)
    return environment
