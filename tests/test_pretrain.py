"""02: a Llama that plain transformers loads, the same weights for the same seed, faults as one sentence."""
from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from test_sample import make
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.chat import load_chat
from common.faults import NotFinite, UserError

script = importlib.import_module("02_pretrain")
tokenizer_script = importlib.import_module("01_train_tokenizer")
ROOT = Path(__file__).resolve().parents[1]
SMALL = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
         "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with corpus.txt, t.model and small.json."""
    path = tmp_path_factory.mktemp("pretrain")
    text, prefix = path / "corpus.txt", path / "t"
    text.write_text(make.make_sample(stories=300, rows=6, heldout=6)["corpus.txt"], encoding="utf-8")
    tokenizer_script.main(["--input", str(text), "--output_prefix", str(prefix), "--vocab_size", "400"])
    (path / "small.json").write_text(json.dumps(SMALL))
    return path


def pretrain(place: Path, output_dir: Path, *more: str, steps: int = 3) -> dict[str, torch.Tensor]:
    """Run the script (flags in `more` replace the usual ones) and return the weights it left."""
    flags = {"--config_path": place / "small.json", "--tokenizer_path": place / "t.model",
             "--input": place / "corpus.txt", "--output_dir": output_dir, "--max_steps": steps, "--batch_size": 2,
             "--sequence_length": 16}
    words = [str(word) for flag, value in flags.items() if flag not in more for word in (flag, value)]
    script.main([*words, *more])
    return AutoModelForCausalLM.from_pretrained(output_dir).state_dict()


def test_loads_with_plain_transformers(place, tmp_path):
    """Guards against a base whose vocabulary, special ids or tokenizer do not fit together."""
    pretrain(place, tmp_path / "m")
    model, tokenizer = (kind.from_pretrained(tmp_path / "m") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert (model.config.vocab_size, len(tokenizer)) == (400, 400)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, 3)
    text = "Say it again: lamp boat\n\tlamp  boat."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == load_chat(str(place / "t.model"), "raw").encode_texts([text])[0]
    assert model.dtype == torch.float32
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_same_seed_same_weights(place, tmp_path):
    """Guards against figures that cannot be repeated."""
    first, again, other = (pretrain(place, tmp_path / name, "--seed", seed) for name, seed in
                           (("a", "1"), ("b", "1"), ("c", "2")))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_it_learns(place, tmp_path, capsys):
    """Guards against shifted targets or an optimizer that does not step."""
    pretrain(place, tmp_path / "m", "--learning_rate", "0.01", "--logging_steps", "10", steps=40)
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert len(losses) == 4 and losses[-1] < losses[0] - 1


