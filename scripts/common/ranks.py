"""The processes of one run: what the main one finds counts for all, and a dead or hung one ends the job.

Every process notes in the job's key-value store how far it has come. A thread in each looks at the notes: when none has
changed for `minutes`, or a process is gone, it writes the reason to run_status.json and ends its own process with 70.
The backend's own time limits are not used: they name nobody, and a collective on a GPU cannot be left any other way.
"""
from __future__ import annotations

import functools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from common.faults import RankLost, SaidElsewhere, UserError
from common.rundir import read_status, write_status

if TYPE_CHECKING:
    from accelerate import Accelerator

    from common.settings import SftConfig

T = TypeVar("T")
COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed? ?out|broken pipe|recv\w* fail|socket",
                        re.IGNORECASE)
GRACE_SECONDS = 5.0  # for a dead process's neighbours to notice by themselves, and for a failed one's last words


def on_main(watch: Watch, work: Callable[[], T]) -> T:
    """The result of work() on the main process, for all (it is pickled). A fault of it ends all with its exit status;
    the main process alone says why. It may take any time, as long as it shows that it comes further (`Watch.through`)
    or lives (`Watch.alive`)."""
    if watch.world == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    result, fault = None, None
    watch.turns += 1
    if watch.rank == 0:
        try:
            result = work()
        except Exception as found:
            fault = found
        watch.store.set(f"main {watch.turns}", "done")
    else:  # no collective call waits for the work: that would run into its time limit
        while not watch.store.check([f"main {watch.turns}"]):
            time.sleep(0.02)
    result, status = broadcast_object_list([result, None if fault is None else exit_status(fault)])
    if fault is not None:
        raise fault
    if status is not None:
        raise SaidElsewhere(status)
    return result


def exit_status(fault: BaseException) -> int:
    """The exit status that a fault ends in."""
    return getattr(fault, "status", 74 if isinstance(fault, OSError) else 1)


