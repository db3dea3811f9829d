"""The memory that --dry_run names against the peak of a real run on CPU: tiny and small, LoRA and full.

    python tests/benchmarks/bench_estimate.py [--models tiny small] [--rows 1 4] [--lengths 1024] [--examples short]

Every case is 03_sft.py in a process of its own, two steps on full rows of short examples, or of one long example each,
with a vocabulary of 32k. Measured is the peak of resident memory (VmHWM) from the loading of the model on, above what
the process held before. Linux.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from peers import about, record

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 32_000
ONE_RUN = """
import sys, json
sys.path.insert(0, "scripts")
sys.path.insert(0, "tests")
import common.run
from forks import load_script

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

def load_run(*given):
    global before
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM counts from here
    return real(*given)

real, common.run.load_run = common.run.load_run, load_run
load_script("03_sft").main(sys.argv[1:])
print("MEASURED", status("VmHWM") - before)
"""


def make_inputs(work: Path, models: list[str], lengths: list[int]) -> None:
    """Random models, a tokenizer of 32k words, and rows that fill any length."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(VOCABULARY - 4)]
    tokenizer = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>")
    torch.manual_seed(0)
    for name in models:
        settings = json.loads((ROOT / "config" / f"{name}.json").read_text())
        settings |= {"max_position_embeddings": 4096, "vocab_size": VOCABULARY}
        kind = settings.pop("model_type")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        model.save_pretrained(work / name)
        fast.save_pretrained(work / name)
    rng = np.random.default_rng(0)
    for name, words in [("short", 120), *((f"long{n}", n // 2 - 16) for n in lengths)]:  # each of prompt, answer
        with (work / f"{name}.jsonl").open("w") as file:
            for _ in range(400 if name == "short" else 100):
                prompt, response = (" ".join(f"w{i}" for i in rng.integers(0, VOCABULARY - 4, words)) for _ in range(2))
                file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")


def run(work: Path, model: str, mode: str, rows: int, length: int, precision: str, examples: str,
        more: list[str]) -> tuple[int, int]:
    """(measured, estimated) bytes of one run."""
    shutil.rmtree(work / "out", ignore_errors=True)
    data = work / ("short.jsonl" if examples == "short" else f"long{length}.jsonl")
    command = ["--model_path", str(work / model), "--dataset_paths", str(data), "--output_dir",
               str(work / "out"), "--cache_dir", str(work / "cache"), "--max_seq_length", str(length),
               "--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", "1", "--max_steps", "2",
               "--packing", "--use_lora" if mode == "lora" else "--no_lora", "--report_to", "none", *more]
    found = subprocess.run([sys.executable, "-c", ONE_RUN, *command], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_USE_CPU": "true"})
    try:
        measured = int(re.search(r"MEASURED (\d+)", found.stdout)[1])
        estimate = re.search(r"memory needed about ([\d.]+) GiB", found.stdout)
    except TypeError:
        raise SystemExit(found.stdout + found.stderr) from None
    return measured, int(float(estimate[1]) * 2**30) if estimate else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "small"])
    parser.add_argument("--modes", nargs="+", default=["lora", "full"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024])
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"])
    parser.add_argument("--examples", nargs="+", default=["short", "long"], choices=("short", "long"))
    parser.add_argument("--more", nargs="*", default=[], help="further settings of 03_sft.py")
    args = parser.parse_args()
    print(about())
    print(f"{'':<34}{'measured MiB':>13}{'estimated':>11}{'ratio':>8}")
    worst, entries = 1.0, {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_inputs(work, args.models, args.lengths)
        for case in ((m, k, r, n, p, e) for m in args.models for k in args.modes for n in args.lengths
                     for r in args.rows for p in args.precisions for e in args.examples):
            measured, estimated = run(work, *case, args.more)
            ratio = estimated / measured
            worst = max(worst, ratio, 1 / max(ratio, 1e-9))
            name = "{} {} {} x {} {} {}".format(*case)
            entries[name] = {"measured_mib": round(measured / 2**20), "estimated_mib": round(estimated / 2**20)}
            print(f"{name:<34}{measured / 2**20:13,.0f}{estimated / 2**20:11,.0f}{ratio:8.2f}", flush=True)
    record("estimate", {"cases": entries, "worst_ratio": round(worst, 3)})
    print(f"RATIO memory_estimate_worst {worst:.3f}")


if __name__ == "__main__":
    main()
