"""Plain text of a domain: no token lost, an end that is learnt, duplicates told, and learning by heart noticed."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, chat_rows, sentences, write_rows
from running import Ran, metrics, run_script

from common.chat import load_chat
from common.data import load_dataset
from common.evaluate import opening
from common.overfit import divergence
from common.rows import RowReader
from common.show import duplicates
from common.sides import split

DISTINCT = 20


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Twenty short texts, as the document's example has them."""
    return [f"{a} {b}" for a, b in zip(sentences(DISTINCT, 21), sentences(DISTINCT, 22))]


@pytest.fixture(scope="module")
def domain(shared: Path, texts: list[str]) -> Path:
    """500 rows that hold 20 distinct texts."""
    return write_rows(shared / "domain" / "domain.jsonl", [{"text": texts[i * 7 % DISTINCT]} for i in range(500)])


def train(model: str, tokenizer: str, rows: Path, output_dir: Path, *more: object) -> Ran:
    """Run 03 with config/sft_domain.json, all weights of a tiny model."""
    return run_script("03_sft", "--config_path", ROOT / "config" / "sft_domain.json", "--model_path", model,
                      "--tokenizer_path", tokenizer, "--dataset_paths", rows, "--output_dir", output_dir, "--no_lora",
                      "--cache_dir", output_dir.parent / "cache", "--max_seq_length", "64", "--report_to", "none",
                      *more)


@pytest.fixture(scope="module")
def by_heart(shared: Path, tiny_model: str, spm_unigram: str, domain: Path) -> tuple[Path, Ran]:
    """A run that was trained far too long."""
    place = shared / "domain" / "by_heart"
    return place, train(tiny_model, spm_unigram, domain, place, "--learning_rate", "2e-2", "--max_steps", "70",
                        "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--weight_decay",
                        "0", "--early_stopping_patience", "none", "--eval_steps", "10", "--save_steps", "70",
                        "--num_gen_samples", "2", "--max_new_tokens", "60", "--do_gen_test").ok()


# ---- rows

@pytest.mark.parametrize("template", ["raw", "chatml"])
def test_windows_lose_no_token_and_the_end_is_trained(tmp_path, spm_unigram, template):
    """Guards against a text that loses its tail or a token at each cut, or whose end is never learnt."""
    text = " ".join(sentences(80, 5))
    rows = write_rows(tmp_path / "long.jsonl", [{"text": text}, {"text": "The cat."}])
    chat = load_chat(spm_unigram, template)
    found = load_dataset(rows, chat, max_seq_length=32, cache_dir=tmp_path / "cache")
    windows = [found.example(i) for i in range(len(found)) if found.lines[i] == 1]
    assert len(windows) > 10 and max(len(w.input_ids) for w in windows) <= 32
    whole = [2, *chat.encode_texts([text])[0], 3]
    joined = [*windows[0].input_ids, *(token for w in windows[1:] for token in w.input_ids[1:])]
    assert joined == whole
    targets = [token for w in windows for token in w.input_ids[w.trained]]
    assert targets == whole[1:]  # each token is predicted exactly once, the end included
    assert found.meta["rows_split"] == 1
    assert np.array_equal(found.example(len(found) - 1).trained, [False] + [True] * (found.lengths[-1] - 1))


def test_duplicates_are_told_and_do_not_leak(tmp_path, spm_unigram, domain, by_heart):
    """Guards against a validation loss that is measured on texts that were trained on."""
    chat = load_chat(spm_unigram, "raw")
    found = load_dataset(domain, chat, max_seq_length=64, cache_dir=tmp_path)
    assert (found.meta["rows_kept"], found.meta["rows_distinct"]) == (500, DISTINCT)
    assert "500 rows hold 20 distinct texts: each is learnt 25 times an epoch" in by_heart[1].out
    sides = split([found], 0.1, 0.1)
    held = [{found.example(i).input_ids.tobytes() for i in side[0]} for side in (sides.train, sides.val, sides.test)]
    assert [len(a & b) for a, b in ((held[0], held[1]), (held[0], held[2]), (held[1], held[2]))] == [0, 0, 0]
    assert sum(map(len, held)) == DISTINCT and all(held)
    assert {json.loads(line)["text"] for line in (by_heart[0] / "val.jsonl").read_text().splitlines()} < {
        row.text for row in RowReader(domain)}


def test_few_duplicates_are_one_number():
    """Guards against alarm over eight rows in fifteen thousand."""
    assert duplicates({"form": "prompt", "rows_kept": 15011, "rows_distinct": 15003}) == (
        "15,011 rows hold 15,003 distinct conversations (the same ones are on one side of the split)")


# ---- learning by heart

def lines(validation: list[float], training: list[float], stages: list[str] | None = None) -> list[dict]:
    """An evaluation every ten steps, a training line before each."""
    out: list[dict] = []
    for i, (v, t) in enumerate(zip(validation, training), 1):
        out += [{"step": 10 * i, "loss": t, "stage": stages[i - 1] if stages else "train"},
                {"step": 10 * i, "eval_loss": v}]
    return out


