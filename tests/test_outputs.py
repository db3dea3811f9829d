"""What is written: nothing over what is read or what somebody keeps, and no hour of work before that is known."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import chat_rows, make_llama, write_rows
from running import ROOT, Ran, run_script

from common.faults import UserError
from common.outputs import check_no_input, check_replaceable, check_writable


@pytest.fixture(scope="module")
def place(shared: Path, spm_unigram: str) -> Path:
    """A folder with rows, a model and its tokenizer, a text and an architecture."""
    path = shared / "outputs"
    write_rows(path / "rows.jsonl", chat_rows(30))
    make_llama(path / "model", 390)
    shutil.copy(spm_unigram, path / "spm.model")
    (path / "text.txt").write_text("the red cat sees a small dog\n" * 40)
    (path / "a.json").write_text(json.dumps({"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                                             "num_key_value_heads": 2, "intermediate_size": 64}))
    return path


def train(place: Path, *words: object) -> Ran:
    return run_script("03_sft", "--model_path", place / "model", "--tokenizer_path", place / "spm.model",
                      "--dataset_paths", place / "rows.jsonl", "--cache_dir", place / "cache", "--max_seq_length", "64",
                      "--report_to", "none", *words)


def pretrain(place: Path, out: Path, *words: object) -> Ran:
    return run_script("02_pretrain", "--tokenizer_path", place / "spm.model", "--config_path", place / "a.json",
                      "--input", place / "text.txt", "--batch_size", "2", "--sequence_length", "16",
                      "--output_dir", out, *words)


def refused(ran: Ran, *says: str) -> None:
    assert ran.status == 2 and len(ran.err.strip().splitlines()) == 1, ran
    assert all(words in ran.err for words in says), ran.err


def test_rows_are_not_written_over(place: Path, tmp_path: Path) -> None:
    """Guards against an export into the training data, a run whose val.jsonl is one of its inputs, and one that moves
    its data aside."""
    before = (place / "rows.jsonl").read_bytes()
    refused(train(place, "--output_dir", tmp_path / "run", "--dry_run", "--export_rendered", place / "rows.jsonl"),
            "--export_rendered", "it is read here")
    refused(train(place, "--output_dir", place, "--val_dataset_paths", write_rows(place / "val.jsonl", chat_rows(4))),
            f"--output_dir: {place / 'val.jsonl'} would be written over")
    (place / "run.json").write_text("{}")
    refused(train(place, "--output_dir", place, "--overwrite_output_dir"), "aside")
    (place / "run.json").unlink()
    assert (place / "rows.jsonl").read_bytes() == before and not (tmp_path / "run").exists()


def test_results_do_not_replace_a_run_or_their_questions(place: Path, tmp_path: Path) -> None:
    """Guards against the report of a training that an evaluation writes over, and answers in place of references."""
    run = shutil.copytree(place / "model", tmp_path / "run")
    shutil.copy(place / "spm.model", run / "tokenizer.model")
    (run / "run.json").write_text('{"config": {}}')
    words = ("--model_path", run, "--output_dir", run, "--dataset_paths", place / "rows.jsonl")
    refused(run_script("06_eval_sft", *words), "it holds a run")
    asked = Path(shutil.copy(place / "rows.jsonl", tmp_path / "predictions.jsonl"))
    refused(run_script("06_eval_sft", "--model_path", run, "--predict", asked, "--output_dir", tmp_path), "it is read")
    assert asked.read_bytes() == (place / "rows.jsonl").read_bytes()


def test_a_published_file_is_not_replaced_by_its_rows(tmp_path: Path) -> None:
    """Guards against the only copy of a download that is overwritten by what was made of it."""
    raw = tmp_path / "dolly15k.jsonl"
    raw.write_text(json.dumps({"instruction": "Who?", "context": "", "response": "Ann.", "category": "open_qa"}) + "\n")
    before = raw.read_bytes()
    words = ("--dataset", "dolly15k", "--raw_dir", tmp_path, "--output_dir", tmp_path)
    refused(run_script("prepare_sft_datasets", *words), "it is read here")
    assert raw.read_bytes() == before and list(tmp_path.iterdir()) == [raw]


def test_logs_are_not_replaced_by_their_rows(tmp_path: Path) -> None:
    """Guards against the only copy of one's own logs that is overwritten by what was left of them."""
    raw = tmp_path / "openai.jsonl"
    raw.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant",
                                                                               "content": "Hello"}]}) + "\n")
    before = raw.read_bytes()
    words = ("--dataset", "openai", "--raw_dir", tmp_path, "--output_dir", tmp_path)
    refused(run_script("prepare_sft_datasets", *words), "it is read here")
    assert raw.read_bytes() == before and list(tmp_path.iterdir()) == [raw]


