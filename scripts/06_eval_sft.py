"""Evaluate a fine-tuned model: is it better than before, does it stop, what does it say?

    python scripts/06_eval_sft.py --gen_only                                 # answers of the newest finished run
    python scripts/06_eval_sft.py --model_path checkpoints/sft/first --dataset_paths data/sft/eval.jsonl
    python scripts/06_eval_sft.py --compare checkpoints/sft/first checkpoints/sft/second
    python scripts/06_eval_sft.py --golden prompts.jsonl       # exit status 1 if an answer is not as it has to be
    python scripts/06_eval_sft.py --predict rows.jsonl         # or --chat

In: a run of 03_sft.py, a model or adapter directory, or a Hub id, and files of rows (without any: the run's validation
rows). Out, in OUTPUT_DIR: eval_results.json, samples.jsonl, report.html; with --gen_only gen_samples.jsonl, with
--compare compare.json and compare_samples.jsonl, with --predict predictions.jsonl; with --golden and --chat nothing.

The base model is asked the same rows, through the chat template, in plain text (where a short answer is expected, the
first line it says is its answer) and through a template of its own; for its answers and for its loss the best way
counts. In eval_results.json the numbers at the top are those of the first data set ("main"); those of a further data
set NAME follow as exact_match_NAME and so on; "datasets" has each in full, "total" all rows together. common/scores.py
says what each number means, common/golden.py how golden prompts are written. Several processes share the rows.
"""
from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common import faults
from common.config import is_hub_name, level, parse, setting
from common.faults import CheckFailed, UserError, run_main
from common.hub import local_rows
from common.outputs import check_no_input, check_writable
from common.settings import TEMPLATES
from common.sources import check_prepared

if TYPE_CHECKING:
    from torch import nn

    from common.chat import Chat
    from common.evaluate import Measured, Options
    from common.questions import EvalSet
    from common.subject import Baseline, Subject
    from common.team import Team

Say = Callable[[str], None]
RUNS = Path("checkpoints/sft")
NOT_WITH = {  # task -> settings that would change nothing in it
    "gen_only": ("baseline_path",), "chat": ("baseline_path", "dataset_paths", "max_eval_samples", "skip_bad_rows",
                                             "num_gen_samples", "per_device_eval_batch_size", "output_dir"),
    "predict": ("baseline_path", "dataset_paths", "num_gen_samples"),
    "golden": ("baseline_path", "dataset_paths", "max_eval_samples", "skip_bad_rows", "num_gen_samples", "output_dir"),
    "compare": ("baseline_path", "model_path", "num_gen_samples")}


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

    dataset_paths: list[str] = setting([], "Files of rows, as for training; with --gen_only also questions alone. "
                                       "Without any: the run's val.jsonl.",
                                       path="hub", group="Data")
    max_eval_samples: int | None = setting(None, "Use at most this many rows of each file, a seeded choice.",
                                           unit="rows", within="[1, inf)")
    skip_bad_rows: bool = setting(False, "Go on without bad rows and say how many, instead of stopping.")
    seed: int = setting(42, "Decides which rows are taken, sampling, and the resampling of intervals.",
                        within="[0, 4294967295]")

    gen_only: bool = setting(False, "Answer some prompts and print them, measure nothing.", group="What is done")
    compare: list[str] = setting([], "Measure these runs or models on the same rows, side by side; differences are to "
                                 "the first.", path="hub")
    golden: str | None = setting(None, "File of golden prompts; exit status 1 if an answer is not as it has to be.",
                                 path=True)
    predict: str | None = setting(None, "File of rows to be answered; their own answers are not read.", path=True)
    chat: bool = setting(False, "Talk with the model in the terminal.")

    num_gen_samples: int = setting(5, "Answers printed; with --gen_only: prompts answered.", within="[1, inf)",
                                   group="Answers")
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
        modes = [mode for mode in NOT_WITH if getattr(self, mode)]
        if len(modes) > 1:
            found.append(f"--{' --'.join(modes)}: each of them is a task of its own. Give one.")
        found += [f"--{name}: it changes nothing with --{mode}. Leave one of them out." for mode in modes
                  for name in NOT_WITH[mode] if level(self, name) == 2 and getattr(self, name)]
        if self.compare and len({*self.compare}) < max(2, len(self.compare)):
            found.append("--compare: name two or more different runs.")
        return found