def test_divergence_of_the_documentation():
    """Guards against a sentence with other numbers than those of the run."""
    assert divergence(lines([2.0, 1.8, 1.7, 1.9, 2.1], [2.1, 1.6, 1.2, 0.8, 0.5])) == (
        "validation loss was lowest at step 30 (1.7000) and is 2.1000 at step 50, while the training loss fell from "
        "1.2000 to 0.5000: the model is learning its rows by heart. The weights of the best step are kept; fewer "
        "epochs, a lower learning rate or more weight decay help")


@pytest.mark.parametrize("validation, training", [
    ([2.0, 1.8, 1.7, 1.6], [2.1, 1.6, 1.2, 0.8]),                 # both fall
    ([2.0, 1.7, 1.71, 1.72, 1.73], [2.1, 1.6, 1.2, 0.8, 0.7]),    # within 2 %
    ([2.0, 1.7, 1.9], [2.1, 1.6, 1.2]),                           # once only: may be noise
    ([2.0, 1.7, 1.9, 1.72, 1.9], [2.1, 1.6, 1.2, 1.0, 0.9]),      # up and down
    ([2.0, 1.7, 2.4, 2.9], [2.1, 1.6, 2.3, 3.0]),                 # both rise: it diverges, but not by heart
    ([], []), ([2.0], [1.0]),
], ids=["both fall", "margin", "once", "noise", "both rise", "nothing", "one"])
def test_sane_runs_have_no_note(validation, training):
    """Guards against a note that cries wolf."""
    assert divergence(lines(validation, training)) is None


def test_a_new_stage_is_no_divergence():
    """Guards against comparing the losses of two mixtures."""
    stages = ["one", "one", "two", "two", "two"]
    assert divergence(lines([2.0, 1.5, 2.5, 2.4, 2.3], [2.0, 1.8, 1.0, 0.9, 0.8], stages)) is None
    assert divergence(lines([2.0, 1.5, 2.0, 2.4, 2.5], [2.0, 1.8, 1.0, 0.9, 0.8], stages)).startswith(
        "validation loss was lowest at step 30")


def test_note_in_an_overtrained_run(by_heart):
    """Guards against a run that learns by heart in silence: the log says it once, card and report keep it."""
    place, ran = by_heart
    note = divergence(metrics(place))
    assert note and ran.out.count("learning its rows by heart") == 1
    assert note.split(" (")[0] in (place / "README.md").read_text()
    assert "learning its rows by heart" in (place / "report.html").read_text()


def test_no_note_in_a_sane_run(tmp_path, tiny_model, spm_unigram):
    """Guards against a note in a run over many different texts."""
    rows = write_rows(tmp_path / "many.jsonl", [{"text": text} for text in sentences(400, 30)])
    ran = train(tiny_model, spm_unigram, rows, tmp_path / "run", "--learning_rate", "1e-3", "--num_train_epochs",
                "3", "--early_stopping_patience", "none").ok()
    losses = [line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert len(losses) > 3 and losses[-1] < losses[0]
    assert "by heart" not in ran.out + (tmp_path / "run" / "README.md").read_text()
    assert "distinct" not in ran.out


# ---- going on

def test_opening():
    """Guards against a prompt that ends inside a word, is empty, or gives the text away."""
    assert opening("The cat sees a small dog and then the old house by the river.") == "The cat sees a"
    assert opening("Hej") == "Hej" and opening("a" * 300) == "a" * 75
    assert len(opening("word " * 1000)) <= 200


def test_generation_continues_and_ends(by_heart, domain, texts, tmp_path):
    """Guards against a model of plain text that never stops, or that is asked with a chat template."""
    last = by_heart[0] / "checkpoint-70"  # the weights kept at the top are those of the best step
    ran = run_script("06_eval_sft", "--model_path", last, "--dataset_paths", domain, "--gen_only",
                     "--num_gen_samples", "6", "--max_new_tokens", "80", "--output_dir", tmp_path).ok()
    samples = [json.loads(line) for line in (tmp_path / "gen_samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    assert sum(sample["stopped"] for sample in samples) >= 5, ran.out
    assert sum(f"{s['prompt']} {s['prediction'].strip()}" in texts for s in samples) >= 3, samples
    asked = [json.loads(line) for line in (by_heart[0] / "samples.jsonl").read_text().splitlines()]
    assert len(asked) == 2 and all(any(text.startswith(s["prompt"]) for text in texts) for s in asked)


def test_text_beside_conversations(tmp_path, tiny_model, spm_unigram):
    """Guards against held-out rows of two forms that nothing can read back."""
    rows = write_rows(tmp_path / "text.jsonl", [{"text": text} for text in sentences(30, 40)])
    chats = write_rows(tmp_path / "chats.jsonl", chat_rows(30, 41))
    words = ["--model_path", tiny_model, "--tokenizer_path", spm_unigram, "--dataset_paths", rows, chats, "--no_lora",
             "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--max_steps", "2", "--report_to",
             "none", "--val_split_ratio", "0.2", "--max_seq_length", "64", "--do_gen_test", "--max_new_tokens", "3",
             "--num_gen_samples", "20"]
    run_script("03_sft", *words).ok()
    forms = {"text" in json.loads(line) for line in (tmp_path / "run" / "val.jsonl").read_text().splitlines()}
    assert forms == {True, False}
    run_script("06_eval_sft", "--model_path", tmp_path / "run", "--max_new_tokens", "3", "--baseline_path", "none").ok()
