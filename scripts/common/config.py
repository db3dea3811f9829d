"""Settings: a dataclass is the one table from which flags, file keys, checks, --help and the README's table are made.

    @dataclass
    class Config:
        steps: int = setting(100, "Optimizer steps.", unit="steps", within="[1, inf)", group="training")
        config_path: str | None = setting(None, "JSON or YAML file with settings.", path=True, action=True)

    config = parse(Config, sys.argv[1:], __doc__)      # default < --config_path < command line

Everything that is wrong is collected and refused in one `UserError`; each line says place, finding and way out.
Optional in the class: `settle(self) -> list[str]` derives values from others (its lines land in `config.notes`, for the
script to print) and `problems(self) -> list[str]` names contradictions. `config.origin[name]` says who set a value:
"default", "file" or "command line".

Paths in a file are relative to that file. Settings that also take names (`path="hub"`: a Hub id, a template) read a
value as a path if it is absolute, starts with "." or "~", ends in a known file suffix, has more than one slash, or
exists beside the file; anything else is a name. owner/name with a revision or a part (`is_hub_name`) is a name of the
Hub unless it exists. A `run.json` is a config file too: its "config" part is taken.
"""
from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable
from typing import Any

from common.faults import UserError, say
from common.structured import read_structured

LEVELS = {"default": 0, "file": 1, "command line": 2}
FILE_SUFFIXES = (".jsonl", ".json", ".gz", ".csv", ".parquet", ".model", ".jinja", ".yaml", ".yml", ".txt")
NAMES_OF_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^\s:@]+))?(:(?P<part>[^\s:]+))?")
_NUMBER = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d+))?", re.ASCII)


class _Refused(ValueError):
    """A value that does not pass; the message is finding and way out, without the place."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table: what `setting()` was given, with name and type from the dataclass."""

    name: str
    base: type          # bool, int, float, str, or a dataclass for structured settings
    many: bool          # a list of `base`
    optional: bool      # None is allowed; `none` on the command line
    default: Any
    help: str
    unit: str = ""
    choices: tuple = ()         # nothing else is allowed
    words: tuple = ()           # allowed beside the type, e.g. "recommended" beside a list of numbers; never paths
    suffixes: tuple = ()        # a text that is none of `words` has to end in one of these
    flag_off: str | None = None
    path: bool | str = False    # True: always a local path; "hub": a local path or a name
    resume: str = "fixed"       # "fixed": a change is refused on resume; "free": it may change
    group: str = ""
    within: str = ""            # interval, e.g. "[0, 1)"
    bare: str | None = None     # value of the flag without a value
    required: bool = False
    action: bool = False        # what this one start does (dry run, resume): not part of the saved config
    file_only: bool = False

    def flags(self) -> list[str]:
        """The flags that set this, e.g. ['--use_lora', '--no_lora']."""
        return [f"--{self.name}"] + ([f"--{self.flag_off or 'no_' + self.name}"] if self.base is bool else [])


def setting(default: Any, help: str, *, unit: str = "", choices: tuple = (), flag_off: str | None = None,
            path: bool | str = False, resume: str = "fixed", group: str = "", words: tuple = (),
            suffixes: tuple = (), within: str = "", bare: str | None = None, required: bool = False,
            action: bool = False, file_only: bool = False) -> Any:
    """A dataclass field with its meaning; see `Setting` for the keywords. A `group` lasts until the next one named."""
    assert resume in ("fixed", "free"), resume
    meta = {"help": help, "unit": unit, "choices": tuple(choices), "flag_off": flag_off, "path": path, "resume": resume,
            "group": group, "words": tuple(words), "suffixes": tuple(suffixes), "within": within, "bare": bare,
            "required": required, "action": action, "file_only": file_only}
    metadata = {"setting": meta}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def settings_of(cls: type) -> dict[str, Setting]:
    """The table of a dataclass: name -> Setting, in order."""
    hints, table, group = typing.get_type_hints(cls), {}, ""
    for field in dataclasses.fields(cls):
        if "setting" not in field.metadata:
            continue
        meta = dict(field.metadata["setting"])
        group = meta["group"] = meta["group"] or group
        kinds = [hints[field.name]]
        if typing.get_origin(kinds[0]) in (typing.Union, types.UnionType):
            kinds = list(typing.get_args(kinds[0]))
        plain = [kind for kind in kinds if kind is not type(None)]
        lists = [kind for kind in plain if kind is list or typing.get_origin(kind) is list]
        # `list[float] | str`: the text is one of `words`, the list is the type
        base = (typing.get_args(lists[0]) or (str,))[0] if lists else min(plain, key=lambda kind: kind is str)
        assert base in NAMES_OF_TYPES or dataclasses.is_dataclass(base), f"{field.name}: {base} is no type of a setting"
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        table[field.name] = Setting(field.name, base, bool(lists), type(None) in kinds,
                                    default, **meta)
    return table


