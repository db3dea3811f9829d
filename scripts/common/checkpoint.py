"""A checkpoint is complete and verified, or it does not exist.

    save    .partial-checkpoint-<step>.<pid>/   files, fsync, sha256, MANIFEST.json renamed last
         -> checkpoint-<step>/                  one rename, fsync of the parent
         -> rotation                            only now; a directory is renamed away before it is deleted
    load    newest first; size and sha256 of every file; a damaged one is set aside as broken-checkpoint-<step>

Nothing here knows models: the caller gives a function that writes files into a directory. A kill at any moment leaves
the checkpoints that were there, and leftovers that `tidy` removes at the next start.
"""
from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from common.faults import UserError

MANIFEST = "MANIFEST.json"
STATE = "trainer_state.json"
FORMAT = 1
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DAMAGE = {errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}  # of reading; anything else is no finding
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d*)")


@dataclass
class TrainState:
    """How far a run has come: all that resuming needs beside weights, optimizer and plan."""

    step: int = 0                      # optimizer steps done
    best_loss: float | None = None     # lowest validation loss so far
    best_step: int | None = None       # the step it was measured at
    evals_without_gain: int = 0        # evaluations since, for early stopping
    stopped_early: bool = False
    tokens: int = 0                    # tokens seen
    trained_tokens: int = 0            # of them targets
    seconds: float = 0.0               # training time of all sessions together
    since_log: dict[str, float] = field(default_factory=dict)  # sums since the last metrics line, so that it is equal
    rows: str = ""                     # sha256 over the rows of all steps done, in their order


def state_from_dict(found: dict, place: str) -> TrainState:
    """TrainState from its JSON object; a missing or unknown key is a UserError that names `place`."""
    names = {f.name for f in fields(TrainState)}
    odd = sorted(names ^ set(found))
    if odd:
        raise UserError(f"{place}: keys differ from this version's ({', '.join(odd)}). Resume with the version that "
                        "wrote it, or train on from its weights with --init_from.")
    return TrainState(**found)


# ---- files that are whole or absent

def fsync_path(path: Path | str) -> None:
    """Flush a file or a directory to the disk; file systems that cannot do it for directories are left alone."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def flush(directory: Path, paths: Iterable[Path] | None = None) -> None:
    """fsync the files below a directory (or those of them), then the directories."""
    paths = [path for path in directory.rglob("*") if path.is_file()] if paths is None else paths
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fsync_path, paths))
    for folder in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        fsync_path(folder)


def atomic_write(path: Path | str, data: str | bytes) -> None:
    """Write a file so that a reader, or a start after a kill, sees the old content or the new one, never a part."""
    path = Path(path)
    work = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(work, "wb") as out:
            out.write(data.encode() if isinstance(data, str) else data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(work, path)
    except BaseException:
        with contextlib.suppress(OSError):
            work.unlink()
        raise
    fsync_path(path.parent)


def atomic_json(path: Path | str, content: object) -> None:
    """`atomic_write` of strict JSON (NaN and infinity raise ValueError; floats keep every bit)."""
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def fail_point(name: str, step: int | None = None) -> None:
    """For tests: SFT_FAIL_AT=NAME or NAME:STEP kills the process here as `kill -9` would."""
    if os.environ.get("SFT_FAIL_AT") in (name, f"{name}:{step}"):
        os.kill(os.getpid(), signal.SIGKILL)


# ---- the seal

def file_facts(path: Path) -> dict:
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": os.fstat(stream.fileno()).st_size, "sha256": digest}


def manifest_text(content: dict) -> str:
    """The manifest's exact bytes: its last entry is the sha256 of the others, so that no bit of it is unguarded."""
    content = {name: value for name, value in content.items() if name != "seal"}
    body = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return body[:-2] + f',\n "seal": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def seal(directory: Path, step: int, extra: dict, known: dict | None = None) -> dict:
    """fsync every file below `directory`, then write MANIFEST.json with their sizes and hashes. Returns its content.

    known: name -> size and sha256 of files that whoever wrote them has flushed and hashed already.
    """
    known = known or {}
    paths = sorted(path for path in directory.rglob("*")
                   if path.is_file() and path.relative_to(directory).as_posix() not in known)
    flush(directory, paths)
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        facts = list(pool.map(file_facts, paths))
    fail_point("before_manifest", step)
    content = {"format": FORMAT, "step": step, "extra": extra,
               "files": known | {path.relative_to(directory).as_posix(): fact for path, fact in zip(paths, facts)}}
    atomic_write(directory / MANIFEST, manifest_text(content))
    return content


def read_manifest(path: Path | str) -> dict:
    """MANIFEST.json of a checkpoint: {format, step, files: {name: {bytes, sha256}}, extra}. ValueError if damaged."""
    text = (Path(path) / MANIFEST).read_bytes()
    try:
        content = json.loads(text.decode())
        if manifest_text(content).encode() != text:
            raise ValueError("its own sha256 differs")
    except (ValueError, TypeError, AttributeError) as fault:
        raise ValueError(f"{MANIFEST}: {fault}") from None
    return content


