"""From a JSONL file to token ids, masks and packed rows: TRL's preparation against load_dataset and make_plan.

    python tests/benchmarks/bench_prepare.py                                  # 100,000 made-up instruction rows
    python tests/benchmarks/bench_prepare.py --rows FILE.jsonl --tokenizer_path spm32k.model

Same rows, same converted tokenizer and template, rows of 1,024 tokens packed. Ours: the file read strictly, every row
rendered, encoded and masked on all cores, the cache written, split and plan made. TRL: load_dataset("json") and what
SFTTrainer does with its defaults and packing=True (one process), without and with assistant masks, and with masks on
all cores; its rate is measured on the first --trl_rows, because it does not depend on their number. Ratios are to the
fastest of these, and to the fastest in one process, as it is without --dataset_num_proc. Made-up rows have Zipf-
distributed words and the lengths of Dolly, OpenAssistant and Alpaca.
"""
from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from peers import about, need_trl, record

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from common.chat import Chat, load_chat  # noqa: E402
from common.data import Dataset, load_dataset  # noqa: E402
from common.forked import cores  # noqa: E402
from common.plan import Source, Stage, make_plan  # noqa: E402
from common.sides import split  # noqa: E402

LENGTH = 1024  # tokens of a row
# (share of rows; mean and deviation of ln words of the prompt; of the response)
LENGTHS = [(0.4, (3.60, 1.08), (3.54, 1.10)), (0.4, (4.18, 1.07), (4.43, 1.08)), (0.2, (3.08, 0.34), (3.30, 1.11))]


def words(rng: np.random.Generator, n: int) -> list[str]:
    """Made-up words of one to five syllables."""
    syllables = [a + b for a in "b c d f g h l m n p r s t v st tr sh".split() for b in "a e i o u en ar".split()]
    return ["".join(rng.choice(syllables, rng.integers(1, 6))) for _ in range(n)]


def write_rows(path: Path, n: int) -> None:
    """Rows of messages with texts of Zipf-distributed words."""
    rng = np.random.default_rng(0)
    known = np.array(words(rng, 20_000))

    def text(side: tuple[float, float]) -> str:
        chosen = known[np.minimum(rng.zipf(1.15, max(2, min(int(rng.lognormal(*side)), 400))) - 1, len(known) - 1)]
        return " ".join(chosen).capitalize() + "."

    with path.open("w") as file:
        for kind in rng.choice(len(LENGTHS), n, p=[share for share, _, _ in LENGTHS]):
            _, prompt, response = LENGTHS[kind]
            file.write(json.dumps({"messages": [{"role": "user", "content": text(prompt)},
                                                {"role": "assistant", "content": text(response)}]}) + "\n")


def train_tokenizer(path: Path, rows: Path, vocabulary: int = 16_384) -> None:
    """A SentencePiece BPE model over the first rows."""
    import sentencepiece as spm

    with rows.open() as lines:
        texts = [m["content"] for _, line in zip(range(5000), lines) for m in json.loads(line)["messages"]]
    with path.open("wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=vocabulary, model_type="bpe", minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True, pad_id=0, unk_id=1,
            bos_id=2, eos_id=3, hard_vocab_limit=False)


def ours(rows: Path, chat: Chat, work: Path) -> tuple[float, Dataset]:
    """Seconds from the file to the plan, and the data set."""
    shutil.rmtree(work / "cache", ignore_errors=True)
    started = time.perf_counter()
    dataset = load_dataset(rows, chat, max_seq_length=LENGTH, cache_dir=work / "cache")
    train = split([dataset], 0.02, 0.0).train[0]
    source = Source("rows", dataset.lengths[train], dataset.trained_counts[train])
    make_plan([source], [Stage("train", (0,), epochs=1)], max_seq_length=LENGTH, packing=True, rows_per_step=16, seed=0)
    return time.perf_counter() - started, dataset


