"""A table of settings as text: --help, and the table in README."""
from __future__ import annotations

import shutil
import textwrap

from common.config import Setting, settings_of


def default_text(s: Setting) -> str:
    """The default as it is typed; empty for none."""
    if s.required:
        return "required"
    if s.default is None or s.default == [] or s.default == "":
        return ""
    if isinstance(s.default, bool):
        return "true" if s.default else "false"
    return " ".join(map(str, s.default)) if isinstance(s.default, list) else str(s.default)


def _usage(s: Setting) -> str:
    """A flag with what follows it: '--val_from TEXT [TEXT ...]'."""
    if s.base is bool:
        return " / ".join(s.flags())
    word = "PATH" if s.path else {int: "N", float: "X", str: "TEXT"}.get(s.base, "")
    word = "|".join(map(str, s.choices)) if s.choices else "|".join([*s.words, word])
    word = f"{word} [...]" if s.many else word
    return f"--{s.name} " + (f"[{word}]" if s.bare is not None else word)


def help_text(cls: type, description: str) -> str:
    """The text of --help: the script's docstring, then every setting by group."""
    width = max(60, min(shutil.get_terminal_size((110, 24)).columns, 120))
    lines, group = [description.strip(), "", "Settings: default < config file < command line. `none` empties a "
                    "setting that may be empty.", "  -h, --help  this text"], None
    for s in settings_of(cls).values():
        if s.group != group:
            group = s.group
            lines += ["", group]
        lines.append(f"  {s.name} (config file only)" if s.file_only else f"  {_usage(s)}")
        facts = "; ".join(filter(None, [s.unit and f"unit: {s.unit}", default_text(s) and (
            "required" if s.required else f"default: {default_text(s)}")]))
        lines += textwrap.wrap(s.help + (f" [{facts}]" if facts else ""), width, initial_indent=" " * 6,
                               subsequent_indent=" " * 6, break_on_hyphens=False)
    return "\n".join(lines)


def settings_table(cls: type) -> str:
    """All settings as Markdown tables, one a group, for the README."""
    cell = lambda text: str(text).replace("|", "\\|")
    lines, group = [], None
    for s in settings_of(cls).values():
        if s.group != group:
            group = s.group
            lines += ["", f"**{group}**", "", "| setting | default | unit | meaning | may change on resume |",
                      "|---|---|---|---|---|"]
        flags = f"`{s.name}` (file only)" if s.file_only else " ".join(f"`{flag}`" for flag in s.flags())
        default = f"`{default_text(s)}`" if default_text(s) else ""
        free = "yes" if s.resume == "free" or s.action else "no"
        one_of = f" One of {', '.join(map(str, s.choices))}." if s.choices else ""
        lines.append(f"| {flags} | {cell(default)} | {cell(s.unit)} | {cell(s.help + one_of)} | {free} |")
    return "\n".join(lines).strip() + "\n"