def verify(path: Path | str) -> list[str]:
    """Problems of a sealed directory, each `file: finding`; [] if every listed file has its size and sha256.

    Files that the manifest does not list are ignored. A file that may not be read at all (permissions) is an OSError.
    """
    path = Path(path)
    try:
        content = read_manifest(path)
    except ValueError as fault:
        return [str(fault)]
    except OSError as fault:
        if fault.errno not in DAMAGE:
            raise
        return [f"{MANIFEST}: missing" if fault.errno == errno.ENOENT else f"{MANIFEST}: {fault.strerror}"]
    if content["format"] != FORMAT:
        return [f"{MANIFEST}: format {content['format']}, this version reads {FORMAT}"]
    name = CHECKPOINT.fullmatch(path.name)
    problems = [f"{STATE}: not in {MANIFEST}"] if name and STATE not in content["files"] else []
    if name and int(name[1]) != content["step"]:
        problems.append(f"{MANIFEST}: is of step {content['step']}, the directory's name says {name[1]}")
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda entry: file_problem(path / entry[0], entry[1]), sorted(content["files"].items()))
        problems += [f"{file}: {problem}" for file, problem in zip(sorted(content["files"]), found) if problem]
    return problems


def file_problem(path: Path, fact: dict) -> str | None:
    try:
        size = path.stat().st_size
        if size != fact["bytes"]:
            return f"{size:,} bytes instead of {fact['bytes']:,}"
        return None if file_facts(path) == fact else "sha256 differs"
    except OSError as fault:
        if fault.errno not in DAMAGE:
            raise
        return "missing" if fault.errno == errno.ENOENT else str(fault.strerror)


def read_state(path: Path | str) -> TrainState:
    """The TrainState of a checkpoint directory (verify it first)."""
    place = Path(path) / STATE
    return state_from_dict(json.loads(place.read_text()), str(place))


# ---- save

def save_checkpoint(run_dir: Path | str, state: TrainState, write: Callable[[Path], dict | None], *, keep: int,
                    extra: dict | None = None) -> Path:
    """Write checkpoint-<state.step> and then rotate; returns its path, on disk to the last bit.

    write(dir) puts weights, optimizer and so on into the directory and may return what `seal` need not find out.
    `extra` (JSON-able) is stored in the manifest.
    What the step has to say in metrics.jsonl comes before its save, so that no line is lost. After any fault the
    partial directory is removed, the older checkpoints stand, and the fault propagates; a full disk as OSError.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    final = run_dir / f"checkpoint-{state.step}"
    work = run_dir / f".partial-{final.name}.{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        known = write(work)
        fail_point("after_weights", state.step)
        atomic_json(work / STATE, asdict(state))
        seal(work, state.step, extra or {}, known)
        if (run_dir / "metrics.jsonl").exists():  # a checkpoint is never younger than its log
            fsync_path(run_dir / "metrics.jsonl")
        fail_point("before_rename", state.step)
        put_in_place(work, final)
    except BaseException as fault:
        written = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
        shutil.rmtree(work, ignore_errors=True)
        if found := no_space(fault):
            raise OSError(found, no_space_sentence(run_dir, state.step, written, found), str(run_dir)) from fault
        raise
    fail_point("before_rotation", state.step)
    rotate(run_dir, state, keep)
    return final


def put_in_place(work: Path, final: Path) -> None:
    """Rename `work` to `final`; a directory that is there stays whole under another name until the new one stands."""
    old = final.with_name(f".replaced-{final.name}.{os.getpid()}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    fail_point("in_replace")
    try:
        os.rename(work, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    fsync_path(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def no_space(fault: BaseException | None) -> int | None:
    """The errno if a fault, or its cause, means a full disk; torch and safetensors only say it in words."""
    while fault is not None:
        if isinstance(fault, OSError) and fault.errno in NO_SPACE:
            return fault.errno
        words = re.search(r"os error (\d+)", str(fault))
        if words and int(words[1]) in NO_SPACE:
            return int(words[1])
        if re.search(r"PytorchStreamWriter failed writing|inline_container.*unexpected pos", str(fault)):
            return errno.EIO  # torch.save keeps the number to itself
        fault = fault.__cause__ or fault.__context__
    return None


def disk_fault(fault: BaseException | None, place: Path) -> BaseException | None:
    """An OSError with the way out for a full disk, whatever a library made of it; any other fault as it is."""
    if fault is None or not (found := no_space(fault)) or "--save_total_limit" in str(fault):
        return fault
    return OSError(found, f"{os.strerror(found)}, {size(free_bytes(place))} are free. The checkpoints there are whole. "
                   "Make room and start again with --resume_from_checkpoint.", str(place))


def no_space_sentence(run_dir: Path, step: int, written: int, found: int) -> str:
    whole = checkpoints(run_dir)
    try:
        needed = sum(fact["bytes"] for fact in read_manifest(whole[-1])["files"].values()) if whole else None
    except (OSError, ValueError):
        needed = None
    need = f"about {size(needed)} are needed" if needed else f"{size(written)} were written when it ended"
    stands = f"{whole[-1].name} is whole" if whole else "There is no earlier checkpoint"
    return (f"{os.strerror(found)} while saving checkpoint-{step}: {need}, {size(free_bytes(run_dir))} are free. "
            f"{stands}. Make room, or lower --save_total_limit, and start again with --resume_from_checkpoint.")


def size(n: int) -> str:
    """1234567 -> '1.2 MB'."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            return f"{n / factor:,.1f} {unit}"
    return f"{n} bytes"


