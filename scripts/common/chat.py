"""Messages and a template -> token ids and the mask of trained tokens: for training, generation and evaluation alike.

    chatml   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    trained                                                          ^^^^^^^^^^^^^^^

Text between two control tokens is encoded in one piece, as `apply_chat_template` does, so the template saved with a run
gives the same ids. The prompt's ids are a prefix of the whole: where a tokenizer would join the end of the prompt and
the beginning of the answer in one token, the two are encoded apart and counted (`Chat.encoded_apart`).
"""
from __future__ import annotations

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.faults import UserError
from common.hub import local_model
from common.layout import Fixed, Layout, Layouts, boundary_texts, cut_at
from common.render import PROBE, Structure, Template, today
from common.spm import SentencePiece, to_fast
from common.template_file import TemplateFile, facts, read_template_file, to_jinja
from common.words import Words, of_fast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from common.rows import Row

TEMPLATE_DIR = Path(__file__).resolve().parents[2] / "config" / "templates"
BUILT_IN = ("chatml", "instruct", "chat", "raw")
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
FORMAT = 4  # part of every cache key: raise it when the ids or masks of any template change


@dataclass(slots=True)
class Encoded:
    """One example. input_ids: int32 (T,). trained: bool (T,), True where the token is a target of the loss."""

    input_ids: np.ndarray
    trained: np.ndarray


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
    notes: list[str] = field(default_factory=list)  # what a template file said that has no effect, and the like
    replaces: bool = False  # the tokenizer brings another template
    loads_with: str = "AutoTokenizer"  # the class of transformers that reads what is saved as it is
    encoded_apart: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # texts of rows that the template does not put in

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        self.bos_id, self.eos_id, self.pad_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        # Llama 3 and others name bos and eos only; their chat tokens are special by a flag in tokenizer.json.
        special = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._controls = {t.content: i for i, t in special.items()} | {
            t: tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}
        self._inner = None if self.native else _inside_of_texts(tokenizer)
        self._layouts = Layouts(self._encode_inside, {i for i, t in special.items() if t.lstrip},
                                {i for i, t in special.items() if t.rstrip}, self.train_on_prompt)
        never = set(self._controls.values())
        if tokenizer.unk_token_id not in (self.eos_id, self.bos_id):
            never.discard(tokenizer.unk_token_id)  # text may hold characters the vocabulary lacks
        self._never_from_text = np.zeros(len(tokenizer), dtype=bool)
        self._never_from_text[list(never)] = True
        self._template = Template(self.template_name, self.template, self._controls, tokenizer.special_tokens_map,
                                  trusted=self.template_name in BUILT_IN)
        before, prompt = self._template.before_answer
        # "Assistant: " ends in a space that tokenizers join with the answer's first word. The generation prompt stops
        # before it, and the joined token counts as part of the answer.
        self._space_joins = prompt != before and prompt == before.rstrip(" ")
        if not (prompt == before or self._space_joins or self._template.lead_in):
            self.notes.append(f"template {self.template_name}: it asks for an answer with {prompt[-40:]!r}, but in a "
                              f"conversation an answer comes after {before[-40:]!r}: the model will be asked otherwise "
                              "than it is trained")
        self.end_id = self._end_of_turn()
        self.stop_ids = list(dict.fromkeys([self.end_id, self.eos_id]))

    def _end_of_turn(self) -> int:
        answer = [p for p in self._template.follow([*PROBE])[0].pieces if p.turn is not None]
        if any(PROBE[p.turn]["role"] != "assistant" for p in answer):
            raise UserError(f"template {self.template_name}: it marks a user's text as trained. Put the marks around "
                            "the assistant's text alone; --train_on_prompt trains everything.")
        while answer and not answer[-1].text.strip() and answer[-1].control is None and answer[-1].message is None:
            answer.pop()  # SmolLM3's blocks reach to the newline behind the end
        if not answer or answer[-1].control is None:
            raise UserError(f"template {self.template_name}: what is trained of an answer does not end in a control "
                            "token, so a model could never learn to stop. End it with eos_token or a chat token.")
        return answer[-1].control

    @property
    def control_pattern(self) -> re.Pattern:
        """Matches the strings of the control tokens."""
        return self._template.control_pattern

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(self._controls.values())

    @cached_property
    def role_map(self) -> dict[str, tuple[str, str]]:
        """Names of roles in the rows -> (role, the template's name for who speaks), as a template file has them."""
        return {name: tuple(pair) for name, pair in facts(self.template)["roles"].items()}

    # -- rows and prompts

    def encode_rows(self, rows: list[Row]) -> list[Encoded]:
        """Encode rows in one batch. Every row keeps its place; a row without an answer has no trained token.

        Raise UserError where the template cannot follow a row, or the tokenizer reads a control token in a text.
        """
        return self._encode([self._row_layout(row) for row in rows])

    def prompt_ids(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """Ids of the conversation so far and the generation prompt: what the model sees before it answers."""
        layout = self._layout(messages, tools, frozenset(), generation_prompt=True)
        return self._encode([layout])[0].input_ids.tolist()

    def text_prompt_ids(self, text: str) -> list[int]:
        """Ids of plain text to be continued, for a base model or a model of plain text."""
        return ([self.bos_id] if self.adds_bos else []) + self.encode_texts([text])[0]

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Encode plain texts; control strings in them stay text. Raises UserError if the tokenizer cannot do that."""
        return [np.frombuffer(ids, np.int32).tolist() for ids in self._encode_texts(texts)]

    def _trained_turns(self, messages: list[dict]) -> frozenset[int]:
        trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
        if self.assistant_turns == "last":
            last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
            trained = [i for i in trained if i == last]
        return frozenset(trained)

    def rendered(self, row: Row) -> tuple[str, list[tuple[int, int]]]:
        """A row as text, without the BOS, and where in it (characters from, to) its trained parts are.

        Signs that a control token stands for are shown as the template file calls them.
        """
        layout = self._row_layout(row)
        items = [part for item in layout for part in (item.items if type(item) is Fixed else [item])]
        if items and isinstance(items[0], tuple) and items[0][0] == self.bos_id:
            items = items[1:]
        names = {i: t for t, i in self._controls.items()}
        shown = facts(self.template)["signs"]
        parts = [part for item in items for part in (
            item if isinstance(item, list) else [(shown.get(names[item[0]], names[item[0]]), item[1])])]
        spans, at = [], 0
        for text, learnt, *_ in parts:
            if learnt and text:
                spans = [*spans[:-1], (spans[-1][0], at + len(text))] if spans and spans[-1][1] == at else \
                    [*spans, (at, at + len(text))]
            at += len(text)
        return "".join(part[0] for part in parts), spans

    # -- a row before it is encoded

    def _row_layout(self, row: Row) -> Layout:
        if row.messages is not None:
            return self._layout(row.messages, row.tools, self._trained_turns(row.messages))
        begin, end = self._around_text
        return [*begin, [(row.text, True, True)], end]

    @cached_property
    def _around_text(self) -> tuple[Layout, Fixed]:
        begin = [self._layouts.fixed([(self.bos_id, False)])] if self.adds_bos else []
        return begin, self._layouts.fixed([(self.eos_id, True)])

    def _layout(self, messages: list[dict], tools: list | None, trained: frozenset[int],
                generation_prompt: bool = False) -> Layout:
        structure, contents = self._template.follow(messages, tools, generation_prompt)
        if len(structure.shows) < len(messages) or structure.hides_calls:
            self._count_left_out(messages, structure)
        layout = self._layouts.of(structure, contents, trained)
        if self._inner is not None and type(layout[0]) is Fixed and type(layout[0].items[0]) is list:
            run, *rest = layout[0].items  # it begins the text: `_encode` does it
            return [run, *([self._layouts.fixed(rest)] if rest else []), *layout[1:]]
        return layout

    def _count_left_out(self, messages: list[dict], structure: Structure) -> None:
        """What of the messages the template does not put in. Raise UserError if nothing of an answer is left: it would
        teach to end at once."""
        self.left_out.update([f"{m['role']} texts left out by the template" for i, m in enumerate(messages)
                              if m["content"] and i not in structure.shows])
        if structure.hides_calls:
            if any("tool_calls" in m and not m["content"] for m in messages):
                raise UserError(f"template {self.template_name}: it does not show tool calls, and there is an answer "
                                "of nothing else. Take a template that does (chatml), or leave such rows out.")
            self.left_out["turns whose tool calls are left out by the template"] += sum(
                "tool_calls" in m for m in messages)

    # -- encoding

    def _encode(self, layouts: list[Layout]) -> list[Encoded]:
        """Encode all runs of all rows in one call of the tokenizer, then put the rows together."""
        runs = [boundary_texts(item, self._space_joins) for layout in layouts for item in layout
                if type(item) is not Fixed]
        ids_of = _looked_up(runs, self._encode_inside)
        tables = repeat(ids_of) if self._inner is None else self._tables(layouts, runs, ids_of)
        parts = iter([cut_at(ids[own[0]], [ids[text] for text in own[1:]]) or self._apart(ids is not ids_of, *own)
                      for own, ids in zip(runs, tables)])
        ids: list[bytes] = []
        trained: list[bytes] = []
        ends = [0]
        for layout in layouts:
            for item in layout:
                if type(item) is Fixed:
                    ids.append(item.ids)
                    trained.append(item.trained)
                else:
                    for (_, learnt, _), part in zip(item, next(parts)):
                        ids.append(part)
                        trained.append((b"\1" if learnt else b"\0") * (len(part) // 4))
            ends.append(len(ids))
        sizes = np.fromiter(map(len, ids), np.intp)
        bounds = (np.append(0, np.cumsum(sizes))[ends] // 4).tolist()
        flat, learnt = np.frombuffer(b"".join(ids), np.int32), np.frombuffer(bytearray().join(trained), np.bool_)
        # nothing comes before the first token of a row, so it cannot be predicted
        learnt[[start for start, end in zip(bounds, bounds[1:]) if end > start]] = False
        return [Encoded(flat[start:end], learnt[start:end]) for start, end in zip(bounds, bounds[1:])]

    def _tables(self, layouts: list[Layout], runs: list[list[str]], inside: dict[str, bytes]) -> list[dict[str, bytes]]:
        """Where to look up the ids of each run: what begins a text has others than what stands inside of one."""
        plain = self._around_text[1]
        begins = [i == 0 or layout[-1] is plain for layout in layouts for i, item in enumerate(layout)
                  if type(item) is not Fixed]
        first = _looked_up([own for own, begun in zip(runs, begins) if begun], self._encode_texts)
        return [first if begun else inside for begun in begins]

    def _apart(self, begins: bool, text: str, *before: str) -> list[bytes]:
        """The parts of a run encoded each by itself, where a token would reach over the beginning or end of an answer.
        begins: the run begins the whole text. before: what precedes each of the parts."""
        self.encoded_apart += 1
        cuts = [0, *map(len, before), len(text)]
        first, *others = [text[a:b] for a, b in zip(cuts, cuts[1:])]
        return [*(self._encode_texts if begins else self._encode_inside)([first]), *self._encode_inside(others)]

    def _encode_inside(self, texts: list[str]) -> list[bytes]:
        """`_encode_texts` of what does not begin a text."""
        return self._encode_texts(texts, self._inner)

    def _encode_texts(self, texts: list[str], inner: PreTrainedTokenizerFast | None = None) -> list[bytes]:
        """Plain texts -> int32 ids of each side by side, none of them a control id."""
        if self.native is not None:  # cannot emit a control id, whatever the text
            return self.native.encode_bytes(texts)
        found = self._words.encode(texts) if self._words else self._encode_whole(texts, inner)
        # Unigram tokenizers without a piece for "<" read </s> in a text as the token, whatever they are asked.
        if self._controls_in(b"".join(found)).size:
            text, controls = next((t, c) for t, c in zip(texts, map(self._controls_in, found)) if c.size)
            token = self.tokenizer.convert_ids_to_tokens(int(controls[0]))
            raise UserError(f"tokenizer: it reads {token!r} in a text as the control token ({_around(text, token)!r}). "
                            "Remove the string from the rows, or use the SentencePiece .model it was made from.")
        return found

    def _controls_in(self, content: bytes) -> np.ndarray:
        """Those of the ids that cannot come from a text."""
        ids = np.frombuffer(content, np.int32)
        return ids[self._never_from_text[ids]]

    @cached_property
    def _words(self) -> Words | None:
        return of_fast(self.tokenizer, self._encode_whole)

    def _encode_whole(self, texts: list[str], inner: PreTrainedTokenizerFast | None = None) -> list[bytes]:
        if not texts:
            return []
        tokenizer = inner or self.tokenizer
        found = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
                          return_token_type_ids=False, verbose=False)["input_ids"]
        return [np.array(ids, dtype=np.int32).tobytes() for ids in found]

    # -- text and files

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text without control tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def said(self, ids: Iterable[int]) -> str:
        """An answer's ids -> its text, without what the template has every answer begin with (an empty thought)."""
        return self.decode(ids).removeprefix(self.control_pattern.sub("", self._template.lead_in))

    @cached_property
    def _tokenizer_state(self) -> str:
        """The tokenizer's definition, without the padding and truncation of its last call."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return json.dumps({k: v for k, v in state.items() if k not in ("padding", "truncation")}, sort_keys=True)

    def fingerprint(self) -> str:
        """sha256 of all that decides ids and masks."""
        parts = [self._tokenizer_state, self.template, str(sorted(self._controls.items())), str(self.eos_id),
                 self.native.sha256 if self.native else "", self.assistant_turns, str(self.train_on_prompt),
                 str(self.adds_bos), str(FORMAT)]
        if self.template_name not in BUILT_IN and "_token" in self.template:
            parts.append(str(sorted(self.tokenizer.special_tokens_map.items())))
        if "strftime_now" in self.template:
            parts.append(today().strftime("%Y-%m-%d"))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer and its chat template, in the form `transformers` loads."""
        self.tokenizer.chat_template = self.template
        self.tokenizer.save_pretrained(str(directory))


def _looked_up(runs: list[list[str]], encode: Callable[[list[str]], list[bytes]]) -> dict[str, bytes]:
    texts = list(dict.fromkeys(chain.from_iterable(runs)))
    return dict(zip(texts, encode(texts)))


def _inside_of_texts(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast | None:
    """For a tokenizer that puts a ▁ before the beginning of a whole text alone (Mistral v0.3, Llama 2 as transformers 5
    saves it): the same one without, for what stands behind a control token. Others need none."""
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer is not None else {}
    metaspaces = [part for part in (state, *state.get("pretokenizers", ())) if part.get("prepend_scheme") == "first"]
    if not metaspaces:
        return None
    from tokenizers import Tokenizer

    for part in metaspaces:
        part["prepend_scheme"] = "never"
    inner = copy.deepcopy(tokenizer)
    inner._tokenizer = Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), "pre_tokenizer": state}))
    return inner


