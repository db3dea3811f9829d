"""Generation: transformers one prompt at a time against batches of ours. Same prompts, greedy, answers compared.

    python tests/benchmarks/bench_generate.py [--threads 2] [--rounds 3]

A random 6 x 256 Llama with 8,192 tokens; 96 prompts of 3 to 200 tokens, at most 64 new ones. The two take turns after a
warm-up; best and median of the rounds, in real new tokens a second.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from peers import about, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from common.generate import generate

    print(f"{about()}, {options.threads} threads")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.1, pad_token_id=0)).eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 8192, size=int(n)).tolist() for n in rng.integers(3, 200, size=96)]
    stop = list(range(4, 140))  # a random model rarely draws one stop id

    def one_by_one() -> list[list[int]]:
        found = []
        for prompt in prompts:
            ids = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                 max_new_tokens=64, do_sample=False, eos_token_id=stop, pad_token_id=0)[0, len(prompt):]
            found.append([i for i in ids.tolist() if i not in stop])
        return found

    def ours(batch_size: int) -> Callable[[], list[list[int]]]:
        return lambda: [a.ids for a in generate(model, prompts, max_new_tokens=64, stop_ids=stop, pad_id=0,
                                                batch_size=batch_size)]

    rivals = {"transformers, one by one": one_by_one, **{f"ours, batches of {n}": ours(n) for n in (1, 16, 32, 64)}}
    answers = {name: run() for name, run in rivals.items()}  # the warm-up
    tokens = sum(map(len, answers["transformers, one by one"]))
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(options.rounds):
        for name, run in rivals.items():
            started = time.perf_counter()
            run()
            rates[name].append(tokens / (time.perf_counter() - started))
    rate = {name: statistics.median(found) for name, found in rates.items()}
    first = rate["transformers, one by one"]
    for name, found in rates.items():
        same = "same answers" if answers[name] == answers["transformers, one by one"] else "OTHER ANSWERS"
        print(f"{name:26} best {max(found):7.0f}  median {statistics.median(found):7.0f} tokens a second, "
              f"{rate[name] / first:.1f} x, {same}")
    record("generate", {"tokens/s": {name: round(r) for name, r in rate.items()}})
    right = [r for name, r in rate.items() if answers[name] == answers["transformers, one by one"]]
    print(f"RATIO generate_vs_hf {max(right) / first:.2f}")


if __name__ == "__main__":
    main()
