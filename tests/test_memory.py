"""The memory estimate: its arithmetic by hand, what it must grow and shrink with, and the README's sizing table.

    python tests/test_memory.py      # writes the sizing table into README.md
"""
from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from test_readme import README, between, text  # noqa: E402

from common.memory import Load, Shape, kept_pairs, largest_load, needed, seconds, shape_of, spoken  # noqa: E402
from common.plan import Source, Stage, make_plan  # noqa: E402

TINY = Shape(256, 688, 6, 4, 4, 64, 32_002, True)
SHAPES = {"tiny": TINY, "small": Shape(512, 1376, 12, 8, 8, 64, 32_002, True),
          "base": Shape(768, 2048, 24, 12, 12, 64, 32_002, True),
          "1B": Shape(2048, 8192, 16, 32, 8, 64, 128_256, True),
          "8B": Shape(4096, 14_336, 32, 32, 8, 128, 128_256, False),
          "70B": Shape(8192, 28_672, 80, 64, 8, 128, 128_256, False)}
# (model, rows a process and pass, tokens a row, processes, useful operations a second of one)
SIZES = [("tiny", 4, 1024, 1, 0.15e12), ("small", 4, 1024, 1, 0.15e12), ("base", 4, 1024, 1, 0.15e12),
         ("1B", 4, 4096, 1, 300e12), ("8B", 1, 8192, 1, 300e12), ("8B", 1, 8192, 8, 300e12),
         ("70B", 1, 8192, 8, 300e12), ("70B", 1, 8192, 64, 300e12)]


