"""Evaluate a fine-tuned model: is it better than before, does it stop, what does it say?

    python scripts/06_eval_sft.py --gen_only                                 # answers of the newest finished run
    python scripts/06_eval_sft.py --model_path checkpoints/sft/first --dataset_paths data/sft/eval.jsonl

In: a run of 03_sft.py, a model or adapter directory, or a Hub id, and files of rows (without any: the run's validation
rows). Out, in OUTPUT_DIR: eval_results.json, samples.jsonl, report.html; with --gen_only gen_samples.jsonl alone.

The base model is asked the same rows, once through the chat template and once in plain text (the first line it says is
its answer); for its answers and for its loss the better way counts. In eval_results.json the numbers at the top are
those of the first data set ("main"); those of a further data set NAME follow as exact_match_NAME and so on;
"datasets" has each in full, "total" all rows together. common/evaluate.py says what each number means.
"""
from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import level, parse, setting
from common.faults import UserError, run_main
from common.settings import TEMPLATES, dataset_name

if TYPE_CHECKING:
    from torch import nn

    from common.chat import Chat
    from common.evaluate import Case, Measured, Options
    from common.subject import Baseline, Subject

RUNS = Path("checkpoints/sft")


@dataclass
class EvalConfig:
    """Settings of an evaluation."""

    other_names = {"eval_batch_size": "per_device_eval_batch_size", "batch_size": "per_device_eval_batch_size",
                   "model_name_or_path": "model_path", "base_model_path": "baseline_path", "top_k": "top_p",
                   "merged": "no_lora", "num_samples": "num_gen_samples", "limit": "max_eval_samples"}

    model_path: str = setting("", "Run, model or adapter: a directory or a Hub id. Without it: the newest finished run "
                              "under checkpoints/sft.", path="hub", group="Model")
    tokenizer_path: str | None = setting(None, "Tokenizer of a model that brings none; beside a run, a check on its "
                                         "own.", path="hub")
    prompt_template: str | None = setting(None, "How prompts become text. Without it: the template saved with the "
                                          "model.", words=TEMPLATES, suffixes=(".jinja", ".yaml", ".yml"),
                                          path="hub")
    use_lora: bool = setting(True, "Evaluate an adapter on its base. --no_lora: the merged weights (merged/ where it "
                             "exists, a full model as it is, else the adapter merged in memory).", flag_off="no_lora")
    baseline_path: str | None = setting("auto", "Model to compare with. auto: the base the run names; none: no "
                                        "comparison.", words=("auto",), path="hub")
    dtype: str = setting("auto", "Precision of the weights. auto: float32 on CPU, the model's own on a GPU.",
                         choices=("auto", "float32", "bfloat16", "float16"))

    dataset_paths: list[str] = setting([], "Files of rows, as for training. Without any: the run's val.jsonl.",
                                       path="hub", group="Data")
    max_eval_samples: int | None = setting(None, "Use at most this many rows of each file, a seeded choice.",
                                           unit="rows", within="[1, inf)")
    skip_bad_rows: bool = setting(False, "Go on without bad rows and say how many, instead of stopping.")
    seed: int = setting(42, "Decides which rows are taken, sampling, and the resampling of intervals.",
                        within="[0, 4294967295]")

    gen_only: bool = setting(False, "Answer some prompts and print them, measure nothing.", group="Answers")
    num_gen_samples: int = setting(5, "Answers printed; with --gen_only: prompts answered.", within="[1, inf)")
    max_new_tokens: int = setting(128, "Longest answer.", unit="tokens", within="[1, inf)")
    temperature: float = setting(0.0, "0 takes the likeliest token; 1 samples as the model says.", within="[0, inf)")
    top_p: float = setting(1.0, "Sample from the likeliest tokens that together have this probability.",
                           within="(0, 1]")
    per_device_eval_batch_size: int = setting(32, "Rows of a forward pass; changes the speed alone.", unit="rows",
                                              within="[1, inf)")

    output_dir: str | None = setting(None, "Where results go. Without it: MODEL_PATH/eval.", path=True, group="Output")

    def problems(self) -> list[str]:
        """Settings that would change nothing."""
        found = []
        if self.top_p < 1 and self.temperature == 0:
            found.append("--top_p: it changes nothing at temperature 0. Give --temperature too, or leave it out.")
        if self.gen_only and level(self, "baseline_path") == 2 and self.baseline_path:
            found.append("--baseline_path: --gen_only compares nothing. Leave one of them out.")
        return found


