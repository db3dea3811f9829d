"""Models and data sets from the Hugging Face Hub.

    owner/name                 a model, or the training rows of a data set
    owner/name@revision        at a branch, a tag or a commit (of the model: --revision)
    owner/name@revision:part   data sets: a split, a configuration, or a file of the repository

What exists here goes before the Hub, and what looks like a path never goes there (is_hub_name in config.py). A branch
is looked up once, when a run starts: run.json records the commit, and a resumed run goes on with it. Files lie in the
Hub's own cache; a data set is one file in CACHE_DIR/hub/, a link or its parts joined, with a manifest beside it.
"""
from __future__ import annotations

import errno
import functools
import glob
import gzip
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import HUB_NAME, is_hub_name
from common.faults import UserError
from common.ranks import is_alive
from common.rundir import earlier_run
from common.settings import SftConfig, dataset_name

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo

ROWS = re.compile(r"\.(jsonl|json|csv|parquet)(\.gz)?$")
NOT_ROWS = ("dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
PART = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?|\d{3,}")  # what tells the parts of one table apart in their names
SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.md", "adapter_model.safetensors")
WEIGHTS = ("*.safetensors",)
NOT_MODEL = ("*/*", "consolidated*")  # other formats of the same weights
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
LOG_IN = "log in (hf auth login, or HF_TOKEN)"


@dataclass(frozen=True)
class Ref:
    """A repository of the Hub at a revision. kind: model or dataset; part: split, configuration or file of it."""

    kind: str
    repo: str
    revision: str = "main"
    part: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.repo}@{self.revision}"


def read_ref(kind: str, name: str, revision: str | None = None) -> Ref:
    """'owner/name@revision:part' in pieces; `revision` is what stands where the name has none."""
    found = HUB_NAME.fullmatch(name)
    return Ref(kind, found["repo"], found["revision"] or revision or "main", found["part"])


# ---- what a run needs from the Hub

def needed(config: SftConfig) -> dict[tuple[str, str], Ref]:
    """(kind, name as given) -> repository, for every name in the settings that is one of the Hub."""
    source = config.source
    models = [name for name in (source, config.tokenizer_path) if name and is_hub_name(name)]
    data = [name for name in (*config.all_dataset_paths(), *config.val_dataset_paths) if is_hub_name(name)]
    return {("model", name): read_ref("model", name, config.revision if name == source else None) for name in models} \
        | {("dataset", name): read_ref("dataset", name) for name in data}


def resolve(config: SftConfig) -> dict[str, str]:
    """The commit of each repository that the settings name; of a run that goes on, those it was started with.

    Raises UserError within seconds for what is not there, may not be read or cannot be reached.
    """
    known = (earlier_run(config) or {}).get("hub", {})
    return {str(ref): known.get(str(ref)) or commit_of(ref) for ref in needed(config).values()}


def fetch(config: SftConfig, commits: dict[str, str], weights: bool) -> list[str]:
    """Bring what the settings name to this machine, and let config.at() know where it is; lines that say so.

    First without the weights (configuration, tokenizer, rows: what the plan needs), then with them.
    """
    places, lines = dict(config.places), []
    for (kind, name), ref in needed(config).items():
        commit = commits[str(ref)]
        if kind == "model":
            places[kind, name] = str(snapshot(ref, commit, weights))
        elif not weights:
            places[kind, name] = str(data_file(ref, commit, Path(config.cache_dir), dataset_name(name)))
        if not weights:
            lines.append(f"{ref}: commit {commit}" + (f", {places[kind, name]}" if kind == "dataset" else ""))
    config.places, config.commits = places, commits
    return lines


def commit_used(config: SftConfig, name: str) -> str | None:
    """The commit of the model `name` that this run uses; None for a path."""
    ref = needed(config).get(("model", name))
    return config.commits[str(ref)] if ref else None