def main(argv: list[str]) -> int:
    config = parse(EvalConfig, argv, __doc__, config_flag=None)
    for name in ("dataset_paths", "golden", "predict"):
        given = getattr(config, name) or []
        missing = [path for path in ([given] if isinstance(given, str) else given)
                   if not Path(path).is_file() and not (name == "dataset_paths" and is_hub_name(path))]
        if missing:
            raise UserError(f"{', '.join(missing)}: no such file. Check --{name}" + (
                ", or make it with scripts/prepare_sft_datasets.py." if name == "dataset_paths" else "."))

    check_prepared(config.dataset_paths)
    config.dataset_paths = [local_rows(path, Path("data/cache")) for path in config.dataset_paths]
    from common.allocator import tune_allocator
    from common.model import quiet_libraries, use_cores
    from common.team import joined_team

    tune_allocator()
    quiet_libraries()
    with joined_team() as team:
        say = faults.say if team.main else lambda *lines: None
        for line in use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
            say(line)
        tasks = {"gen_only": show_answers, "chat": talk, "predict": predict, "golden": check_golden,
                 "compare": compare_runs}
        task = next((tasks[mode] for mode in NOT_WITH if getattr(config, mode)), evaluate)
        task(config, team, say)
    return 0


# ---- tasks

def evaluate(config: EvalConfig, team: Team, say: Say) -> None:
    """The numbers of a model beside its base's, its answers, and the report."""
    from common.evaluate import measure_all, with_calls
    from common.subject import find_baseline, load_for

    started = time.time()
    subject = find(config, say)
    sets = rows_of(config, subject, say)
    if not sets:
        raise UserError(f"{subject.path}: it has no val.jsonl, so there are no rows to measure on. Name files with "
                        "--dataset_paths, or look at some answers with --gen_only.")
    other = find_baseline(subject, config.baseline_path, config.tokenizer_path, config.prompt_template, say)
    model, chat, stops = opened(config, subject, sets, say)
    sets, options = with_calls(sets, chat), options_of(config, team)
    tuned = measure_all(model, chat, sets, options, "tuned", say)
    del model  # its memory is the baseline's
    baseline = measure_baseline(config, other, chat, subject.settings.get("system_prompt"), sets, options, load_for,
                                say) if other else None
    if team.main:
        leave(config, subject, other, sets, tuned, baseline, stops, time.time() - started, say)


def show_answers(config: EvalConfig, team: Team, say: Say) -> None:
    """Answer some prompts, print them, and write gen_samples.jsonl."""
    from common.evaluate import answer, with_calls
    from common.questions import built_in, few_prompts

    subject = find(config, say)
    sets = rows_of(config, subject, say)
    if not sets:
        say("prompts: built-in ones; --dataset_paths takes files of your own")
        sets = [built_in()]
    sets = few_prompts(sets, config.num_gen_samples, config.seed)
    model, chat, _ = opened(config, subject, sets, say)
    lines = []
    for s in with_calls(sets, chat):
        answers, texts = answer(model, chat, s.cases, options_of(config, team), continued=True)
        for case, one, text in zip(s.cases, answers, texts):
            lines.append({"dataset": s.name, "source": case.source, "prompt": case.prompt, "reference": case.reference,
                          "prediction": text, "stopped": one.stopped})
            show(lines[-1], say)
    if team.main:
        write_lines(output_dir(config) / "gen_samples.jsonl", lines, "answers", say)


