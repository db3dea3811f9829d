"""The output directory of a run: who may write there, whether it is new, continued or rewound, and how it went.

    with RunLock(output_dir):
        opened = open_run_dir(output_dir, resume, overwrite, check=compare)   # fresh | resume | finished
        write_status(output_dir, status="running", ...)

Nothing of an older run is ever deleted: it is moved to `<output_dir>.old-<time>` or to `superseded-<time>/` in it.
"""
from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from common.checkpoint import (
    atomic_json,
    atomic_write,
    checkpoints,
    free_name,
    newest_complete,
    numbered,
    put_aside,
    read_state,
    step_of,
    tidy,
    verify,
)
from common.faults import UserError

if TYPE_CHECKING:
    from common.settings import SftConfig

RUN = "run.json"
STATUS = "run_status.json"
METRICS = "metrics.jsonl"
LOCK = ".lock"
STATUSES = ("running", "finished", "early_stopped", "stopped", "failed")
DONE = ("finished", "early_stopped")
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")
FINAL = (*WEIGHTS, "model.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json",
         "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*",
         "merged", "eval", "samples.jsonl", "README.md", "Modelfile", "report.html", STATUS)  # the end of a run
PLANNED = ("plan.json", "val.jsonl", "test.jsonl", "base")  # its begin, beside run.json


# ---- one run at a time

open_locks: set[int] = set()  # descriptors; a forked child closes them, else it would hold the lock beyond its parent


def drop_locks() -> None:
    while open_locks:
        os.close(open_locks.pop())


class RunLock:
    """Context manager: this process alone works in `run_dir`, which is made if need be. The kernel frees it on kill -9.

    UserError with the holder's process id and start time if another run is there. Only rank 0 takes it. A directory
    made by it that is still empty at the end is removed again.
    """

    hooked = False

    def __init__(self, run_dir: Path | str, say: Callable[[str], None] = print) -> None:
        self.run_dir, self.say = Path(run_dir), say
        self.path = self.run_dir / LOCK
        self.handle: int | None = None
        self.made = False

    def __enter__(self) -> RunLock:
        if not RunLock.hooked:
            os.register_at_fork(after_in_child=drop_locks)
            RunLock.hooked = True
        self.made = not self.run_dir.exists()
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.run_dir}: is a file, not a directory. Choose another --output_dir.") from None
        while True:
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)  # close-on-exec, as always in Python
            open_locks.add(self.handle)
            self.lock()
            if self.path.exists() and os.path.samestat(os.fstat(self.handle), os.stat(self.path)):
                break  # else its last holder removed the empty directory meanwhile
            self.close()
            self.run_dir.mkdir(parents=True, exist_ok=True)
        os.ftruncate(self.handle, 0)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": now()}
        os.pwrite(self.handle, json.dumps(holder).encode(), 0)
        return self

    def lock(self) -> None:
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self.handle, 4096, 0).decode(errors="replace")
            self.close()
            raise UserError(f"{self.run_dir}: another run is working there ({describe(holder)}). Wait for it, stop it, "
                            "or choose another --output_dir.") from None
        except OSError as fault:
            if fault.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                self.close()
                raise
            self.say(f"{self.run_dir}: this file system has no locks; see to it that only one run works there")

    def close(self) -> None:
        if self.handle in open_locks:
            open_locks.discard(self.handle)
            os.close(self.handle)
        self.handle = None

    def __exit__(self, *_: object) -> None:
        if self.handle not in open_locks:  # a forked child
            return
        if self.made and os.listdir(self.run_dir) == [LOCK]:
            self.path.unlink()
            self.run_dir.rmdir()
        self.close()


def describe(holder: str) -> str:
    try:
        found = json.loads(holder)
        return f"process {found['pid']} on {found['host']} since {found['started']}"
    except (ValueError, KeyError, TypeError):
        return "process unknown"


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# ---- how it goes: run_status.json, metrics.jsonl