def trl(rows: Path, chat: Chat, work: Path, masks: bool, processes: int | None, packing: bool = True) -> tuple:
    """Seconds that SFTTrainer prepares for, the reading of the file included, and what it prepared."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    seconds: list[float] = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: object, **options: object) -> object:
            begun = time.perf_counter()
            found = super()._prepare_dataset(*args, **options)
            seconds.append(time.perf_counter() - begun)
            return found

    started = time.perf_counter()
    data = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(work / "hub"))
    reading = time.perf_counter() - started
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(chat.tokenizer), hidden_size=8, intermediate_size=8,
                                         num_hidden_layers=1, num_attention_heads=1, pad_token_id=chat.pad_id))
    settings = SFTConfig(output_dir=str(work / "trl"), packing=packing, max_length=LENGTH, assistant_only_loss=masks,
                         dataset_num_proc=processes, use_cpu=True, bf16=False, report_to="none")
    chat.tokenizer.chat_template = chat.template
    trainer = Timed(model=model, args=settings, train_dataset=data, processing_class=chat.tokenizer)
    shutil.rmtree(work / "hub")
    return reading + seconds[0], trainer.train_dataset


def same(rows: Path, chat: Chat, work: Path) -> str:
    """Whether TRL's ids and labels of the rows are ours."""
    _, theirs = trl(rows, chat, work, True, None, packing=False)
    mine = load_dataset(rows, chat, max_seq_length=LENGTH, too_long="cut", cache_dir=work / "cache")
    ids = labels = 0
    for i, row in enumerate(theirs):
        example = mine.example(i)
        expected = np.where(example.trained, example.input_ids, -100)
        ids += row["input_ids"][:LENGTH] == example.input_ids.tolist()
        labels += row["labels"][1:LENGTH] == expected[1:].tolist()  # nothing predicts the first
    return f"of {len(mine):,} rows {ids:,} have TRL's ids and {labels:,} its labels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="made-up rows")
    parser.add_argument("--trl_rows", type=int, default=10_000)
    parser.add_argument("--rows", type=Path, help="a JSONL file of messages instead of made-up rows")
    parser.add_argument("--tokenizer_path", help="instead of one trained on the made-up rows")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    need_trl()
    print(about())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = args.rows or work / "rows.jsonl"
        if not args.rows:
            write_rows(rows, args.count)
        if not args.tokenizer_path:
            train_tokenizer(work / "spm.model", rows)
        native = load_chat(args.tokenizer_path or str(work / "spm.model"), "chatml")
        native.save(work / "fast")
        report(args, work, rows, native, load_chat(str(work / "fast"), "model"))


def report(args: argparse.Namespace, work: Path, rows: Path, native: Chat, fast: Chat) -> None:
    """Measure, print the table, and keep the figures."""
    few, some = work / "few.jsonl", work / "some.jsonl"
    with rows.open() as lines, few.open("w") as first, some.open("w") as more:
        n = 0
        for n, line in enumerate(lines, 1):
            (first.write(line) if n <= 500 else None, more.write(line) if n <= args.trl_rows else None)
    table, tokens = {}, {}
    for name, chat in (("ours, SentencePiece", native), ("ours, fast tokenizer", fast)):
        found = [ours(rows, chat, work) for _ in range(args.repeats)]
        table[name], tokens[name] = [n / seconds for seconds, _ in found], found[0][1].meta["tokens"] / n
    for name, masks, processes in (("TRL, defaults", False, None), ("TRL, assistant masks", True, None),
                                   (f"TRL, masks, {cores()} processes", True, cores())):
        table[name] = [min(n, args.trl_rows) / trl(some, native, work, masks, processes)[0]
                       for _ in range(args.repeats)]
    per_row = tokens["ours, SentencePiece"]
    print(f"{n:,} rows of {per_row:.0f} tokens on average, {rows.stat().st_size / 1e6:,.0f} MB; "
          + same(few, native, work))
    print(f"{'':<28}{'best rows/s':>12}{'median':>9}{'tokens/s':>12}")
    for name, rates in table.items():
        print(f"{name:<28}{max(rates):12,.0f}{statistics.median(rates):9,.0f}{max(rates) * per_row:12,.0f}")
    best = max(table["ours, SentencePiece"])
    rivals = {name: max(rates) for name, rates in table.items() if name.startswith("TRL")}
    single, rival = max(rate for name, rate in rivals.items() if "processes" not in name), max(rivals.values())
    record("prepare", {"seconds": round(n / best, 2), "rows": n, "rows_per_second": round(best),
                       "tokens_per_second": round(best * per_row), **{
                           f"{name}: rows_per_second": round(rate) for name, rate in rivals.items()}})
    print(f"RATIO prepare_vs_trl {best / rival:.2f}")
    print(f"RATIO prepare_vs_trl_one_process {best / single:.2f}")


if __name__ == "__main__":
    main()
