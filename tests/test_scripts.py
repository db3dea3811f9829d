"""The pipeline end to end: every command of the README on tiny things, the real launchers, and how starts are refused.

The commands are read from README.md and run as they stand there, in a project directory with the same layout; they are
shortened by fewer steps and small files alone.
"""
from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import chat_rows, sentences, write_rows
from running import ROOT, Ran, files_below, metrics, read_json, run_script
from test_prepare import ALPACA, DOLLY, MESSAGES, jsonl

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
SHORT = ["--max_steps", "6", "--eval_steps", "3", "--save_steps", "3"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}


def readme_commands() -> list[str]:
    """The commands in the README's bash blocks, each on one line; those of the first screen are tests of their own."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]
    return [command for command in commands if not command.startswith("bash scripts/")]


COMMANDS = readme_commands()


@dataclass
class Command:
    """A command of the README, taken apart and shortened."""

    precision: str
    processes: int
    script: str
    argv: list[str] = field(default_factory=list)

    def value(self, flag: str) -> str | None:
        after = self.argv[self.argv.index(flag) + 1:] if flag in self.argv else []
        return after[0] if after and not after[0].startswith("--") else None

    def replace(self, flag: str, value: str) -> None:
        self.argv[self.argv.index(flag) + 1] = value


def shortened(command: str) -> Command:
    """The same command, with fewer steps and small sizes."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    launcher, script, argv = words[:at], Path(words[at]).stem, words[at + 1:]
    after = lambda flag, otherwise: launcher[launcher.index(flag) + 1] if flag in launcher else otherwise
    found = Command(after("--mixed_precision", "no"), int(after("--nproc_per_node", "1")), script, argv)
    if script == "01_train_tokenizer":
        found.replace("--vocab_size", "400")
    elif script == "02_pretrain":
        found.replace("--max_steps", "3")
        found.argv += ["--batch_size", "2", "--sequence_length", "32"]
    elif script == "prepare_sft_datasets" and "--raw_dir" not in argv:
        found.argv += ["--raw_dir", "raw"]
    elif script == "03_sft" and "--dry_run" not in argv:
        found.argv += SHORT
        if "checkpoint-500" in (found.value("--resume_from_checkpoint") or ""):
            found.replace("--resume_from_checkpoint", f"{found.value('--output_dir')}/checkpoint-3")
    return found


class Project:
    """A directory laid out like the project, in which the README's commands run in their order, each once."""

    def __init__(self, place: Path) -> None:
        self.place, self.ran = place, {}
        (place / "scripts").symlink_to(ROOT / "scripts")
        (place / "config").mkdir()
        for path in (ROOT / "config").iterdir():
            (place / "config" / path.name).symlink_to(path)
        for name in ("tiny.json", "small.json"):
            architecture = read_json(ROOT / "config" / name)
            small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
                     "intermediate_size": 64}
            assert set(small) < set(architecture) and architecture["max_position_embeddings"] == 1024
            (place / "config" / name).unlink()
            (place / "config" / name).write_text(json.dumps(architecture | small))
        (place / "raw").mkdir()
        (place / "corpus.txt").write_text("\n".join(sentences(1500)), encoding="utf-8")
        dolly = [{"instruction": r["prompt"], "context": "", "response": r["response"], "category": "open_qa"}
                 for r in chat_rows(60, 1)]
        alpaca = [{"instruction": r["prompt"], "input": "", "output": r["response"]} for r in chat_rows(60, 2)]
        jsonl(place / "raw" / "databricks-dolly-15k.jsonl", DOLLY + dolly)
        (place / "raw" / "alpaca_data.json").write_text(json.dumps(ALPACA + alpaca))
        jsonl(place / "raw" / "oasst1.messages.jsonl.gz", MESSAGES)
        write_rows(place / "my_logs" / "log.jsonl", [{"messages": [
            {"role": "user", "content": "hello"}, {"role": "assistant", "content": "the key is sk-" + "a1B2" * 8}]}])
        for seed, name in enumerate(("mixed_dataset", "high_quality_dataset", "eval_dataset"), 3):
            write_rows(place / "data" / "sft" / f"{name}.jsonl", chat_rows(40 if seed < 5 else 6, seed))

    def run(self, index: int) -> Ran:
        """How command `index` went; those before it that have not run yet are run first."""
        for i in range(index + 1):
            if i not in self.ran:
                self.ran[i] = self.start(COMMANDS[i])
        return self.ran[index]

    def start(self, text: str) -> Ran:
        command = shortened(text)
        resumed = command.value("--resume_from_checkpoint")
        if resumed and not (self.place / resumed).exists():
            at = command.argv.index("--resume_from_checkpoint")
            self.in_process(command, command.argv[:at] + command.argv[at + 2:]).ok()
        if command.processes > 1 or "--output_dir checkpoints/sft/tiny-mixed " in text:
            return self.launch(text, command)
        return self.in_process(command, command.argv)

    def in_process(self, command: Command, argv: list[str]) -> Ran:
        return run_script(command.script, *argv, cwd=self.place, mixed_precision=command.precision)

    def launch(self, text: str, command: Command) -> Ran:
        """With the launcher that the command names."""
        words = shlex.split(text)
        at = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
        variables = dict(word.split("=", 1) for word in words[:at] if "=" in word)
        launcher = [word for word in words[:at] if "=" not in word]
        launcher[0] = str(Path(sys.executable).parent / launcher[0])
        found = subprocess.run([*launcher, words[at], *command.argv], cwd=self.place, env={**ENVIRONMENT, **variables},
                               capture_output=True, text=True, timeout=600,
                               preexec_fn=on_one_core if command.processes == 1 else None)
        return Ran(found.returncode, found.stdout, found.stderr)


