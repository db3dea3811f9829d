"""The model card has metadata that the Hub accepts and says what it must; the Modelfile prompts as the training did."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_rows

from common.card import base_licence, metadata, model_card, modelfile, with_merged
from common.chat import Chat, load_chat
from common.checkpoint import TrainState
from common.config import is_hub_name
from common.settings import SftConfig

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def chat(spm_unigram: str) -> Chat:
    return load_chat(spm_unigram, "chatml")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a LoRA run on two data sets leaves: one prepared, with a manifest, one of the user's own."""
    config = {**vars(SftConfig(model_path="owner/base", dataset_paths=["a"])), "output_dir": str(tmp_path / "run")}
    source = {"examples": 100, "draws": 60, "share_asked": 0.6, "share_examples": 0.6, "drawn_trained_tokens": 1234}
    files = {"dolly15k": tmp_path / "data" / "dolly15k.jsonl", "own|rows": tmp_path / "own|rows.jsonl.gz"}
    write_rows(tmp_path / "data" / "dolly15k.manifest.json",
               [{"licence": "CC BY-NC 4.0", "source": "owner/dolly", "config": {"note": "for tests alone"}}])
    place = tmp_path / "run"
    write_rows(place / "metrics.jsonl", [
        {"step": 3, "loss": 2.0}, {"step": 4, "eval_loss": 1.5, "eval_loss/dolly15k": 1.4, "eval_loss/own|rows": 1.6},
        {"step": 8, "eval_loss": 1.9}])
    write_rows(place / "samples.jsonl", [
        {"prompt": "---\n```\nlicense: mit\n````", "prediction": "</b>", "stopped": False}])
    (place / "run.json").write_text(json.dumps(
        {"config": config, "versions": {"torch": "2"}, "mixed_precision": "bf16"}))
    (place / "plan.json").write_text(json.dumps(
        {"max_seq_length": 64, "rows_per_step": 8, "sources": [{"name": name, **source} for name in files],
         "data": {name: {"file": str(file)} for name, file in files.items()}}))
    return place


STATE = TrainState(step=8, best_step=4, best_loss=1.5, tokens=1000, trained_tokens=400, seconds=90.0)


def test_the_hub_reads_the_metadata(run: Path, chat: Chat) -> None:
    """Guards against front matter that the Hub refuses: broken YAML, a licence it does not know, a path as a base."""
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(run, STATE, chat))
    found = card.data.to_dict()
    assert found["base_model"] == "owner/base" and found["base_model_relation"] == "adapter"
    assert (found["library_name"], found["pipeline_tag"]) == ("peft", "text-generation")
    assert found["datasets"] == ["owner/dolly"] and {"sft", "lora"} <= set(found["tags"])
    assert found["license"] == "other" and found["license_name"] and found["license_link"]
    losses = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert losses == {"dolly15k": 1.4, "own|rows": 1.6} and card.data.model_name == "run"
    assert "CC BY-NC" in card.text and "license: mit" in card.text  # the sample did not end the text


def test_what_a_card_tells(run: Path, chat: Chat) -> None:
    """Guards against a card without shares, licences, losses of the weights that are kept, or limits; and against text
    that leaves its place: a pipe in a name, a fence in an answer."""
    text = model_card(run, STATE, chat, {"saved": 2e-3})
    for part in ("| dolly15k | owner/dolly | CC BY-NC 4.0 | 100 | 60 | 0.6000 | 0.6000 | 1,234 |",
                 "| own\\|rows | not stated | not stated |", "Best validation loss 1.5000 nats a token, at step 4",
                 "Licence of the base: not stated", "dolly15k: for tests alone.", "| lora_r | 16 |",
                 "| precision | bf16 |",
                 "rows of at most 64 tokens", "Not for commercial use", "licence of own|rows is not stated",
                 "AutoPeftModelForCausalLM", "convert_hf_to_gguf.py", "ollama create run", "at most 2.0e-03", "(cut)"):
        assert part in text, part
    fence = "`````"
    assert f"{fence}text\n---\n```\nlicense: mit\n````\n{fence}" in text
    assert re.search(r"^place = .*\nmodel = AutoPeft.*\nmodel.generation_config = GenerationConfig", text, re.M)
    assert "num_train_epochs" in text and "AutoTokenizer.from_pretrained(place)" in text
    anew = with_merged(text, 4e-1)
    assert "at most 4.0e-01" in anew and "2.0e-03" not in anew and len(anew) == len(text)


