"""How a script ends: one sentence, one exit status, nothing lost.

0 done · 1 a check failed · 2 the user can mend it · 3 the loss or a gradient was not finite · 70 a rank died or hung ·
74 disk or I/O · 75 stopped by a signal or a time limit after saving a checkpoint · 130 Ctrl-C where nothing is saved.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend. The message says place, finding and way out; it is shown without a traceback."""

    status = 2


class CheckFailed(Exception):
    """A check that the user asked for did not pass."""

    status = 1


class NotFinite(Exception):
    """The loss or a gradient is NaN or infinite; the message names the step and the rows."""

    status = 3


class RankLost(Exception):
    """A process of a distributed job died or hung; the message names its rank."""

    status = 70


class Stopped(Exception):
    """A signal or --max_minutes ended the run after a checkpoint was written."""

    status = 75


class SaidElsewhere(Exception):
    """The main process of a distributed job ends with this status and says why; the others end quietly."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}, said by the main process")
        self.status = status


def memory_fault(fault: BaseException | None, way: str = "Take smaller batches, or a machine with more of it."
                 ) -> BaseException | None:
    """A UserError in place of torch's words for memory that does not suffice, with the way out; any other fault as it
    is."""
    if type(fault).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(fault):
        return fault
    return UserError(f"the memory does not suffice ({str(fault).strip().partition(chr(10))[0]:.160}). {way}")


def say(*lines: str) -> None:
    """Print lines at once. Whoever reads may leave (`… | head`): the work goes on, unread."""
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:
        _unread()


def _unread() -> None:
    """Let what is still printed, at exit too, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_main(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run a script's `main(argv)` and return its exit status; the faults above become one line on stderr."""
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except SaidElsewhere as fault:
        return fault.status
    except (UserError, CheckFailed, NotFinite, RankLost, Stopped) as fault:
        name = {2: "error", 75: "stopped"}.get(fault.status, type(fault).__name__)
        print(f"{name}: {fault}", file=sys.stderr)
        return fault.status
    except KeyboardInterrupt:
        print("stopped: by Ctrl-C; what was not finished was not written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _unread()
        print("disk or I/O error: whoever read the output has left", file=sys.stderr)
        return 74
    except OSError as fault:
        place = f"{fault.filename}: " if fault.filename else ""
        print(f"disk or I/O error: {place}{fault.strerror or fault}", file=sys.stderr)
        return 74
    except Exception as fault:
        from common.checkpoint import no_space

        if isinstance(short := memory_fault(fault), UserError):
            print(f"error: {short}", file=sys.stderr)
            return short.status
        if not (found := no_space(fault)):  # a full disk by a library's own name
            raise
        print(f"disk or I/O error: {os.strerror(found)} ({fault})", file=sys.stderr)
        return 74