def on_one_core() -> None:
    """Small tensors on all cores of a busy machine wait for each other most of the time."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def label(command: str) -> str:
    """A short name of a command for the test's."""
    found = shortened(command)
    return "-".join(filter(None, [found.script, Path(found.value("--output_dir") or "").name,
                                  *(w[2:] for w in found.argv if w in ("--dry_run", "--gen_only", "--no_lora")),
                                  *(found.value(f) for f in ("--dataset",) if found.value(f))]))


def test_readme_has_every_example():
    """Guards against a README without commands that people know, and against a test that found none."""
    found = [shortened(command) for command in COMMANDS]
    count = lambda script: sum(command.script == script for command in found)
    assert count("01_train_tokenizer") == 1 and count("02_pretrain") == 2 and count("prepare_sft_datasets") == 5
    assert count("03_sft") == 8 and count("04_merge_lora") == 2 and count("06_eval_sft") == 4
    runs = {Path(command.value("--output_dir")).name for command in found
            if command.script == "03_sft" and command.value("--output_dir")}
    assert runs >= {"tiny-mixed", "small-balanced", "tiny-quality", "tiny-chatml", "tiny-full-ft"}


@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=map(label, COMMANDS))
def test_readme_command(project, index):
    """Guards against a documented command that does not run, or runs and leaves nothing."""
    ran, command = project.run(index).ok(), shortened(COMMANDS[index])
    output = project.place / (command.value("--output_dir") or "checkpoints/sft/run")
    if command.script == "03_sft" and "--dry_run" in command.argv:
        assert "(asked 0.4000)" in ran.out and "«" in ran.out
        assert not output.exists()
    elif command.script == "03_sft":
        check_run(output, command, ran)
    elif command.script == "prepare_sft_datasets":
        wanted = {"all": ["dolly15k", "oasst1_en", "alpaca"], "oasst1": ["oasst1_en"]}
        for name in wanted.get(command.value("--dataset"), [command.value("--dataset")]):
            manifest = read_json(project.place / "data" / "sft" / f"{name}.manifest.json")
            rows = (project.place / "data" / "sft" / f"{name}.jsonl").read_text().splitlines()
            assert manifest["rows_in"] == len(rows) + sum(manifest["rows_dropped"].values()) and rows
    elif command.script == "04_merge_lora":
        merged = output if command.value("--output_dir") else project.place / command.value("--model_path") / "merged"
        assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"} <= set(os.listdir(merged))
        assert read_json(merged / "config.json")["dtype"] == (command.value("--merge_dtype") or "float32")
    elif command.script == "06_eval_sft":
        assert ran.out.strip()
        if "--gen_only" not in command.argv:
            found = read_json(project.place / command.value("--model_path") / "eval" / "eval_results.json")
            assert found["loss"] > 0 and "baseline" in found