def at_commit(name: str, settings: dict, commits: dict[str, str]) -> str:
    """The base that a run names, as name@commit if it came from the Hub. settings, commits: of its run.json."""
    ref = read_ref("model", name, settings.get("revision")) if is_hub_name(name) else None
    return f"{ref.repo}@{commits[str(ref)]}" if str(ref) in commits else name


def local_model(name: str, weights: bool = True) -> str:
    """The directory of a model or a tokenizer: a path as it is, a Hub id's copy here (downloaded if need be)."""
    if not is_hub_name(name):
        return name
    ref = read_ref("model", name)
    return str(snapshot(ref, commit_of(ref), weights))


def local_rows(name: str, cache_dir: Path) -> str:
    """The file of rows: a path as it is, a Hub data set's copy here."""
    if not is_hub_name(name):
        return name
    ref = read_ref("dataset", name)
    return str(data_file(ref, commit_of(ref), cache_dir, dataset_name(name)))


# ---- from the Hub

@functools.cache
def commit_of(ref: Ref) -> str:
    """The commit that a revision names: the Hub's word, or the cache's if the Hub cannot be reached."""
    from huggingface_hub import HfApi

    if re.fullmatch("[0-9a-f]{40}", ref.revision):
        return ref.revision
    if reason := unreachable():
        note = _cache_of(ref) / "refs" / ref.revision
        if note.is_file():
            return note.read_text().strip()
        raise absent(ref, reason)
    return ask_hub(ref, lambda: HfApi().repo_info(ref.repo, repo_type=ref.kind, revision=ref.revision, timeout=10)).sha


def absent(ref: Ref, reason: str) -> UserError:
    """What is neither here nor to be had."""
    return UserError(f"{ref.repo}: no path here, and the {ref.kind} of this name on the Hub cannot be fetched "
                     f"({reason}). Connect, name a local path, or download it elsewhere (hf download {ref.repo} "
                     f"--repo-type {ref.kind}) and bring the folder that HF_HOME names.")


def _cache_of(ref: Ref) -> Path:
    """Where the Hub's cache keeps a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{ref.kind}s--{ref.repo.replace('/', '--')}"


@functools.cache
def snapshot(ref: Ref, commit: str, weights: bool) -> Path:
    """The directory of a model at a commit in the Hub's cache, with what it lacks downloaded."""
    return _download(ref, commit, [*SMALL, *(WEIGHTS if weights else ())], list(NOT_MODEL))


def _download(ref: Ref, commit: str, take: list[str], leave: list[str] | None = None) -> Path:
    """The repository's directory in the cache, holding all of its files that fit `take` and not `leave`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    reason = unreachable()
    options = {"repo_type": ref.kind, "revision": commit, "allow_patterns": take, "ignore_patterns": leave}
    try:
        place = ask_hub(ref, lambda: snapshot_download(ref.repo, local_files_only=bool(reason), **options),
                       LocalEntryNotFoundError if reason else (), tries=3)
    except LocalEntryNotFoundError:
        raise absent(ref, reason) from None
    if not reason and ref.revision != commit:  # so that it is found by its name when there is no network
        note = _cache_of(ref) / "refs" / ref.revision
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit)
    return Path(place)


def data_file(ref: Ref, commit: str, cache_dir: Path, name: str) -> Path:
    """The rows of a data set as one file NAME.jsonl (.json, .csv, .parquet), with a manifest beside it."""
    folder = cache_dir / "hub" / f"{ref.repo.replace('/', '--')}@{commit[:12]}"
    if ref.part:  # parts in different folders of a repository may have the same name
        folder /= re.sub(r"[^\w.-]", "--", ref.part)
    made = [path for path in folder.glob(f"{glob.escape(name)}.*") if path.is_file() and ROWS.search(path.name)
            and ROWS.sub("", path.name) == name]
    if made:
        return made[0]
    names, licence = _listing(ref, commit)
    chosen = choose(names, ref.part, ref)
    files = [_download(ref, commit, [glob.escape(n) for n in chosen]) / n for n in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    kind = ROWS.search(chosen[0])[0]
    work, place = folder / f".{name}.{os.getpid()}{kind}", folder / f"{name}{kind}"
    told = {"source": ref.repo, "revision": commit, "files": chosen} | ({"licence": licence} if licence else {})
    (folder / f"{name}.manifest.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    for left in folder.glob(f".{glob.escape(name)}.*{kind}"):  # of starts that were killed
        maker = left.name.removesuffix(kind).rpartition(".")[2]
        if maker.isdigit() and not is_alive(int(maker)):
            left.unlink(missing_ok=True)
    work.unlink(missing_ok=True)
    if len(files) == 1:
        work.symlink_to(files[0].absolute())
    else:
        try:
            join(files, work)
        except BaseException:
            work.unlink(missing_ok=True)
            raise
    os.replace(work, place)
    return place


def _listing(ref: Ref, commit: str) -> tuple[list[str], str | None]:
    """The files of a data set's repository and its licence; without a network, the files that are in the cache."""
    from huggingface_hub import HfApi

    if reason := unreachable():
        place = _cache_of(ref) / "snapshots" / commit
        if not place.is_dir():
            raise absent(ref, reason)
        return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()), None
    info: DatasetInfo = ask_hub(ref, lambda: HfApi().dataset_info(ref.repo, revision=commit, timeout=10))
    licence = info.card_data.get("license") if info.card_data else None
    return sorted(file.rfilename for file in info.siblings), licence if isinstance(licence, str) else None