def test_what_a_card_tells_of_other_runs(run: Path, chat: Chat) -> None:
    """Guards against epochs that are not those of the run, and against code that loads other ids than it trained on."""
    settings = json.loads((run / "run.json").read_text())
    settings["config"]["stages"] = [{"name": "first", "epochs": 0.5}, {"name": "then", "until_step": 1200}]
    (run / "run.json").write_text(json.dumps(settings))
    text = model_card(run, STATE, replace(chat, loads_with="PreTrainedTokenizerFast"))
    assert "num_train_epochs" not in text and "| stage first | 0.5 epochs |\n| stage then | until step 1,200 |" in text
    assert "tokenizer = PreTrainedTokenizerFast.from_pretrained(place)" in text and "AutoTokenizer" not in text


@pytest.mark.parametrize("base, licences, expected", [
    ("cc0-1.0", ["CC0-1.0", "CC0-1.0"], "cc0-1.0"), ("apache-2.0", ["CC BY-SA 3.0"], "other"),
    (None, ["Apache-2.0"], "other"), ("apache-2.0", ["your own"], "other")])
def test_a_licence_is_named_only_where_all_agree(tmp_path: Path, base: str | None, licences: list[str],
                                                 expected: str) -> None:
    """Guards against a card that promises more than base and data allow."""
    if base:
        (tmp_path / "README.md").write_text(f"---\nlicense: {base}\n---\n# base\n")
    config = vars(SftConfig(model_path=str(tmp_path), use_lora=False))
    data = {str(i): {"licence": name} for i, name in enumerate(licences)}
    found = metadata("run", config, str(tmp_path), base_licence(str(tmp_path)), data, {})
    assert f"license: {expected}\n" in found and "base_model" not in found  # a directory is no name on the Hub


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against paths of this machine in the metadata."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "sample").mkdir(parents=True)
    assert is_hub_name("owner/name-1.5")
    assert not any(map(is_hub_name, ("data/sample", "/a/b", "a/b/c", "name", "", "None")))


WORD = re.compile(r'\{\{ (if eq|else if eq|else|end)(?: \.Role "(\w+)")? \}\}')


def spoken(template: str, messages: list[dict]) -> str:
    """The text of an Ollama template: a range over messages, in it branches by role."""
    body, after = template.removeprefix("{{- range .Messages }}").rsplit("{{ end }}", 1)
    whole = ""
    for message in messages:
        text, *rest = WORD.split(body)
        done = False  # a branch has been taken
        for word, role, part in zip(rest[::3], rest[1::3], rest[2::3]):
            done = done and word != "if eq"
            taken = word == "end" or (not done and role in (None, message["role"]))
            done = done or taken
            text += part if taken else ""
        whole += text.replace("{{ .Role }}", message["role"]).replace("{{ .Content }}", message["content"])
    return whole + after


@pytest.mark.parametrize("template", ["chatml", "instruct", "chat", "raw"])
def test_the_modelfile_prompts_as_the_training_did(spm_unigram: str, template: str) -> None:
    """Guards against a model that is served with prompts it has never seen, or that does not stop there."""
    chat = load_chat(spm_unigram, template)
    file = modelfile(chat, "Be brief.")
    source = re.search(r'^TEMPLATE """(.*?)"""$', file, re.M | re.S)[1]
    expected = chat.tokenizer.apply_chat_template(TALK, chat_template=chat.template, tokenize=False,
                                                  add_generation_prompt=True)
    assert spoken(source, TALK) == expected.removeprefix("<s>")  # llama.cpp adds the BOS
    stops = re.findall(r'^PARAMETER stop "(.*)"$', file, re.M)
    assert [chat.tokenizer.convert_tokens_to_ids(stop) for stop in stops] == chat.stop_ids
    assert file.startswith("FROM ./model.gguf\n") and 'SYSTEM """Be brief."""' in file


def test_a_template_that_ollama_cannot_read_is_left_out(with_template: str) -> None:
    """Guards against a Modelfile with Jinja in it, which Ollama takes for text."""
    assert "TEMPLATE" not in modelfile(load_chat(with_template, "model"))
