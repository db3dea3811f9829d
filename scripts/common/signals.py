"""Being asked to stop: SIGTERM, SIGINT, --max_minutes or the launcher's death set a flag that the loop reads.

    stop = StopFlag(max_minutes)            # early, before the heavy imports
    ... at the end of every step: reason = stop.asked(accelerator); if reason: save, say why, exit 75
"""
from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

# One request often arrives twice: Ctrl-C reaches launcher and child, then the launcher passes it on or dies of it
# (accelerate waits 0.25 s). Only a signal later than this is a person who has lost patience.
SAME_REQUEST_SECONDS = 2.0
PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """A flag that a first SIGTERM or SIGINT only sets; a second one ends the process at once with 128 + its number."""

    hooked = False

    def __init__(self, max_minutes: float | None = None) -> None:
        """Take over SIGTERM and SIGINT (main thread only) and, under a launcher, ask for a signal at its death.

        max_minutes: wall-clock minutes from now after which a stop is requested; None for no limit.
        """
        self.reason: str | None = None        # "SIGTERM", "SIGINT", "--max_minutes 30", "the launcher ended", or given
        self.max_minutes = max_minutes
        self.started = time.monotonic()
        self.noticed: float | None = None     # when the first signal, or the launcher's death, was noticed
        self.launcher: int | None = None      # process id of the launcher, once its death is watched
        self.launcher_gone = False
        for number in STOP_SIGNALS:
            signal.signal(number, self.handle)
        if not StopFlag.hooked:
            os.register_at_fork(before=block_signals, after_in_parent=unblock_signals, after_in_child=default_signals)
            StopFlag.hooked = True
        if launched():
            self.follow_launcher()

    def handle(self, number: int, _frame: object) -> None:
        if self.launcher_died():
            return
        now = time.monotonic()
        if self.noticed is not None and now - self.noticed > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
        self.noticed = self.noticed or now
        self.request(signal.Signals(number).name)

    def request(self, reason: str) -> None:
        """Ask for a stop, for instance because another rank was asked; the first reason stands."""
        self.reason = self.reason or reason

    @property
    def requested(self) -> bool:
        """Whether to stop at the end of this step."""
        self.launcher_died()
        if self.max_minutes is not None and time.monotonic() - self.started >= 60 * self.max_minutes:
            self.request(f"--max_minutes {self.max_minutes:g}")
        return self.reason is not None

    def asked(self, accelerator: object = None) -> str | None:
        """The reason to stop at the end of this step, or None; the same on every process of the accelerator.

        With several processes this is a collective call: a signal to one of them stops all at the same step.
        """
        own = self.reason if self.requested else None
        if accelerator is None or accelerator.num_processes == 1:
            return own
        import torch

        known = [None, "another process was asked to stop", "the launcher ended", "SIGTERM", "SIGINT", "--max_minutes"]
        code = next((n for n, name in enumerate(known) if name and own and own.startswith(name)), 1) if own else 0
        found = torch.tensor(code, device=accelerator.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        if own is None and int(found):
            self.request(known[int(found)])
        return self.reason if int(found) else None  # one that came since counts at the next step, for all

    def follow_launcher(self) -> None:
        """Let the kernel send SIGTERM when the parent dies (Linux; elsewhere `requested` looks). Linux: prctl(2)."""
        self.launcher = os.getppid()
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
            if self.launcher == 1 and not is_launcher(1) and not started_by_init():
                self.note_launcher_gone()  # it died before we asked, and init took us over
        self.launcher_died()  # it may have died between the two lines above

    def launcher_died(self) -> bool:
        """True once: at the first look after the launcher's death (its signal is then no second signal)."""
        if self.launcher is None or self.launcher_gone or os.getppid() == self.launcher:
            return False
        self.note_launcher_gone()
        return True

    def note_launcher_gone(self) -> None:
        self.launcher_gone = True
        self.noticed = time.monotonic()
        self.request("the launcher ended")


# A forked worker dies of a stop signal. Python forgets one that arrives while it forks: they wait until that is over.
before_fork = threading.local()


def block_signals() -> None:
    before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, before_fork.mask)


def default_signals() -> None:
    for number in STOP_SIGNALS:
        if isinstance(getattr(signal.getsignal(number), "__self__", None), StopFlag):
            signal.signal(number, signal.SIG_DFL)
    unblock_signals()


def launched() -> bool:
    """Whether a launcher (accelerate launch, torchrun, deepspeed) started this process."""
    theirs = [name for name in os.environ if name.startswith(("ACCELERATE_", "TORCHELASTIC_"))]
    return "LOCAL_RANK" in os.environ or bool({*theirs} - {"ACCELERATE_USE_CPU"})  # which people set by hand


def started_by_init() -> bool:
    """Whether process 1 itself started this one, as in a container: in its own process group, or at the head of one."""
    return os.getpgrp() in (os.getpid(), os.getpgid(1))


def is_launcher(pid: int) -> bool:
    """Whether that process looks like a launcher; in a container one can be process 1."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(word in command for word in (b"accelerate", b"torch", b"deepspeed"))