def _around(text: str, token: str) -> str:
    at = max(0, text.find(token))
    return text[max(0, at - 30):at + 30]


def load_tokenizer(path: str) -> tuple[PreTrainedTokenizerFast, SentencePiece | None]:
    """Load a bare SentencePiece `.model`, a directory, or a Hub id; raise UserError with the way out."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = local_model(path, weights=False)
    place = Path(path)
    described = any((place / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))
    if place.is_dir() and not described:
        models = sorted(place.glob("*.model"))
        if not models:
            raise UserError(f"{path}: no tokenizer in this directory (tokenizer.json or *.model). "
                            "Name one with --tokenizer_path.")
        place = models[0]
    if place.suffix == ".model":
        native = SentencePiece(place)
        return to_fast(native), native
    if not place.exists():
        raise UserError(f"{path}: no such file or directory. A model is a directory in Hugging Face form or a Hub id; "
                        "--tokenizer_path takes a .model file as well.")
    # tokenizer.json is the truth; a class named beside it may rebuild its own normaliser and give other ids
    loader = PreTrainedTokenizerFast if (place / "tokenizer.json").exists() else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(path, trust_remote_code=False)
    except Exception as fault:
        finding = f"{type(fault).__name__}: {str(fault).strip().partition(chr(10))[0]:.120}"
        raise UserError(f"{path}: the tokenizer cannot be loaded ({finding}). Give a directory with "
                        "tokenizer.json.") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{path}: the tokenizer has no fast version, and exact masks need one. "
                        "Convert it to tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no eos_token, so an answer could not end. "
                        "Set one in tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks never ask for the pad id, so the end of turn stays trained
    return tokenizer, None


def load_chat(tokenizer_path: str, template: str = "chatml", *, system_prompt: str | None = None,
              assistant_turns: str = "all", train_on_prompt: bool = False) -> Chat:
    """Load a tokenizer and give it a template: chatml, instruct, chat, raw, model (the tokenizer's own), FILE.jinja
    or FILE.yaml (template_file.py).

    `system_prompt` becomes part of the template: it is used where a conversation does not begin with a system turn.
    """
    tokenizer, native = load_tokenizer(tokenizer_path)
    plain = tokenizer("a")["input_ids"]
    adds_bos = tokenizer.bos_token_id is not None and (native is not None or plain[:1] == [tokenizer.bos_token_id])
    added, notes = [], []
    if template.endswith((".yaml", ".yml")):
        file = read_template_file(template)
        signs, notes = _signs(file, tokenizer)
        added = _add_special(tokenizer, list(signs.values()))
        source = _with_bos(to_jinja(file, signs), adds_bos and "bos_token" not in file.template)
    else:
        added = _add_special(tokenizer, CHATML_TOKENS) if template == "chatml" else []
        source = _template_source(template, tokenizer, tokenizer_path, adds_bos)
    own = own_template(tokenizer)
    replaces = own is not None and not own.endswith(source)  # (a run's own may have a system prompt before it)
    if template == "model" and isinstance(tokenizer.chat_template, dict) and len(tokenizer.chat_template) > 1:
        others = ", ".join(name for name in tokenizer.chat_template if name != "default")
        notes.append(f"template: {tokenizer_path} brings several; the one called default is taken (others: {others}; "
                     "--prompt_template FILE.jinja takes one)")
    if system_prompt is not None:
        turn = json.dumps(system_prompt, ensure_ascii=False)
        source = ("{%- if not messages or messages[0].role != 'system' -%}\n{%- set messages = "
                  f"[{{'role': 'system', 'content': {turn}}}] + messages -%}}\n{{%- endif -%}}\n") + source
    return Chat(tokenizer, template, source, native, assistant_turns, train_on_prompt, added, adds_bos, notes, replaces)


def own_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The chat template that a tokenizer brings; of several the one called default, which transformers takes too."""
    found = tokenizer.chat_template
    found = found.get("default") if isinstance(found, dict) else found
    return found if isinstance(found, str) else None


def _add_special(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> list[str]:
    """Make these strings control tokens; return those that are new in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in tokens if t not in tokenizer.all_special_tokens]
    if missing:  # special, so that the same strings in a text can be told apart from them
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    return [t for t in tokens if t not in vocabulary]


def _signs(file: TemplateFile, tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, str], list[str]]:
    """The control token for each special token of a template file, and lines to be said.

    A string that is an ordinary token (° is one of most tokenizers) cannot be a control token as well: the model could
    not write "25 °C" without ending its turn, nor could a text be told apart from a sign. A new token stands for it.
    """
    used = {name: text for name, text in file.signs.items() if name in file.template}
    vocabulary, known = tokenizer.get_vocab(), {str(t) for t in tokenizer.added_tokens_decoder.values()}
    ordinary = {name for name, text in used.items() if text in vocabulary and text not in known}
    notes = [f"{file.path}: {name} {used[name]!r} is an ordinary token of this tokenizer; the new control token "
             f"<|{name}|> stands for it, so that {used[name]!r} in a text stays text" for name in used
             if name in ordinary]
    return {name: f"<|{name}|>" if name in ordinary else text for name, text in used.items()}, [*file.notes, *notes]


def _with_bos(source: str, adds_bos: bool) -> str:
    return "{{- bos_token -}}\n" + source if adds_bos else source


def _template_source(template: str, tokenizer: PreTrainedTokenizerFast, tokenizer_path: str, adds_bos: bool) -> str:
    if template == "model":
        if (own := own_template(tokenizer)) is None:
            brings = ("several chat templates, none of them called default" if isinstance(tokenizer.chat_template, dict)
                      else "no chat template")
            raise UserError(f"{tokenizer_path}: the tokenizer brings {brings}. "
                            f"Use --prompt_template {'|'.join(BUILT_IN)} or a .jinja or .yaml file.")
        return own
    if template.endswith(".jinja"):
        try:
            source = Path(template).read_text(encoding="utf-8-sig")
            brings = "bos_token" in source or (tokenizer.bos_token or "bos_token") in source
            return _with_bos(source, adds_bos and not brings)
        except (OSError, UnicodeDecodeError) as fault:
            raise UserError(f"{template}: {getattr(fault, 'strerror', None) or fault}. --prompt_template takes "
                            f"{', '.join(BUILT_IN)}, model, or a .jinja or .yaml file.") from None
    if template not in BUILT_IN:
        raise UserError(f"--prompt_template: {template!r} is unknown. Use {', '.join(BUILT_IN)}, model, "
                        "or a .jinja or .yaml file.")
    source = (TEMPLATE_DIR / f"{template}.jinja").read_text(encoding="utf-8")
    return _with_bos(source, adds_bos)


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