class Watch:
    """Context manager around a run's work. With one process it does nothing."""

    def __init__(self, accelerator: Accelerator, minutes: float) -> None:
        """minutes: end the job when no process has come further for this long."""
        self.rank, self.world, self.seconds = accelerator.process_index, accelerator.num_processes, 60 * minutes
        self.directory: Path | None = None  # where run_status.json is, once this run has the directory
        self.done = threading.Event()
        self.marks, self.place, self.turns = 0, "start", 0
        self.table: list[dict] = []
        if self.world > 1:
            from torch.distributed import PrefixStore
            from torch.distributed.distributed_c10d import _get_default_store

            store = PrefixStore("sft_watch", _get_default_store())
            self.store, self.reader = store, store.clone()  # a client each: a lock is held while one waits
            try:
                self.note()
                accelerator.wait_for_everyone()  # every process has a note now
            except RuntimeError as fault:
                raise self.named(fault) from None

    def at(self, place: str) -> None:
        """This process has come to `place`."""
        if self.world > 1:
            self.marks, self.place = self.marks + 1, place
            self.note()

    def through(self, items: Iterable[T], place: str, every: int = 2000) -> Iterator[T]:
        """The items, with a note at every so many."""
        for i, item in enumerate(items):
            if i % every == 0:
                self.at(place)
            yield item

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Around work that may take any time, such as a download: a thread notes now and then that this process
        lives."""
        done = threading.Event()

        def note_it() -> None:
            with suppress(RuntimeError):  # the store's host has ended, which `look` tells
                while not done.wait(min(60.0, self.seconds / 4)):
                    self.at(self.place)

        thread = threading.Thread(target=note_it, name="alive", daemon=True)
        if self.world > 1:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if self.world > 1:
                thread.join(GRACE_SECONDS)

    def meet(self) -> None:
        """Wait for all processes, for any time: a collective call would run into its time limit."""
        if self.world > 1:
            self.turns += 1
            self.store.set(f"met {self.turns} {self.rank}", "done")
            while not self.store.check([f"met {self.turns} {rank}" for rank in range(self.world)]):
                time.sleep(0.02)

    def note(self, end: str = "") -> None:
        self.store.set(str(self.rank), json.dumps({
            "rank": self.rank, "pid": os.getpid(), "host": socket.gethostname(), "marks": self.marks,
            "place": self.place, "end": end}))

    def read(self, store: object) -> list[dict]:
        """The notes of all processes; the last ones seen if the store's host is gone."""
        try:
            if store.check([str(rank) for rank in range(self.world)]):  # reading a missing one would wait for it
                self.table = [json.loads(store.get(str(rank))) for rank in range(self.world)]
        except RuntimeError:
            pass
        return self.table

    def __enter__(self) -> Watch:
        if self.world > 1:
            self.read(self.store)
            threading.Thread(target=self.look, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, fault: BaseException | None, _: object) -> None:
        self.close()
        if self.world > 1:
            lost = self.named(fault)
            if lost is not fault:
                raise lost from None
            try:
                self.note(end=f"{kind.__name__}: {fault}"[:300] if fault else "done")
            except RuntimeError:
                pass  # the store's host has ended: nobody is left to read it

    def close(self) -> None:
        """From here on processes work alone, for any time."""
        self.done.set()

    def named(self, fault: BaseException | None) -> BaseException | None:
        """RankLost in place of what a collective call raises when another process is gone; else the fault itself."""
        if self.world == 1 or not of_a_collective(fault):
            return fault
        self.done.set()
        end = time.monotonic() + GRACE_SECONDS
        while not (lost := gone(self.read(self.store), self.rank)) and time.monotonic() < end:
            time.sleep(0.1)
        cause = re.sub(r"\[[^]]*\] *", "", f"{fault}".splitlines()[0]).partition(". ")[0]  # no place in C++, no guesses
        return RankLost(sentence(lost or behind(self.table), cause.rstrip(".")[:200]))

    def look(self) -> None:
        """The thread: compare the notes again and again."""
        seen, since, missing_since = None, time.monotonic(), None
        while not self.done.wait(min(1.0, self.seconds / 10)):
            table, now = self.read(self.reader), time.monotonic()
            if table != seen:
                seen, since = [*table], now
            lost = gone(table, self.rank)
            missing_since = (missing_since or now) if lost else None
            if lost and now - missing_since > 2 * GRACE_SECONDS:
                self.end(sentence(lost, ""))
            elif now - since > self.seconds:
                self.end(sentence(behind(table), f"no process came further for {self.seconds / 60:g} minutes"))

    def end(self, reason: str) -> None:
        """End this process; its main thread hangs in a call that does not return."""
        if self.done.is_set():
            return
        print(f"RankLost: {reason}", file=sys.stderr, flush=True)
        self.leave_reason(reason)
        os._exit(RankLost.status)

    def leave_reason(self, reason: str) -> None:
        """Write how it ended, from any process: the main one may be the lost one."""
        if self.directory is None:
            return
        old = read_status(self.directory) or {}
        if old.get("status") == "running":
            kept = {name: old[name] for name in ("step", "total_steps", "resume_command") if name in old}
            write_status(self.directory, **kept, status="failed", exit_status=RankLost.status, reason=reason)


def start_processes(config: SftConfig) -> Accelerator:
    """Start the processes (or find them started); refuse a launch that left them apart, or an engine this cannot do."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, patch_environment

    from common.sharded import check_engine
    from common.zero import check_zero, is_zero

    if is_zero():
        check_zero(config)
    # Watch ends a job that hangs and says where; the backend's own limit comes after it
    limit = timedelta(minutes=config.rank_timeout_minutes + 5)
    # buffers (rotary tables) never change: sent anew, they would make processes wait for each other in every forward
    once = DistributedDataParallelKwargs(broadcast_buffers=False)
    try:
        # DeepSpeed's engine is driven by common.zero instead; steps are accumulated by common.train
        with patch_environment(accelerate_use_deepspeed="false", accelerate_gradient_accumulation_steps="1"):
            accelerator = Accelerator(cpu=torch.backends.mps.is_available(),  # Apple's GPUs know no float64
                                      kwargs_handlers=[InitProcessGroupKwargs(timeout=limit), once])
    except RuntimeError as fault:
        if of_a_collective(fault):
            raise RankLost(sentence(["the processes did not find each other"], str(fault).splitlines()[0])) from None
        raise
    check_launch(accelerator.num_processes)
    check_engine(accelerator, config)
    return accelerator


def check_launch(processes: int) -> None:
    """UserError if the launcher was asked for more processes than there are in this job."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and processes == 1:
        raise UserError(f"the launcher started {started} processes, but each would train alone. On CPU set the "
                        "environment variable ACCELERATE_USE_CPU=true; on GPUs start with accelerate launch "
                        "--multi_gpu.")
    if (asked := processes_asked_for()) > processes:
        raise UserError(f"accelerate launch was asked for {asked} processes and started {processes}. On GPUs give "
                        "--multi_gpu, or one of the files in config/accelerate; several processes on a CPU are started "
                        f"by: ACCELERATE_USE_CPU=true torchrun --nproc_per_node {asked} scripts/03_sft.py …")