def show(value: Any) -> str:
    """A value as it is written in JSON, shortened."""
    if isinstance(value, str | bool | int | float) or value is None:
        try:
            text = json.dumps(value, ensure_ascii=False)
        except ValueError:  # an int of more digits than python prints
            text = "a number with thousands of digits"
        return text if len(text) <= 80 else text[:77] + "..."
    return reprlib.repr(value)


def nearest(name: str, names: typing.Iterable[str]) -> str | None:
    """The most similar of `names`, or None if none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return close[0] if close else None


def _advice(name: str, names: typing.Iterable[str], hints: dict[str, str]) -> tuple[str | None, str]:
    """Which of the names is meant by an unknown one, and what to say. hints: names of other tools -> ours, or what to
    do there instead (a sentence)."""
    bare = name.removeprefix("--")
    hint = hints.get(bare, "")
    if " " in hint:
        return None, hint
    known = name[:len(name) - len(bare)] + hint if hint else nearest(name, names)
    return known, f"Did you mean {known}?" if known else ""


def _needs(s: Setting, many: bool | None = None) -> str:
    """What the setting takes, in words: 'a list of numbers'."""
    one = NAMES_OF_TYPES.get(s.base, "an object")
    text = f"a list, each entry {one}" if (s.many if many is None else many) else one
    return " or ".join([text, *map(show, s.words)]) + (" or null" if s.optional else "")


def _check_range(value: float, within: str) -> None:
    """Refuse a number outside of an interval like "[0, 1)"."""
    low, high = (float(end) for end in within[1:-1].split(","))
    above = value >= low if within[0] == "[" else value > low
    below = value <= high if within[-1] == "]" else value < high
    if not (above and below):
        parts = [f"{'at least' if within[0] == '[' else 'more than'} {low:g}"] if low > -math.inf else []
        parts += [f"{'at most' if within[-1] == ']' else 'less than'} {high:g}"] if high < math.inf else []
        raise _Refused(f"{show(value)} is out of range: it has to be {' and '.join(parts)}")


def _unquoted(text: str, base: type, file: str) -> str:
    """The hint for a number or a truth value that arrived as a text."""
    number = _NUMBER.fullmatch(text)
    if base is bool and text.lower() in ("true", "false"):
        return f". Write {text.lower()} without quotes"
    if base not in (int, float) or not number:
        return ""
    if not file.endswith((".yaml", ".yml")) or number[3] is None:
        return f". Write {text} without quotes"
    mantissa = number[2] if "." in number[2] else number[2] + ".0"  # YAML reads 2e-5 as a text, 2.0e-5 as a number
    return f". Write {number[1]}{mantissa}e{number[3] if number[3][0] in '+-' else '+' + number[3]} without quotes"


def _check_one(value: Any, s: Setting, file: str = "") -> Any:
    """A single value of type `s.base`, or refuse it. An int is accepted for a float; nothing else is converted."""
    if s.base is float and type(value) is int and abs(value) < 2 ** 63:
        value = float(value)
    if type(value) is not s.base:
        hint = _unquoted(value, s.base, file) if isinstance(value, str) else \
            ". Write it in quotes" if s.base is str and isinstance(value, int | float) else ""
        raise _Refused(f"{show(value)} is not {_needs(s, many=False)}{hint}")
    if s.base is float and not math.isfinite(value):
        raise _Refused(f"{value} is not a finite number")
    if s.base is int and abs(value) >= 2 ** 63:
        raise _Refused("the number is too large")
    if s.choices and value not in s.choices:
        near = nearest(str(value), map(str, s.choices))
        raise _Refused(f"{show(value)} is not one of {', '.join(map(str, s.choices))}"
                       + (f". Did you mean {near}?" if near else ""))
    if s.suffixes and not value.endswith(s.suffixes):
        near = nearest(value, s.words)
        raise _Refused(f"{show(value)} is neither one of {', '.join(s.words)} nor a file that ends in "
                       f"{' or '.join(s.suffixes)}" + (f". Did you mean {near}?" if near else ""))
    if s.path and not value.strip():
        raise _Refused("the path is empty")
    if s.within:
        _check_range(value, s.within)
    return value


def _check(value: Any, s: Setting, file: str = "", resolve: Callable[[str], str] = os.path.expanduser) -> Any:
    """A value as python has it (from JSON, YAML or a converted flag), checked and with its paths resolved."""
    if value is None and s.optional:
        return None
    if s.bare is not None and isinstance(value, bool):
        return s.bare if value else s.default
    if isinstance(value, str) and value in s.words:
        return value
    if not s.many:
        value = _check_one(value, s, file)
        return resolve(value) if s.path else value
    if not isinstance(value, list):
        hint = f". Write [{show(value)}]" if type(value) in (s.base, int) and not s.words else ""
        raise _Refused(f"{show(value)} is not {_needs(s)}{hint}")
    entries = []
    for i, entry in enumerate(value):
        try:
            entries.append(_check_one(entry, s, file))
        except _Refused as refusal:
            raise _Refused(f"entry {i + 1} of {len(value)}: {refusal}") from None
    return [resolve(entry) for entry in entries] if s.path else entries


def is_hub_name(name: str, exists: Callable[[str], bool] = os.path.exists) -> bool:
    """Whether a name means a repository of the Hub: owner/name, with @revision and :part where they are needed. What
    exists, or looks like a path (two slashes, a file's suffix), is one."""
    found = HUB_NAME.fullmatch(name)
    named = found and (found["revision"] or found["part"] or not name.endswith(FILE_SUFFIXES))
    return bool(named) and not name.startswith(".") and not exists(name)


def local_path(value: str, folder: str, s: Setting) -> str:
    """`value` relative to `folder` if it is a local path (rule: see the top of this file), else the name unchanged."""
    value = os.path.expanduser(value)
    joined = os.path.normpath(os.path.join(folder, value))
    if value in s.words or (s.path == "hub" and re.search("[:@]", value)
                            and is_hub_name(value, lambda name: os.path.exists(joined))):
        return value
    is_path = (s.path is True or os.path.isabs(value) or value.startswith(".") or value.count("/") > 1
               or value.endswith(FILE_SUFFIXES) or os.path.exists(joined))
    return joined if is_path else value


def _is_flag(word: str) -> bool:
    return word.startswith("--") or re.match(r"-[A-Za-z]", word) is not None


def _from_text(text: str, s: Setting) -> Any:
    """A word of the command line as bool, int, float or str."""
    if s.base is int and re.fullmatch(r"[+-]?\d{1,30}", text, re.ASCII):
        return int(text)
    if s.base is float and (_NUMBER.fullmatch(text) or text.lower().lstrip("+-") in ("nan", "inf", "infinity")):
        return float(text)
    if s.base in (int, float):
        raise _Refused(f"{show(text)} is not {_needs(s, many=False)}"
                       + (". Separate values by spaces" if s.many and "," in text else ""))
    return text


def _from_words(words: list[str], s: Setting, flag: str) -> Any:
    """What follows a flag, as a checked value."""
    if s.file_only:
        raise _Refused("this is structured and belongs in a config file. Name the file with --config_path")
    if s.base is bool:
        if words:
            raise _Refused(f"it takes no value ({show(words[0])} follows). Write {' or '.join(s.flags())}")
        return flag == f"--{s.name}"
    if not words:
        if s.bare is not None:
            return s.bare
        raise _Refused("a value is missing after it")
    if len(words) > 1 and not s.many:
        raise _Refused(f"it takes one value, {len(words)} follow: {show(' '.join(words))}. Quote a value with spaces")
    if words == ["none"] and s.optional and "none" not in s.choices + s.words:
        return None
    if words == ["none"] and s.many and s.default == []:
        return []
    if len(words) == 1 and words[0] in s.words:
        return words[0]
    values = [_from_text(word, s) for word in words]
    return _check(values if s.many else values[0], s)


def _read_flags(table: dict[str, Setting], argv: list[str], hints: dict, problems: list[str], refused: set) -> dict:
    """The command line -> {name: value}. Nothing is abbreviated; a flag's values reach to the next flag."""
    flags = {flag: s for s in table.values() for flag in s.flags()}
    values, seen, i = {}, {}, 0
    while i < len(argv):
        flag, equals, value = argv[i].partition("=")
        words, i = [value] if equals else [], i + 1
        if not _is_flag(flag):
            problems.append(f"{show(argv[i - 1])}: no flag stands before it. Write --NAME {argv[i - 1]}")
            continue
        while i < len(argv) and not _is_flag(argv[i]):
            words.append(argv[i])
            i += 1
        if flag not in flags:
            known, advice = _advice(flag, flags, hints)
            problems.append(f"{flag}: there is no such flag. {advice or 'See --help.'}")
            refused.update({flags[known].name} if known in flags else ())
            continue
        s = flags[flag]
        if s.name in seen:
            problems.append(f"{flag}: it is given twice ({seen[s.name]} stands before). Give it once.")
            refused.add(s.name)
            continue
        seen[s.name] = flag
        try:
            values[s.name] = _from_words(words, s, flag)
        except _Refused as refusal:
            problems.append(f"{flag}: {refusal}.")
            refused.add(s.name)
    return values


def _read_object(cls: type, data: dict, place: str, file: str, hints: dict, problems: list[str], refused: set) -> dict:
    """Keys and values of a JSON object -> {name: checked value}; nested dataclasses become instances."""
    table, values, folder = settings_of(cls), {}, os.path.dirname(file)
    for key, value in data.items():
        s = table.get(key) if isinstance(key, str) else None
        if s is None:
            known, advice = _advice(str(key), table, hints)
            problems.append(f"{place}{key}: there is no such setting. " + (
                advice or ("See --help." if len(table) > 9 else f"There are: {', '.join(table)}.")))
            refused.update({known} if known else ())
            continue
        try:
            if dataclasses.is_dataclass(s.base):
                values[key] = _read_list(s, value, f"{place}{key}", file, problems, refused)
            else:
                values[key] = _check(value, s, file, lambda text, s=s: local_path(text, folder, s))
        except _Refused as refusal:
            problems.append(f"{place}{key}: {refusal}.")
            refused.add(key)
    return values


def _read_list(s: Setting, value: Any, place: str, file: str, problems: list[str], refused: set) -> list | None:
    """A list of objects -> a list of instances of the dataclass `s.base`."""
    if value is None and s.optional:
        return None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise _Refused(f"{show(value)} is not a list of objects")
    made, before = [], len(problems)
    for i, entry in enumerate(value):
        wrong: set[str] = set()
        inner = _read_object(s.base, entry, f"{place}[{i}].", file, {}, problems, wrong)
        for key, t in settings_of(s.base).items():
            if t.required and key not in wrong and inner.get(key) in (None, "", []):
                problems.append(f"{place}[{i}].{key}: it is missing. {t.help}")
        made.append(s.base(**inner))
    if len(problems) > before:
        refused.add(s.name)
    return made


def _read_file(cls: type, path: str, config_flag: str, hints: dict, problems: list[str], refused: set) -> dict:
    """The settings of a config file or of a run.json."""
    try:
        data = read_structured(path)
    except UserError as fault:
        problems.append(str(fault))
        refused.update(settings_of(cls))  # what is missing now may have stood there
        return {}
    if not isinstance(data, dict):
        problems.append(f"{path}: the file holds {show(data)}, not an object of settings.")
        refused.update(settings_of(cls))
        return {}
    if isinstance(data.get("config"), dict) and "versions" in data:
        data = data["config"]
    if config_flag in data:
        problems.append(f"{path}: {config_flag}: a config file cannot name another one. Put all settings in one file.")
        data = {key: value for key, value in data.items() if key != config_flag}
    return _read_object(cls, data, f"{path}: ", path, hints, problems, refused)


def parse(cls: type, argv: list[str], description: str, *, config_flag: str | None = "config_path") -> Any:
    """An instance of the dataclass `cls`: default < file named by `config_flag` < command line.

    `config_flag=None`: the script has no config file (a setting of that name is then like any other).
    Raises UserError with all problems, one a line; prints the help and raises SystemExit(0) for --help.
    """
    table = settings_of(cls)
    if "--help" in argv or "-h" in argv:
        from common.helptext import help_text

        say(help_text(cls, description))
        raise SystemExit(0)
    problems: list[str] = []
    refused: set[str] = set()
    hints = getattr(cls, "other_names", {}) | getattr(cls, "elsewhere", {})
    flagged = _read_flags(table, argv, hints, problems, refused)
    path = flagged.get(config_flag) if config_flag else None
    filed = _read_file(cls, path, config_flag, hints, problems, refused) if path else {}
    config = cls(**{**filed, **flagged})
    config.origin = {name: "command line" if name in flagged else "file" if name in filed else "default"
                     for name in table}
    later = [f"--{name}: it is missing. {s.help}" for name, s in table.items()
             if s.required and getattr(config, name) in (None, "", [])]
    config.notes = list(config.settle()) if hasattr(config, "settle") else []
    later += config.problems() if hasattr(config, "problems") else []
    # a contradiction that mentions a refused setting only repeats the refusal
    problems += [line for line in later if not any(re.search(rf"\b{re.escape(str(n))}\b", line) for n in refused)]
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else
                        f"{len(problems)} problems in the settings:\n  " + "\n  ".join(problems))
    return config


