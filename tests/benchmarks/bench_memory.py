"""Memory of a training step: TRL against 03_sft.py's own step, a vocabulary of 32k, packed rows of 1,024 tokens.

    python tests/benchmarks/bench_memory.py [--model tiny|small] [--mode full|lora] [--rows_per_pass 1 8]

Each rival is a process of its own and does two steps of eight rows, half of each trained. Measured is the peak of
resident memory in the second one (VmHWM) above what the process held before its model was loaded: weights, gradients,
optimizer state, activations, logits. TRL: bf16, no gradient checkpointing. Both with the allocator as glibc comes
("installed"), which gives memory back at once, and ours also as 03_sft.py sets it.
"""
from __future__ import annotations

import argparse

from peers import about, record
from rivals import Rival, Task

VARIANTS = {"TRL, installed": ("trl", False), "ours, installed": ("ours", False), "ours, tuned": ("ours", True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--mode", choices=("full", "lora"), default="full")
    parser.add_argument("--rows_per_pass", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(f"{about()}, {options.threads} threads\n{options.model}, {options.mode}; MiB above the process "
          "without its model\n")
    print(f"{'rows a pass':24}" + "".join(f"{n:>10}" for n in options.rows_per_pass))
    peaks = {name: [peak(name, Task(options.model, options.mode, 8, full_rows=True, rows_per_pass=n), options.threads)
                    for n in options.rows_per_pass] for name in VARIANTS}
    for name, found in peaks.items():
        print(f"{name:24}" + "".join(f"{mib:10,.0f}" for mib in found))
    record(f"memory_{options.model}_{options.mode}",
           {"rows a pass": options.rows_per_pass, "MiB": {n: [round(x) for x in p] for n, p in peaks.items()}})
    # the worse of our two allocators, at the number of rows that suits TRL best
    ratio = min(trl / max(ours) for trl, *ours in zip(*peaks.values()))
    print(f"RATIO memory_vs_trl {ratio:.2f}")


def peak(name: str, task: Task, threads: int) -> float:
    rival, tuned = VARIANTS[name]
    process = Rival(rival, task, tuned=tuned, threads=threads)
    process.step()
    found = process.step()
    process.close()
    return found["peak"] - found["before"]


if __name__ == "__main__":
    main()