def choose(names: list[str], part: str | None, ref: Ref) -> list[str]:
    """The files that hold the rows asked for: one, or the parts of one table.

    part: a file, or a word in the names (data/test-00000-of-00001.parquet is "test"); without it: all files of rows,
    and of them those with the word "train" if there are any. UserError with what there is if that is not one table.
    """
    there = [n for n in names if ROWS.search(n) and not n.startswith(".") and Path(n).name not in NOT_ROWS
             and not n.endswith(".manifest.json")]
    has = lambda word, n: re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9_])", ROWS.sub("", n))
    found = there if part is None else [n for n in there if n == part] or [n for n in there if has(part, n)]
    found = [n for n in found if has("train", n)] or found
    tables = {PART.sub("#", n) for n in found}
    if len(tables) == 1 and _all_parts(found):
        return found
    shown = ", ".join(there[:12]) + (f" and {len(there) - 12} more" if len(there) > 12 else "")
    asked = f"{ref.repo}:{part}" if part else ref.repo
    if len(tables) == 1:
        raise UserError(f"{asked}: some of its parts are missing here ({shown}). Download them too.")
    finding = "no file of rows" if not found else f"{len(tables)} tables"
    raise UserError(f"{asked}: {finding} there (the repository has: {shown or 'none at all'}). Name a split or a file: "
                    f"{ref.repo}:FILE.")


def _all_parts(names: list[str]) -> bool:
    """Whether every part is there, where the names say how many there are."""
    total = re.search(r"-\d{5}-of-(\d{5})", names[0])
    return total is None or len(names) == int(total[1])


def join(files: list[Path], out: Path) -> None:
    """Write the parts of a table, all JSONL or all parquet, into one file."""
    if out.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile, ParquetWriter

        schema = ParquetFile(files[0]).schema_arrow
        with ParquetWriter(out, schema) as writer:
            for file in files:
                for batch in ParquetFile(file).iter_batches():
                    writer.write_batch(batch.cast(schema))
    elif ".jsonl" in out.suffixes:
        zipped = out.suffix == ".gz"  # members of a .gz may follow each other, but a last line may lack its end
        with gzip.open(out, "wb", 1) if zipped else open(out, "wb") as whole:
            for file in files:
                with gzip.open(file) if zipped else open(file, "rb") as stream:
                    last = b"\n"
                    while block := stream.read(1 << 20):
                        whole.write(block)
                        last = block[-1:]
                    whole.write(b"" if last == b"\n" else b"\n")
    else:
        raise UserError(f"{files[0].name}: {len(files)} parts of a kind that cannot be joined. Name one of the files.")


