"""Run scripts in forked children: the parent imports torch and transformers once, a run then costs a fraction of a
second. A child has its own process group, signals and environment, and its output goes to a file."""
from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def load_script(name: str) -> ModuleType:
    """The module of scripts/<name>.py, whose name may begin with a digit."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
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
    import common.report_eval
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
                sys.argv = [f"scripts/{Path(main.__globals__['__file__']).name}", *argv]
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

    from tqdm import tqdm

    from common.faults import run_main

    tqdm.set_lock(threading.RLock())  # its own is shared by all children: one that is killed would never give it back
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


@dataclass(frozen=True)
class Bench:
    """A tiny base model without chat tokens, its tokenizer, two files of rows, and 03_sft.py to run on them."""

    place: Path
    base: str
    tokenizer: str
    rows: Path
    more: Path

    def argv(self, out: Path, *flags: object) -> list[str]:
        """A command of 8 steps, 2 rows of 128 tokens each, that evaluates and saves every second step."""
        given = {str(flag) for flag in flags}
        defaults = {"--dataset_paths": self.rows, "--model_path": self.base, "--tokenizer_path": self.tokenizer,
                    "--cache_dir": self.place / "cache", "--max_seq_length": 128, "--per_device_train_batch_size": 1,
                    "--gradient_accumulation_steps": 2, "--max_steps": 8, "--save_steps": 2, "--eval_steps": 2,
                    "--logging_steps": 1, "--report_to": "none", "--val_split_ratio": 0.05, "--learning_rate": 0.003}
        if "--config_path" in given:
            defaults = {k: v for k, v in defaults.items() if k not in ("--dataset_paths", "--max_steps")}
        kept = [str(word) for name, value in defaults.items() if name not in given for word in (name, value)]
        return [*kept, "--output_dir", str(out), *map(str, flags)]

    def start(self, out: Path, *flags: object, ranks: int = 1, env: dict[str, str] | None = None,
              patch: Callable[[], None] | None = None, report: bool = False) -> Child:
        """Fork a run into `out`; its output goes to <out>.log."""
        def changes() -> None:
            if not report:  # plots take longer than the training here
                import common.leave

                common.leave.report = lambda *_: None
            if patch:
                patch()

        return fork_main(script("03_sft").main, self.argv(out, *flags), Path(f"{out}.log"), ranks=ranks, env=env,
                         patch=changes)

    def run(self, out: Path, *flags: object, **options: object) -> Child:
        """The same, and wait for its end."""
        child = self.start(out, *flags, **options)
        child.wait()
        return child


@cache
def script(name: str) -> ModuleType:
    return load_script(name)


def make_bench(place: Path) -> Bench:
    """Train the tokenizer and make model and rows in an empty directory."""
    import sentencepiece
    from conftest import chat_rows, make_llama, train_spm, write_rows

    tokenizer = str(train_spm(place / "unigram.model"))
    size = sentencepiece.SentencePieceProcessor(model_file=tokenizer).get_piece_size()
    base = make_llama(place / "base", size)
    rows = chat_rows(90)
    long = [{"prompt": f"{i} what is this?", "response": " ".join(row["response"] for row in chat_rows(2, i))}
            for i in range(40)]
    return Bench(place, base, tokenizer, write_rows(place / "rows.jsonl", rows), write_rows(place / "more.jsonl", long))


def what_is_left(run_dir: Path) -> dict[str, object]:
    """All of a finished run that must not depend on interruptions: weights and optimizer tensors by sha256, state and
    metrics without times, held-out rows, how it ended."""
    from common.checkpoint import numbered
    from common.rundir import read_status
    from common.verify import TIMES, tensors_of

    newest = numbered(run_dir)[-1]
    found: dict[str, object] = {"newest": newest.name, "status": read_status(run_dir)["status"]}
    files = [*run_dir.glob("*.safetensors"), *run_dir.glob("base/*.safetensors"), *run_dir.glob("merged/*.safetensors"),
             *newest.glob("*.safetensors"), run_dir / "val.jsonl"]
    for file in sorted(files):
        found[str(file.relative_to(run_dir))] = hashlib.sha256(file.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for name, value in tensors_of(newest / "optimizer.pt"):
        digest.update(name.encode() + (value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode()))
    found["optimizer"] = digest.hexdigest()
    without_times = lambda entries: {k: v for k, v in entries.items() if k not in TIMES}
    found["state"] = without_times(json.loads((newest / "trainer_state.json").read_text()))
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found["metrics"] = [without_times(json.loads(line)) for line in lines]
    return found


def hold_at(step: int, action: Callable[[], None], place: str = "batch_inputs") -> Callable[[], None]:
    """A patch: action() is called once in the middle of optimizer step `step` (from 1), before its first pass."""
    def patch() -> None:
        import common.train as train

        real_step, real_part, now, done = train.train_step, getattr(train, place), [0], []

        def train_step(*args: object, **options: object) -> object:
            now[0] = args[5] + 1
            return real_step(*args, **options)

        def part(*args: object, **options: object) -> object:
            found = real_part(*args, **options)
            if now[0] == step and not done:
                done.append(1)
                changed = action()
                return found if changed is None else changed
            return found

        train.train_step = train_step
        setattr(train, place, part)
    return patch
