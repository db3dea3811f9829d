"""Starting from another run: its adapter or weights, its tokenizer, its new rows; optimizer and schedule afresh."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import chat_rows, write_rows
from running import Ran, metrics, read_json, run_script
from safetensors.torch import load_file

from common.model import load_model

STILL = ["--learning_rate", "1e-12", "--max_steps", "1"]  # weights that come out are those that went in


@pytest.fixture(scope="module")
def train(shared: Path) -> Callable[..., Ran]:
    """Run 03; model, tokenizer and way of training are the caller's."""
    place = shared / "init_from"
    rows = write_rows(place / "rows.jsonl", chat_rows(24, 61))

    def run(output_dir: Path, *words: object) -> Ran:
        return run_script("03_sft", "--dataset_paths", rows, "--output_dir", output_dir, "--cache_dir", place / "cache",
                          "--max_seq_length", "64", "--report_to", "none", "--val_split_ratio", "0.1",
                          "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", *words)
    return run


@pytest.fixture(scope="module")
def runs(shared: Path, train: Callable[..., Ran], tiny_model: str, spm_unigram: str) -> dict[str, Path]:
    """A LoRA run and a full one, both with new tokens."""
    place = shared / "init_from"
    base = ["--model_path", tiny_model, "--tokenizer_path", spm_unigram, "--max_steps", "6"]
    train(place / "lora", *base, "--learning_rate", "3e-2", "--lora_r", "4", "--merge_adapters").ok()
    train(place / "full", *base, "--learning_rate", "1e-2", "--no_lora").ok()
    return {"lora": place / "lora", "full": place / "full", "merged": place / "lora" / "merged"}


def logits(path: Path) -> torch.Tensor:
    """What a model says to a few ids, new tokens (390 and 391) among them."""
    model = load_model(str(path)).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[2, 390, 20, 30, 391, 390, 17, 9]])).logits


@pytest.mark.parametrize("source, how", [("lora", "use_lora"), ("lora", "no_lora"), ("full", "no_lora"),
                                         ("full", "use_lora"), ("merged", "use_lora")])
@pytest.mark.parametrize("tokenizer", ["its own", "bare"])
def test_start_is_where_the_other_run_ended(train, runs, tmp_path, spm_unigram, tiny_model, source, how, tokenizer):
    """Guards against a start from the base, against an adapter that is lost when all weights are trained, and against
    rows of chat tokens that are set anew although they were trained (a bare .model does not know them)."""
    given = ["--tokenizer_path", spm_unigram, "--model_path", tiny_model] if tokenizer == "bare" else []
    ran = train(tmp_path / "run", "--init_from", runs[source], f"--{how}", *STILL, *given).ok()
    assert "new tokens" not in ran.out
    assert ("--model_path is not used: --init_from brings its model" in ran.out) == (tokenizer == "bare")
    assert ("goes on with the adapter" in ran.out) == (source == "lora" and how == "use_lora")
    torch.testing.assert_close(logits(tmp_path / "run"), logits(runs[source]), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "run" / "adapter_config.json").exists() == (how == "use_lora")
    assert read_json(tmp_path / "run" / "run.json")["config"]["init_from"] == str(runs[source])


@pytest.mark.parametrize("how", ["use_lora", "no_lora"])
def test_everything_is_trained_afresh(train, runs, tmp_path, how):
    """Guards against frozen weights after a merge, and an optimizer or schedule that goes on with the old run's."""
    train(tmp_path / "run", "--init_from", runs["lora"], f"--{how}", "--learning_rate", "1e-2", "--max_steps", "3",
          "--logging_steps", "1", "--warmup_ratio", "0.5").ok()
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["learning_rate"] < lines[1]["learning_rate"]
    state = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    assert {float(entry["step"]) for entry in state.values()} == {3.0}
    if how == "use_lora":
        old, new = (load_file(str(run / "adapter_model.safetensors")) for run in (runs["lora"], tmp_path / "run"))
        assert set(old) == set(new) and read_json(tmp_path / "run" / "adapter_config.json")["r"] == 4
    else:
        old, new = (load_file(str(run / "model.safetensors")) for run in (runs["merged"], tmp_path / "run"))
    assert all(not torch.equal(value, new[name]) for name, value in old.items())


