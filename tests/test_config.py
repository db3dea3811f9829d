"""Settings: who wins, what is refused, and that what is saved says the same again."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import config as cfg
from common.config import differences, parse, setting, settings_of, to_dict
from common.faults import UserError
from common.helptext import settings_table
from common.settings import SftConfig, dataset_name

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "config").glob("sft*.json")) + sorted((ROOT / "config").glob("sft*.yaml"))
NEEDED = ["--model_path", "m", "--dataset_paths", "a.jsonl", "b.jsonl"]


def sft(*argv: str, needed: bool = True) -> SftConfig:
    return parse(SftConfig, [*(NEEDED if needed else []), *argv], "x")


def refusal(*argv: str, needed: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        sft(*argv, needed=needed)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write_file(content: object, name: str = "c.json") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)
    return write_file


def test_command_line_beats_file_beats_default(write):
    """Guards against a file that overrides what was typed."""
    path = write({"lora_r": 4, "seed": 7})
    config = sft("--config_path", path, "--seed", "9")
    assert (config.lora_r, config.seed, config.lora_dropout) == (4, 9, 0.05)
    assert [config.origin[name] for name in ("lora_r", "seed", "lora_dropout")] == ["file", "command line", "default"]


def test_every_shipped_config_parses():
    """Guards against shipped files that nobody ever loads."""
    names = {path.stem for path in SHIPPED}
    assert {"sft", "sft_tiny", "sft_small", "sft_domain", "sft_sample"} <= names
    for path in SHIPPED:
        text = path.read_text()
        argv = ["--config_path", str(path)]
        argv += [] if '"model_path"' in text or "model_path:" in text else ["--model_path", "m"]
        argv += [] if "dataset_paths" in text or "stages" in text else ["--dataset_paths", "a.jsonl"]
        for mode in ([], ["--use_lora"], ["--no_lora"], ["--no_packing"]):
            config = sft(*argv, *mode, needed=False)
            assert config.save_total_limit == 3
        if path.stem in ("sft_tiny", "sft_small"):
            rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
            assert rows * config.max_seq_length <= 16384


@pytest.mark.parametrize("argv", [
    "--use_lora --lora_r 16 --packing --do_gen_test", "--use_lora --merge_adapters", "--no_lora --no_packing",
    "--resume_from_checkpoint checkpoints/sft/tiny-chatml/checkpoint-500", "--dataset_weights 0.7 0.3"])
def test_documented_commands_parse_with_the_shipped_file(argv):
    """Guards against contradictions between a shipped file and the documented flags."""
    sft("--config_path", str(ROOT / "config/sft_tiny.json"), "--prompt_template", "chatml", *argv.split())


def test_unknown_names_are_refused_with_the_nearest(write):
    """Guards against a misspelt key that is ignored."""
    assert "--lora_rank: there is no such flag. Did you mean --lora_r?" in refusal("--lora_rank", "8")
    assert "Did you mean --no_packing?" in refusal("--no-packing")
    assert "Did you mean --learning_rate?" in refusal("--lr", "1")
    assert "--bf16: there is no such flag. The launcher sets it: accelerate launch --mixed_precision bf16" in refusal(
        "--bf16")
    path = write({"learning_rat": 1e-4, "epochs": 3, "_comment": "x", "use_liger_kernel": True})
    text = refusal("--config_path", path)
    assert f"{path}: use_liger_kernel: there is no such setting. The loss is computed in chunks anyway" in text
    assert f"{path}: learning_rat: there is no such setting. Did you mean learning_rate?" in text
    assert f"{path}: epochs: there is no such setting. Did you mean num_train_epochs?" in text
    assert f"{path}: _comment:" in text


def test_hints_name_settings_that_exist():
    """Guards against a hint that leads nowhere."""
    flags = {flag for s in settings_of(SftConfig).values() for flag in s.flags()}
    assert all("--" + ours in flags for ours in SftConfig.other_names.values())
    assert not set(SftConfig.other_names) & {flag[2:] for flag in flags}


@pytest.mark.parametrize("argv, says", [
    (["--lora_r", "4", "--lora_r", "8"], "--lora_r: it is given twice"),
    (["--packing", "--no_packing"], "--no_packing: it is given twice (--packing stands before)"),
    (["--packing", "false"], 'it takes no value ("false" follows). Write --packing or --no_packing'),
    (["--use_lora=true"], "Write --use_lora or --no_lora"),
    (["--seed"], "--seed: a value is missing"),
    (["--seed", "--packing"], "--seed: a value is missing"),
    (["--seed", "1", "2"], "it takes one value, 2 follow"),
    (["--seed", "1.0"], '"1.0" is not a whole number'),
    (["--learning_rate", "fast"], '"fast" is not a number'),
    (["--learning_rate", "nan"], "not a finite number"),
    (["--learning_rate", "1e999"], "not a finite number"),
    (["--learning_rate", "0"], "more than 0"),
    (["--val_split_ratio", "1"], "at least 0 and less than 1"),
    (["--too_long", "spilt"], "Did you mean split?"),
    (["--prompt_template", "chatlm"], "Did you mean chatml?"),
    (["--dataset_weights", "0.4,0.6"], "Separate values by spaces"),
    (["--dataset_weights", "1", "-1"], "entry 2 of 2: -1.0 is out of range"),
    (["--stages", "x"], "belongs in a config file"),
    (["--lora", "4"], "no such flag"),  # an abbreviation
    (["--output_dir", ""], "the path is empty"),
    (["--seed", "99999999999999999999"], "too large"),
    (["--config_path", "no/such.json"], "no/such.json: it cannot be read"),
])
def test_a_wrong_flag_is_one_sentence(argv, says):
    """Guards against abbreviations, last-one-wins and values of the wrong type."""
    text = refusal(*argv)
    assert says in text and "\n" not in text


def test_a_stray_word_is_refused():
    """Guards against a forgotten flag name whose value is dropped."""
    with pytest.raises(UserError, match="no flag stands before it"):
        parse(SftConfig, ["m", *NEEDED], "x")


def test_forms_of_values():
    """Guards against negative numbers taken for flags, and `=` not understood."""
    config = sft("--max_steps", "-1", "--seed=3", "--dataset_weights", "recommended", "--resume_from_checkpoint",
                 "--early_stopping_patience", "none", "--system_prompt=--be brief", "--learning_rate", "2e-5")
    assert (config.max_steps, config.seed, config.dataset_weights) == (-1, 3, "recommended")
    assert (config.resume_from_checkpoint, config.early_stopping_patience) == ("auto", None)
    assert (config.system_prompt, config.learning_rate) == ("--be brief", 2e-5)
    assert sft("--dataset_weights", "1", "3").dataset_weights == [1.0, 3.0]
    assert sft("--resume_from_checkpoint", "x/checkpoint-5").resume_from_checkpoint == "x/checkpoint-5"


@pytest.mark.parametrize("name, content, says", [
    ("c.json", '{"learning_rate": "2e-5"}', 'learning_rate: "2e-5" is not a number or null. Write 2e-5 without quotes'),
    ("c.yaml", "learning_rate: 2e-5", "Write 2.0e-5 without quotes"),
    ("c.yaml", "learning_rate: 2e5", "Write 2.0e+5 without quotes"),
    ("c.json", '{"packing": "false"}', 'packing: "false" is not true or false. Write false without quotes'),
    ("c.json", '{"lora_r": true}', "lora_r: true is not a whole number"),
    ("c.json", '{"lora_r": 16.0}', "lora_r: 16.0 is not a whole number"),
    ("c.json", '{"packing": 1}', "packing: 1 is not true or false"),
    ("c.json", '{"prompt_template": 5}', "prompt_template: 5 is not a text"),
    ("c.json", '{"learning_rate": NaN}', "not a finite number"),
    ("c.json", '{"learning_rate": 1e999}', "not a finite number"),
    ("c.yaml", "learning_rate: .inf", "not a finite number"),
    ("c.json", '{"seed": null}', "seed: null is not a whole number"),
    ("c.json", '{"seed": 1, "seed": 2}', "seed: the key stands twice"),
    ("c.yaml", "seed: 1\nlora_r: 4\nseed: 2\n", "c.yaml:3: seed: the key stands twice"),
    ("c.json", '{"seed": 1,}', "c.json:1: this is not JSON"),
    ("c.yaml", "a: [1", "this is not YAML"),
    ("c.json", "[1]", "not an object of settings"),
    ("c.yaml", "", "not an object of settings"),
    ("c.json", '{"report_to": "wandb"}', 'Write ["wandb"]'),
    ("c.json", '{"config_path": "d.json"}', "a config file cannot name another one"),
    ("c.toml", "seed = 1", "Name it .json, .yaml or .yml"),
    ("c.json", "[" * 100_000, "nested too deeply"),
])
def test_types_are_checked_at_the_door(write, name, content, says):
    """Guards against "2e-5" and "false" from a file taken as values."""
    text = refusal("--config_path", write(content, name))
    assert says in text and "c." in text and "\n" not in text


def test_no_value_of_any_type_crashes(write):
    """Guards against a traceback for a value nobody thought of."""
    odd = [None, True, 0, -1, 10 ** 40, 1.5, -0.0, "", "x", "none", [], [None], [[]], [{}], {}, {"a": [1]}, ["x", 1]]
    for name in settings_of(SftConfig):
        for value in odd:
            path = write({name: value})
            try:
                config = sft("--config_path", path)
            except UserError as fault:
                assert name in str(fault), (name, value)
            else:
                json.dumps(to_dict(config), allow_nan=False)
    for word in ("", "-1", "none", "x=y", "-", "1e5", "0x10", "1_000", "١", " 1", "nan", "true"):
        for s in settings_of(SftConfig).values():
            if s.name not in ("config_path", "model_path", "dataset_paths"):
                try:
                    sft(f"--{s.name}", word)
                except UserError as fault:
                    assert s.name in str(fault), (s.name, word)


def test_an_int_is_accepted_for_a_float(write):
    """Guards against a check so strict that 3 epochs are refused."""
    epochs = sft("--config_path", write({"num_train_epochs": 3})).num_train_epochs
    assert epochs == 3.0 and type(epochs) is float


def test_yaml_reads_like_json(write):
    """Guards against two readers with two meanings."""
    config = sft("--config_path", write("learning_rate: 2.0e-5\npacking: no\nreport_to: [none]\n", "c.yaml"))
    assert (config.learning_rate, config.packing, config.report_to) == (2e-5, False, ["none"])


def test_all_problems_at_once(write):
    """Guards against a user who mends one mistake a start."""
    path = write({"seed": "1", "lora_q": 3, "too_long": "x"})
    text = refusal("--config_path", path, "--lora_alpha", "big", "--dataset_weights", "1", "--max_stps", "5",
                   "--warmup_ratio", ".1", "--warmup_steps", "3")
    assert text.startswith("7 problems")
    for name in ("seed", "lora_q", "too_long", "--lora_alpha", "--dataset_weights", "--max_stps", "--warmup_steps"):
        assert len(re.findall(rf"(^|\W){name}:", text)) == 1, name


def test_a_refused_setting_is_not_reported_twice():
    """Guards against a misspelt flag that is also called missing."""
    text = refusal("--model_pth", "m", "--dataset_paths", "a.jsonl", needed=False)
    assert text == "--model_pth: there is no such flag. Did you mean --model_path?"
    text = refusal(needed=False)
    assert "--model_path: it is missing" in text and "--dataset_paths: it is missing" in text


def test_paths_in_a_file_are_relative_to_it(write, tmp_path, monkeypatch):
    """Guards against a config that works from one directory only, and a Hub id made into a path."""
    (tmp_path / "config/beside").mkdir(parents=True)
    write({"model_path": "../models/tiny/final", "tokenizer_path": "spm.model",
           "dataset_paths": ["x.jsonl", "/y.jsonl"],
           "output_dir": "out", "prompt_template": "raw", "init_from": "beside"}, "config/c.json")
    monkeypatch.chdir(tmp_path)
    config = sft("--config_path", "config/c.json", needed=False)
    assert (config.model_path, config.tokenizer_path) == ("models/tiny/final", "config/spm.model")
    assert (config.dataset_paths, config.output_dir) == (["config/x.jsonl", "/y.jsonl"], "config/out")
    assert (config.prompt_template, config.init_from) == ("raw", "config/beside")
    write({"model_path": "owner/name-0.5B"}, "config/hub.json")
    config = sft("--config_path", "config/hub.json", "--dataset_paths", "x.jsonl", needed=False)
    assert (config.model_path, config.dataset_paths) == ("owner/name-0.5B", ["x.jsonl"])


def test_saved_config_resolves_to_the_same_values(write, tmp_path, monkeypatch):
    """Guards against a run.json that cannot be run, or means something else where it lies."""
    monkeypatch.chdir(tmp_path)
    config = sft("--warmup_steps", "5", "--no_lora", "--val_from", "b", "--report_to", "none", "--dataset_weights", "1",
                 "2", "--tokenizer_path", "owner/name", "--dry_run", "--resume_from_checkpoint")
    saved = to_dict(config)
    assert saved["output_dir"] == str(tmp_path / "checkpoints/sft/run") and saved["tokenizer_path"] == "owner/name"
    assert "dry_run" not in saved and "resume_from_checkpoint" not in saved and "config_path" not in saved
    path = write({"config": saved, "versions": {}, "fingerprints": {}, "command": "x"}, "elsewhere/run.json")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    again = sft("--config_path", path, needed=False)
    assert to_dict(again) == saved and not again.dry_run
    assert to_dict(sft("--config_path", write(saved, "x/plain.json"), needed=False)) == saved


def test_stages_are_structured_and_strict(write):
    """Guards against a misspelt key inside a stage, and survives saving."""
    stages = [{"name": "one", "epochs": 2, "datasets": [{"path": "a.jsonl"}]},
              {"name": "two", "until_step": 50, "datasets": [{"path": "b.jsonl", "weight": 1, "n_samples": 9},
                                                             {"path": "a.jsonl", "weight": 2}]}]
    path = write({"model_path": "m", "stages": stages})
    config = sft("--config_path", path, needed=False)
    folder = str(Path(path).parent)
    assert config.stages[1].datasets[0].weight == 1.0 and config.stages[0].epochs == 2.0
    assert config.all_dataset_paths() == [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]
    assert to_dict(sft("--config_path", write(to_dict(config), "run.json"), needed=False)) == to_dict(config)
    assert "names data sets as well" in refusal("--config_path", path)
    both = write({"model_path": "m", "stages": stages, "dataset_weights": [1, 2]}, "both.json")
    assert "dataset_weights: it has no effect: the stages say it" in refusal("--config_path", both, needed=False)
    stages[0]["epoch"] = 1
    stages[1]["datasets"][0]["wieght"] = 2
    del stages[1]["datasets"][1]["path"]
    text = refusal("--config_path", write({"model_path": "m", "stages": stages}), needed=False)
    assert "stages[0].epoch: there is no such setting. Did you mean epochs?" in text
    assert "stages[1].datasets[0].wieght: there is no such setting. Did you mean weight?" in text
    assert "stages[1].datasets[1].path: it is missing" in text and text.startswith("3 problems")


@pytest.mark.parametrize("stage, says", [
    ([], "the list is empty"),
    ([{"name": "a", "datasets": [{"path": "a.jsonl"}]}], "it needs epochs or until_step"),
    ([{"name": "a", "epochs": 1, "datasets": []}], "Every stage needs data sets"),
    ([{"name": "a", "epochs": 1, "datasets": [{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"}]}], "some not"),
    ([{"name": "a", "epochs": 1, "datasets": [{"path": "a.jsonl"}, {"path": "a.jsonl"}]}], "stands twice"),
    ([{"name": n, "until_step": 5, "datasets": [{"path": "a.jsonl"}]} for n in "ab"], "not after step 5"),
    ([{"name": "a", "epochs": 1, "datasets": [{"path": "a.jsonl"}]}] * 2, "the name of an earlier stage"),
    ("x", "not a list of objects"),
    ([3], "not a list of objects"),
])
def test_impossible_stages_are_refused(write, stage, says):
    """Guards against a curriculum that silently skips a stage."""
    assert says in refusal("--config_path", write({"model_path": "m", "stages": stage}), needed=False)


@pytest.mark.parametrize("argv, says", [
    ("--dataset_weights 1 1 1", "3 weights for 2 dataset_paths"),
    ("--dataset_weights 0 0", "all weights are zero"),
    ("--warmup_ratio 0.1 --warmup_steps 5", "Keep one of them"),
    ("--no_lora --merge_adapters", "there are no adapters, as --no_lora says"),
    ("--no_lora --lora_r 8", "--lora_r: it has no effect"),
    ("--val_split_ratio 0 --early_stopping_patience 2", "there are no validation rows"),
    ("--val_split_ratio 0.6 --test_split_ratio 0.5", "leave nothing to train on"),
    ("--val_split_ratio 0 --eval_steps 5", "--eval_steps: it has no effect"),
    ("--val_split_ratio 0 --per_device_eval_batch_size 4", "--per_device_eval_batch_size: it has no effect"),
    ("--dry_run --verify_resume", "--dry_run --verify_resume: each of them is a task of its own"),
    ("--explain_step 2 --export_rendered x.jsonl", "no effect with --explain_step"),
    ("--val_split_ratio 0.1 --val_dataset_paths v.jsonl", "Leave one of them out"),
    ("--val_dataset_paths a.jsonl", "a.jsonl is trained on as well"),
    ("--val_from aa", "Did you mean a?"),
    ("--max_steps 0", "0 steps train nothing"),
    ("--max_steps 9 --num_train_epochs 2", "--num_train_epochs: it has no effect: max_steps says how long"),
    ("--max_seq_length 4", "at least 8"),
    ("--lr_scheduler_type constant --warmup_steps 5", "Write constant_with_warmup"),
    ("--lr_scheduler_type constant --min_lr_ratio 0.1", "does not fall"),
    ("--overwrite_output_dir --resume_from_checkpoint", "Leave one of them out"),
    ("--num_gen_samples 3", "Add --do_gen_test"),
    ("--role_map human", "is not NAME=ROLE"),
    ("--optim sgd --adam_beta1 0.5", "optim is sgd"),
])
def test_contradictions_are_refused(argv, says):
    """Guards against a flag that is parsed and has no effect."""
    assert says in refusal(*argv.split())


@pytest.mark.parametrize("paths, says", [
    (["x/a.jsonl", "y/a.jsonl"], "x/a.jsonl and y/a.jsonl would both be called a"),
    (["a.jsonl", "a.jsonl"], "a.jsonl stands twice"),
    (["a.jsonl", "a.jsonl.gz"], "would both be called a")])
def test_data_sets_have_different_names(paths, says):
    """Guards against two data sets under one name in weights, logs and --val_from."""
    assert says in refusal("--model_path", "m", "--dataset_paths", *paths, needed=False)


def test_dataset_name():
    """Guards against a version number taken for an extension."""
    assert [dataset_name(p) for p in ("d/a.jsonl", "a.jsonl.gz", "org/data-v1.5", "x.parquet")] == \
        ["a", "a", "data-v1.5", "x"]


def test_a_file_for_both_modes_gives_way_to_the_command_line(write):
    """Guards against a file that cannot be overridden, and against giving way in silence."""
    path = write({"merge_adapters": True, "lora_r": 8, "warmup_ratio": 0.1, "early_stopping_patience": 3})
    config = sft("--config_path", path, "--no_lora", "--warmup_steps", "5", "--val_split_ratio", "0")
    assert (config.merge_adapters, config.warmup_ratio, config.warmup_steps) == (False, 0.0, 5)
    assert config.early_stopping_patience is None
    assert config.notes == [f"{path}: warmup_ratio gives way to --warmup_steps",
                            f"{path}: merge_adapters gives way to --no_lora",
                            f"{path}: early_stopping_patience gives way to --val_split_ratio"]
    config = sft("--config_path", write({"overwrite_output_dir": True}), "--resume_from_checkpoint")
    assert (config.overwrite_output_dir, config.resume_from_checkpoint) == (False, "auto")
    assert "there are no adapters" in refusal("--config_path", write({"use_lora": False, "merge_dtype": "bfloat16"}))
    path = write({"max_steps": 9, "num_train_epochs": 1})
    config = sft("--config_path", path, "--num_train_epochs", "2")
    assert (config.max_steps, config.notes) == (-1, [f"{path}: max_steps gives way to --num_train_epochs"])
    assert sft("--config_path", path).max_steps == 9 and not sft("--config_path", path, "--max_steps", "5").notes
    config = sft("--config_path", write({"warmup_steps": 5}), "--warmup_ratio", "0.2")
    assert (config.warmup_ratio, config.warmup_steps) == (0.2, 0)
    assert sft("--val_dataset_paths", "v.jsonl").val_split_ratio == 0.0
    path = write({"init_from": "./old", "model_path": "./old"})  # as the run.json of such a run
    assert sft("--config_path", path).source == "m"
    assert sft("--config_path", path, "--dataset_paths", "a.jsonl", needed=False).source.endswith("old")


def test_the_learning_rate_follows_the_mode():
    """Guards against a rate for adapters used on all weights."""
    assert (sft().learning_rate, sft("--no_lora").learning_rate) == (2e-4, 2e-5)
    assert sft("--no_lora", "--learning_rate", "1e-3").learning_rate == 1e-3


def test_differences_are_the_fixed_settings_that_changed(tmp_path, monkeypatch):
    """Guards against a resume under another schedule, and against refusing a moved project."""
    monkeypatch.chdir(tmp_path)
    old = to_dict(sft())
    new = to_dict(sft("--learning_rate", "1e-3", "--logging_steps", "1", "--save_steps", "7", "--output_dir", "other"))
    assert [row for row in differences(old, new, SftConfig) if row[0] != "dataset_paths"] == \
        [("learning_rate", 2e-4, 1e-3)]
    (tmp_path / "moved").mkdir()
    monkeypatch.chdir(tmp_path / "moved")
    assert differences(old, to_dict(sft()), SftConfig) == []
    swapped = to_dict(parse(SftConfig, ["--model_path", "m", "--dataset_paths", "b.jsonl", "a.jsonl"], "x"))
    assert [row[0] for row in differences(old, swapped, SftConfig)] == ["dataset_paths"]
    del old["seed"]
    assert differences(old, to_dict(sft("--seed", "5")), SftConfig) == [("seed", 42, 5)]


def test_help_names_every_setting_and_exits_0(capsys):
    """Guards against a setting that only the source tells of."""
    with pytest.raises(SystemExit) as caught:
        parse(SftConfig, ["--help"], "Fine-tune.")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and text.startswith("Fine-tune.")
    table = settings_table(SftConfig)
    for s in settings_of(SftConfig).values():
        assert s.name in text and f"`--{s.name}`" in table or s.file_only and s.name in table
        assert s.help.endswith(".") and s.group


def test_help_is_fast_and_imports_no_torch():
    """Guards against a --help that takes the seconds of a library import."""
    code = ("import sys; from time import perf_counter; start = perf_counter()\n"
            "from common.settings import SftConfig; from common.config import parse\n"
            "try: parse(SftConfig, ['--help'], 'x')\n"
            "except SystemExit: pass\n"
            "seconds = perf_counter() - start\n"
            "print(seconds, [m for m in ('torch', 'numpy', 'yaml', 'transformers') if m in sys.modules], "
            "file=sys.stderr)")
    best = 9.0
    for _ in range(3):  # the machine may be busy: the best of three
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True)
        seconds, _, modules = done.stderr.strip().partition(" ")
        assert modules == "[]", done.stderr
        best = min(best, float(seconds))
    assert best < 0.1


def test_every_setting_is_read_somewhere():
    """Guards against a flag that is parsed and never used."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "scripts").rglob("*.py")
               if path.name not in ("settings.py", "config.py")]
    text = "\n".join(sources)
    unread = [name for name, s in settings_of(SftConfig).items()
              if name not in ("config_path", "stages", "dataset_paths", "role_map")
              and not re.search(rf"\b(config|cfg|settings|c|args)\.{name}\b", text)]
    through_methods = [use for use in ("all_dataset_paths", "roles(", ".stages") if use not in text]
    assert not unread + through_methods, f"settings that no script reads: {unread + through_methods}"


def test_another_script_declares_its_own_table(tmp_path):
    """Guards against machinery that only fits one script."""
    @dataclass
    class Small:
        input: list[str] = setting([], "Files.", path=True, required=True, group="all")
        vocab_size: int = setting(512, "Pieces.", choices=(512, 1024))
        fast: bool = setting(False, "Be fast.", flag_off="slow")
        config_path: str | None = setting(None, "An architecture.", path=True)

    small = parse(Small, ["--input", "a", "b", "--slow", "--config_path", "x.json"], "d", config_flag=None)
    assert (small.input, small.fast, small.config_path, small.notes) == (["a", "b"], False, "x.json", [])
    with pytest.raises(UserError, match="3 is not one of 512, 1024"):
        parse(Small, ["--input", "a", "--vocab_size", "3"], "d")
    assert cfg.level(small, "fast") == 2 and cfg.place(small, "fast") == "--slow"
