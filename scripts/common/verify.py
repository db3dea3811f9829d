"""--verify_resume: prove on this machine, model and data that a killed and resumed run equals an uninterrupted one.

    A   the command, 6 steps, uninterrupted
    B   the same, killed (kill -9) between the gradients and the weights of step 4, then given again: it must go on
        from checkpoint-2
    A = B?   weights and optimizer state bit by bit, order of the rows, every line of metrics, the final model

Both run beside the output directory as separate processes of the very command, and are removed afterwards.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common import faults
from common.checkpoint import checkpoints, verify
from common.config import to_dict
from common.faults import CheckFailed, Stopped
from common.rundir import read_status
from common.settings import SftConfig
from common.signals import StopFlag

STEPS, SAVED, KILLED = 6, 2, 4  # of the whole run; in the checkpoint resumed from; in which it is killed
TIMES = ("tokens_per_second", "trained_tokens_per_second", "mfu", "seconds", "since_log")  # differ between any two runs
Start = Callable[[list[str], dict[str, str], Path], int]


def verify_resume(config: SftConfig, stop: StopFlag, start: Start | None = None) -> int:
    """Run A and B and compare; 0 if they are equal. Raises CheckFailed with what differs.

    start(argv, environment, log) runs 03_sft.py and returns its exit status (negative: the signal). Under a launcher
    with several processes each of them calls this; the first alone compares and speaks.
    """
    start = start or (lambda argv, env, log: subprocess_run(argv, env, log, stop))
    main, alone = os.environ.get("RANK", "0") == "0", os.environ.get("WORLD_SIZE", "1") == "1"
    scratch = Path(f"{Path(config.output_dir).absolute()}.verify-{os.environ.get('TORCHELASTIC_RUN_ID', '')[:8]}"
                   f"{os.getppid() if 'RANK' in os.environ else os.getpid()}")
    scratch.mkdir(parents=True, exist_ok=True)
    say = faults.say if main else lambda *lines: None
    try:
        say(f"verifying in {scratch}: {STEPS} steps, uninterrupted")
        run(start, scratch, config, "a", 1, {})
        say(f"the same, killed in step {KILLED}, and resumed")
        run(start, scratch, config, "b", 2, {"SFT_FAIL_AT": f"in_step:{KILLED}"}, killed=True)
        run(start, scratch, config, "b", 3, {})
        if not main:
            return 0
        problems = [*went_on(scratch / "b"), *compare(scratch / "a", scratch / "b")]
        if problems and alone:
            say("they differ; uninterrupted once more, to see whether the machine repeats itself")
            run(start, scratch, config, "c", 4, {})
            own = compare(scratch / "a", scratch / "c")
            problems += ["two uninterrupted runs differ as well, so that this says nothing about resuming: the kernels "
                         "of this device do not give the same result twice (--attn_implementation eager may):",
                         *own] if own else ["two uninterrupted runs are equal: the difference comes from the resume"]
        if problems:
            raise CheckFailed("\n  ".join(["a resumed run is not the uninterrupted one:", *problems]))
        say(f"PASS: killed in step {KILLED} and resumed from step {SAVED}, the run ends after {STEPS} steps with the "
            "same weights, optimizer state, rows, metrics and final model, bit for bit")
        return 0
    finally:
        if main:
            shutil.rmtree(scratch, ignore_errors=True)


def run(start: Start, scratch: Path, config: SftConfig, name: str, number: int, env: dict[str, str],
        killed: bool = False) -> None:
    """Start the script on `name`; CheckFailed with the end of its output unless it ends as it should."""
    settings = {**to_dict(config), "output_dir": str(scratch / name), "max_steps": STEPS, "save_steps": SAVED,
                "eval_steps": SAVED, "logging_steps": 1, "report_to": ["none"], "save_total_limit": 3,
                "early_stopping_patience": None, "max_minutes": None, "merge_adapters": False, "do_gen_test": False,
                "push_to_hub": None}
    place = scratch / f"{name}-{os.environ.get('RANK', '0')}.json"
    place.write_text(json.dumps(settings))
    log = scratch / f"{name}-{number}-{os.environ.get('RANK', '0')}.log"
    if "MASTER_PORT" in os.environ:  # a group of its own for every run
        env = {**env, "MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + number),
               "TORCHELASTIC_USE_AGENT_STORE": "False"}
    code = start(["--config_path", str(place), "--resume_from_checkpoint"], env, log)
    if code != (-signal.SIGKILL if killed else 0):
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""
        wanted = "to be killed" if killed else "to finish"
        raise CheckFailed(f"run {name.upper()} was {wanted}, but ended with {code}:\n{end}")


def subprocess_run(argv: list[str], env: dict[str, str], log: Path, stop: StopFlag) -> int:
    """Run this very script as a process; a request to stop ends it and raises Stopped."""
    script = Path(__file__).resolve().parents[1] / "03_sft.py"
    with open(log, "wb") as out:
        child = subprocess.Popen([sys.executable, str(script), *argv], env={**os.environ, **env}, stdout=out,
                                 stderr=subprocess.STDOUT)
        try:
            code = None
            while code is None and not stop.requested:
                with suppress(subprocess.TimeoutExpired):
                    code = child.wait(0.2)
            if stop.requested:  # also if the child was asked too, and ended first
                raise Stopped(f"{stop.asked()} while verifying; nothing is left behind.")
            return code
        finally:
            child.kill()
            child.wait()


def went_on(b: Path) -> list[str]:
    """A run that began anew instead of going on would be equal too, and prove nothing."""
    resumed = (read_status(b) or {}).get("resumed_from")
    wanted = f"checkpoint-{SAVED}"
    return [] if resumed == wanted else [f"run B went on from {resumed or 'the start'}, not from {wanted}"]


def compare(a: Path, b: Path) -> list[str]:
    """What differs between two finished runs, a sentence each; [] if they are equal."""
    problems: list[str] = []
    names = [{path.name for path in checkpoints(run)} for run in (a, b)]
    last = f"checkpoint-{STEPS}"
    if last not in names[0] & names[1]:
        return [*problems, f"{last} is missing"]
    for name in sorted(names[0] & names[1], key=lambda name: int(name.rpartition("-")[2])):
        problems += [f"{name} of run {of.name.upper()}: {found}" for of in (a, b) for found in verify(of / name)]
    problems += [f"{last}/{found}" for found in different_files(a / last, b / last)]
    problems += different_files(a, b)
    # what the processes held in the end: what is lost on the way to the disk would be missing in both files
    held = [(read_status(of) or {}).get("state", {}) for of in (a, b)]
    problems += different_entries("state at the end", *held)
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (a, b)]
    if len(lines[0]) != len(lines[1]):
        problems.append(f"metrics.jsonl: {len(lines[0])} lines against {len(lines[1])}")
    for x, y in zip(*lines):
        problems += different_entries(f"metrics.jsonl, step {x['step']}", x, y)
    return problems


def different_entries(place: str, x: dict, y: dict) -> list[str]:
    """A sentence for each entry, but for times, that is not the same in both."""
    return [f"{place}: {key} {x.get(key)} against {y.get(key)}"
            for key in sorted({*x, *y} - {*TIMES}) if x.get(key) != y.get(key)]


def different_files(a: Path, b: Path) -> list[str]:
    """Differences of weights, optimizer state and state of two directories; which tensors, and by how much."""
    kinds = ("*.safetensors", "optimizer.pt", "trainer_state.json", "val.jsonl", "base/*.safetensors",
             "shards/.metadata")
    names = sorted({str(path.relative_to(of)) for of in (a, b) for kind in kinds for path in of.glob(kind)})
    problems = [] if any(name.endswith((".safetensors", ".metadata")) for name in names) else ["no weights were saved"]
    for name in names:
        if not ((a / name).exists() and (b / name).exists()):
            problems.append(f"{name}: only in one of the two runs")
        elif name.endswith("trainer_state.json"):
            problems += different_entries(name, *(json.loads((of / name).read_text()) for of in (a, b)))
        elif (a / name).read_bytes() != (b / name).read_bytes():
            problems += different_tensors(a / name, b / name) if not name.endswith(".jsonl") else [f"{name}: differs"]
    return problems


def different_tensors(a: Path, b: Path) -> list[str]:
    """One sentence on the tensors of two files that are not equal bit by bit; [] if only the files' layout differs."""
    found = [dict(tensors_of(path)) for path in (a, b)]
    differ = sorted(name for name in {*found[0], *found[1]} if not same(found[0].get(name), found[1].get(name)))
    if not differ:
        return []
    x, y = (of.get(differ[0]) for of in found)
    by = f"({brief(x)} against {brief(y)})"
    if hasattr(x, "double") and hasattr(y, "double") and x.shape == y.shape:
        by = f"by up to {float((x.double() - y.double()).abs().max()):.1e}"
    every = len({*found[0], *found[1]})
    return [f"{a.name}: {len(differ):,} of {every:,} entries differ, for example {differ[0]} {by}"]


