"""Training: TRL and a plain transformers loop against 03_sft.py's own step. Same rows, same weights, one table.

    python tests/benchmarks/bench_train.py [--model tiny|small] [--mode full|lora] [--rounds 5]

Each rival runs in a process of its own and they take turns, step by step, after a warm-up. "tuned": its allocator keeps
its memory (as 03_sft.py sets it); "installed": as glibc comes. TRL is given its best settings on a CPU (packing by best
fit, one row a pass, no gradient checkpointing), in fp32 and in bf16; the faster one counts (with three rows a pass it
takes twice as long). 03_sft.py is tried with one row a pass and with all six. Tokens are real ones, never padding.
Beside the speeds: the loss and the gradients of each rival against one example at a time in eager fp32.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import about, record
from rivals import Rival, Task, make_rows

# name: (rival, tuned allocator, bf16, rows a pass if not one)
VARIANTS = {"TRL fp32, installed": ("trl", False, False), "TRL bf16, installed": ("trl", False, True),
            "TRL fp32, tuned": ("trl", True, False), "TRL bf16, tuned": ("trl", True, True),
            "plain bf16, tuned": ("plain", True, True), "ours bf16": ("ours", True, True),
            "ours bf16, 6 rows": ("ours", True, True, 6), "ours bf16, --compile": ("ours_compiled", True, True),
            "ours bf16, --compile, 6": ("ours_compiled", True, True, 6)}
EXACT = {"ours fp32": ("ours", True, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--mode", choices=("full", "lora"), default="full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="names of variants, to try something out; nothing is recorded")
    options = parser.parse_args()
    task = Task(options.model, options.mode)
    rows = make_rows(task)
    real, trained = sum(len(ids) for ids, _ in rows), sum(int(mask[1:].sum()) for _, mask in rows)
    print(f"{about()}, {options.threads} threads\n{options.model}, {options.mode}: {len(rows)} rows, {real:,} real "
          f"tokens, {trained:,} trained ({trained / real:.0%})")

    chosen = {n: v for n, v in VARIANTS.items() if not options.only or n in options.only}
    errors = equality(task, {**chosen, **EXACT}, options.threads)
    seconds = turns(task, chosen, options.threads, options.rounds)
    print(f"\n{'':24}{'best s':>9}{'median s':>10}{'real tok/s':>12}{'trained':>9}{'loss off by':>13}{'gradients':>11}")
    for name in [*chosen, *EXACT]:
        found = seconds.get(name)
        speed = (f"{min(found):9.2f}{statistics.median(found):10.2f}{real / statistics.median(found):12,.0f}"
                 f"{trained / statistics.median(found):9,.0f}") if found else " " * 40
        print(f"{name:24}{speed}{errors[name][0]:13.1e}{errors[name][1]:11.1e}")
    if options.only:
        return
    report(options, seconds, real, trained)


def equality(task: Task, variants: dict[str, tuple], threads: int) -> dict[str, tuple[float, float]]:
    """Loss and gradients of the first step against the reference, relative: |a - b| / |b|."""
    import torch

    def first_step(rival: Rival, place: Path) -> tuple[float, dict]:
        loss = rival.step(place)["loss"]
        rival.close()
        return loss, torch.load(place)

    errors: dict[str, tuple[float, float]] = {}
    with TemporaryDirectory() as work:
        place = Path(work) / "gradients.pt"
        true_loss, truth = first_step(start("reference", True, False, task=task, threads=threads), place)
        size = sum(float(g.double().square().sum()) for g in truth.values()) ** 0.5
        for name, variant in variants.items():
            loss, found = first_step(start(*variant, task=task, threads=threads), place)
            if found.keys() != truth.keys():
                raise RuntimeError(f"{name} trains other weights: {sorted(found.keys() ^ truth.keys())[:4]}")
            apart = sum(float((found[n].double() - truth[n].double()).square().sum()) for n in truth) ** 0.5
            errors[name] = (abs(loss - true_loss) / true_loss, apart / size)
    return errors


def start(name: str, tuned: bool, bf16: bool, rows: int = 1, *, task: Task, threads: int) -> Rival:
    return Rival(name, replace(task, rows_per_pass=rows), tuned=tuned, threads=threads, bf16=bf16)


def turns(task: Task, variants: dict[str, tuple], threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, the rivals taking turns."""
    rivals = {name: start(*variant, task=task, threads=threads) for name, variant in variants.items()}
    for rival in rivals.values():
        rival.step()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, rival in rivals.items():
            seconds[name].append(rival.step()["seconds"])
    for rival in rivals.values():
        rival.close()
    return seconds


def report(options: argparse.Namespace, seconds: dict[str, list[float]], real: int, trained: int) -> None:
    median = {name: statistics.median(found) for name, found in seconds.items()}
    ours = min((found, n) for n, found in median.items() if n.startswith("ours"))
    best = {kind: min(median[f"TRL {dtype}, {kind}"] for dtype in ("fp32", "bf16")) for kind in ("tuned", "installed")}
    name = f"train_{options.model}_{options.mode}"
    ratios = {f"{name}_same_allocator": best["tuned"] / ours[0], f"{name}_as_installed": best["installed"] / ours[0],
              f"{name}_vs_plain": median["plain bf16, tuned"] / ours[0]}
    record(name, {"seconds": {n: round(s, 3) for n, s in median.items()}, "fastest of ours": ours[1],
                  "real tokens/s": round(real / ours[0]), "trained tokens/s": round(trained / ours[0]),
                  **{n: round(r, 2) for n, r in ratios.items()}})
    for ratio, value in ratios.items():
        print(f"RATIO {ratio} {value:.2f}")


if __name__ == "__main__":
    main()
