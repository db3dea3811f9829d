"""Data sets -> data/sft/<name>.jsonl and <name>.manifest.json, ready for 03_sft.py.

    python scripts/prepare_sft_datasets.py --dataset all                              # from the Hugging Face Hub
    python scripts/prepare_sft_datasets.py --dataset all --raw_dir ~/Downloads        # from files you already have
    python scripts/prepare_sft_datasets.py --dataset gptme --tokenizer_path MODEL --max_seq_length 1024   # own logs
    python scripts/prepare_sft_datasets.py --list

In: the published file of each data set, described by config/sft_datasets/<name>.json, or conversation logs. Out: one
row a line, {"prompt", "response", "source"} or {"messages", "source", "id"}, and a manifest in which rows_in is
rows_kept plus the rows dropped by reason. Secrets in logs are redacted. Files appear complete or not at all, so after
an interruption start the same command again; the rows come out byte for byte the same. Exit status 2 if any data set
failed; the good ones are kept.
"""
from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

from common.collect import Aside, Collected, collect_logs, secrets_text
from common.config import nearest, parse, setting
from common.faults import UserError, run_main, say
from common.logs import LOG_FORMS, Filters, LogReader, default_folder, log_files
from common.oasst import TreeReader
from common.outputs import check_no_input
from common.render import PLAIN_KEYS
from common.rows import Row, RowReader, row_to_json
from common.settings import TEMPLATES
from common.sources import (
    ONLY_OF_LOGS,
    ROOT,
    SPEC_DIR,
    TREE_FORMS,
    Spec,
    free_of_dead,
    hub_files,
    local_files,
    read_spec,
    spec_names,
)

ALL = ("dolly15k", "oasst1", "alpaca")
Names = list[str]  # inside Config the word list is a setting