def check_run(run: Path, command: Command, ran: Ran) -> None:
    """A finished run of six steps has left everything that the README lists."""
    status, weights = read_json(run / "run_status.json"), read_json(run / "run.json")["config"]["use_lora"]
    assert status["status"] in ("finished", "early_stopped") and status["exit_status"] == 0
    assert read_json(run / "run.json")["mixed_precision"] == command.precision
    assert read_json(run / "run.json")["processes"] == command.processes
    there = {"adapter_model.safetensors" if weights else "model.safetensors", "tokenizer.json", "chat_template.jinja",
             "generation_config.json", "run.json", "plan.json", "metrics.jsonl", "val.jsonl", "README.md",
             "report.html", "checkpoint-3"}
    assert there <= set(os.listdir(run))
    assert ("merged" in os.listdir(run)) == ("--merge_adapters" in command.argv)
    assert ("samples.jsonl" in os.listdir(run)) == ("--do_gen_test" in command.argv)
    lines = metrics(run)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert lines[-1]["step"] == 6
    if command.value("--resume_from_checkpoint"):
        assert "checkpoint-3: step 3" in ran.out and list(run.glob("superseded-*"))
    if weights_named := command.value("--dataset_weights"):
        assert weights_named == "recommended" or read_json(run / "plan.json")["sources"][0]["share_asked"] == (
            pytest.approx(float(weights_named)))


def test_finished_run_resumed_is_no_op(project):
    """Guards against a finished run that trains on, or is written again, when its command is repeated."""
    index = next(i for i, command in enumerate(COMMANDS) if "tiny-again" in command)
    project.run(index).ok()
    run = project.place / "checkpoints" / "sft" / "tiny-again"
    before = {name: (run / name).stat().st_mtime_ns for name in files_below(run) if name != ".lock"}
    again = project.start(COMMANDS[index]).ok()
    assert "step 1/" not in again.out and "finished" in again.out
    assert before == {name: (run / name).stat().st_mtime_ns for name in files_below(run) if name != ".lock"}


# ---- starts

@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_fast(name):
    """Guards against heavy imports at the top of a script: --help and a mistyped flag have to answer at once."""
    code = (f"import runpy, sys; sys.argv = ['{name}', '--help']; sys.path.insert(0, 'scripts')\n"
            f"try: runpy.run_path('scripts/{name}', run_name='__main__')\n"
            "except SystemExit as end: status = end.code\n"
            "print('HEAVY', [m for m in ('torch', 'transformers', 'peft', 'datasets', 'matplotlib') "
            "if m in sys.modules], status or 0)")
    before = os.times()
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    after = os.times()
    assert found.stdout.endswith("HEAVY [] 0\n"), found.stdout[-300:] + found.stderr[-2000:]
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 0.5 and "--" in found.stdout  # seconds of a core, so that a busy machine does not count


@pytest.fixture
def start(tmp_path, tiny_model, spm_unigram):
    """Start 03 in an empty directory with flags over a working set; None leaves one out."""
    write_rows(tmp_path / "rows.jsonl", chat_rows(20))

    def run(*more: str, script: str = "03_sft", **flags: object) -> Ran:
        usual = {"model_path": tiny_model, "tokenizer_path": spm_unigram, "dataset_paths": ["rows.jsonl"],
                 "output_dir": "out", "max_seq_length": 64, "max_steps": 2}
        argv = []
        for name, value in {**usual, **flags}.items():
            values = value if isinstance(value, list) else [value]
            argv += [] if value is None else [f"--{name}", *map(str, values)]
        return run_script(script, *argv, *more, cwd=tmp_path)

    return run


def refused(ran: Ran, *words: str) -> None:
    """Exit status 2, one sentence with these words, no traceback."""
    assert ran.status == 2, ran.out + ran.err
    assert ran.err.startswith("error: ") and "Traceback" not in ran.err
    for word in words:
        assert word in ran.err, ran.err