@dataclass
class EvalSet:
    """The rows of one file."""

    name: str
    path: str
    cases: list[Case]
    counts: dict = field(default_factory=dict)


def main(argv: list[str]) -> int:
    config = parse(EvalConfig, argv, __doc__, config_flag=None)
    missing = [path for path in config.dataset_paths if not Path(path).is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)}: no such file. Check --dataset_paths, or make it with "
                        "scripts/prepare_sft_datasets.py.")

    from common.model import quiet_libraries, tune_allocator
    from common.subject import find_baseline, find_subject, load_for, newest_run, open_chat, open_model

    tune_allocator()
    quiet_libraries()
    started = time.time()
    if not config.model_path:
        config.model_path = str(newest_run(RUNS))
        say(f"model {config.model_path}, the newest finished run")
    subject = find_subject(config.model_path)
    sets = read_sets(config, subject)
    sets = few_prompts(config, sets) if config.gen_only else sets
    chat = open_chat(subject, config.tokenizer_path, config.prompt_template, texts_of(sets), say)
    options = {"dtype": config.dtype, "seed": config.seed, "say": say}
    model = open_model(subject, chat, merged=not config.use_lora, **options)
    if config.gen_only:
        return show_answers(config, model, chat, sets)

    tuned = measure_all(config, model, chat, sets, "tuned")
    del model  # its memory is the baseline's
    other = find_baseline(subject, config.baseline_path, config.tokenizer_path, config.prompt_template, say)
    baseline = measure_baseline(config, other, sets, load_for) if other else None
    leave(config, subject, other, sets, tuned, baseline, time.time() - started)
    return 0


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


# ---- rows

def read_sets(config: EvalConfig, subject: Subject) -> list[EvalSet]:
    """Read the rows: --dataset_paths, else the run's validation rows, else (--gen_only) a few built-in prompts."""
    from common.evaluate import BUILT_IN_PROMPTS, Case
    from common.rows import Row

    paths = config.dataset_paths
    if not paths and subject.run_dir and (subject.run_dir / "val.jsonl").exists():
        paths = [str(subject.run_dir / "val.jsonl")]
        say(f"rows: {paths[0]}, held out from training")
    if paths:
        sets: list[EvalSet] = []
        for path in paths:
            sets.append(read_set(config, path, roles_of(subject, config.prompt_template), [s.name for s in sets]))
        return sets
    if not config.gen_only:
        raise UserError(f"{subject.path}: it has no val.jsonl, so there are no rows to measure on. Name files with "
                        "--dataset_paths, or look at some answers with --gen_only.")
    say("prompts: built-in ones; --dataset_paths takes files of your own")
    asked = [[{"role": "user", "content": p}] for p in BUILT_IN_PROMPTS]
    return [EvalSet("built-in", "", [Case(Row(i, m), "built-in", m, None) for i, m in enumerate(asked, 1)])]


def roles_of(subject: Subject, asked: str | None = None) -> dict[str, str | tuple]:
    """The run's names of roles, and those of the template file that is asked for or that it was trained with."""
    from common.template_file import facts, read_template_file, role_map

    template = Path(subject.path) / "chat_template.jinja"
    if asked and asked.endswith((".yaml", ".yml")):
        found = role_map(read_template_file(asked))
    else:
        found = facts(template.read_text(encoding="utf-8"))["roles"] if template.is_file() else {}
    return dict(entry.split("=", 1) for entry in subject.settings.get("role_map", [])) | found


def read_set(config: EvalConfig, path: str, roles: dict[str, str | tuple], taken: list[str]) -> EvalSet:
    """Read a file of rows, or a seeded choice of them in their order. Raises UserError for bad rows."""
    import numpy as np
    from tqdm import tqdm

    from common.evaluate import make_case
    from common.rows import RowReader

    stem = dataset_name(path)
    reader = RowReader(path, skip_bad_rows=config.skip_bad_rows, role_map=roles, mixed=stem in ("val", "test"))
    name = stem if stem not in taken else f"{stem}-{len(taken) + 1}"
    rows = list(tqdm(reader, desc=f"reading {path}", unit=" rows", disable=None, leave=False))
    counts = {"rows_in": reader.rows_in, "bad": reader.n_bad, "dropped": dict(reader.dropped), "kept": reader.rows_kept}
    if config.max_eval_samples and len(rows) > config.max_eval_samples:
        chosen = np.random.default_rng([config.seed, 5]).permutation(len(rows))[:config.max_eval_samples]
        rows = [rows[i] for i in sorted(chosen)]
    if not rows:
        raise UserError(f"{path}: no row is left to evaluate on.")
    gone = [f"{n:,} {reason}" for reason, n in reader.dropped.items()]
    gone += [f"{reader.n_bad:,} bad"] if reader.n_bad else []
    say(f"{path}: {reader.rows_in:,} rows, {len(rows):,} taken" + (f" (dropped: {'; '.join(gone)})" if gone else ""))
    return EvalSet(name, path, [make_case(row, row.source or name) for row in rows], counts | {"taken": len(rows)})


