"""Messages and a template -> token ids and the mask of trained tokens. One renderer for training, generation, evaluation.

A template is a Jinja file. It is rendered with placeholders in place of everything a user wrote; what comes out is cut
at the control tokens and at the placeholders, and only then the texts are put in. So control ids come from the template
alone: `<|im_end|>` or `</s>` inside a message stays text, and the trained part is known without searching for markers.

    chatml   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    trained                                                          ^^^^^^^^^^^^^^^

Text between two control tokens is encoded in one piece, as `apply_chat_template` does, so the template saved with a run
gives the same ids. The prompt's ids are a prefix of the whole: where a tokenizer would join the end of the prompt and the
beginning of the answer in one token, the two are encoded apart and counted (`Chat.encoded_apart`).
"""
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.faults import UserError
from common.spm import SentencePiece, prove_equal, to_fast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from common.rows import Row

TEMPLATE_DIR = Path(__file__).resolve().parents[2] / "config" / "templates"
BUILT_IN = ("chatml", "instruct", "chat", "raw")
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
FORMAT = 1  # part of every cache key: raise it when the ids or masks of any template change

OPEN, CLOSE = "\ue000", "\ue001"  # private-use characters around a placeholder
PLACEHOLDER = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}")
BLOCK_MARK = re.compile(f"{OPEN}[+-]{CLOSE}")


@dataclass(slots=True)
class Encoded:
    """One example. input_ids: int32 (T,). trained: bool (T,), True where the token is a target of the loss."""

    input_ids: np.ndarray
    trained: np.ndarray


@dataclass(slots=True)
class Piece:
    """Template text, the place of message `message`'s content, or a control token; `turn` is the assistant message
    (by index) whose answer it belongs to, None outside answers."""

    text: str = ""
    control: int | None = None
    message: int | None = None
    turn: int | None = None


