"""Whether the quickstart's training has become slower: its last run against the entry in baseline.json.

    bash scripts/quickstart.sh                               # with nothing else running
    python tests/benchmarks/bench_quickstart.py              # compare; exit status 1 if more than 10 % slower
    python tests/benchmarks/bench_quickstart.py --record     # make this run the entry, on a new machine for example

The seconds are those of the optimizer steps of 03_sft.py, as the run itself has counted them.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from peers import BASELINE, about, record

RUN = Path(__file__).resolve().parents[2] / "checkpoints" / "sft" / "sample"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN, help="directory of the run")
    parser.add_argument("--record", action="store_true", help="keep this run's figures as the entry")
    options = parser.parse_args()
    status = options.run / "run_status.json"
    if not status.is_file():
        parser.error(f"{options.run}: no run there. Make it with scripts/quickstart.sh.")
    told = json.loads(status.read_text(encoding="utf-8"))
    if told["status"] != "finished":
        parser.error(f"{status}: the run is {told['status']}. Let it finish.")
    state = told["state"]
    found = {"steps": state["step"], "seconds": round(state["seconds"], 1),
             "real tokens/s": round(state["tokens"] / state["seconds"]),
             "trained tokens/s": round(state["trained_tokens"] / state["seconds"])}
    print(about())
    if options.record:
        record("quickstart", found)
    entry = json.loads(BASELINE.read_text())["quickstart"]
    print(f"{'':<12} {'steps':>7} {'seconds':>9} {'real tokens/s':>15} {'trained tokens/s':>18}")
    for name, row in (("this run", found), ("baseline", entry)):
        print(f"{name:<12} {row['steps']:>7} {row['seconds']:>9} {row['real tokens/s']:>15,} "
              f"{row['trained tokens/s']:>18,}")
    print(f"the entry: {entry['machine']}, {entry['date']}")
    ratio = found["real tokens/s"] / entry["real tokens/s"]
    print(f"RATIO quickstart_training {ratio:.2f}")
    return int(ratio < 0.9)


if __name__ == "__main__":
    sys.exit(main())