def few_prompts(config: EvalConfig, sets: list[EvalSet]) -> list[EvalSet]:
    """A seeded choice of num_gen_samples rows of all sets together."""
    import numpy as np

    asked = [(s, case) for s in sets for case in s.cases if case.asks(continued=True)]
    if not asked:
        raise UserError(f"{', '.join(s.path for s in sets)}: no row asks anything. Give rows with a prompt before the "
                        "answer, or plain text.")
    chosen = sorted(np.random.default_rng([config.seed, 7]).permutation(len(asked))[:config.num_gen_samples])
    for s in sets:
        s.cases = [case for i in chosen for t, case in [asked[i]] if t is s]
    return [s for s in sets if s.cases]


def texts_of(sets: list[EvalSet], most: int = 200) -> list[str]:
    """What the first rows of each set say."""
    texts = [m["content"] for s in sets for case in s.cases[:most] for m in case.row.messages or [] if m["content"]]
    return texts + [case.row.text for s in sets for case in s.cases[:most] if case.row.messages is None]


def train_answers(subject: Subject) -> Counter[str] | None:
    """The short answers in the run's training files, counted; None if the run or its files are not there."""
    from common.evaluate import is_short, make_case
    from common.rows import RowReader

    staged = [d["path"] for stage in subject.settings.get("stages") or [] for d in stage["datasets"]]
    paths = [p for p in dict.fromkeys([*subject.settings.get("dataset_paths", []), *staged]) if Path(p).is_file()]
    found: Counter[str] = Counter()
    for path in paths:
        for row in RowReader(path, skip_bad_rows=True, role_map=roles_of(subject)):
            case = make_case(row, "")
            if case.context and is_short(case.reference):
                found[case.reference.strip()] += 1
    return found or None


# ---- measuring

def options_of(config: EvalConfig) -> Options:
    """How models are asked, with progress bars on stderr."""
    from tqdm import tqdm

    from common.evaluate import Options

    def bar(what: str, total: int) -> Callable[[int], None]:
        shown = tqdm(total=total, desc=what, unit=" rows", disable=None, leave=False)

        def done(n: int) -> None:
            shown.update(n)
            if shown.n >= total:
                shown.close()
        return done

    return Options(config.per_device_eval_batch_size, config.max_new_tokens, config.temperature, config.top_p,
                   config.seed, bar)


def measure_all(config: EvalConfig, model: nn.Module, chat: Chat, sets: list[EvalSet], who: str,
                plain: bool = False) -> list[Measured]:
    """Measure a model on every set; `who` it is goes into the log."""
    from common.evaluate import measure
    from common.generate import context_limit

    context = context_limit(model.get_base_model() if hasattr(model, "get_base_model") else model)
    found = []
    for s in sets:
        started = time.time()
        found.append(measure(model, chat, s.cases, options_of(config), plain=plain, context=context))
        longer = f"; {found[-1].left_out:,} rows longer than its {context:,} tokens have no loss" \
            if found[-1].left_out else ""
        say(f"{who}, {s.name}: {len(s.cases):,} rows in {time.time() - started:.0f} s{longer}")
    return found


def measure_baseline(config: EvalConfig, other: Baseline, sets: list[EvalSet],
                     load_for: Callable) -> list[tuple[Measured, dict]] | None:
    """Measure the base through the template and in plain text; for each set the better way counts."""
    from common.chat import load_chat
    from common.evaluate import better_of

    try:
        chat = load_chat(other.tokenizer_path, other.template)
        model = load_for(other.path, chat, dtype=config.dtype, seed=config.seed, say=say)
    except UserError as fault:
        if level(config, "baseline_path") == 2:
            raise
        say(f"baseline: none, because it cannot be loaded. {fault}")
        return None
    say(f"baseline {other.path}: asked through the template and plainly, the better way counts")
    template = measure_all(config, model, chat, sets, "baseline through the template")
    raw = load_chat(other.tokenizer_path, "raw")
    plain = measure_all(config, model, raw, sets, "baseline in plain text", plain=True)
    return [better_of(a, b) for a, b in zip(template, plain)]


