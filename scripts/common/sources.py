"""Where a data set comes from: its description in config/sft_datasets/<name>.json, and its file, here or on the Hub.

    {"source": "owner/name", "revision": "...", "split": "train", "files": {"train": ["path/in/repository.parquet"]},
     "raw_patterns": ["*name*.jsonl"], "form": "prompt", "columns": {"prompt": "question"}, "filters": [...],
     "output": "name.jsonl", "licence": "...", "recommended_weights": {"tiny": 0.5, "small": 0.4, "base": 0.3}}

Only source (or raw_dir), form, output and licence have to be there. Without `files` the split is loaded by `datasets`.
The forms gptme, openai and chatgpt are a person's own logs; raw_dir is where they lie if --raw_dir is not given.
"""
from __future__ import annotations

import dataclasses
import difflib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from common.config import HUB_NAME, is_hub_name
from common.faults import UserError
from common.hub import Ref, refusal, unreachable
from common.logs import LOG_FORMS, Filters
from common.ranks import is_alive
from common.records import kind_of
from common.rows import FORMS
from common.structured import read_structured

ROOT = Path(__file__).resolve().parents[2]
SPEC_DIR = ROOT / "config" / "sft_datasets"
TREE_FORMS = ("context", "pairs")
ONLY_OF_LOGS = ("min_turns", "require_user", "exclude", "since")
NOT_OF_LOGS = ("revision", "split", "files", "columns", "filters", "top_k")
NOT_OF_TREES = ("columns", "filters", "role_map")
ONLY_OF_TREES = ("top_k", "reviewed")
SHARD = re.compile(r"-\d{5}-of-(\d{5})")
TYPES = {str: "a text", dict: "an object", list: "a list", bool: "true or false", int: "a whole number"}


@dataclass
class Spec:
    """One data set, as its JSON file says."""

    name: str
    form: str                                   # a row form, context / pairs for message trees, or a form of logs
    output: str                                 # file name; {lang} is the language asked for
    licence: str
    title: str = ""
    note: str = ""                              # a word on the licence, shown at the end of the run
    source: str = ""                            # Hub id, owner/name
    revision: str = ""                          # commit of the Hub repository, so that the rows stay the same
    split: str = "train"
    files: dict[str, list] = field(default_factory=dict)          # split -> files of the Hub repository
    raw_patterns: list[str] = field(default_factory=list)         # names of downloaded files, best first
    raw_dir: str = ""                           # where its file lies in this repository (no Hub needed)
    columns: dict[str, str] = field(default_factory=dict)         # our key -> the file's key
    role_map: dict[str, str] = field(default_factory=dict)        # the file's role name -> ours
    filters: list[dict] = field(default_factory=list)             # {column, matches, action: drop | blank, reason}
    lang: str = "any"                           # the one language of its rows; any: rows name theirs (trees)
    reviewed: bool = True                       # trees: only replies that passed review
    top_k: int | None = None                    # trees: best replies to one message; null: all
    min_turns: int | None = None                # logs: see Filters in common/logs.py; flags of the script go before
    require_user: bool = False
    exclude: str | None = None
    since: str | None = None
    recommended_weights: dict[str, float] = field(default_factory=dict)  # model size -> weight

    def output_name(self, lang: str) -> str:
        """File name of the rows in `lang`."""
        return self.output.replace("{lang}", lang)


def read_spec(path: Path) -> Spec:
    """Read and check one description; raise UserError with everything that is wrong with it."""
    given = read_structured(str(path))
    if not isinstance(given, dict):
        raise UserError(f"{path}: {kind_of(given)} instead of an object. See another data set's file.")
    known = {f.name: f for f in dataclasses.fields(Spec) if f.name != "name"}
    problems = []
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            problems.append(f'unknown key "{key}"' + (f' (nearest: "{near[0]}")' if near else ""))
            continue
        hint = str(known[key].type)
        kind = next(t for t in TYPES if hint.startswith(t.__name__))
        right = value is None and "None" in hint or type(value) is kind
        if not right:
            problems.append(f'"{key}" is {kind_of(value)}, it has to be {TYPES[kind]}')
    problems += [f'"{key}" is missing' for key in ("form", "output", "licence") if key not in given]
    problems = problems or _contradictions(given)
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}. Mend the file.")
    return Spec(path.stem, **given)