def brief(value: object) -> str:
    """A value in a few characters."""
    if value is None:
        return "absent"
    return str(tuple(value.shape)) if hasattr(value, "shape") else repr(value)[:40]


def tensors_of(path: Path) -> list[tuple[str, object]]:
    """(name, value) of everything in a file of weights or of optimizer state, or in the shards beside `.metadata`."""
    if path.name == ".metadata":
        from common.sharded import all_tensors

        return list(all_tensors(path.parent).items())
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return list(load_file(str(path)).items())
    import torch

    def walk(value: object, name: str) -> list[tuple[str, object]]:
        if isinstance(value, dict):
            return [entry for key, part in value.items() for entry in walk(part, f"{name}.{key}")]
        if isinstance(value, (list, tuple)):
            return [entry for i, part in enumerate(value) for entry in walk(part, f"{name}.{i}")]
        return [(name.lstrip("."), value)]

    return walk(torch.load(path, map_location="cpu", weights_only=True), "")


def same(x: object, y: object) -> bool:
    """Bit by bit: NaN equals the same NaN, 0.0 does not equal -0.0."""
    if hasattr(x, "numpy") and hasattr(y, "numpy"):
        import torch

        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (x, y)]
        return x.dtype == y.dtype and x.shape == y.shape and torch.equal(*raw)
    return x is y or (type(x) is type(y) and x == y)