def place(config: Any, name: str) -> str:
    """Where a setting was given, for a message: '--lora_r', 'config/sft.json: lora_r' or 'lora_r (default)'."""
    origin = getattr(config, "origin", {}).get(name, "default")
    if origin == "command line":
        s, value = settings_of(type(config))[name], getattr(config, name)
        return s.flags()[-1 if value is False else 0]
    return f"{getattr(config, 'config_path', 'the config file')}: {name}" if origin == "file" else f"{name} (default)"


def level(config: Any, name: str) -> int:
    """How strongly a setting was given: 0 default, 1 file, 2 command line."""
    return LEVELS[getattr(config, "origin", {}).get(name, "default")]


def to_dict(config: Any) -> dict:
    """The resolved settings as a valid --config_path: JSON-able, local paths absolute, actions of this start left out.

    Nothing depends on the current directory or on where the file is moved to.
    """
    values = {}
    for name, s in settings_of(type(config)).items():
        value = getattr(config, name)
        if s.action:
            continue
        if dataclasses.is_dataclass(s.base):
            value = None if value is None else [to_dict(entry) for entry in value]
        elif s.path and value is not None:
            absolute = lambda text, s=s: local_path(text, os.getcwd(), s)
            value = [absolute(entry) for entry in value] if isinstance(value, list) else absolute(value)
        values[name] = list(value) if isinstance(value, list) else value
    return values


