"""Kill a run at random times, again and again, and start it with the same command, until hundreds of kills are done.

    python tests/soak_kills.py --kills 300 [--seed 0] [--minutes 30]

Over LoRA and all weights, packed and padded rows, dropout, stages, early stopping, and two processes (both or one of
them killed). Nobody mends anything: the command is always the same, with a bare --resume_from_checkpoint. Every run
that finishes must have left exactly what the uninterrupted one left: weights, optimizer state, state and metrics.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "scripts"), str(Path(__file__).resolve().parent)]

from forks import Bench, make_bench, warm, what_is_left  # noqa: E402

RESUME = "--resume_from_checkpoint"


@dataclass
class Case:
    """A kind of run, what its uninterrupted run left, how long that took, and what was counted."""

    name: str
    flags: tuple
    ranks: int = 1
    whole: dict | None = None
    seconds: float = 0.0
    kills: int = 0
    finished: int = 0
    starts: int = 0


def cases(bench: Bench) -> list[Case]:
    stages = bench.place / "stages.json"
    stages.write_text(json.dumps({"stages": [
        {"name": "short", "until_step": 5, "datasets": [{"path": str(bench.rows)}]},
        {"name": "mixed", "until_step": 12, "datasets": [{"path": str(bench.rows), "weight": 1.0, "n_samples": 30},
                                                         {"path": str(bench.more), "weight": 2.0}]}]}))
    steps = ("--max_steps", 12)
    return [
        Case("LoRA, packed, dropout", (*steps, "--lora_dropout", 0.1)),
        Case("LoRA, padded, accumulated", (*steps, "--no_packing", "--gradient_accumulation_steps", 3)),
        Case("all weights, packed", (*steps, "--no_lora", "--save_steps", 1, "--save_total_limit", 1)),
        Case("all weights, padded, merged", (*steps, "--no_packing", "--merge_adapters", "--lora_r", 4)),
        Case("two data sets, tokens", (*steps, "--no_lora", "--weight_unit", "tokens", "--dataset_weights", 0.7, 0.3,
                                       "--dataset_paths", bench.rows, bench.more)),
        Case("stages", ("--config_path", stages, "--no_lora", "--reset_optimizer_per_stage")),
        Case("stages, LoRA", ("--config_path", stages)),
        Case("early stopping", (*steps, "--no_lora", "--early_stopping_patience", 3, "--early_stopping_threshold", 1)),
        Case("two ranks, LoRA", (*steps, "--gradient_accumulation_steps", 1, "--lora_dropout", 0.1), 2),
        Case("two ranks, all weights", (*steps, "--gradient_accumulation_steps", 1, "--no_lora", "--no_packing"), 2),
    ]


def kill_once(bench: Bench, case: Case, run: Path, chance: random.Random) -> None:
    """Start the command, kill it at a random time, compare what is left if it finished before."""
    case.starts += 1
    child = bench.start(run, *case.flags, RESUME, ranks=case.ranks)
    end = time.monotonic() + chance.uniform(0.02, 1.1) * case.seconds
    while time.monotonic() < end and alive(child.pids[0]):
        time.sleep(0.005)
    whom = chance.choice([[0], [1], [0, 1]]) if case.ranks == 2 else [0]
    child.kill(ranks=whom)
    left = [rank for rank in range(case.ranks) if rank not in whom]
    end = time.monotonic() + 20
    while left and alive(child.pids[left[0]]) and time.monotonic() < end:
        time.sleep(0.05)
    if left and alive(child.pids[left[0]]):  # killed while they met: the launcher ends the other
        child.kill(ranks=left)
    child.wait(60)
    hit = any(child.codes[rank] == -signal.SIGKILL for rank in whom)
    case.kills += hit
    allowed = {0, -signal.SIGKILL, 70} if hit else {0}
    if not set(child.codes) <= allowed:
        raise SystemExit(f"{case.name}: ended with {child.codes} after {case.kills} kills\n{child.output[-4000:]}")
    if not hit:
        check(case, run)


def alive(pid: int) -> bool:
    """Whether a child that nobody has waited for still runs."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def check(case: Case, run: Path) -> None:
    """A finished run is what the uninterrupted one was; make room for the next."""
    left = what_is_left(run)
    if left != case.whole:
        differ = [name for name in {*left, *case.whole} if left.get(name) != case.whole.get(name)]
        raise SystemExit(f"{case.name}: after {case.kills} kills {', '.join(sorted(differ))} differ; see {run}")
    broken = [path.name for path in run.iterdir() if "broken" in path.name or path.name.startswith(".partial")]
    if broken:
        raise SystemExit(f"{case.name}: {', '.join(broken)} left in {run}")
    case.finished += 1
    shutil.rmtree(run)
    Path(f"{run}.log").unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=300, help="stop after so many")
    parser.add_argument("--minutes", type=float, default=60, help="or after this time")
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warm()
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    bench, chance, start = make_bench(place), random.Random(given.seed), time.monotonic()
    todo = cases(bench)
    for i, case in enumerate(todo):
        begun = time.monotonic()
        child = bench.run(place / f"whole{i}", *case.flags, ranks=case.ranks)
        if set(child.codes) != {0}:
            raise SystemExit(f"{case.name}: {child.codes}\n{child.output[-4000:]}")
        case.whole, case.seconds = what_is_left(place / f"whole{i}"), time.monotonic() - begun
    while sum(case.kills for case in todo) < given.kills and time.monotonic() - start < 60 * given.minutes:
        for i, case in enumerate(todo):
            kill_once(bench, case, place / f"run{i}", chance)
    for i, case in enumerate(todo):  # and now to the end
        if (place / f"run{i}").exists():
            case.starts += 1
            child = bench.run(place / f"run{i}", *case.flags, RESUME, ranks=case.ranks)
            if set(child.codes) != {0}:
                raise SystemExit(f"{case.name}: {child.codes}\n{child.output[-4000:]}")
            check(case, place / f"run{i}")
        print(f"{case.name:<28} {case.kills:>4} kills {case.starts:>4} starts {case.finished:>3} finished runs")
    shutil.rmtree(place)
    kills, finished = (sum(getattr(case, name) for case in todo) for name in ("kills", "finished"))
    print(f"{kills} kills, {finished} finished runs, all bit-identical to the uninterrupted one, 0 human steps "
          f"({(time.monotonic() - start) / 60:.1f} minutes, {os.cpu_count()} cores {platform.machine()}, "
          f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