def compare_runs(config: EvalConfig, team: Team, say: Say) -> None:
    """The numbers of several models on the same rows, and how they differ from the first."""
    from common.checkpoint import atomic_json
    from common.compare import check_same_rows, comparison, short_names, side_by_side
    from common.config import to_dict
    from common.evaluate import measure_all, with_calls
    from common.subject import find_subject
    from common.tables import comparison_table

    config.model_path = config.compare[0]
    check_output(config)
    subjects = [find_subject(path) for path in config.compare]
    check_same_rows(subjects, config.dataset_paths)
    sets = rows_of(config, subjects[0], say)
    names, measured, turns = short_names(config.compare), [], None
    for name, subject in zip(names, subjects):
        say(f"{name}: {subject.path}")
        model, chat, _ = opened(config, subject, sets, say)
        turns = chat.assistant_turns = turns or chat.assistant_turns  # the same answers are measured of all
        sets = with_calls(sets, chat)
        measured.append(measure_all(model, chat, sets, options_of(config, team), name, say))
        del model
    if not team.main:
        return
    found = comparison(names, sets, measured, config.seed)
    found |= {"paths": dict(zip(names, config.compare)), "rows_read": {s.name: s.counts for s in sets},
              "settings": to_dict(config)}
    place = output_dir(config)
    place.mkdir(parents=True, exist_ok=True)
    atomic_json(place / "compare.json", found)
    write_lines(place / "compare_samples.jsonl", side_by_side(names, sets, measured), "answers", say)
    say(comparison_table(found))
    say(str(place / "compare.json"))


def check_golden(config: EvalConfig, team: Team, say: Say) -> None:
    """Ask the golden prompts; print every answer that is not as it has to be; CheckFailed if there is one."""
    from common.evaluate import answer
    from common.golden import findings, read_golden
    from common.questions import EvalSet, roles_of

    subject = find(config, say)
    goldens = read_golden(config.golden, roles_of(subject, config.prompt_template))
    cases = [golden.case for golden in goldens]
    model, chat, _ = opened(config, subject, [EvalSet("golden", config.golden, cases)], say)
    longest = [golden.longest(config.max_new_tokens) for golden in goldens]
    answers, texts = answer(model, chat, cases, options_of(config, team), longest=longest)
    failed = []
    for golden, one, text in zip(goldens, answers, texts):
        wrong = findings(golden, text, one)
        if wrong:
            place = f"{config.golden}:{golden.case.row.line}"
            failed.append(place)
            say(f"FAILED {place}: {'; '.join(wrong)}\n> {golden.case.prompt[:1000]}\n{text}\n")
    say(f"golden prompts: {len(goldens) - len(failed):,} of {len(goldens):,} passed")
    if failed:
        more = f" and {len(failed) - 5:,} more" if len(failed) > 5 else ""
        raise CheckFailed(f"{len(failed):,} of {len(goldens):,} golden prompts failed: {', '.join(failed[:5])}{more}.")


def predict(config: EvalConfig, team: Team, say: Say) -> None:
    """Answer every row of a file; write them as `messages`, in their order."""
    from common.evaluate import answer
    from common.questions import QuestionReader, question, read_set, roles_of
    from common.rows import row_to_json

    subject = find(config, say)
    reader = QuestionReader(config.predict, roles_of(subject, config.prompt_template),
                            skip_bad_rows=config.skip_bad_rows)
    rows = read_set(reader, "predict", question, config.max_eval_samples, config.seed, say)
    model, chat, _ = opened(config, subject, [rows], say)
    answers, texts = answer(model, chat, rows.cases, options_of(config, team))
    if not team.main:
        return
    lines = [row_to_json(replace(case.row, messages=[*case.context, {"role": "assistant", "content": text}]))
             | {"stopped": one.stopped} for case, one, text in zip(rows.cases, answers, texts)]
    longer = sum(not one.stopped for one in answers)
    if longer:
        say(f"{longer:,} answers did not stop by themselves (\"stopped\": false); {sum(one.cut for one in answers):,} "
            "of them because the context was full")
    write_lines(output_dir(config) / "predictions.jsonl", lines, "answers", say)


