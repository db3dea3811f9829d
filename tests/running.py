"""Run the numbered scripts in this process, as a launcher would start them; and small material for them."""
from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SPEED = ("tokens_per_second", "trained_tokens_per_second", "mfu")


@dataclass
class Ran:
    """How a script ended and what it printed."""

    status: int
    out: str
    err: str

    def ok(self) -> Ran:
        """The same, if it ended well."""
        assert self.status == 0, f"exit {self.status}\n{self.out[-2000:]}\n{self.err[-4000:]}"
        return self


def run_script(name: str, *argv: object, cwd: Path | None = None, mixed_precision: str = "no") -> Ran:
    """Run scripts/<name>.py with these arguments; everything a script changes in a process is put back."""
    from accelerate.state import AcceleratorState, GradientState

    from common.faults import run_main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    environment, out, err = dict(os.environ), io.StringIO(), io.StringIO()
    os.environ["ACCELERATE_MIXED_PRECISION"] = mixed_precision
    words = [str(word) for word in argv]
    try:
        with contextlib.ExitStack() as stack:
            # whoever started the tests stands for the launcher, be it process 1
            stack.enter_context(mock.patch("common.signals.is_launcher", return_value=True))
            stack.enter_context(mock.patch.object(sys, "argv", [f"scripts/{name}.py", *words]))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            if cwd:
                stack.enter_context(contextlib.chdir(cwd))
            status = run_main(importlib.import_module(name).main, words)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # no signal at the parent's death any more
    return Ran(status, out.getvalue(), err.getvalue())


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def files_below(folder: Path) -> list[str]:
    """Every file below a directory, by its path in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