def test_no_steps_need_no_text(place, tmp_path):
    """Guards against a test model that cannot be made in a second."""
    script.main(["--config_path", str(place / "small.json"), "--tokenizer_path", str(place / "t.model"),
                 "--output_dir", str(tmp_path / "m"), "--max_steps", "0"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.hidden_size == 32
    with pytest.raises(UserError, match="--input: it is missing"):
        script.main(["--output_dir", str(tmp_path / "n"), "--max_steps", "1"])


def test_a_model_is_not_overwritten_by_accident(place, tmp_path):
    """Guards against losing a base that runs depend on, and against leftovers of the old one."""
    before = pretrain(place, tmp_path / "m")
    (tmp_path / "m" / "old.txt").write_text("")
    with pytest.raises(UserError, match="something is there already.*--overwrite_output_dir"):
        pretrain(place, tmp_path / "m", "--seed", "7")
    assert torch.equal(before["lm_head.weight"], AutoModelForCausalLM.from_pretrained(tmp_path / "m").lm_head.weight)
    pretrain(place, tmp_path / "m", "--seed", "7", "--overwrite_output_dir")
    assert not (tmp_path / "m" / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_leaves_nothing(place, tmp_path, monkeypatch):
    """Guards against half a model that a second start would take for a whole one."""
    from transformers import PreTrainedTokenizerFast

    def no_space(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", no_space)
    with pytest.raises(OSError, match="No space"):
        pretrain(place, tmp_path / "m", steps=0)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_replaced_stays_until_the_new_one_stands(place, tmp_path, monkeypatch):
    """Guards against a failed renaming after which neither is there."""
    pretrain(place, tmp_path / "m", steps=0)
    before, real = sorted(p.name for p in (tmp_path / "m").iterdir()), os.rename

    def rename(one: Path, other: Path) -> None:
        if ".part" in str(one):
            raise OSError(5, "Input/output error")
        real(one, other)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        pretrain(place, tmp_path / "m", "--overwrite_output_dir", steps=0)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == before


def test_an_architecture_that_is_no_object_is_refused(place, tmp_path):
    """Guards against a traceback for a list."""
    (tmp_path / "a.json").write_text('["hidden_size"]')
    with pytest.raises(UserError, match="no object of settings"):
        pretrain(place, tmp_path / "m", "--config_path", str(tmp_path / "a.json"), steps=0)


def test_tokens_are_the_text(place, tmp_path, monkeypatch):
    """Guards against text lost, doubled or re-spaced where it is cut for the tokenizer, and at the ends of files."""
    chat = load_chat(str(place / "t.model"), "raw")
    texts = ["Anna asks Ben.\n\n  lamp\tboat\n" * 5, "hat"]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, text in zip(paths, texts):
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(script, "CHUNK", 20)
    ids = script.read_tokens([str(path) for path in paths], chat).tolist()
    assert [ids[0], ids[-1], ids.count(2), ids.count(3)] == [2, 3, 2, 2]
    end = ids.index(3)
    assert [chat.decode(ids[1:end]), chat.decode(ids[end + 2:-1])] == texts


@pytest.mark.parametrize(("change", "flags", "finding"), [
    ({"num_hiden_layers": 3}, [], "num_hiden_layers: .*Did you mean num_hidden_layers"),
    ({"num_attention_heads": 3}, [], r"hidden size \(32\) is not a multiple"),
    ({"model_type": "gpt2"}, [], "only llama"),
    ({}, ["--sequence_length", "65"], "context is 64"),
    ({"max_position_embeddings": 100_000}, ["--sequence_length", "90000"], "fewer than one window of 90000"),
    ({}, ["--tokenizer_path", "missing.model"], "missing.model: "),
    ({}, ["--input", "missing.txt"], "missing.txt: No such file"),
    ({}, ["--learnig_rate", "1"], "--learning_rate"),
])
def test_faults_are_one_sentence(place, tmp_path, change, flags, finding):
    """Guards against tracebacks and half-made directories."""
    (tmp_path / "c.json").write_text(json.dumps({**SMALL, **change}))
    with pytest.raises(UserError, match=finding):
        pretrain(place, tmp_path / "m", *flags, "--config_path", str(tmp_path / "c.json"))
    assert not (tmp_path / "m").exists()


def test_loss_that_is_not_finite_stops(place, tmp_path, monkeypatch):
    """Guards against a base full of NaN."""
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *given: real(*given) * float("inf"))
    with pytest.raises(NotFinite, match="step 1: loss inf"):
        pretrain(place, tmp_path / "m", steps=6)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("name", "layers", "width", "heads"), [("tiny", 6, 256, 4), ("small", 12, 512, 8),
                                                               ("base", 24, 768, 12)])
def test_shipped_architectures(place, name, layers, width, heads):
    """Guards against a config that drifts from the documented size."""
    found = script.read_architecture(str(ROOT / f"config/{name}.json"), load_chat(str(place / "t.model"), "raw"))
    assert (found.num_hidden_layers, found.hidden_size, found.num_attention_heads) == (layers, width, heads)
    assert (found.max_position_embeddings, found.tie_word_embeddings, found.vocab_size) == (1024, True, 400)


def test_windows_done_one_after_the_other(place, tmp_path, monkeypatch):
    """Guards against a step whose memory grows with its windows, and against other gradients where it does not."""
    whole = pretrain(place, tmp_path / "whole", "--batch_size", "5", steps=2)
    monkeypatch.setattr(script, "LOGITS", 2 * 16 * 400)  # two windows of 16 tokens at 400 pieces: 2 + 2 + 1
    parts = pretrain(place, tmp_path / "parts", "--batch_size", "5", steps=2)
    for name, value in whole.items():
        # AdamW moves every weight by about 1e-3 a step; where a gradient is nearly 0 bf16 rounding turns its sign
        assert float((parts[name] - value).abs().mean()) < 5e-5, name