def talk(config: EvalConfig, team: Team, say: Say) -> None:
    """Talk with the model."""
    from common.converse import converse

    if team.world > 1:
        raise UserError("--chat: several processes cannot read one terminal. Start it with python alone.")
    if sys.stdin is None:
        raise UserError("--chat: there is no input to read from. Start it in a terminal, or give it a pipe.")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a pipe may hold anything
    model, chat, _ = opened(config, find(config, say), [], say)
    converse(model, chat, options_of(config, team))


# ---- model and rows

def find(config: EvalConfig, say: Say) -> Subject:
    """The model that was asked for, or the newest finished run."""
    from common.subject import find_subject, newest_run

    if not config.model_path:
        config.model_path = str(newest_run(RUNS))
        say(f"model {config.model_path}, the newest finished run")
    if not (config.chat or config.golden):  # these leave nothing
        check_output(config)
    return find_subject(config.model_path)


def rows_of(config: EvalConfig, subject: Subject, say: Say) -> list[EvalSet]:
    """The rows of --dataset_paths, else of the run's val.jsonl, else none."""
    from common.questions import read_sets, roles_of

    return read_sets(subject, config.dataset_paths, roles_of(subject, config.prompt_template), config.max_eval_samples,
                     config.seed, config.skip_bad_rows, say, to_ask=config.gen_only)


def opened(config: EvalConfig, subject: Subject, sets: list[EvalSet], say: Say) -> tuple[nn.Module, Chat, dict]:
    """The model with its tokenizer and template, and where its answers stop."""
    from common.questions import keep_renderable, texts_of
    from common.subject import open_chat, open_model, stop_audit

    chat = open_chat(subject, config.tokenizer_path, config.prompt_template, texts_of(sets), say)
    # models that are compared answer the same rows
    keep_renderable(sets, chat, None if config.compare or config.golden else config.skip_bad_rows, say)
    model = open_model(subject, chat, merged=not config.use_lora, dtype=config.dtype, seed=config.seed, say=say)
    line, stops = stop_audit(model, chat, subject.path)
    say(line)
    return model, chat, stops


# ---- measuring

def options_of(config: EvalConfig, team: Team) -> Options:
    """How models are asked, with progress bars on stderr."""
    from tqdm import tqdm

    from common.evaluate import Options

    def bar(what: str, total: int) -> Callable[[int], None]:
        shown = tqdm(total=total, desc=what, unit=" rows", disable=None if team.main else True, leave=False)
        done = [0]

        def add(n: int) -> None:
            shown.update(n)
            done[0] += n
            if done[0] >= total:
                shown.close()
        return add

    return Options(config.per_device_eval_batch_size, config.max_new_tokens, config.temperature, config.top_p,
                   config.seed, bar, team)


def measure_baseline(config: EvalConfig, other: Baseline, tuned: Chat, system_prompt: str | None, sets: list[EvalSet],
                     options: Options, load_for: Callable, say: Say) -> list[tuple[Measured, dict]] | None:
    """Measure the base through the template, in plain text, and through a template of its own where it brings one; for
    each set the best way counts. It is told what the tuned model's template tells: the run's system prompt."""
    from common.chat import load_chat
    from common.evaluate import best_of, measure_all, with_system
    from common.subject import default_template

    sets = with_system(sets, system_prompt)
    # the same answers are measured
    chat_of = lambda template: load_chat(other.tokenizer_path, template, assistant_turns=tuned.assistant_turns)
    try:
        raw = chat_of("raw")
        try:
            chat = chat_of(other.template)
        except UserError as fault:
            say(f"baseline: it is not asked through the template. {fault}")
            chat = None
        model = load_for(other.path, chat or raw, dtype=config.dtype, seed=config.seed, say=say)
    except UserError as fault:
        if level(config, "baseline_path") == 2:
            raise
        say(f"baseline: none, because it cannot be loaded. {fault}")
        return None
    say(f"baseline {other.path}: asked in several ways, the best one counts")
    ways = {"template": ("through the template", lambda: chat)} if chat else {}
    ways["plain"] = "in plain text", lambda: raw
    if other.template != "model" and default_template(other.tokenizer_path) == "model":
        ways["its own template"] = "through its own template", lambda: chat_of("model")
    found = {}
    for way, (how, chat_for) in ways.items():
        try:
            found[way] = measure_all(model, chat_for(), sets, options, f"baseline {how}", say, plain=way == "plain")
        except UserError as fault:
            say(f"baseline: it cannot be asked {how}. {fault}")
    if not found:
        return None
    return [best_of({way: measured[i] for way, measured in found.items()}) for i in range(len(sets))]