def test_a_directory_of_other_things_is_not_replaced_by_a_model(place: Path, tmp_path: Path) -> None:
    """Guards against --overwrite_output_dir on one's own papers."""
    (tmp_path / "papers" / "sub").mkdir(parents=True)
    (tmp_path / "papers" / "sub" / "thesis.txt").write_text("x")
    refused(pretrain(place, tmp_path / "papers", "--max_steps", 0, "--overwrite_output_dir"), "something else")
    assert (tmp_path / "papers" / "sub" / "thesis.txt").exists()
    pretrain(place, tmp_path / "model", "--max_steps", 0).ok()
    pretrain(place, tmp_path / "model", "--max_steps", 0, "--overwrite_output_dir").ok()
    (tmp_path / "model" / "notes").mkdir()
    with pytest.raises(UserError, match="something else"):
        check_replaceable(tmp_path / "model")


def test_a_place_that_cannot_be_written_is_told_before_the_work(place: Path, tmp_path: Path) -> None:
    """Guards against hours of training or evaluation whose result has nowhere to go."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    out = tmp_path / "file" / "out"
    for ran in (run_script("01_train_tokenizer", "--input", place / "text.txt", "--output_prefix", out / "spm"),
                pretrain(place, out / "model", "--max_steps", 2), train(place, "--output_dir", out / "run"),
                run_script("06_eval_sft", "--model_path", place / "model", "--output_dir", out, "--gen_only")):
        refused(ran, str(tmp_path / "file"), "not a directory")
        assert not ran.out
    with pytest.raises(UserError, match="a link to .*nowhere, which does not exist"):
        check_writable(tmp_path / "link", "--output_dir")
    if os.path.isdir("/proc/self"):
        with pytest.raises(UserError, match="/proc cannot be written to"):
            check_writable(Path("/proc/none/x"), "--output_dir")
    check_writable(tmp_path / "new" / "deep", "--output_dir")
    assert not (tmp_path / "new").exists()


def test_a_link_to_an_input_is_that_input(tmp_path: Path) -> None:
    """Guards against a comparison of names."""
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "rows.jsonl")
    with pytest.raises(UserError):
        check_no_input(tmp_path / "out.jsonl", "--x", [tmp_path / "rows.jsonl"])
    check_no_input(tmp_path / "new.jsonl", "--x", [tmp_path / "rows.jsonl", "owner/name"])


def test_a_name_that_is_a_directory_is_no_tokenizer(place: Path, tmp_path: Path) -> None:
    """Guards against a file called .model, and one called spm.model.model."""
    words = ("--input", place / "text.txt", "--vocab_size", 300, "--output_prefix")
    refused(run_script("01_train_tokenizer", *words, f"{tmp_path}/"), "a directory, not a name")
    run_script("01_train_tokenizer", *words, tmp_path / "t.model").ok()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.model", "t.vocab"]


@pytest.mark.parametrize("settings, says", [
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"), ({"hidden_size": 0}, "hidden_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"), ({"num_key_value_heads": 3}, "no multiple of"),
    ({"hidden_act": "foo"}, "foo")])
def test_an_architecture_that_makes_no_model(place: Path, tmp_path: Path, settings: dict, says: str) -> None:
    """Guards against a traceback, and against a model of -1 layers."""
    (tmp_path / "a.json").write_text(json.dumps(json.loads((place / "a.json").read_text()) | settings))
    ran = run_script("02_pretrain", "--tokenizer_path", place / "spm.model", "--config_path", tmp_path / "a.json",
                     "--output_dir", tmp_path / "m", "--max_steps", 0)
    refused(ran, str(tmp_path / "a.json"), says)
    assert not (tmp_path / "m").exists()


def test_a_last_update_that_breaks_the_weights(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a model of NaN with status 0: no loss is computed after the last step."""
    import torch

    real = torch.optim.AdamW.step

    def step(self: torch.optim.Optimizer, *args: object) -> None:
        real(self, *args)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    ran = pretrain(place, tmp_path / "m", "--max_steps", 1)
    assert ran.status == 3 and "step 1" in ran.err and not (tmp_path / "m").exists()