# ---- what can go wrong

def ask_hub(ref: Ref, ask: Callable, passed: type[Exception] | tuple = (), tries: int = 1) -> object:
    """ask(), up to `tries` times if the network fails; a fault of the library or the network becomes one sentence."""
    for left in reversed(range(tries)):
        try:
            return ask()
        except passed:
            raise
        except Exception as fault:  # the library raises OSError, ValueError, httpx's and its own errors alike
            found = refusal(fault, ref)
            if not left or isinstance(found, UserError) or found.errno:
                raise found from fault


def refusal(fault: BaseException, ref: Ref) -> UserError | OSError:
    """What a fault of the Hub's library means: a UserError if the user can mend it, an OSError if it may pass."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    while not isinstance(fault, HfHubHTTPError) and isinstance(fault.__cause__, Exception):
        fault = fault.__cause__  # what the library says around it is of no use
    page = f"{constants.ENDPOINT}/{'datasets/' if ref.kind == 'dataset' else ''}{ref.repo}"
    status = fault.response.status_code if isinstance(fault, HfHubHTTPError) else None
    token = "the token that is set does not open it" if get_token() else "no token is set"
    if isinstance(fault, GatedRepoError):
        return UserError(f"{ref.repo}: its owner lets in those who ask, and {token}. Ask at {page}, then {LOG_IN}.")
    if isinstance(fault, RevisionNotFoundError):
        return UserError(f"{ref.repo}: no branch, tag or commit is called {ref.revision}. See {page}/tree/main.")
    if isinstance(fault, RepositoryNotFoundError):
        return UserError(f"{ref.repo}: no path here, and the Hub shows no {ref.kind} of this name ({token}). Check the "
                         f"name; for a private one {LOG_IN}.")
    if isinstance(fault, HFValidationError):
        return UserError(f"{ref.repo}: this cannot be a name on the Hub. Write owner/name, or a path that exists.")
    if status == 401:
        return UserError(f"{ref.repo}: the Hub does not know the token. Make another at {constants.ENDPOINT}"
                         f"/settings/tokens and {LOG_IN}.")
    if status == 403:
        return UserError(f"{ref.repo}: the token may not do this. Give it the right at {constants.ENDPOINT}"
                         "/settings/tokens.")
    if status is not None and status < 500 and status not in (408, 429):
        return UserError(f"{ref.repo}: the Hub refuses ({_brief(fault)}). Check name and file.")
    if isinstance(fault, OSError) and fault.errno in DISK:
        way_out = f"{fault.strerror}. Make room, or let HF_HOME name another disk."
        return OSError(fault.errno, way_out, constants.HF_HUB_CACHE)
    finding = f"the Hub answers {status}" if status else f"the transfer broke off ({_brief(fault)})"
    return OSError(f"{ref.repo}: {finding}. Give the same command again: files that are whole stay.")


def _brief(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:160]}"


_reachable: dict[str, str] = {}


def unreachable(seconds: float = 3.0) -> str:
    """Why the Hub cannot be reached, or "" if it can. Asked once; the libraries would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    endpoint = constants.ENDPOINT
    if endpoint not in _reachable:
        answer = [f"no answer from {endpoint} within {seconds + 1:g} s"]

        def ask() -> None:
            try:
                urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
                answer[0] = ""
            except urllib.error.HTTPError:
                answer[0] = ""  # it answers
            except (OSError, ValueError) as fault:
                answer[0] = f"{endpoint} cannot be reached: {getattr(fault, 'reason', fault)}"

        thread = threading.Thread(target=ask, daemon=True)  # a name lookup knows no time limit of its own
        thread.start()
        thread.join(seconds + 1)
        _reachable[endpoint] = answer[0]
    return _reachable[endpoint]