def test_resume_of_a_run_that_started_from_another(train, runs, tmp_path):
    """Guards against a resume that starts from the base of the base."""
    words = ["--init_from", runs["lora"], "--learning_rate", "1e-2", "--max_steps", "4", "--save_steps", "2"]
    train(tmp_path / "run", *words).ok()
    before = load_file(str(tmp_path / "run" / "adapter_model.safetensors"))
    train(tmp_path / "run", *words, "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-2").ok()
    after = load_file(str(tmp_path / "run" / "adapter_model.safetensors"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_run_keeps_its_base_when_the_one_before_goes(train, runs, tmp_path, tiny_model, spm_unigram):
    """Guards against an adapter that loads on another model once the run it came from is written over or moved, here
    or with plain PEFT; and against an overwrite that moves what it is about to read."""
    from peft import AutoPeftModelForCausalLM

    base = ["--model_path", tiny_model, "--tokenizer_path", spm_unigram, "--max_steps", "1"]
    train(tmp_path / "one", *base, "--learning_rate", "3e-2").ok()
    train(tmp_path / "two", "--init_from", tmp_path / "one", *STILL).ok()
    expected = logits(tmp_path / "two")
    for words in (["--init_from", tmp_path / "one"], ["--init_from", tmp_path / "two"]):  # itself, and its base
        place = tmp_path / "one" if words[1] == tmp_path / "one" else tmp_path / "two"
        refused = train(place, *words, *STILL, "--overwrite_output_dir")
        assert refused.status == 2 and "which this run reads, aside" in refused.err
    train(tmp_path / "one", *base, "--seed", "9", "--overwrite_output_dir").ok()
    torch.testing.assert_close(logits(tmp_path / "two"), expected, atol=1e-5, rtol=1e-5)
    moved = next(tmp_path.glob("one.old-*"))
    assert read_json(moved / "adapter_config.json")["base_model_name_or_path"] == str(moved.resolve() / "base")
    elsewhere = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "two").eval()
    with torch.no_grad():
        found = elsewhere(input_ids=torch.tensor([[2, 390, 20, 30, 391, 390, 17, 9]])).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_form_of_an_adapter_cannot_change(train, runs, tmp_path):
    """Guards against a rank that is asked for and not used."""
    ran = train(tmp_path / "run", "--init_from", runs["lora"], "--lora_r", "8", *STILL)
    assert ran.status == 2 and "--lora_r 8 (it has 4)" in ran.err and "04_merge_lora.py" in ran.err
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_model_is_needed_from_somewhere(train, tmp_path):
    """Guards against a start without any model."""
    ran = train(tmp_path / "run")
    assert ran.status == 2 and "--model_path: it is missing" in ran.err
    ran = train(tmp_path / "run", "--init_from", tmp_path / "nothing")
    assert ran.status == 2 and "nothing" in ran.err


def test_rows_that_nothing_would_train_are_refused(train, tmp_path, tiny_model, spm_unigram):
    """Guards against an adapter that is trained on with a template whose new tokens are neither trained nor saved."""
    base = ["--model_path", tiny_model, "--tokenizer_path", spm_unigram, "--max_steps", "1"]
    train(tmp_path / "first", *base, "--prompt_template", "instruct").ok()
    refused = train(tmp_path / "second", "--init_from", tmp_path / "first", "--max_steps", "1")
    assert refused.status == 2 and "would not be trained" in refused.err and not (tmp_path / "second").exists()
    same = [*STILL, "--init_from", tmp_path / "first", "--prompt_template", "instruct"]
    refused = train(tmp_path / "third", *same, "--lora_target_modules", "q_proj")
    assert refused.status == 2 and "--lora_target_modules" in refused.err
    train(tmp_path / "fourth", *same).ok()