def write_status(run_dir: Path | str, **entries: object) -> None:
    """Replace run_status.json: `entries` over what this process wrote before (status, step, total_steps, exit_status,
    reason, resume_command …), with pid, host, started and updated. `status` is one of STATUSES."""
    old = read_status(run_dir) or {}
    same = old.get("pid") == os.getpid() and old.get("host") == socket.gethostname()
    content = {"pid": os.getpid(), "host": socket.gethostname(), "started": now(), **(old if same else {}), **entries,
               "updated": now()}
    assert content.get("status") in STATUSES, content
    atomic_json(Path(run_dir) / STATUS, content)


def read_status(run_dir: Path | str) -> dict | None:
    """The content of run_status.json, or None if there is none that can be read."""
    try:
        content = json.loads((Path(run_dir) / STATUS).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_run(run_dir: Path | str) -> dict | None:
    """What run.json tells of the run in a directory: its settings, versions and fingerprints; None if there is none."""
    file = Path(run_dir) / RUN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def earlier_run(config: SftConfig) -> dict | None:
    """`read_run` of the run that is gone on with, or explained."""
    return read_run(config.output_dir) if config.resume_from_checkpoint or config.explain_step else None


def append_metrics(path: Path | str, line: dict) -> None:
    """Add one line of strict JSON with a "step"; the next reader sees all of it or, after a kill, a torn last line."""
    assert isinstance(line.get("step"), int), line
    with open(path, "ab", buffering=0) as out:
        out.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())


def cut_metrics(path: Path | str, step: int, removed_to: Path | None = None) -> int:
    """Keep the lines of steps <= `step`, byte for byte; the others, and a torn one, go (to `removed_to` if given).

    Returns how many went. A file without such lines is not touched.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith(b"\n") and line_step(line) <= step]
    if len(kept) < len(lines):
        if removed_to:
            left = set(map(id, kept))
            atomic_write(removed_to, b"".join(line for line in lines if id(line) not in left))
        atomic_write(path, b"".join(kept))
    return len(lines) - len(kept)


def line_step(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


# ---- fresh, resumed or finished

@dataclass
class Opened:
    """What a start finds: kind "fresh" | "resume" | "finished", the checkpoint to go on from, its step, what moved."""

    kind: str
    checkpoint: Path | None = None
    step: int = 0
    moved_to: Path | None = None


def open_run_dir(output_dir: Path | str, resume: str | Path | None = None, overwrite: bool = False, *,
                 check: Callable[[Opened], None] | None = None, say: Callable[[str], None] = print) -> Opened:
    """Decide between fresh, resume and finished, and put the directory into that state. Under RunLock.

    resume: None, "auto" (continue, or start if nothing is there) or a checkpoint of this run. check(opened) may refuse
    (compare run.json there) before anything is moved. UserErrors: those of `decide`, damage of a named checkpoint.
    """
    run_dir = Path(output_dir)
    if run_dir.is_dir():
        tidy(run_dir)
    opened = decide(run_dir, resume, overwrite)
    named = resume not in (None, "auto") and opened.kind == "resume" and named_checkpoint(run_dir, Path(resume))
    if named:
        refuse_damaged(opened.checkpoint)
    elif opened.kind == "resume":
        found = newest_usable(run_dir, say)
        opened = Opened("resume", found, step_of(found)) if found else Opened("fresh")
        if not found:
            say(f"{run_dir}: no checkpoint can be used; starting from step 0")
    if check:
        check(opened)
    if opened.kind == "finished":
        say(f"{run_dir}: the run is {read_status(run_dir)['status'].replace('_', ' ')}; nothing to do. --init_from "
            f"{run_dir} trains on from it; naming one of its checkpoints goes back to that.")
    elif overwrite and holds_run(run_dir):
        opened.moved_to = move_run_aside(run_dir)
        say(f"{run_dir}: the run that was there is now {opened.moved_to}")
    elif named or (opened.kind != "finished" and any(step_of(path) > opened.step for path in numbered(run_dir))):
        opened.moved_to = rewind(run_dir, opened.step)
        if opened.moved_to:
            say(f"{run_dir}: back to step {opened.step}; what is newer is now in {opened.moved_to.name}/")
    if opened.kind != "finished":
        cut_metrics(run_dir / METRICS, opened.step if opened.kind == "resume" else -1)
    return opened


def newest_usable(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint whose best one so far is whole too, or None; what is damaged is set aside by name.

    The best one is what the run leaves in the end. If it is lost, going on from a later one cannot bring it back;
    going on from an earlier one makes it again, bit for bit.
    """
    newest = newest_complete(run_dir, say=say)
    for path in reversed(numbered(run_dir) if newest else []):
        problems = [] if path == newest else verify(path)
        best = None if problems else read_state(path).best_step
        if problems:
            put_aside(path, problems, say)
        elif best in (None, step_of(path)) or not (problems := verify(path.with_name(f"checkpoint-{best}"))):
            return path
        else:
            say(f"{path}: whole, but what was best by then, checkpoint-{best}, is damaged or gone")
            put_aside(path.with_name(f"checkpoint-{best}"), problems, say)
    return None