@dataclass
class Chat:
    """A tokenizer and a template: everything that turns messages into ids and ids into text."""

    tokenizer: PreTrainedTokenizerFast
    template_name: str
    template: str  # Jinja source as saved with a run
    native: SentencePiece | None = None
    assistant_turns: str = "all"
    train_on_prompt: bool = False
    added_tokens: list[str] = field(default_factory=list)  # new in the vocabulary, so their rows must be trained
    adds_bos: bool = False
    encoded_apart: int = 0

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        self.bos_id, self.eos_id, self.pad_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        controls = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
        flags = {t.content: t for t in tokenizer.added_tokens_decoder.values()}
        self._control_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in controls}
        self._strips = {t: (flags[t].lstrip, flags[t].rstrip) for t in controls if t in flags}
        self._controls = re.compile("|".join(map(re.escape, controls)))
        self._compiled = _environment().from_string(self.template)
        self._structures: dict[str, list[Piece]] = {}
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        whole, prompt = (BLOCK_MARK.sub("", self._render(*x)) for x in ((probe,), (probe[:1], None, True)))
        before = whole[:whole.rindex("b")]
        # "Assistant: " ends in a space that tokenizers join with the answer's first word. The generation prompt stops
        # before it, and the joined token counts as part of the answer.
        self._space_joins = prompt != before and prompt == before.rstrip(" ")
        self.prompt_is_prefix = whole.startswith(prompt)
        self.end_id = self._end_of_turn(probe)
        self.stop_ids = list(dict.fromkeys([self.end_id, self.eos_id]))

    # -- rendering

    def _render(self, messages: list[dict], tools: list | None = None, generation_prompt: bool = False) -> str:
        """Rendered text, with placeholders around generation blocks and for whatever placeholders were put in."""
        from jinja2 import TemplateError

        try:
            return self._compiled.render(messages=messages, tools=tools, add_generation_prompt=generation_prompt,
                                         **self.tokenizer.special_tokens_map)
        except (TemplateError, TypeError, KeyError, AttributeError) as fault:
            roles = " ".join(m["role"] for m in messages)
            raise UserError(f"template {self.template_name}: cannot render turns {roles}: {fault}. "
                            "Change the rows or the template.") from None

    def _structure(self, messages: list[dict], tools: list | None, generation_prompt: bool) -> list[Piece]:
        """Render with placeholders and cut into pieces. Depends on roles and tool calls only, so it is remembered."""
        names: list[str] = []
        shape = [{k: v if k == "role" else _protect(v, self._controls, names) for k, v in m.items()
                  if k not in ("content", "train") and v is not None} for m in messages]
        for i, m in enumerate(messages):
            shape[i]["content"] = None if m["content"] is None else f"{OPEN}{i}{CLOSE}"
        tools = _protect(tools, self._controls, names)
        key = json.dumps([shape, tools, generation_prompt])
        if key not in self._structures:
            text = self._render(shape, tools, generation_prompt)
            if len(self._structures) > 10_000:  # rows with tool calls are rarely alike: do not keep them for ever
                self._structures.clear()
            self._structures[key] = self._cut(text, messages, names)
        return self._structures[key]

    def _cut(self, text: str, messages: list[dict], names: list[str]) -> list[Piece]:
        """Cut rendered text at placeholders and control tokens; mark the answers."""
        assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        tagged = f"{OPEN}+{CLOSE}" in text
        pieces, turn, block = [], None, 0
        for i, part in enumerate(PLACEHOLDER.split(text)):
            if i % 2 == 0:
                pieces += [Piece(text=t, control=c, turn=turn) for t, c in self._split_controls(part)]
            elif part == "+":
                turn, block = assistants[block] if block < len(assistants) else None, block + 1
            elif part == "-":
                turn = None
            elif part.startswith("s"):
                pieces.append(Piece(text=names[int(part[1:])], turn=turn))
            else:
                pieces.append(Piece(message=int(part), turn=turn))
        return pieces if tagged else _mark_answers(pieces, assistants)

    def _split_controls(self, text: str) -> Iterable[tuple[str, int | None]]:
        """Template text -> (text, None) and ("", control id), whitespace beside a token cut where the token says so."""
        start, eats_next = 0, False
        for match in [*self._controls.finditer(text), None]:
            end = len(text) if match is None else match.start()
            left, right = self._strips.get(match.group(), (False, False)) if match else (False, False)
            plain = text[start:end].lstrip() if eats_next else text[start:end]
            if plain.rstrip() if left else plain:
                yield (plain.rstrip() if left else plain), None
            if match:
                yield "", self._control_ids[match.group()]
                start, eats_next = match.end(), right

    def _end_of_turn(self, probe: list[dict]) -> int:
        answer = [p for p in self._structure(probe, None, False) if p.turn is not None]
        if not answer or answer[-1].control is None:
            raise UserError(f"template {self.template_name}: an answer is not followed by a control token, so a model "
                            "could never learn to stop. End the assistant's turn with eos_token or a chat token.")
        return answer[-1].control

    # -- encoding

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Encode plain texts; control strings in them stay text."""
        if not texts:
            return []
        if self.native is not None:
            return self.native.encode(texts)
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode_rows(self, rows: list[Row]) -> list[Encoded]:
        """Encode rows in one batch. Every row keeps its place; a row without an answer has no trained token."""
        layouts = [self._layout_text(row.text) if row.messages is None else
                   self._layout(row.messages, row.tools, self._trained_turns(row.messages)) for row in rows]
        return self._encode(layouts)

    def prompt_ids(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """Ids of the conversation so far and the generation prompt: what the model sees before it answers."""
        layout = self._layout(messages, tools, frozenset(), generation_prompt=True)
        return self._encode([layout])[0].input_ids.tolist()

    def text_prompt_ids(self, text: str) -> list[int]:
        """Ids of plain text to be continued, for a base model or a model of plain text."""
        return ([self.bos_id] if self.adds_bos else []) + self.encode_texts([text])[0]

    def _trained_turns(self, messages: list[dict]) -> frozenset[int]:
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self.assistant_turns == "last":
            turns = turns[-1:]
        return frozenset(i for i in turns if messages[i].get("train", True))

    def _layout_text(self, text: str) -> list[tuple[int | None, list[tuple[str, bool]]]]:
        layout = [(self.bos_id, [("", False)])] if self.adds_bos else []
        return [*layout, (None, [(text, True)]), (self.eos_id, [("", True)])]

    def _layout(self, messages: list[dict], tools: list | None, trained: frozenset[int],
                generation_prompt: bool = False) -> list[tuple[int | None, list[tuple[str, bool]]]]:
        """A row as a list of (control id, [("", trained)]) and (None, [(text, trained), ...]): runs between controls."""
        pieces = self._structure(messages, tools, generation_prompt)
        if self.template_name not in BUILT_IN:
            messages = self._as_rendered(pieces, messages, tools, generation_prompt)
        layout, run = [], []
        for piece in pieces:
            learnt = self.train_on_prompt or piece.turn in trained
            if piece.control is not None:
                if run:
                    layout.append((None, run))
                    run = []
                layout.append((piece.control, [("", learnt)]))
                continue
            text = piece.text if piece.message is None else messages[piece.message]["content"] or ""
            if run and run[-1][1] == learnt:
                run[-1] = (run[-1][0] + text, learnt)
            elif text:
                run.append((text, learnt))
        return [*layout, (None, run)] if run else layout

    def _as_rendered(self, pieces: list[Piece], messages: list[dict], tools: list | None,
                     generation_prompt: bool) -> list[dict]:
        """Check that the template puts contents in as they are (or stripped), and return them so."""
        truth = BLOCK_MARK.sub("", self._render(messages, tools, generation_prompt))
        spelled = {i: token for token, i in self._control_ids.items()}
        for candidate in (messages, [{**m, "content": m["content"].strip() if m["content"] else m["content"]}
                                     for m in messages]):
            text = "".join(spelled[p.control] if p.control is not None else p.text if p.message is None
                           else candidate[p.message]["content"] or "" for p in pieces)
            if _squeeze(text) == _squeeze(truth):
                return candidate
        raise UserError(f"template {self.template_name}: it changes the text of a message "
                        f"({messages[0]['content']!r:.60} …) in a way that cannot be followed token by token. "
                        "Use a template that inserts contents as they are.")

    def _encode(self, layouts: list[list[tuple[int | None, list[tuple[str, bool]]]]]) -> list[Encoded]:
        """Encode all runs of all rows in one call of the tokenizer, then put the rows together."""
        slots: dict[str, int] = {}
        for layout in layouts:
            for control, run in layout:
                if control is None:
                    for text in self._boundary_texts(run):
                        slots.setdefault(text, len(slots))
        ids = dict(zip(slots, self.encode_texts(list(slots))))
        return [self._assemble(layout, ids) for layout in layouts]

    def _boundary_texts(self, run: list[tuple[str, bool]]) -> list[str]:
        """The whole run, and what of it precedes each change between trained and not trained."""
        texts, text = [], ""
        for i, (part, trained) in enumerate(run):
            if i:
                texts.append(text.rstrip(" ") if trained and self._space_joins else text)
            text += part
        return [text, *texts]

    def _assemble(self, layout: list, ids: dict[str, list[int]]) -> Encoded:
        tokens: list[int] = []
        trained: list[bool] = []
        for control, run in layout:
            if control is not None:
                tokens.append(control)
                trained.append(run[0][1])
                continue
            whole, *prefixes = (ids[t] for t in self._boundary_texts(run))
            if all(whole[:len(p)] == p for p in prefixes):
                ends = [*map(len, prefixes), len(whole)]
            else:
                self.encoded_apart += 1
                apart = self.encode_texts([text for text, _ in run])
                whole, ends = sum(apart, []), np.cumsum([len(a) for a in apart]).tolist()
            start = 0
            for (_, learnt), end in zip(run, ends):
                trained += [learnt] * (end - start)
                start = end
            tokens += whole
        mask = np.array(trained, dtype=bool)
        mask[:1] = False  # nothing comes before the first token, so it cannot be predicted
        return Encoded(np.array(tokens, dtype=np.int32), mask)

    # -- text and files

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text without control tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def fingerprint(self) -> str:
        """sha256 of all that decides ids and masks."""
        parts = [self.tokenizer.backend_tokenizer.to_str(), self.template, str(self.tokenizer.special_tokens_map),
                 self.native.sha256 if self.native else "", self.assistant_turns, str(self.train_on_prompt),
                 str(self.adds_bos), str(FORMAT)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer and its chat template, in the form `transformers` loads."""
        self.tokenizer.chat_template = self.template
        self.tokenizer.save_pretrained(str(directory))

    def prove(self, rows: list[Row]) -> dict[str, int]:
        """Check on real rows that SentencePiece and the converted tokenizer agree, and that the saved template gives
        the ids used here. Rows with control strings in their text are left out of the second. Raises UserError."""
        texts = [m["content"] for row in rows for m in row.messages or [] if m["content"]]
        texts += [row.text for row in rows if row.messages is None]
        found = prove_equal(self.native, self.tokenizer, texts) if self.native else {"texts": len(texts), "changed": sum(
            self.tokenizer.decode(i) != t for t, i in zip(texts, self.encode_texts(texts)))}
        found["template_rows"] = found["template_differs"] = 0
        self.tokenizer.chat_template = self.template
        for row, encoded in zip(rows, self.encode_rows(rows)):
            if row.messages is None or self._controls.search(json.dumps(row.messages, ensure_ascii=False)):
                continue
            plain = [{k: v for k, v in m.items() if k != "train" and v is not None} for m in row.messages]
            served = self.tokenizer.apply_chat_template(plain, tools=row.tools, tokenize=True)["input_ids"]
            found["template_rows"] += 1
            found["template_differs"] += list(served) != encoded.input_ids.tolist()
        return found


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _protect(value: object, controls: re.Pattern, names: list[str]) -> object:
    """Replace control strings inside the strings of tool calls and tool lists by placeholders; `names` collects them."""
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