def _relative(values: dict, cls: type, folder: str) -> dict:
    """`values` with its absolute paths written relative to `folder`."""
    moved = lambda v: os.path.relpath(v, folder) if isinstance(v, str) and os.path.isabs(v) else v
    out = dict(values)
    for name, s in settings_of(cls).items():
        value = values.get(name)
        if dataclasses.is_dataclass(s.base) and isinstance(value, list):
            out[name] = [_relative(entry, s.base, folder) for entry in value]
        elif s.path:
            out[name] = [moved(entry) for entry in value] if isinstance(value, list) else moved(value)
    return out


def differences(old: dict, new: dict, cls: type) -> list[tuple[str, Any, Any]]:
    """Settings that may not change on resume and did: (name, old, new); both from `to_dict`.

    A setting that `old` does not have is compared with its default. A path is the same if it is equal, or equal as
    seen from each one's output_dir: a project that was moved as a whole has not changed.
    """
    old_seen, new_seen = (_relative(d, cls, d.get("output_dir") or os.sep) for d in (old, new))
    found = []
    for name, s in settings_of(cls).items():
        if s.resume == "free" or s.action:
            continue
        before, after = old.get(name, s.default), new.get(name, s.default)
        if before != after and old_seen.get(name, s.default) != new_seen.get(name, s.default):
            found.append((name, before, after))
    return found