def half_trained(rows: int, length: int, each: int, on_cpu: bool = True) -> Load:
    """Full rows of examples of `each` tokens, half of them trained."""
    n = rows * (length // each)
    return Load(n * each, n * each // 2, n * int(kept_pairs(np.array([each]))[0]) if on_cpu else 0)


def sizing_table() -> str:
    """Memory of one process and time for 10 M tokens, by the formula of memory.py."""
    lines = ["| model | rows | processes | LoRA r 16: memory | full: memory | LoRA: 10 M tokens | full: 10 M tokens |",
             "|---|---|---|---|---|---|---|"]
    for name, rows, length, n, flops in SIZES:
        shape, cells = SHAPES[name], []
        for lora_r in (16, None):
            parts = needed(shape, half_trained(rows, length, 256, on_cpu=flops < 1e12), lora_r=lora_r, bf16=True,
                           checkpointing=flops > 1e12, processes=n, sharded=n > 1, on_cpu=flops < 1e12)
            cells.append(f"{sum(parts.values()) / 2**30:,.1f} GiB")
        for lora in (True, False):
            minutes = seconds(shape, lora=lora, tokens=10_000_000, flops=n * flops) / 60
            cells.append(f"{minutes / 60:,.1f} h" if minutes >= 100 else f"{minutes:,.1f} min")
        where = "" if n == 1 else " (FSDP)"
        lines.append(f"| {name} | {rows} x {length:,} | {n}{where} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_arithmetic_by_hand() -> None:
    """A formula whose terms nobody ever worked out."""
    shape = Shape(hidden=4, inner=8, layers=2, heads=2, kv_heads=1, head_size=2, vocabulary=10, tied=True)
    # q 16, k 8, v 8, o 16, gate 32, up 32, down 32 = 144; embeddings 40, norms 2 x 8 + 4
    assert shape.layer == 144 and shape.parameters == 40 + 2 * 152 + 4 == 348
    full = needed(shape, Load(100, 60, 7), lora_r=None, bf16=False)
    assert full["weights"] == full["gradients"] == 4 * 348 and full["optimizer"] == 8 * 348
    # the last layer keeps 60 tokens of 100; 30 bytes a token and hidden are kept once; 2 heads x 7 pairs x 2 layers
    kept = (40 * 4 + 16 * 8) * (100 + 60) + 30 * 4 * 100
    assert full["activations"] == int(1.2 * kept + 2 * 4 * 2 * 7) and full["head"] == 4 * 60 * 10 + 4 * 40
    lora = needed(shape, Load(100, 60, 7), lora_r=2, bf16=True)
    adapters = 2 * 2 * (8 + 6 + 6 + 8 + 12 + 12 + 12)
    assert lora["weights"] == 4 * 60 + 2 * 288 + 4 * adapters and lora["gradients"] == 4 * adapters
    kept = (38 * 4 + 9 * 8 + 14 * 2) * (100 + 60) + 30 * 4 * 100
    assert lora["activations"] == int(1.5 * kept + 2 * 4 * 2 * 7) and lora["head"] == 2 * 60 * 10 + 2 * 40


def test_kept_probabilities_are_those_of_the_blocks() -> None:
    """A formula beside the code of attention: what it keeps is counted in its own blocks."""
    from common import attention, memory

    assert (memory.BLOCK, memory.LONGEST_KEPT) == (attention.BLOCK, attention.LONGEST_KEPT)
    lengths = [1, 191, 192, 193, 960, 1000, 1024, 1025, 3000]
    kept = [attention.count_kept([0, n]) for n in lengths]
    assert kept_pairs(np.array(lengths)).tolist() == kept


def test_the_largest_micro_batch_of_the_plan() -> None:
    """Settings taken for what the rows hold: short rows without packing, or the first rows instead of the longest."""
    source = Source("a", np.array([10, 30, 20, 40, 5]), np.array([1, 3, 2, 4, 5]))
    plan = make_plan([source], [Stage("all", (0,), epochs=1)], max_seq_length=50, packing=False, rows_per_step=5,
                     seed=1)
    assert largest_load(plan, 2, on_cpu=False) == Load(70, 9)
    assert largest_load(plan, 2, on_cpu=True).pairs == 30 * 30 + 40 * 40
    assert largest_load(plan, 8, on_cpu=False) == Load(105, 15)


def test_the_shape_is_that_of_the_model() -> None:
    """A parameter that is counted twice, or a tied head that is counted."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for tied, kv in ((True, 4), (False, 2)):
        config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=3, vocab_size=99,
                                      num_attention_heads=4, num_key_value_heads=kv, tie_word_embeddings=tied)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert shape_of(config).parameters == model.num_parameters()
        assert shape_of(config, 120).vocabulary == 120


def total(**changes: object) -> int:
    tokens = changes.pop("tokens", 4096)
    given = {"shape": TINY, "load": half_trained(1, tokens, 64), "lora_r": None, "bf16": True, **changes}
    return sum(needed(**given).values())


def test_what_it_grows_and_shrinks_with() -> None:
    """A setting that is parsed and has no effect on the estimate."""
    assert total(tokens=8192) > total() > total(tokens=1024)
    assert total(checkpointing=True) < total() < total(bf16=False)
    assert total(optim="sgd") < total() < total(processes=2)
    assert total(lora_r=8, tokens=64) < total(lora_r=64, tokens=64) < total(tokens=64)
    assert total(lora_r=8) < total(lora_r=8, dora=True)
    large = {"shape": SHAPES["8B"], "tokens": 1024}
    assert total(**large, processes=8, sharded=True) < total(**large) / 4
    few = {"shape": SHAPES["8B"], "tokens": 64, "lora_r": 16}
    assert total(**few, in_4bit=True) < total(**few) * 0.8
    assert total(shape=replace(TINY, vocabulary=128_000)) > total()


def test_measured_runs_are_met() -> None:
    """A formula that has drifted from the code: within 15 % of what was measured, where it was measured."""
    file = ROOT / "tests/benchmarks/baseline.json"
    known = json.loads(file.read_text()).get("estimate", {}) if file.exists() else {}
    for name, found in known.get("cases", {}).items():
        model, mode, rows, _, length, precision, examples = name.split()
        # of 245 tokens, or one that all but fills its row
        load = half_trained(int(rows), int(length), 245 if examples == "short" else int(length) - 28)
        parts = needed(SHAPES[model], load, lora_r=16 if mode == "lora" else None, bf16=precision == "bf16")
        assert abs(sum(parts.values()) / 2**20 / found["measured_mib"] - 1) <= 0.15, (name, found)


def test_the_line_names_the_parts() -> None:
    """A sum that is not that of its parts; an unchecked device without a word."""
    parts = {"weights": 2**30, "head": 2**29}
    assert spoken(parts, True) == "memory needed about 1.50 GiB a process (weights 1.00, head 0.50)"
    assert "estimate" in spoken(parts, False)


def test_the_sizing_table() -> None:
    """Guards against a table that lags behind the formula. Mend it with: python tests/test_memory.py"""
    assert between("sizing") == sizing_table()


@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "gpt_oss", "qwen3_moe", "mamba", "bloom", "opt", "lfm2"])
def test_unusual_configurations_have_a_shape(name):
    """Guards against a traceback after all rows are tokenised: layers of Gemma 4 and 3n differ in size."""
    from transformers import AutoConfig

    shape = shape_of(AutoConfig.for_model(name))
    assert shape.parameters > 0 and shape.inner > 0


def test_weights_beside_the_layers_are_counted():
    """Guards against experts that are not counted: 8 GiB said, 115 needed."""
    shape, load = Shape(64, 128, 2, 2, 2, 32, 1000, False), Load(100, 50)
    for lora_r in (None, 4):
        with_more, without = (needed(shape, load, lora_r=lora_r, bf16=False, more=n) for n in (10**6, 0))
        assert with_more["weights"] - without["weights"] == 4 * 10**6
        assert with_more["optimizer"] - without["optimizer"] == (0 if lora_r else 8 * 10**6)


if __name__ == "__main__":
    README.write_text(text().replace(f"<!-- sizing: begin -->\n{between('sizing')}",
                                     f"<!-- sizing: begin -->\n{sizing_table()}"), encoding="utf-8")