def free_bytes(place: Path) -> int:
    """Free bytes on the file system of `place`, which need not exist yet."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_space(run_dir: Path | str, needed_bytes: int) -> None:
    """Refuse before step 1 what the disk cannot hold (UserError)."""
    free = free_bytes(Path(run_dir))
    if needed_bytes > free:
        raise UserError(f"{run_dir}: checkpoints and the final model need about {size(needed_bytes)}, {size(free)} are "
                        "free. Make room, choose another --output_dir, or lower --save_total_limit.")


# ---- which checkpoints there are

def checkpoints(run_dir: Path | str) -> list[Path]:
    """checkpoint-<step> directories that carry a manifest, oldest first; their content is not looked at."""
    return [path for path in numbered(run_dir) if (path / MANIFEST).is_file()]


def numbered(run_dir: Path | str) -> list[Path]:
    """Every checkpoint-<step> directory, oldest first."""
    run_dir = Path(run_dir)
    names = [path for path in run_dir.iterdir() if CHECKPOINT.fullmatch(path.name)] if run_dir.is_dir() else []
    return sorted((path for path in names if path.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """checkpoint-120 -> 120."""
    return int(path.name.rsplit("-", 1)[1])


def rotate(run_dir: Path, state: TrainState, keep: int) -> None:
    """Delete old checkpoints: the newest `keep`, the best, and the best as each kept one knows it stay.

    The last, because going back to a kept checkpoint goes back to what was best then.
    """
    there = checkpoints(run_dir)
    stay = {path.name for path in there[-max(keep, 1):]} | {f"checkpoint-{state.step}", f"checkpoint-{state.best_step}"}
    for path in there:
        if path.name in stay:
            with contextlib.suppress(OSError, ValueError, TypeError):  # a damaged one is found when it is loaded
                stay = stay | {f"checkpoint-{read_state(path).best_step}"}
    for path in there:
        if path.name not in stay:
            gone = path.with_name(f".removed-{path.name}.{os.getpid()}")
            shutil.rmtree(gone, ignore_errors=True)
            os.rename(path, gone)
            fail_point("in_rotation", state.step)
            shutil.rmtree(gone, ignore_errors=True)  # a file that a network disk holds on to goes at the next start


def tidy(run_dir: Path | str) -> None:
    """Remove what a killed process left unfinished. Only for the holder of the directory's lock."""
    for path in sorted(Path(run_dir).iterdir()):
        replaced = re.fullmatch(r"\.replaced-(checkpoint-\d+|base|merged)\.\d+", path.name)
        if replaced and not path.with_name(replaced[1]).exists():
            os.rename(path, path.with_name(replaced[1]))
        elif replaced or re.fullmatch(r"\.((partial|removed)-checkpoint-\d+|base|merged)\.\d+", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\..+\.\d+-\d+\.tmp", path.name):
            path.unlink()


def newest_complete(run_dir: Path | str, *, set_aside: bool = True, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint whose every byte is right, or None.

    A damaged one on the way gets one line, and with `set_aside` (only under the directory's lock) is renamed to
    broken-checkpoint-<step>.
    """
    for path in reversed(numbered(run_dir)):
        problems = verify(path)
        if not problems:
            return path
        if set_aside:
            put_aside(path, problems, say)
        else:
            say(damaged(path, problems))
    return None


def damaged(path: Path, problems: list[str]) -> str:
    return f"{path}: damaged ({'; '.join(problems[:3])})"


def put_aside(path: Path, problems: list[str], say: Callable[[str], None]) -> None:
    """Rename a damaged checkpoint to broken-checkpoint-<step>, so that nothing takes it for one; say so."""
    line = damaged(path, problems)
    if path.exists():
        aside = free_name(path.with_name(f"broken-{path.name}"))
        os.rename(path, aside)
        line += f"; set aside as {aside.name}"
    say(line)


def free_name(path: Path) -> Path:
    """`path`, or path-2, path-3 … if it is taken."""
    n, found = 1, path
    while found.exists() or found.is_symlink():
        n += 1
        found = path.with_name(f"{path.name}-{n}")
    return found