def _contradictions(given: dict) -> list[str]:
    problems = []
    forms = (*FORMS, *TREE_FORMS, *LOG_FORMS)
    if given["form"] not in forms:
        problems.append(f'"form" is "{given["form"]}", it has to be one of {", ".join(forms)}')
    logs = given["form"] in LOG_FORMS
    problems += [f'"{key}" has no effect on the form {given["form"]}' for key in (NOT_OF_LOGS if logs else ONLY_OF_LOGS)
                 if given.get(key)]
    idle = () if logs else NOT_OF_TREES if given["form"] in TREE_FORMS else ONLY_OF_TREES
    problems += [f'"{key}" has no effect on the form {given["form"]}' for key in idle
                 if given.get(key) not in (None, [], {}, True)]
    if logs and not given.get("raw_patterns"):
        problems.append('"raw_patterns" is missing: the names of the log files')
    if logs:
        chosen = Filters(**{key: given.get(key) for key in ONLY_OF_LOGS})
        problems += [f'"{name}": {finding}' for name, _, finding in (p.partition(": ") for p in chosen.problems())]
    if not given.get("source") and not given.get("raw_dir"):
        problems.append('"source" (a Hub id) or "raw_dir" is missing')
    if Path(given["output"]).name != given["output"] or not given["output"].endswith(".jsonl"):
        problems.append('"output" has to be a plain file name in .jsonl')
    for rule in given.get("filters", []):
        if not isinstance(rule, dict) or set(rule) != {"column", "matches", "action", "reason"} or \
                not all(isinstance(v, str) for v in rule.values()) or rule["action"] not in ("drop", "blank"):
            problems.append('a filter is {"column", "matches", "action": "drop" or "blank", "reason"}, all texts')
            continue
        try:
            re.compile(rule["matches"])
        except re.error as fault:
            problems.append(f'the filter\'s "matches" is no regular expression ({fault})')
    if given.get("top_k") is not None and given["top_k"] < 1:
        problems.append('"top_k" has to be at least 1, or null for all')
    return problems


def spec_names(folder: Path = SPEC_DIR) -> list[str]:
    """Names of all data sets that are described."""
    return sorted(path.stem for path in folder.glob("*.json"))


def check_prepared(paths: list[str]) -> None:
    """Refuse names of the Hub whose rows are made by a description's columns, filters or choice of replies."""
    repos = {found["repo"]: path for path in paths if is_hub_name(path) and (found := HUB_NAME.fullmatch(path))}
    for name in spec_names() if repos else []:
        spec = read_spec(SPEC_DIR / f"{name}.json")
        if spec.source in repos and (spec.columns or spec.filters or spec.form in TREE_FORMS):
            raise UserError(f"{repos[spec.source]}: its rows are made by python scripts/prepare_sft_datasets.py "
                            f"--dataset {name}. Do that first, and name data/sft/{spec.output_name('en')}.")


def recommended_weight(stem: str, size: str, folder: Path = SPEC_DIR) -> float | None:
    """The weight that the data set whose output file has this stem recommends for models of this size (tiny, small,
    base), or None if no description knows it."""
    for name in spec_names(folder):
        spec = read_spec(folder / f"{name}.json")
        pattern = re.escape(spec.output.removesuffix(".jsonl")).replace(r"\{lang\}", r"[\w-]+")
        if re.fullmatch(pattern, stem):
            return spec.recommended_weights.get(size)
    return None


