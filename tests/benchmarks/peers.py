"""What the benchmarks share: TRL, which is installed here and nowhere else, and the file that keeps the figures.

    from peers import about, need_trl, record
    need_trl()                                     # import trl works from here on
    print(about())                                 # 2026-01-31  AMD EPYC, 2 cores, load 0.1, Linux; torch 2.13.0 ...
    record("prepare", {"seconds": 5.1, "rows_per_second": 19600})     # -> baseline.json, with machine, date, versions
"""
from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS, BASELINE = HERE / ".peers", HERE / "baseline.json"
TRL = "trl==1.16.*"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "sentencepiece", "numpy", "trl")


def need_trl() -> None:
    """Put TRL on sys.path; the first time it is installed aside, without its dependencies, which are all here."""
    if not (PEERS / "trl").is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                        "--target", str(PEERS), TRL], check=True)
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))


def processor() -> str:
    """Model name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what can decide a figure."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def about() -> str:
    """The first line of every benchmark: date, machine, load and versions."""
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    return (f"{date.today()}  {processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
            f"{platform.system()}; {packages}")


def record(name: str, entry: dict) -> None:
    """Keep the figures of a benchmark under its name in baseline.json, with machine, date and versions."""
    known = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    known[name] = {"machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
                   "date": str(date.today()), "versions": versions(), **entry}
    aside = BASELINE.with_suffix(".tmp")
    aside.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    os.replace(aside, BASELINE)