def test_dry_run_refuses_what_the_run_would(start, tmp_path):
    """Guards against a rehearsal that passes where the run is refused once its weights are fetched."""
    refused(start("--dry_run", lora_target_modules=["q_prj"]), "q_prj", "q_proj")
    assert " M trained (LoRA)" in start("--dry_run").ok().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more, flags, words", [
    (["--lora_rnk", "8"], {}, ["--lora_rnk", "--lora_r"]),
    (["--dataset_weight", "1"], {}, ["--dataset_weights"]),
    ([], {"dataset_paths": ["rows.jsonl", "b.jsonl", "c.jsonl"], "dataset_weights": [1, 1]}, ["2 weights for 3"]),
    ([], {"dataset_weights": [0]}, ["--dataset_weights", "zero"]),
    ([], {"dataset_paths": ["rows.jsonl", "gone.jsonl"]}, ["gone.jsonl", "does not exist"]),
    ([], {"val_dataset_paths": ["gone.jsonl"], "val_split_ratio": 0}, ["gone.jsonl", "does not exist"]),
    ([], {"model_path": "gone"}, ["gone"]),
    ([], {"tokenizer_path": "gone.model"}, ["gone.model"]),
    ([], {"max_seq_length": 4096}, ["4,096", "256"]),
    ([], {"lora_target_modules": ["q_prj"]}, ["q_prj", "q_proj"]),
    ([], {"dataset_weights": "recommended"}, ["recommended", "rows.jsonl"]),
    (["--no_lora", "--merge_adapters"], {}, ["--merge_adapters"]),
], ids=["flag", "flag-plural", "weights-count", "weights-zero", "file", "val-file", "model", "tokenizer", "context",
        "target", "recommended", "contradiction"])
def test_refused(start, tmp_path, more, flags, words):
    """Guards against mistakes that are ignored, end in a traceback, or are found after something was written."""
    refused(start(*more, **flags), *words)
    assert [name for name in files_below(tmp_path) if not name.startswith("data/cache/")] == ["rows.jsonl"]


def test_misspelt_key_is_refused(start, tmp_path):
    """Guards against a key of the config file that is ignored because it is misspelt."""
    (tmp_path / "my.json").write_text('{"learning_rat": 1e-4}')
    refused(start(config_path="my.json"), "learning_rat", "learning_rate", "my.json")
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_model_is_refused(start, tmp_path, byte_level, spm_bpe):
    """Guards against ids that mean other words to the model: training would look normal."""
    refused(start(tokenizer_path=byte_level), "tokenizer", "--tokenizer_path")
    assert files_below(tmp_path) == ["rows.jsonl"]


def test_bad_row_is_refused(start, tmp_path):
    """Guards against a bad row that is skipped, or found without its line."""
    write_rows(tmp_path / "rows.jsonl", [*chat_rows(3), {"prompt": "no answer"}])
    refused(start(), "rows.jsonl:4:", "response")
    assert files_below(tmp_path) == ["rows.jsonl"]
    start("--skip_bad_rows", "--dry_run").ok()


def test_used_directory_is_refused(start, tmp_path):
    """Guards against two runs mixed in one directory; what is there stays as it is."""
    start(report_to="none").ok()
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path / "out")
              for name in [f"out/{name}"] if not name.endswith(".lock")}
    refused(start(report_to="none"), "out", "--resume_from_checkpoint", "--overwrite_output_dir")
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    start("--overwrite_output_dir", report_to="none", learning_rate=1e-3).ok()
    assert len(list(tmp_path.glob("out.old-*"))) == 1


def test_changed_resume_is_refused(start, tmp_path):
    """Guards against a resumed run that quietly takes other data or settings."""
    start(report_to="none").ok()
    changed = start("--resume_from_checkpoint", report_to="none", seed=7)
    refused(changed, "seed", "42", "7")
    write_rows(tmp_path / "rows.jsonl", chat_rows(21))
    refused(start("--resume_from_checkpoint", report_to="none"), "data rows")


def test_dry_run_writes_nothing(start, tmp_path):
    """Guards against a dry run that makes the output directory or loads weights."""
    ran = start("--dry_run", dataset_weights=[1])
    ran.ok()
    assert "share of examples 1.0000 (asked 1.0000)" in ran.out and "2 steps" in ran.out and "«" in ran.out
    assert not (tmp_path / "out").exists()


def test_every_setting_is_read():
    """Guards against a flag that is parsed and never read."""
    from common.config import settings_of
    from common.settings import SftConfig

    code = "".join(path.read_text(encoding="utf-8") for path in [
        ROOT / "scripts" / "03_sft.py", *(ROOT / "scripts" / "common").glob("*.py")]
        if path.name not in ("config.py", "settings.py"))
    read = set(re.findall(r"config\.(\w+)", code)) | {"config_path", "role_map"}
    assert sorted(set(settings_of(SftConfig)) - read) == []