def local_files(spec: Spec, folder: Path) -> tuple[list[Path], str]:
    """The raw file of a data set in `folder` (all shards, if it is one of several), and a line that says so.

    The patterns are tried in order. Raises UserError if none fits, naming the file to put there.
    """
    if not folder.is_dir():
        raise UserError(f"{spec.name}: {folder} is no directory. --raw_dir takes the one with the downloaded files.")
    for pattern in spec.raw_patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if not found:
            continue
        shard = SHARD.search(found[0].name)
        if shard and int(shard[1]) > 1:
            n, total = sum(1 for path in found if SHARD.search(path.name)), int(shard[1])
            if n != total:
                raise UserError(f"{spec.name}: {folder} has {n} of the {total} parts of {found[0].name}. "
                                "Download the others too.")
            return found, f"{spec.name}: took {n} parts, {found[0]} and following"
        others = f" ({len(found) - 1} more fit {pattern} and were left)" if len(found) > 1 else ""
        return found[:1], f"{spec.name}: took {found[0]}{others}"
    raise UserError(f"{spec.name}: no file like {' or '.join(spec.raw_patterns)} in {folder}. {how_to_get(spec)}")


def how_to_get(spec: Spec) -> str:
    """A sentence: which file to download and where to put it."""
    urls = [f"https://huggingface.co/datasets/{spec.source}/resolve/{spec.revision or 'main'}/{name}"
            for name in spec.files.get(spec.split, [])] or [f"https://huggingface.co/datasets/{spec.source}"]
    name = spec.raw_patterns[0] if spec.raw_patterns else "its file"
    if spec.files.get(spec.split):
        last = Path(spec.files[spec.split][0]).name
        name = last if any(Path(last).match(p) for p in spec.raw_patterns) else name
    return f"Download {' and '.join(urls)} to DIR/{name} and give --raw_dir DIR."


def hub_files(spec: Spec, cache: Path) -> tuple[list[Path], str]:
    """Download the split's files at the pinned revision, or take them from the Hub cache; and a line that says so.

    Raises UserError within seconds if the Hub cannot be reached. cache: folder for splits converted by `datasets`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = spec.revision or None
    where = f"{spec.source}@{spec.revision[:7] or 'main'}"
    names = spec.files.get(spec.split, [])
    if spec.files and not names:
        raise UserError(f'{spec.name}: "files" of its description has no split "{spec.split}". Add it.')
    try:
        found = [hf_hub_download(spec.source, n, repo_type="dataset", revision=revision, local_files_only=True)
                 for n in names]
    except LocalEntryNotFoundError:
        found = []
    if found:
        return [Path(path) for path in found], f"{spec.name}: took {where} from the Hub cache"
    reason = unreachable()
    if reason:
        raise UserError(f"{spec.name}: {where} cannot be fetched ({reason}). {how_to_get(spec)}")
    try:
        if names:
            found = [Path(hf_hub_download(spec.source, n, repo_type="dataset", revision=revision)) for n in names]
        else:
            found = [_by_datasets(spec, cache)]
    except Exception as fault:  # the libraries' errors for network, names and revisions
        reason = refusal(fault, Ref("dataset", spec.source, spec.revision or "main"))
        raise UserError(f"{spec.name}: {reason} Or: {how_to_get(spec)}") from None
    return found, f"{spec.name}: fetched {where} from the Hub"


def _by_datasets(spec: Spec, cache: Path) -> Path:
    from datasets import load_dataset

    path = cache / f"{spec.name}-{spec.revision[:7] or 'main'}-{spec.split}.parquet"
    rows = load_dataset(spec.source, split=spec.split, revision=spec.revision or None)
    cache.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(path))
    return path


def free_of_dead(folder: Path) -> None:
    """Remove temporary files of processes on this machine that were killed while they wrote."""
    host = os.uname().nodename
    for path in folder.glob(f".*.{host}.*.tmp"):
        if not is_alive(int(path.name.split(".")[-2])):
            path.unlink(missing_ok=True)