def _mark_answers(pieces: list[Piece], assistants: list[int]) -> list[Piece]:
    """For a template without generation blocks: an answer is its content and what follows, through the first control."""
    turn = None
    for piece in pieces:
        if piece.message is not None:
            turn = piece.message if piece.message in assistants else None
        piece.turn = turn
        if piece.control is not None:
            turn = None
    return pieces


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
            marks = [nodes.Output([nodes.TemplateData(f"{OPEN}{sign}{CLOSE}")]).set_lineno(line) for sign in "+-"]
            return [marks[0], *body, marks[1]]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, separators: tuple | None = None,
               sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        from datetime import datetime

        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def load_tokenizer(path: str, revision: str | None = None) -> tuple[PreTrainedTokenizerFast, SentencePiece | None]:
    """Load a bare SentencePiece `.model`, a directory, or a Hub id; raise UserError with the way out."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = Path(path)
    if place.is_dir() and not (place / "tokenizer.json").exists() and not (place / "vocab.json").exists():
        models = sorted(place.glob("*.model"))
        if not models:
            raise UserError(f"{path}: no tokenizer in this directory (tokenizer.json or *.model). "
                            "Name one with --tokenizer_path.")
        place = models[0]
    if place.suffix == ".model":
        native = SentencePiece(place)
        return to_fast(native), native
    if not place.exists() and (place.suffix or path.startswith((".", "/")) or path.count("/") != 1):
        raise UserError(f"{path}: no such file or directory. --tokenizer_path takes a .model file, a directory, or a Hub id.")
    # tokenizer.json is the truth; a class named beside it may rebuild its own normaliser and give other ids
    loader = PreTrainedTokenizerFast if (place / "tokenizer.json").exists() else AutoTokenizer
    try:
        options = {} if place.exists() else {"revision": revision}
        tokenizer = loader.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as fault:
        raise UserError(f"{path}: the tokenizer cannot be loaded ({type(fault).__name__}: {str(fault).splitlines()[0]:.120}"
                        "). Give a local directory with tokenizer.json, or check the Hub id and the network.") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{path}: the tokenizer has no fast version, and exact masks need one. Convert it to tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no eos_token, so an answer could not end. Set one in tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks never ask for the pad id, so the end of turn stays trained
    return tokenizer, None


def load_chat(tokenizer_path: str, template: str = "chatml", *, revision: str | None = None,
              system_prompt: str | None = None, assistant_turns: str = "all", train_on_prompt: bool = False) -> Chat:
    """Load a tokenizer and give it a template: chatml, instruct, chat, raw, model (the tokenizer's own) or a .jinja file.

    `system_prompt` becomes part of the template: it is used where a conversation does not begin with a system turn.
    """
    tokenizer, native = load_tokenizer(tokenizer_path, revision)
    plain = tokenizer("a")["input_ids"]
    adds_bos = tokenizer.bos_token_id is not None and (native is not None or plain[:1] == [tokenizer.bos_token_id])
    added: list[str] = []
    if template == "chatml":
        vocabulary = tokenizer.get_vocab()
        added = [t for t in CHATML_TOKENS if t not in vocabulary]
        missing = [t for t in CHATML_TOKENS if t not in tokenizer.all_special_tokens]
        if missing:  # special, so that the same strings in a text can be told apart from them
            tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    source = _template_source(template, tokenizer, tokenizer_path, adds_bos)
    if system_prompt is not None:
        turn = json.dumps(system_prompt, ensure_ascii=False)
        source = ("{%- if not messages or messages[0].role != 'system' -%}\n{%- set messages = "
                  f"[{{'role': 'system', 'content': {turn}}}] + messages -%}}\n{{%- endif -%}}\n") + source
    return Chat(tokenizer, template, source, native, assistant_turns, train_on_prompt, added, adds_bos)


def _template_source(template: str, tokenizer: PreTrainedTokenizerFast, tokenizer_path: str, adds_bos: bool) -> str:
    if template == "model":
        if not isinstance(tokenizer.chat_template, str):
            raise UserError(f"{tokenizer_path}: the tokenizer brings no chat template. "
                            f"Use --prompt_template {'|'.join(BUILT_IN)} or a .jinja file.")
        return tokenizer.chat_template
    if template.endswith(".jinja"):
        try:
            return Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise UserError(f"{template}: {getattr(fault, 'strerror', None) or fault}. --prompt_template takes "
                            f"{', '.join(BUILT_IN)}, model, or a .jinja file.") from None
    if template not in BUILT_IN:
        raise UserError(f"--prompt_template: {template!r} is unknown. Use {', '.join(BUILT_IN)}, model, or a .jinja file.")
    return ("{{- bos_token -}}\n" if adds_bos else "") + (TEMPLATE_DIR / f"{template}.jinja").read_text(encoding="utf-8")


def load_saved_chat(directory: str) -> Chat:
    """The tokenizer and template that a run (or a merged model of it) left in `directory`, as they were in training."""
    config: dict = {}
    for place in (Path(directory), Path(directory).parent):
        if (place / "run.json").is_file():
            config = json.loads((place / "run.json").read_text(encoding="utf-8"))["config"]
            break
    known = config.get("prompt_template") in BUILT_IN  # the saved form of another has the system prompt in it already
    return load_chat(directory, config["prompt_template"] if known else "model",
                     system_prompt=config.get("system_prompt") if known else None,
                     assistant_turns=config.get("assistant_turns", "all"),
                     train_on_prompt=config.get("train_on_prompt", False))