@pytest.mark.parametrize("words", [("--num_train_epochs", "1e9"), ("--max_steps", "99999999999")])
def test_a_slipped_digit_is_refused_before_memory_is_full(place: Path, tmp_path: Path, words: tuple) -> None:
    """Guards against a dry run of an absurd length that takes the machine down."""
    refused(train(place, "--output_dir", tmp_path / "run", "--dry_run", *words), "The plan would draw", "max_steps")


def test_an_interrupt_is_one_line(place: Path, tmp_path: Path) -> None:
    """Guards against a traceback at Ctrl-C."""
    code = ("import sys; sys.path.insert(0, 'scripts'); from common.faults import run_main\n"
            "def main(argv): raise KeyboardInterrupt\nsys.exit(run_main(main, []))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and len(done.stderr.splitlines()) == 1 and "Ctrl-C" in done.stderr


def test_an_adapter_of_another_origin_is_merged(place: Path, tmp_path: Path) -> None:
    """Guards against a refusal that names a flag which the script does not have, and a base that nobody can find."""
    from peft import LoraConfig, get_peft_model

    from common.chat import load_chat
    from common.model import load_model

    model = get_peft_model(load_model(str(place / "model")), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(place / "model")
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = load_chat(str(place / "spm.model"), "raw").tokenizer
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "adapter")
    words = ("--model_path", tmp_path / "adapter")
    refused(run_script("04_merge_lora", *words), "no chat template", "--prompt_template")
    refused(run_script("04_merge_lora", *words, "--prompt_template", "chatml"), "does not know its tokens")
    run_script("04_merge_lora", *words, "--prompt_template", "instruct").ok()
    assert (tmp_path / "adapter" / "merged" / "config.json").exists()
    base = shutil.copytree(place / "model", tmp_path / "base")  # the adapter alone, as PEFT saves it
    load_chat(str(place / "spm.model"), "instruct").save(base)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "bare")
    run_script("04_merge_lora", "--model_path", tmp_path / "bare").ok()
    assert (tmp_path / "bare" / "merged" / "chat_template.jinja").exists()
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(place / "model"), "/gone/base"))
    refused(run_script("04_merge_lora", *words, "--prompt_template", "instruct", "--overwrite_output_dir"),
            "its base /gone/base is not here", "base_model_name_or_path")


def test_what_a_finished_run_does_not_do_is_told(place: Path, tmp_path: Path) -> None:
    """Guards against --merge_adapters on a finished run that does nothing, without a word."""
    words = ("--output_dir", tmp_path / "run", "--max_steps", 1)
    train(place, *words).ok()
    said = train(place, *words, "--merge_adapters", "--do_gen_test", "--resume_from_checkpoint").ok().out
    assert "04_merge_lora.py --model_path" in said and "--gen_only" in said