def decide(output_dir: Path | str, resume: str | Path | None, overwrite: bool) -> Opened:
    """The decision alone, quickly: nothing is written, no content verified, so the checkpoint is not final yet.

    Fit for an early refusal, before data are read and without the lock.
    """
    run_dir = Path(output_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir}: is a file, not a directory. Choose another --output_dir.")
    if resume is not None and overwrite:
        raise UserError(f"{run_dir}: --resume_from_checkpoint continues the run that --overwrite_output_dir would move "
                        "aside. Leave one of them out.")
    sign = holds_run(run_dir)
    if sign and sign != RUN:
        raise UserError(f"{run_dir}: holds {sign} but no {RUN}, so it is no run of this script. Choose another "
                        "--output_dir.")
    if resume is None:
        if sign and not overwrite:
            raise UserError(f"{run_dir}: holds a run. --resume_from_checkpoint continues it, --overwrite_output_dir "
                            "moves it aside, another --output_dir leaves it alone.")
        return Opened("fresh")
    if resume != "auto":
        path = named_checkpoint(run_dir, Path(resume))
        if path:
            return Opened("resume", path, step_of(path))
    there = numbered(run_dir)
    status = read_status(run_dir) or {}
    if sign and status.get("status") in DONE and any(found(run_dir, pattern) for pattern in WEIGHTS):
        return Opened("finished", there[-1] if there else None, step_of(there[-1]) if there else 0)
    return Opened("resume", there[-1], step_of(there[-1])) if there else Opened("fresh")


def found(run_dir: Path, pattern: str) -> list[Path]:
    return sorted(path for path in run_dir.iterdir() if fnmatchcase(path.name, pattern))


def holds_run(run_dir: Path) -> str | None:
    """The name of something that a fresh run must not run over (run.json first), or None: what it would write."""
    if not run_dir.is_dir():
        return None
    if (run_dir / RUN).exists():
        return RUN
    there = [*numbered(run_dir), *(path for pattern in (*FINAL, *PLANNED, METRICS) for path in found(run_dir, pattern))]
    return next((path.name for path in there if path.name != STATUS), None)


def named_checkpoint(run_dir: Path, path: Path) -> Path | None:
    """The checkpoint of `run_dir` that a user named, relative to here or to the run; None for the run itself."""
    place = path if path.exists() else run_dir / path
    if place.resolve() == run_dir.resolve():
        return None
    names = ", ".join(there.name for there in checkpoints(run_dir)) or "none"
    if not place.is_dir():
        raise UserError(f"{path}: no such checkpoint. {run_dir} has: {names}.")
    here = run_dir / place.resolve().name
    if place.resolve().parent != run_dir.resolve() or here not in numbered(run_dir):
        raise UserError(f"{path}: is not a checkpoint of {run_dir} (which has: {names}). --init_from {path} starts a "
                        "new run from its weights.")
    return here