@dataclass
class Config:
    """The settings of this script."""

    dataset: Names = setting([], f"Names of data sets (see --list), or all: {', '.join(ALL)}.")
    output_dir: str = setting("data/sft", "Directory for the rows and manifests.", path=True)
    raw_dir: str | None = setting(None, "Directory with files already downloaded; nothing is fetched.", path=True)
    max_samples: int | None = setting(None, "Keep at most this many rows of each data set, chosen by the seed.",
                                      unit="rows", within="[1, inf)")
    seed: int = setting(0, "Seed of the choice of --max_samples.")
    lang: str = setting("en", "Language of the rows, a code as in en, de, pt-BR.")
    csv: bool = setting(False, "Write a CSV file beside each JSONL file.")
    skip_bad_rows: bool = setting(False, "Leave out rows that cannot be used, and count them, instead of stopping.")
    num_proc: int = setting(1, "Data sets prepared at the same time.", unit="processes", within="[1, inf)")
    list: bool = setting(False, "Print the known data sets and stop.")
    redact: bool = setting(True, "Replace API keys, tokens, passwords and private keys by [REDACTED kind].",
                           group="Own logs")
    tokenizer_path: str | None = setting(None, "Cut long conversations into windows, measured with this tokenizer: "
                                         ".model file, directory or Hub id.", path="hub")
    max_seq_length: int | None = setting(None, "Longest window.", unit="tokens", within="[8, inf)")
    prompt_template: str = setting("chatml", "How windows are measured; give 03_sft.py the same.", words=TEMPLATES,
                                   suffixes=(".jinja", ".yaml", ".yml"), path="hub")
    min_turns: int | None = setting(None, "Leave out conversations with fewer assistant messages.",
                                    unit="assistant messages", within="[1, inf)")
    require_user: bool = setting(False, "Leave out conversations without a user message.")
    exclude: str | None = setting(None, "Leave out conversations with a message in which this regular expression is "
                                  "found, as in (?i)salary.")
    since: str | None = setting(None, "Leave out conversations whose last message is older, as in 2025-01-31.")

    def problems(self) -> list[str]:
        """Contradictions between settings."""
        if not self.dataset and not self.list:
            return [f"--dataset: it is missing. Name one or several of {', '.join(['all', *spec_names()])}."]
        known, found = spec_names(), []
        for name in self.dataset:
            if name != "all" and name not in known:
                near = nearest(name, known)
                found.append(f'--dataset: "{name}" is not known{f", the nearest is {near}" if near else ""}. Known: '
                             f"{', '.join(['all', *known])}; a new one is a new file in config/sft_datasets/.")
        if not re.fullmatch(r"[A-Za-z]+(-[A-Za-z]+)?", self.lang):
            found.append(f'--lang: "{self.lang}" is no language code. Write it as in en or pt-BR.')
        return found or self._log_problems()

    def _log_problems(self) -> list[str]:
        found = [f"--{problem}" for problem in Filters(exclude=self.exclude, since=self.since).problems()]
        for name, other in (("tokenizer_path", "max_seq_length"), ("max_seq_length", "tokenizer_path")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                found.append(f"--{name}: it needs --{other}; windows are measured in tokens.")
        if self.lang != "en" and self.dataset and all(is_log(name) for name in self.dataset):
            found.append("--lang: logs do not say their language, so it has no effect on them. Leave it out.")
        if self.prompt_template != "chatml" and self.tokenizer_path is None:
            found.append("--prompt_template: it needs --tokenizer_path and --max_seq_length; without, nothing is cut.")
        given = [name for name in ("tokenizer_path", "max_seq_length", *ONLY_OF_LOGS) if getattr(self, name)]
        given += [] if self.redact else ["no_redact"]
        if given and self.dataset and not any(is_log(name) for name in self.dataset):
            logs = ", ".join(filter(is_log, spec_names()))
            found.append(f"--{given[0]}: it has an effect on logs only ({logs}), and none is named. Leave it out; "
                         "03_sft.py splits long rows of other data sets by itself.")
        return found


def main(argv: list[str]) -> int:
    """Prepare the data sets asked for; return 0, or 2 if one of them failed."""
    config = parse(Config, argv, __doc__, config_flag=None)
    if config.list:
        say(listing())
        return 0
    names = list(dict.fromkeys(n for name in config.dataset for n in (ALL if name == "all" else (name,))))
    folder = Path(config.output_dir)
    check_apart(names, config)
    there = folder.exists()
    free_of_dead(folder)
    command = shlex.join(["python", "scripts/prepare_sft_datasets.py", *argv])
    if config.num_proc > 1 and len(names) > 1:
        with ProcessPoolExecutor(min(config.num_proc, len(names)), get_context("spawn")) as pool:
            results = [job.result() for job in [pool.submit(attempt, n, config, command) for n in names]]
    else:
        results = [attempt(name, config, command) for name in names]
    good = [r for r in results if not isinstance(r, str)]
    if good:
        say("\n" + table(good))
    failed = [r for r in results if isinstance(r, str)]
    if not there and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    for sentence in failed:
        print(f"error: {sentence}", file=sys.stderr)
    return 2 if failed else 0


def check_apart(names: list[str], config: Config) -> None:
    """UserError where two of the data sets would be written to one file."""
    written: dict[str, str] = {}
    for name in (name for name in names if name in spec_names()):
        try:
            output = read_spec(SPEC_DIR / f"{name}.json").output_name(config.lang)
        except UserError:  # which ends this one alone, in its turn
            continue
        if output in written:
            raise UserError(f"--dataset {name} {written[output]}: both write {output}. Give one another \"output\", in "
                            f"{SPEC_DIR / name}.json.")
        written[output] = name


def attempt(name: str, config: Config, command: str) -> dict | str:
    """Prepare one data set; return its manifest, or the sentence that says why not."""
    try:
        return prepare(read_spec(SPEC_DIR / f"{name}.json"), config, command)
    except UserError as fault:
        return str(fault)


def prepare(spec: Spec, config: Config, command: str) -> dict:
    """Read, filter, choose and write one data set; return its manifest. Raises UserError; then nothing is written."""
    if spec.lang not in ("any", config.lang):
        raise UserError(f"{spec.name}: its rows are in {spec.lang}, --lang asks for {config.lang}. Leave it out.")
    with Aside(Path(config.output_dir)) as aside:
        found = Collected(aside, spec.output_name(config.lang))
        (from_logs if spec.form in LOG_FORMS else from_files)(found, spec, config)
        if config.max_samples is not None:
            found.choose(config.max_samples, config.seed)
        dropped = {reason: n for reason, n in sorted(found.dropped.items()) if n}
        if found.file is None:
            way = ("Take another --prompt_template." if any(r.startswith("refused") for r in dropped) else
                   "Check --raw_dir and the filters." if spec.form in LOG_FORMS else "Check --lang and the filters.")
            raise UserError(f"{spec.name}: no row is left of {found.rows_in:,} {unit(spec)} ({reasons(dropped)}). "
                            + way)
        numbers = {"rows_in": found.rows_in, "rows_kept": sum(found.units), "rows_dropped": dropped,
                   "rows_changed": dict(sorted(found.changed.items())), "rows_bad": found.n_bad}
        assert numbers["rows_in"] == numbers["rows_kept"] + sum(dropped.values()), numbers
        if spec.form in LOG_FORMS:
            numbers |= {"rows_out": len(found.units), "conversations_kept": len(set(found.groups))}
        found.file.seek(0)
        sha256_out = hashlib.file_digest(found.file, "sha256").hexdigest()
        manifest = describe(spec, config, numbers | found.more, found.hashes, sha256_out) | {
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": command}
        stem = manifest["file"].removesuffix(".jsonl")
        if config.csv:
            to_csv(found.file, aside.open(f"{stem}.csv"))
        aside.open(f"{stem}.manifest.json").write(
            (json.dumps(manifest, ensure_ascii=False, indent=2) + "\n").encode())
        old = Path(config.output_dir) / f"{stem}.csv"
        stale = not config.csv and old.exists() and _wrote_csv(old.with_name(f"{stem}.manifest.json"))
        aside.publish()
    if stale:
        old.unlink()
        say(f"{old}: removed; it held the rows that {manifest['file']} held before (--csv writes it)")
    return manifest


def _wrote_csv(manifest: Path) -> bool:
    """Whether the run that left this manifest wrote a CSV file beside it."""
    try:
        return "--csv" in shlex.split(json.loads(manifest.read_text(encoding="utf-8"))["command"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def from_files(found: Collected, spec: Spec, config: Config) -> None:
    """Add the rows of a published data set that its filters leave."""
    if config.raw_dir is not None or spec.raw_dir:
        files, line = local_files(spec, Path(config.raw_dir) if config.raw_dir is not None else ROOT / spec.raw_dir)
    else:
        files, line = hub_files(spec, ROOT / "data" / "cache")
    say(line)
    check_outputs(found, files, config)
    for path in files:
        reader = open_reader(spec, path, config, found.changed)
        for row in reader:
            found.add(to_output(row, spec))
        found.dropped.update(reader.dropped)
        if reader.n_bad:
            if spec.form not in TREE_FORMS:  # there a bad row is a message or a tree, not a candidate
                found.dropped["bad row"] += reader.n_bad
            show_bad(spec, reader)
        found.rows_in += reader.rows_in
        found.n_bad += reader.n_bad
        found.changed.update(reader.notes)
        found.hashes[path.name] = reader.sha256


def from_logs(found: Collected, spec: Spec, config: Config) -> None:
    """Add the conversations of a person's own logs, filtered, redacted and cut into windows."""
    folder = Path(config.raw_dir) if config.raw_dir is not None else default_folder(spec.form, spec.raw_dir)
    files = log_files(spec.name, folder, spec.raw_patterns)
    check_outputs(found, files, config)
    say(f"{spec.name}: took {len(files):,} file{'s' if len(files) > 1 else ''} of {folder}")
    chat = None
    if config.tokenizer_path is not None:
        from common.chat import load_chat  # seconds

        chat = load_chat(config.tokenizer_path, config.prompt_template)
    reader = LogReader(spec.form, folder, files, config.skip_bad_rows, spec.role_map)
    collect_logs(found, reader, spec.name, log_filters(spec, config), redact=config.redact, chat=chat,
                 size=config.max_seq_length)
    if reader.n_bad:
        show_bad(spec, reader)


def check_outputs(found: Collected, files: list[Path], config: Config) -> None:
    """UserError where what is to be written is one of the files that are read."""
    place = Path(config.output_dir) / found.name
    for path in (place, *([place.with_suffix(".csv")] if config.csv else [])):
        check_no_input(path, "--output_dir", files)


def log_filters(spec: Spec, config: Config) -> Filters:
    """The filters of the command line, before those of the data set's description."""
    return Filters(**{name: getattr(config, name) or getattr(spec, name) for name in ONLY_OF_LOGS})


def show_bad(spec: Spec, reader: RowReader | TreeReader | LogReader) -> None:
    """Print what was left out by --skip_bad_rows."""
    say(*reader.bad, f"{spec.name}: {reader.n_bad:,} bad rows left out")


def unit(spec: Spec) -> str:
    """What the counts of a data set are of."""
    if spec.form in LOG_FORMS:
        return "assistant messages"
    return "candidate replies" if spec.form in TREE_FORMS else "rows"


def is_log(name: str) -> bool:
    """Whether the data set of this name is a person's own logs."""
    return name in spec_names() and read_spec(SPEC_DIR / f"{name}.json").form in LOG_FORMS


def describe(spec: Spec, config: Config, numbers: dict, hashes: dict[str, str], sha256_out: str) -> dict:
    """The manifest without time and command: a function of the raw files, the description and the settings."""
    settings = {k: v for k, v in dataclasses.asdict(spec).items() if v not in ("", None, [], {})}
    if spec.form in LOG_FORMS:
        settings = {k: v for k, v in settings.items() if k not in ("split", "reviewed")}
        settings |= dataclasses.asdict(log_filters(spec, config)) | {
            name: getattr(config, name) for name in ("tokenizer_path", "max_seq_length", "prompt_template", "redact")}
    else:
        settings.pop("require_user")
    return {
        "name": spec.name, "file": spec.output_name(config.lang),
        "unit": unit(spec), **numbers, "files_in": sorted(hashes),
        "sha256_in": next(iter(hashes.values())) if len(hashes) == 1 else hashes, "sha256_out": sha256_out,
        "licence": spec.licence + (f" ({spec.note})" if spec.note else ""),
        "source": spec.source or spec.raw_dir, "revision": spec.revision,
        "config": settings | {"lang": config.lang, "max_samples": config.max_samples, "seed": config.seed},
    }


def open_reader(spec: Spec, path: Path, config: Config, changed: Counter[str]) -> RowReader | TreeReader:
    """The reader for one raw file of the data set."""
    if spec.form in TREE_FORMS:
        return TreeReader(path, form=spec.form, lang=config.lang, reviewed=spec.reviewed, top_k=spec.top_k,
                          skip_bad_rows=config.skip_bad_rows)
    return RowReader(path, skip_bad_rows=config.skip_bad_rows, columns=spec.columns, role_map=spec.role_map,
                     edited=[rule["column"] for rule in spec.filters], form=spec.form, edit=editor(spec, changed))


def editor(spec: Spec, changed: Counter[str]) -> Callable[[dict], str | None] | None:
    """The data set's filters as a function of a raw row: a reason to drop it, or None; texts to blank are emptied.
    A column may be named as in the file or as a row has it."""
    ours = {theirs: own for own, theirs in spec.columns.items()}
    rules = [(ours.get(f["column"], f["column"]), re.compile(f["matches"], re.I | re.S), f["action"], f["reason"])
             for f in spec.filters]

    def edit(record: dict) -> str | None:
        for column, pattern, action, reason in rules:
            value = record.get(column)
            if isinstance(value, str) and pattern.fullmatch(value):
                if action == "drop":
                    return reason
                record[column] = ""
                changed[reason] += 1
        return None

    return edit if rules else None


def to_output(row: Row, spec: Spec) -> dict:
    """A row as it is written: prompt and response where the data set's form is of one turn, else messages. Where they
    are more than two texts, the messages that they are."""
    if spec.form in ("prompt", "instruction", "pairs"):
        roles = [m["role"] for m in row.messages]
        texts = all(m.keys() <= PLAIN_KEYS for m in row.messages) and not row.tools
        if texts and roles[-2:] == ["user", "assistant"] and roles[:-2] in ([], ["system"]):
            system = {"system": row.messages[0]["content"]} if len(roles) == 3 else {}
            out = {"prompt": row.messages[-2]["content"], "response": row.messages[-1]["content"], **system}
            return out | {"source": row.source or spec.name} | ({"id": row.id} if row.id else {})
        out = row_to_json(row)
        first = next(i for i, m in enumerate(row.messages) if m.get("train"))
        messages = out.pop("messages")
        return {"prompt": messages[:first], "response": messages[first:], **out} | {"source": row.source or spec.name}
    out = row_to_json(row)
    out.setdefault("source", spec.name)
    return out


def to_csv(rows: BinaryIO, out: BinaryIO) -> None:
    """Write the rows of a JSONL file as CSV with a header; lists become JSON texts."""
    rows.seek(0)
    names = list(dict.fromkeys(name for line in rows for name in json.loads(line)))
    rows.seek(0)
    text = io.TextIOWrapper(out, "utf-8", newline="")
    # Python before 3.12 leaves a field with a lone carriage return unquoted
    writer = csv.DictWriter(text, names, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows({k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
                      for k, v in json.loads(line).items()} for line in rows)
    text.detach()  # flushes; closing it would close the file


def reasons(dropped: dict[str, int]) -> str:
    """Counts by reason on one line."""
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(dropped.items())) or "none"


def table(manifests: list[dict]) -> str:
    """What was prepared, a line for each data set."""
    rows = [("data set", "in", "kept", "licence", "file")]
    rows += [(m["name"], f"{m['rows_in']:,} {m['unit']}", f"{m['rows_kept']:,}", m["licence"], m["file"])
             for m in manifests]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for i, row in enumerate(rows):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        if i and manifests[i - 1]["rows_dropped"]:
            lines.append(f"    dropped: {reasons(manifests[i - 1]['rows_dropped'])}")
        if i and manifests[i - 1]["rows_changed"]:
            lines.append(f"    changed: {reasons(manifests[i - 1]['rows_changed'])}")
        if i and "secrets" in manifests[i - 1]:
            lines.append("    {conversations_kept:,} of {conversations_in:,} conversations in {rows_out:,} rows".format(
                **manifests[i - 1]))
            lines += ["    " + line for line in secrets_text(manifests[i - 1]["secrets"])]
    return "\n".join(lines)


def listing() -> str:
    """The known data sets, two lines each."""
    lines = []
    for name in spec_names():
        spec = read_spec(SPEC_DIR / f"{name}.json")
        lines.append(f"{name:<10} {spec.title or spec.source or spec.raw_dir}  ({spec.licence}"
                     f"{f', {spec.note}' if spec.note else ''})\n{'':<10} {spec.source or spec.raw_dir} "
                     f"{spec.revision[:7]}, form {spec.form}, to {spec.output}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_main(main))