@functools.cache
def launcher_words() -> list[str]:
    """The command line of the process above this one, remembered beyond its end; none if it cannot be known."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def launchers_patience() -> list[str]:
    """A line where a launcher kills its processes before a checkpoint may be written."""
    known = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ or "TORCHELASTIC_RUN_ID" not in os.environ or any(
        word.startswith(("--shutdown-timeout", "--shutdown_timeout")) for word in launcher_words())
    return [] if known else ["note: this launcher kills its processes 30 s after it is asked to stop. If a step and a "
                             "checkpoint may take longer, set TORCH_ELASTIC_SHUTDOWN_TIMEOUT (seconds) before it "
                             "starts"]


def processes_asked_for() -> int:
    """The number of processes that the `accelerate launch` above this one was asked for; 1 if nothing is known."""
    return asked_for(launcher_words(), sys.argv[0])


def typed_launch(words: list[str], script: str) -> list[str] | None:
    """The part of a launcher's command line that stands before the script, as it was typed; None for other commands."""
    words = words[:words.index(script)] if script in words else []
    place = next((i for i, word in enumerate(words) if Path(word).name in ("accelerate", "torchrun")), None)
    return None if place is None else [Path(words[place]).name, *words[place + 1:]]


def asked_for(words: list[str], script: str) -> int:
    """--num_processes of a command line, or of its file; 1 if it is no `accelerate launch`. That runs a single process,
    without a word, where it finds no GPUs and is not told --multi_gpu."""
    from accelerate.commands.config.config_args import default_config_file

    if "launch" not in words or not any("accelerate" in word for word in words[:words.index("launch")]):
        return 1
    words, given = words[:words.index(script) if script in words else None], {}  # the rest is the script's own
    for word, following in zip(words, [*words[1:], ""]):
        name, _, value = word.partition("=")
        if name.startswith("--"):
            given[name[2:].replace("-", "_")] = value or following
    if "num_processes" in given:
        return int(given["num_processes"])
    if "cpu" in given and "config_file" not in given:  # then accelerate does not read its default file
        return 1
    file = Path(given.get("config_file", default_config_file))
    found = re.search(r"^num_processes: *(\d+)", file.read_text(), re.MULTILINE) if file.is_file() else None
    return int(found[1]) if found else 1


def of_a_collective(fault: BaseException | None) -> bool:
    """Whether a call that several processes do together raised it (gloo has no class of its own for that)."""
    from torch.distributed import DistError

    return isinstance(fault, DistError) or (isinstance(fault, RuntimeError) and bool(COLLECTIVE.search(str(fault))))


def gone(table: list[dict], but: int) -> list[str]:
    """What is known of processes that ended before the others."""
    return [f"rank {n['rank']} failed at {n['place']}: {n['end']}" if n["end"] else
            f"rank {n['rank']} (process {n['pid']}) died at {n['place']}"
            for n in table if n["rank"] != but and n["end"] != "done" and (
                n["end"] or (n["host"] == socket.gethostname() and not is_alive(n["pid"])))]


def behind(table: list[dict]) -> list[str]:
    """The processes that have come least far."""
    if not table:
        return ["another process ended while they started"]
    least, most = min(n["marks"] for n in table), max(n["marks"] for n in table)
    if least == most:
        return [f"all {len(table)} processes wait at {table[0]['place']}"]
    return [f"rank {n['rank']} (process {n['pid']} on {n['host']}) did not come further than {n['place']}"
            for n in table if n["marks"] == least]


def sentence(lost: list[str], cause: str) -> str:
    return (f"{'; '.join(lost)}{f' ({cause})' if cause else ''}. The newest checkpoint is whole: start again with "
            "--resume_from_checkpoint.")


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return False
    except (OSError, IndexError):
        return True
    try:  # no /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