def refuse_damaged(path: Path) -> None:
    problems = verify(path)
    if problems:
        whole = [other.name for other in reversed(checkpoints(path.parent)) if other != path and not verify(other)]
        way = f"Whole: {', '.join(whole)}." if whole else "No other checkpoint of this run is whole."
        raise UserError(f"{path}: damaged ({'; '.join(problems[:3])}). {way}")


def move_run_aside(run_dir: Path) -> Path:
    """Move all but the lock to a sibling `<run_dir>.old-<time>`; into run_dir itself if the sibling is another disk.

    run.json goes last, so that after a kill the rest is still known as a run.
    """
    real = run_dir.resolve()
    same_disk = os.stat(real).st_dev == os.stat(real.parent).st_dev
    name = f"{real.name}.old-{stamp()}"
    aside = free_name(real.parent / name if same_disk else real / name)
    aside.mkdir()
    there = [path for path in real.iterdir() if path.name != LOCK and path != aside]
    for path in sorted(there, key=lambda path: (path.name == RUN, path.name)):
        os.rename(path, aside / path.name)
    _name_base(aside, real / "base")
    return aside


def _name_base(run_dir: Path, old: Path) -> None:
    """Let an adapter that was moved with its base name the base's new place, for libraries that look there."""
    file = run_dir / "adapter_config.json"
    if file.is_file() and (run_dir / "base").is_dir():
        adapter = json.loads(file.read_text(encoding="utf-8"))
        if Path(adapter["base_model_name_or_path"]).resolve() == old:
            atomic_json(file, adapter | {"base_model_name_or_path": str(run_dir / "base")})


def rewind(run_dir: Path, step: int) -> Path | None:
    """Move later checkpoints, the final model and later metrics to superseded-<time>/; None if there is nothing newer.

    The final files go first and checkpoints from the newest down, so that a kill half-way leaves a run that can be
    continued or rewound again.
    """
    later = [path for path in reversed(numbered(run_dir)) if step_of(path) > step]
    done = (read_status(run_dir) or {}).get("status") in DONE
    if not later and not done and not any(found(run_dir, pattern) for pattern in WEIGHTS):
        return None
    aside = free_name(run_dir / f"superseded-{stamp()}")
    aside.mkdir()
    final = {path: None for pattern in (STATUS, *FINAL) for path in found(run_dir, pattern)}
    for path in [*final, *later]:
        os.rename(path, aside / path.name)
    cut_metrics(run_dir / METRICS, step, aside / METRICS)
    return aside


def stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


# ---- what may not change

def fingerprint_differences(old: dict, new: dict) -> list[tuple[str, object, object]]:
    """(name, old, new) for every entry that differs or that only one side has (then None)."""
    return [(name, old.get(name), new.get(name)) for name in [*old, *(set(new) - set(old))]
            if old.get(name) != new.get(name)]


def refuse_changes(run_dir: Path | str, *differences: list[tuple[str, object, object]], begun: bool = True) -> None:
    """UserError with a table of what differs from the run that is there; nothing if the lists are empty. begun: there
    is a checkpoint."""
    rows = [(name, brief(old), brief(new)) for part in differences for name, old, new in part]
    if rows:
        rows.insert(0, ("", "the run", "now"))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        table = "\n".join(f"  {name:<{widths[0]}}  {old:<{widths[1]}}  {new}".rstrip() for name, old, new in rows)
        whole = any(found(Path(run_dir), pattern) for pattern in WEIGHTS)
        newest = run_dir if whole else max(numbered(Path(run_dir)), key=step_of, default=run_dir)
        other = (f"another --output_dir with --init_from {newest} to train on from its weights" if begun else
                 "--overwrite_output_dir to start anew: it has no checkpoint that can be used")
        raise UserError(f"{run_dir}: this is not the run that was started there.\n{table}\nGive the old values to "
                        f"resume, or {other}.")


def brief(value: object, most: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else text[:most - 1] + "…"
