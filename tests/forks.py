"""Run scripts in forked children: the parent imports torch and transformers once, a run then costs a fraction of a
second. A child has its own process group, signals and environment, and its output goes to a file."""
from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def load_script(name: str) -> ModuleType:
    """The module of scripts/<name>.py, whose name may begin with a digit."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def warm() -> None:
    """Import now what every child needs."""
    import accelerate.tracking  # noqa: F401
    import peft  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401  (DDP imports it)
    import torch.nn.parallel  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import common.leave
    import common.report
    import common.run
    import common.show  # noqa: F401

    torch.set_num_threads(1)


@dataclass
class Child:
    """Forked processes, one a rank, that run a script's main."""

    pids: list[int]
    log: Path
    codes: list[int] = field(default_factory=list)

    def wait(self, seconds: float = 120) -> int:
        """Wait for all; the first status that is not 0 (negative: killed by that signal)."""
        end = time.monotonic() + seconds
        for pid in self.pids[len(self.codes):]:
            while True:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    break
                if time.monotonic() > end:
                    self.kill()
                    raise TimeoutError(f"process {pid}: not done after {seconds} s\n{self.output}")
                time.sleep(0.005)
            self.codes.append(os.waitstatus_to_exitcode(status))
        return next((code for code in self.codes if code), 0)

    def kill(self, number: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some of the processes, or to all that are not waited for."""
        for rank in range(len(self.codes), len(self.pids)) if ranks is None else ranks:
            os.kill(self.pids[rank], number)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork_main(main: Callable[[list[str]], int], argv: list[str], log: Path, *, ranks: int = 1,
              env: dict[str, str] | None = None, patch: Callable[[], None] | None = None) -> Child:
    """Start main(argv) under run_main in `ranks` processes; `patch()` is called in each child before it."""
    sys.stdout.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    port, pids = free_port() if ranks > 1 else 0, []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            try:
                _become(log, _environment(rank, ranks, port) | (env or {}))
                code = _run(main, argv, patch)
            except BaseException as fault:  # nothing of the parent's may run on in here
                os.write(2, f"{type(fault).__name__}: {fault}\n".encode())
                code = 99
            os._exit(code)
        pids.append(pid)
    return Child(pids, log)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    if ranks == 1:
        return {}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def _become(log: Path, env: dict[str, str]) -> None:
    for name in [name for name in os.environ if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]:
        del os.environ[name]
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _run(main: Callable[[list[str]], int], argv: list[str], patch: Callable[[], None] | None) -> int:
    import traceback

    from common.faults import run_main

    if "torch" in sys.modules:
        import torch
        from accelerate.state import AcceleratorState, GradientState, PartialState

        torch.set_num_threads(1)
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()
    try:
        if patch:
            patch()
        return run_main(main, argv)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
