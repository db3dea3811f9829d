"""A template file in YAML -> one Jinja chat template that needs nothing beside it.

    instruction_data_transformation:
      role_mapping: {human_1: User1, gpt: Assistant}     names in the rows -> names that the template sees
    jinja2_chat_template: ...                             glues `messages` and `chat_template_data` together
    chat_template_data:
      assistant_role: Assistant                           whose turns are answers
      special_tokens:
        b_include_to_loss_token: ^                        begin and end of what is trained: any strings, they are gone
        e_include_to_loss_token: $                        before the text is tokenised
        e_assistant_token: °                              every other one becomes a control token

The form and its reading are those of Modalities (apply_chat_template): a line end between two tags of the template is
no part of the text. The markers become places in the template, never characters, so a `^` or `$` in a message is text.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass

from common.config import nearest
from common.faults import UserError
from common.messages import ROLE_MAP, ROLES
from common.structured import read_structured

KEYS = ("settings", "instruction_data_transformation", "jinja2_chat_template", "chat_template_data")
MARKERS = ("b_include_to_loss_token", "e_include_to_loss_token")
IGNORED = {"split_config": "--val_split_ratio and --test_split_ratio split the rows",
           "messages_key": "the form of the rows is detected",
           "src_path": "--dataset_paths names the rows",
           "dst_path": "--export_rendered names a file for the rendered rows",
           "pbin_creation_config_file_path": "--max_seq_length, --packing and --cache_dir say how rows are stored"}
# `names` holds the template's name of each role, `known` those that a message may bring along as its speaker. A
# generation prompt is what stands before the begin of the next answer: an empty one is rendered, and everything from
# its begin (`cut`, longer than all contents together, so that none of them holds it) is cut off.
HEAD = r"""
{{%- set names = {names} -%}}
{{%- set known = {known} -%}}
{{%- set seen = namespace(messages=[]) -%}}
{{%- for message in messages -%}}
{{%- set name = message.speaker if message.speaker in known else names.get(message.role, message.role) -%}}
{{%- set seen.messages = seen.messages + [dict(message, role=name)] -%}}
{{%- endfor -%}}
{{%- set cut = '' -%}}
{{%- if add_generation_prompt -%}}
{{%- set cut = '\ue002' ~ '\ue003' * (messages | map(attribute='content') | join | length) -%}}
{{%- set seen.messages = seen.messages + [{{'role': {assistant}, 'content': ''}}] -%}}
{{%- endif -%}}
{{%- set messages = seen.messages -%}}
{{%- set chat_template_data = {data} -%}}
{{%- set rendered %}}
"""
FACTS = "{#- template file: "
TAIL = ("{%+ endset -%}\n{{- (rendered.rpartition(cut)[0] | replace(cut, '')) if add_generation_prompt else rendered "
        "-}}")


@dataclass(frozen=True)
class TemplateFile:
    """A template file as it was read."""

    path: str
    template: str
    data: dict  # chat_template_data, special_tokens in it
    speakers: dict[str, str]  # names in the rows -> names in the template
    assistant: str  # the assistant's name in the template
    notes: list[str]  # a line for each setting of the file that has no effect here

    @property
    def signs(self) -> dict[str, str]:
        """Special tokens that are no markers: name -> string."""
        return {name: text for name, text in self.data["special_tokens"].items() if name not in MARKERS}


def read_template_file(path: str) -> TemplateFile:
    """Read and check a template file; raise UserError with all findings."""
    found = read_structured(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: the file holds no keys. A template file needs {', '.join(KEYS[2:])}.")
    problems = []
    for key in found:
        if key not in KEYS:
            near = nearest(str(key), KEYS)
            problems.append(f"{key}: there is no such key. " + (f"Did you mean {near}?" if near else
                                                                f"There are: {', '.join(KEYS)}."))
    template, data = found.get("jinja2_chat_template"), found.get("chat_template_data")
    tokens = data.get("special_tokens") if isinstance(data, dict) else None
    transformation = found.get("instruction_data_transformation") or {}
    speakers = (transformation.get("role_mapping") if isinstance(transformation, dict) else None) or {}
    if not isinstance(template, str) or not template.strip():
        problems.append("jinja2_chat_template: it is missing. Give the template as a text block (|).")
    if not isinstance(speakers, dict) or not all(isinstance(x, str) for pair in speakers.items() for x in pair):
        problems.append("role_mapping: it is no mapping of names to names. Write e.g. human: User.")
        speakers = {}
    if not isinstance(tokens, dict) or not all(isinstance(x, str) and x for x in tokens.values()):
        problems.append("chat_template_data.special_tokens: it is no mapping of names to strings. It needs "
                        f"{' and '.join(MARKERS)}.")
    else:
        problems += [f"chat_template_data.special_tokens.{name}: it is missing. It marks what is trained."
                     for name in MARKERS if name not in tokens]
        problems += [f"jinja2_chat_template: it does not use {name}, so nothing would be trained. Put it around the "
                     "assistant's text." for name in MARKERS
                     if name in tokens and isinstance(template, str) and name not in template]
    assistant = _assistant(data, speakers) if isinstance(data, dict) else None
    if isinstance(data, dict) and assistant is None:
        problems.append("chat_template_data.assistant_role: it is missing, and role_mapping names no role that is "
                        "known as the assistant's. Say whose turns are trained.")
    problems += [f'role_mapping calls {theirs} "{name}", but chat_template_data.assistant_role is "{assistant}", so '
                 "that its turns would not be trained. Make them equal." for theirs, name in speakers.items()
                 if assistant not in (None, theirs, *speakers.values()) and _role(theirs) == "assistant"]
    if isinstance(data, dict):
        problems += _not_plain(data, "chat_template_data")
    if problems:
        raise UserError(f"{path}: " + (problems[0] if len(problems) == 1 else "\n  ".join(["", *problems])))
    settings = found.get("settings") or {}
    notes = [f"{path}: settings.{key} is not used: "
             f"{IGNORED.get(key, 'it is about files and processes of another program')}"
             for key in (settings if isinstance(settings, dict) else ())]
    return TemplateFile(str(path), template, data, speakers, assistant, notes)


def _assistant(data: dict, speakers: dict[str, str]) -> str | None:
    if isinstance(data.get("assistant_role"), str):
        return data["assistant_role"]
    return next((name for theirs, name in speakers.items() if _role(theirs) == "assistant"), None)


def _role(name: str) -> str | None:
    return name if name in ROLES else ROLE_MAP.get(name)


def _not_plain(value: object, place: str) -> list[str]:
    """Findings for what cannot be written into a template: dates, NaN, keys that are no text."""
    if isinstance(value, dict):
        found = [f"{place}: the key {key!r} is no text. Quote it." for key in value if not isinstance(key, str)]
        return found + [line for key, item in value.items() for line in _not_plain(item, f"{place}.{key}")]
    if isinstance(value, list):
        return [line for i, item in enumerate(value) for line in _not_plain(item, f"{place}[{i}]")]
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return []
    return [f"{place}: {value!r} is neither text nor number. Quote it."]


def role_map(file: TemplateFile) -> dict[str, tuple[str, str]]:
    """Names in the rows -> (role, the template's name of the speaker)."""
    found = {}
    for theirs, name in {**{name: name for name in file.speakers.values()}, file.assistant: file.assistant,
                         **file.speakers}.items():
        role = _role(theirs) or _role(name.lower()) or "user"
        if name == file.assistant:
            role = "assistant"
        elif role == "assistant":
            role = "user"
        found[theirs] = (role, name)
    return found


def to_jinja(file: TemplateFile, signs: dict[str, str]) -> str:
    """The whole chat template. signs: name of a special token -> the control token that stands for it.

    Its first line is a comment with what reading rows and showing text need (`facts`), so that it stays with the model.
    """
    roles = role_map(file)
    names: dict[str, str] = {}
    for role, name in roles.values():
        names.setdefault(role, name)
    shown = {token: file.signs[name] for name, token in signs.items() if token != file.signs[name]}
    markers = dict(zip(MARKERS, (_Expression("cut ~ (generation_begins | default(''))"),
                                 _Expression("(generation_ends | default(''))"))))
    data = {**file.data, "special_tokens": {**file.data["special_tokens"], **signs, **markers}}
    head = HEAD.format(names=_literal(names), known=_literal([name for _, name in roles.values()]),
                       assistant=_literal(file.assistant), data=_literal(data))
    facts_text = json.dumps({"roles": roles, "signs": shown}, ensure_ascii=False).replace("#", "\\u0023")
    # line ends between tags are no text; Jinja drops the last one of a file
    body = file.template.replace("}\n{", "}{").removesuffix("\n")
    return f"{FACTS}{facts_text} -#}}{head}{body}{TAIL}"


def facts(source: str) -> dict:
    """{"roles": name in the rows -> [role, speaker], "signs": control token -> what the file calls it} of a chat
    template that `to_jinja` made; of any other both are empty."""
    start = source.find(FACTS)  # BOS and system prompt may stand before it
    if start < 0:
        return {"roles": {}, "signs": {}}
    try:
        return json.JSONDecoder().raw_decode(source, start + len(FACTS))[0]
    except ValueError:
        return {"roles": {}, "signs": {}}


class _Expression(str):
    """Jinja source, not a text."""


def _literal(value: object) -> str:
    """A Jinja literal."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, _Expression):
        return str(value)
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
