"""Training: TRL and a plain transformers loop against 03_sft.py's own step. Same rows, same weights, one table.

    python tests/benchmarks/bench_train.py [--model tiny|small] [--mode full|lora] [--rounds 5]

Each rival runs in a process of its own. First those of a kind take turns; then the fastest of each kind do, with a step
to warm up and one that counts (all at once would need 30 GB with the small model). "tuned": its allocator keeps
its memory (as 03_sft.py sets it); "installed": as glibc comes. TRL is given its best settings on a CPU (packing by best
fit, one row a pass, no gradient checkpointing), in fp32 and in bf16 (with three rows a pass it takes twice as long).
03_sft.py has all six rows in a pass (with one it takes 1.1 times as long). Tokens are real ones, never padding.
A ratio is of the best steps of both: on a shared machine whole runs of steps take a seventh longer, and most of all
those of a rival that does little but arithmetic. The ratios called "_median" are of the medians.
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

# kind, of which the fastest counts: {name: (rival, tuned allocator, bf16, rows a pass if not one)}
KINDS = {"as_installed": {"TRL fp32, installed": ("trl", False, False), "TRL bf16, installed": ("trl", False, True)},
         "same_allocator": {"TRL fp32, tuned": ("trl", True, False), "TRL bf16, tuned": ("trl", True, True)},
         "vs_plain": {"plain bf16, tuned": ("plain", True, True)},
         "ours": {"ours bf16": ("ours", True, True, 6), "ours bf16, --compile": ("ours_compiled", True, True, 6)}}
EXACT = {"ours fp32": ("ours", True, False)}
VARIANTS = {name: variant for kind in KINDS.values() for name, variant in kind.items()}
HEAT = 2  # timed steps that decide which variant of a kind is the fastest


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
    heats, fastest = {}, {}
    for kind, names in KINDS.items():
        if found := turns(task, [name for name in names if name in chosen], options.threads, HEAT):
            heats.update(found)
            fastest[kind] = min(found, key=lambda name: min(found[name]))
    heats.update(turns(task, list(EXACT), options.threads, HEAT))
    seconds = turns(task, list(fastest.values()), options.threads, options.rounds)
    steps = {**heats, **seconds}
    best, median = ({name: of(found) for name, found in steps.items()} for of in (min, statistics.median))
    # one that came second in its heat may still have the best step of its kind
    fastest = {kind: min((name for name in KINDS[kind] if name in best), key=best.get) for kind in fastest}
    print(f"\n{'':24}{'best s':>9}{'median s':>10}{'real tok/s':>12}{'trained':>9}{'loss off by':>13}{'gradients':>11}")
    for name in errors:
        print(f"{name:24}{best[name]:9.2f}{median[name]:10.2f}{real / best[name]:12,.0f}"
              f"{trained / best[name]:9,.0f}{errors[name][0]:13.1e}{errors[name][1]:11.1e}"
              f"{'' if name in seconds else '  in its heat'}")
    if not options.only:
        report(f"train_{options.model}_{options.mode}", best, median, fastest, real, trained)


def equality(task: Task, variants: dict[str, tuple], threads: int) -> dict[str, tuple[float, float]]:
    """Loss and gradients of the first step against the reference, relative: |a - b| / |b|."""
    import torch

    def first_step(rival: Rival) -> tuple[float, dict]:
        loss = rival.step(place)["loss"]
        rival.close()
        return loss, torch.load(place)

    errors: dict[str, tuple[float, float]] = {}
    with TemporaryDirectory() as work:
        place = Path(work) / "gradients.pt"
        true_loss, truth = first_step(start("reference", True, False, task=task, threads=threads))
        size = sum(float(g.double().square().sum()) for g in truth.values()) ** 0.5
        for name, variant in variants.items():
            loss, found = first_step(start(*variant, task=task, threads=threads))
            if found.keys() != truth.keys():
                raise RuntimeError(f"{name} trains other weights: {sorted(found.keys() ^ truth.keys())[:4]}")
            apart = sum(float((found[n].double() - truth[n].double()).square().sum()) for n in truth) ** 0.5
            errors[name] = (abs(loss - true_loss) / true_loss, apart / size)
    return errors


def start(name: str, tuned: bool, bf16: bool, rows: int = 1, *, task: Task, threads: int) -> Rival:
    return Rival(name, replace(task, rows_per_pass=rows), tuned=tuned, threads=threads, bf16=bf16)


def turns(task: Task, names: list[str], threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, the rivals taking turns."""
    rivals = {name: start(*{**VARIANTS, **EXACT}[name], task=task, threads=threads) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, rival in rivals.items():
            rival.step()  # its memory and caches lay idle while the others had their turn
            seconds[name].append(rival.step()["seconds"])
    for rival in rivals.values():
        rival.close()
    return seconds


def report(name: str, best: dict[str, float], median: dict[str, float], fastest: dict[str, str], real: int,
           trained: int) -> None:
    ours, kinds = fastest["ours"], ("same_allocator", "as_installed", "vs_plain")
    ratios = {f"{name}_{kind}{of}": seconds[fastest[kind]] / seconds[ours]
              for of, seconds in (("_median", median), ("", best)) for kind in kinds}
    rounded = lambda seconds: {n: round(s, 3) for n, s in seconds.items()}
    record(name, {"seconds": rounded(best), "median seconds": rounded(median), "fastest": fastest,
                  "real tokens/s": round(real / best[ours]), "trained tokens/s": round(trained / best[ours]),
                  **{n: round(r, 2) for n, r in ratios.items()}})
    for ratio, value in ratios.items():
        print(f"RATIO {ratio} {value:.2f}")


if __name__ == "__main__":
    main()