# ---- results

def check_output(config: EvalConfig) -> None:
    """Results go where they can be written, over no run and no file that is read."""
    place = output_dir(config)
    check_writable(place, "--output_dir")
    if (place / "run.json").exists():
        raise UserError(f"--output_dir {place}: it holds a run, whose report and answers would be replaced. Choose "
                        "another, or leave it out: then it is eval/ in the model's directory.")
    for name in ("predictions.jsonl", "samples.jsonl", "gen_samples.jsonl"):
        check_no_input(place / name, "--output_dir", [*config.dataset_paths, *filter(None, (config.predict,
                                                                                            config.golden))])


def output_dir(config: EvalConfig) -> Path:
    """--output_dir, else eval/ in the model's directory; for a Hub id checkpoints/eval/<id>."""
    if config.output_dir:
        return Path(config.output_dir)
    place = Path(config.model_path)
    return place / "eval" if place.is_dir() else Path("checkpoints/eval") / config.model_path.replace("/", "--")


def leave(config: EvalConfig, subject: Subject, other: Baseline | None, sets: list[EvalSet], tuned: list[Measured],
          baseline: list[tuple[Measured, dict]] | None, stops: dict, seconds: float, say: Say) -> None:
    """Write eval_results.json, samples.jsonl and report.html; then print the table and some answers."""
    from common.checkpoint import atomic_json, atomic_write
    from common.config import to_dict
    from common.evaluate import results, samples
    from common.questions import train_answers
    from common.report_eval import eval_report
    from common.tables import evaluation_table

    pairs = [(s.name, s.cases) for s in sets]
    found = results(pairs, tuned, baseline, train_answers(subject, say), config.seed)
    found |= {"model": config.model_path, "baseline_model": other.path if other and baseline else None, "stops": stops,
              "rows_read": {s.name: s.counts for s in sets}, "settings": to_dict(config), "seconds": round(seconds, 1)}
    lines = samples(pairs, tuned, baseline)
    place = output_dir(config)
    place.mkdir(parents=True, exist_ok=True)
    atomic_json(place / "eval_results.json", found)
    atomic_write(place / "report.html", eval_report(found, lines, subject.run_dir))
    write_lines(place / "samples.jsonl", lines, "answers", say)
    for line in lines[:config.num_gen_samples]:
        show(line, say)
    say(evaluation_table(found))
    say(str(place / "eval_results.json"))
    say(f"report: {place / 'report.html'}")


def show(line: dict, say: Say) -> None:
    """Print a prompt, its answer, and the reference where it differs."""
    if line["prediction"] is None:
        return
    say(f"> {line['prompt'][:1000]}\n{line['prediction']}{'' if line['stopped'] else ' … (did not stop)'}")
    if line["reference"] and line["reference"].strip() != line["prediction"].strip():
        say(f"  expected: {line['reference'][:1000]}")
    say("")


def write_lines(path: Path, lines: list[dict], what: str, say: Say) -> None:
    """Write JSON lines, whole or not at all, and say where."""
    from common.checkpoint import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    say(f"{what}: {path}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sys.exit(run_main(main))
