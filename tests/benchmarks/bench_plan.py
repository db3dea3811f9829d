"""How long planning takes, and how much memory: three data sets, one packed epoch, lengths known.

    python tests/benchmarks/bench_plan.py                    # 10 million examples; target 10 s and 2 GB
    python tests/benchmarks/bench_plan.py --examples 1000000

Peak memory is that of the whole process, so it includes Python, numpy and the lengths themselves (8 bytes an example).
Lengths are lognormal with median 200, cut to 8 .. max_seq_length, as instruction data have them. One core.
"""
from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
from peers import about, record

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from common.arithmetic import describe
from common.plan import Plan, Source, Stage, make_plan  # noqa: E402

CASES = {"all rows, packed": (None, True), "weights .4 .4 .2, packed": ((.4, .4, .2), True),
         "all rows, unpacked": (None, False)}


def peak_gigabytes() -> float:
    """Peak resident memory of this process; ru_maxrss is in KiB on Linux and in bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def made_up_sources(n: int, max_seq_length: int) -> list[Source]:
    """15, 35 and 50 percent of n examples."""
    rng = np.random.default_rng(0)
    sources = []
    for name, part in (("a", .15), ("b", .35), ("c", .50)):
        lengths = rng.lognormal(np.log(200), .9, round(n * part)).clip(8, max_seq_length).astype(np.int32)
        sources.append(Source(name, lengths, lengths // 2))
    return sources


def check(plan: Plan, n: int) -> None:
    """What is measured must also be right: every example once, no row over-full."""
    assert np.array_equal(np.bincount(plan.draws, minlength=n), np.ones(n))
    tokens = np.add.reduceat(plan.lengths[plan.draws], plan.row_bounds[:-1])
    assert tokens.max() <= plan.max_seq_length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--max_seq_length", type=int, default=1024, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(about())
    sources = made_up_sources(args.examples, args.max_seq_length)
    print(f"{args.examples:,} examples, rows of {args.max_seq_length:,} tokens, 16 rows per step; "
          f"{peak_gigabytes():.2f} GB before planning")
    print(f"{'':<26}{'best s':>8}{'median s':>10}{'summary s':>11}{'us/step':>9}{'peak GB':>9}")
    best = {}
    for case, (weights, packing) in CASES.items():
        seconds = []
        for _ in range(args.repeats):
            plan = None  # the old plan must not count against the new one's peak
            start = time.perf_counter()
            plan = make_plan(sources, [Stage("train", (0, 1, 2), weights, epochs=1)],
                             max_seq_length=args.max_seq_length, packing=packing, rows_per_step=16, seed=0)
            seconds.append(time.perf_counter() - start)
        peak = peak_gigabytes()
        start = time.perf_counter()
        summary = plan.summary()
        summary_seconds = time.perf_counter() - start
        steps = range(0, plan.n_steps, max(plan.n_steps // 500, 1))
        start = time.perf_counter()
        for step in steps:
            plan.rank_rows(step, 0, 2)
        per_step = (time.perf_counter() - start) / len(steps)
        if weights is None:
            check(plan, args.examples)
        best[case] = min(seconds)
        print(f"{case:<26}{min(seconds):8.2f}{sorted(seconds)[len(seconds) // 2]:10.2f}{summary_seconds:11.2f}"
              f"{per_step * 1e6:9.0f}{peak:9.2f}")
        print("\n".join("    " + line for line in describe(summary).splitlines()[-2:]))
    record("plan", {"examples": args.examples, "seconds": round(best["all rows, packed"], 2),
                    "peak_gb": round(peak_gigabytes(), 2)})
    print(f"RATIO plan_10m_seconds {best['all rows, packed'] * 1e7 / args.examples:.2f}")


if __name__ == "__main__":
    main()