def show_answers(config: EvalConfig, model: nn.Module, chat: Chat, sets: list[EvalSet]) -> int:
    """Answer the prompts, print them, and write gen_samples.jsonl."""
    from common.evaluate import answer

    lines = []
    for s in sets:
        answers, texts = answer(model, chat, s.cases, options_of(config), continued=True)
        for case, one, text in zip(s.cases, answers, texts):
            lines.append({"dataset": s.name, "source": case.source, "prompt": case.prompt, "reference": case.reference,
                          "prediction": text, "stopped": one.stopped})
            show(lines[-1])
    place = output_dir(config) / "gen_samples.jsonl"
    write_lines(place, lines)
    say(f"answers: {place}")
    return 0


# ---- results

def output_dir(config: EvalConfig) -> Path:
    """--output_dir, else eval/ in the model's directory; for a Hub id checkpoints/eval/<id>."""
    if config.output_dir:
        return Path(config.output_dir)
    place = Path(config.model_path)
    return place / "eval" if place.is_dir() else Path("checkpoints/eval") / config.model_path.replace("/", "--")


def leave(config: EvalConfig, subject: Subject, other: Baseline | None, sets: list[EvalSet], tuned: list[Measured],
          baseline: list[tuple[Measured, dict]] | None, seconds: float) -> None:
    """Write eval_results.json, samples.jsonl and report.html; print the table and some answers."""
    from common.checkpoint import atomic_json, atomic_write
    from common.config import to_dict
    from common.evaluate import results, samples
    from common.report import eval_report

    pairs = [(s.name, s.cases) for s in sets]
    found = results(pairs, tuned, baseline, train_answers(subject), config.seed)
    found |= {"model": config.model_path, "baseline_model": other.path if other and baseline else None,
              "rows_read": {s.name: s.counts for s in sets}, "settings": to_dict(config), "seconds": round(seconds, 1)}
    lines = samples(pairs, tuned, baseline)
    place = output_dir(config)
    place.mkdir(parents=True, exist_ok=True)
    atomic_json(place / "eval_results.json", found)
    write_lines(place / "samples.jsonl", lines)
    atomic_write(place / "report.html", eval_report(found, lines, subject.run_dir))
    for line in lines[:config.num_gen_samples]:
        show(line)
    say(table(found))
    for name in ("eval_results.json", "samples.jsonl", "report.html"):
        say(str(place / name))


def show(line: dict) -> None:
    """Print a prompt, its answer, and the reference where it differs."""
    if line["prediction"] is None:
        return
    say(f"> {line['prompt'][:1000]}\n{line['prediction']}{'' if line['stopped'] else ' … (did not stop)'}")
    if line["reference"] and line["reference"].strip() != line["prediction"].strip():
        say(f"  expected: {line['reference'][:1000]}")
    say("")


def write_lines(path: Path, lines: list[dict]) -> None:
    """Write JSON lines, whole or not at all."""
    from common.checkpoint import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def table(found: dict) -> str:
    """The numbers of every data set, base beside tuned, with 95 % intervals."""
    from common.evaluate import METRICS

    lines = []
    for name, entry in found["datasets"].items():
        base, apart = entry["baseline"], entry["difference"]
        rows = [["", *(["base"] if base else []), "tuned", *(["difference"] if base else [])]]
        for metric in METRICS:
            if entry[metric] is None:
                continue
            cells = [_cell(base[metric], base["intervals"].get(metric))] if base else []
            cells.append(_cell(entry[metric], entry["intervals"].get(metric)))
            if metric in apart:
                cells.append(_cell(apart[metric]["value"], (apart[metric]["low"], apart[metric]["high"]), "+"))
            rows.append([metric.replace("_", " "), *cells])
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
        lines += ["", f"{name}: {entry['rows']:,} rows, {entry['tokens']:,} trained tokens; in brackets 95 % intervals"]
        lines += ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
        if entry["majority"]:
            lines.append(f"without a model, the best rule ({entry['majority']['rule']}) has exact match "
                         f"{entry['majority']['exact_match']:.3f}")
        if base:
            lines.append("the base was asked in the way that suits it better: answers "
                         f"{base['asked']['answers']}, loss {base['asked']['loss']}")
    return "\n".join([*lines, ""])


def _cell(value: float | None, interval: tuple[float, float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.4g}" + (f" [{interval[0]:{sign}.4g} {interval[1]:{sign}.4g}]" if interval else "")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sys.exit(run_main(main))
