"""The model: new rows seeded apart and trained under LoRA, special ids written, merges exact, others refused."""
from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.adapters import add_lora, round_frozen, save_adapter, towers_of
from common.attention import PACKED
from common.chat import load_chat
from common.faults import UserError
from common.loss import LossModel, batch_inputs, make_batch
from common.model import (
    add_tokens,
    check_unquantized,
    check_vocabulary,
    find_model,
    grows,
    load_model,
    merge_and_save,
    model_config,
    rope_limit,
    save_full,
    saved_dtype,
    set_special_ids,
)
from common.rows import Row
from common.settings import SftConfig

ROWS = [Row(i, [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, "train": True}])
        for i, (asked, answer) in enumerate([("the red cat", "sees"), ("a small dog", "likes it")])]


@pytest.fixture
def chat(spm_unigram: str):
    return load_chat(spm_unigram, "chatml")


def grown(tmp_path: Path, chat: object, tied: bool = True, rows: int | None = None) -> torch.nn.Module:
    size = rows or len(chat.tokenizer) - 2
    return load_model(make_llama(tmp_path / "base", size, tied=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_differ_from_each_other_and_old_rows_stay(tmp_path: Path, chat: object, tied: bool) -> None:
    """Bug: the library's default makes both ChatML rows the mean row, equal to 1e-6; or old rows change."""
    model = grown(tmp_path, chat, tied)
    before = model.get_input_embeddings().weight.detach().clone()
    ids, grew = add_tokens(model, chat, seed=1)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        a, b = table[ids].detach()
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) < 0.9
        assert (a - b).norm() > 0.2 * table[:ids[0]].norm(dim=1).mean()
    assert grew and ids == [len(before), len(before) + 1]
    assert torch.equal(model.get_input_embeddings().weight[:len(before)], before)
    again = grown(tmp_path / "again", chat, tied)
    add_tokens(again, chat, seed=1)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)  # seeded


def test_spare_rows_are_used_before_the_embeddings_grow(tmp_path: Path, chat: object) -> None:
    """Bug: a padded vocabulary is grown, or shrunk to the tokenizer, and the checkpoint's shapes change."""
    model = grown(tmp_path, chat, rows=len(chat.tokenizer) + 30)
    ids, grew = add_tokens(model, chat, seed=1)
    assert not grew and model.get_input_embeddings().weight.shape[0] == len(chat.tokenizer) + 30
    set_special_ids(model, chat)
    assert model.generation_config.suppress_tokens == list(range(len(chat.tokenizer), len(chat.tokenizer) + 30))
    assert model.generation_config.eos_token_id == [chat.end_id, 3] and model.config.eos_token_id == 3
    model.generation_config.suppress_tokens = [chat.end_id, 7]  # spare for an earlier chat, whose model this was
    set_special_ids(model, chat)
    assert model.generation_config.suppress_tokens == [7, *range(len(chat.tokenizer), len(chat.tokenizer) + 30)]


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_new_rows_and_no_other_and_merges_exactly(tmp_path: Path, chat: object, tied: bool) -> None:
    """Bug: chat tokens never trained under LoRA, so the model never stops; whole embeddings in every adapter; a merged
    model that is another one."""
    model = grown(tmp_path, chat, tied)
    ids, _ = add_tokens(model, chat, seed=1)
    set_special_ids(model, chat)
    base = tmp_path / "out" / "base"
    save_full(model, base, torch.float32)
    config = SftConfig(model_path="x", dataset_paths=["x"], lora_dropout=0.0)
    model = add_lora(load_model(str(base)), config, ids)
    model.get_base_model().set_attn_implementation(PACKED)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    loss_model, batch = LossModel(model, PACKED), make_batch([chat.encode_rows(ROWS)], 0)
    for _ in range(5):
        loss_model(**batch_inputs(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.get_base_model().set_attn_implementation("sdpa")
    save_adapter(model, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 200_000
    assert find_model(str(tmp_path / "out")).base == str(base)
    reloaded, samples = load_model(str(tmp_path / "out")), [e.input_ids.tolist() for e in chat.encode_rows(ROWS)]
    with torch.no_grad():
        ours = model.eval()(input_ids=torch.tensor([samples[0]])).logits
        theirs = reloaded.eval()(input_ids=torch.tensor([samples[0]])).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    found = merge_and_save(reloaded, chat, tmp_path / "merged", torch.float32, samples)
    assert found["fp32"] <= 1e-4 and found["saved"] <= 1e-4  # logits of a model with huge weights, hence not 1e-5
    merged, start = load_model(str(tmp_path / "merged")), load_model(str(base))
    for side in ("get_input_embeddings", "get_output_embeddings"):
        a, b = getattr(merged, side)().weight, getattr(start, side)().weight
        assert (a[ids] != b[ids]).all(1).any() and torch.equal(a[:ids[0]], b[:ids[0]])
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("dora", [False, True])
def test_only_frozen_matrices_below_adapters_are_rounded(tmp_path: Path, dora: bool) -> None:
    """Guards against embeddings, norms, a tied head or a trained weight in bf16."""
    config = SftConfig(model_path="x", dataset_paths=["x"], use_dora=dora,
                       lora_target_modules=["q_proj", "down_proj", "lm_head"])
    model = add_lora(load_model(make_llama(tmp_path / "model", 40, tied=False)), config, [])
    found = round_frozen(model, torch.bfloat16)
    rounded = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    below = {name for name, _ in model.named_parameters() if name.endswith(("q_proj.base_layer.weight",
                                                                            "down_proj.base_layer.weight"))}
    assert rounded == (set() if dora else below) and len(below) == 4
    assert found == sum(p.numel() for name, p in model.named_parameters() if name in rounded)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in rounded)


def test_a_merged_model_stops_where_the_run_stops(tmp_path: Path, chat: object) -> None:
    """Bug: a base that knew the chat's tokens has its own stop ids, and the merged model writes on past the end."""
    model = grown(tmp_path, chat, rows=len(chat.tokenizer) + 30)
    model.generation_config.eos_token_id = 3
    adapted = add_lora(model, SftConfig(model_path="x", dataset_paths=["x"]), [])
    merge_and_save(adapted, chat, tmp_path / "merged", torch.float32, [[2, 5, 7]])
    found = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert found["eos_token_id"] == [chat.end_id, 3] and len(found["suppress_tokens"]) == 30


def test_ends_that_the_base_knows_stay(tmp_path: Path, chat: object) -> None:
    """Bug: a model that ends calls of tools with a token of its own no longer stops there once it is fine-tuned."""
    model = grown(tmp_path, chat)
    other = sorted(chat.control_ids - set(chat.stop_ids))[0]
    model.generation_config.eos_token_id = [chat.eos_id, other, 50]  # 50: a word
    set_special_ids(model, chat)
    assert model.generation_config.eos_token_id == [*chat.stop_ids, other]


def test_the_base_of_an_adapter_is_its_own(tmp_path: Path, chat: object) -> None:
    """Bug: a run called base beside other runs is taken for their base."""
    base = make_llama(tmp_path / "start", 390)
    for place in (tmp_path / "runs" / "small", tmp_path / "runs" / "small" / "checkpoint-3"):
        save_adapter(add_lora(load_model(base), SftConfig(model_path="x", dataset_paths=["x"]), []), place)
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    make_llama(tmp_path / "runs" / "base", 390, seed=5)
    small = tmp_path / "runs" / "small"
    assert find_model(str(small)).base == find_model(str(small / "checkpoint-3")).base == base
    make_llama(small / "base", 390, seed=6)
    assert find_model(str(small)).base == find_model(str(small / "checkpoint-3")).base == str(small / "base")


def test_an_adapter_on_embeddings_that_others_resized(tmp_path: Path, chat: object) -> None:
    """Bug: what TRL and Axolotl save after adding tokens ends in a traceback, or is told to be another model's."""
    from peft import LoraConfig, PeftModel, get_peft_model

    size = len(chat.tokenizer)
    base = make_llama(tmp_path / "base", size - 2, tied=False)
    whole = load_model(base)
    whole.resize_token_embeddings(size)
    model = get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    chat.save(tmp_path / "adapter")
    found = load_model(str(tmp_path / "adapter"))
    ids = torch.tensor([[2, 5, size - 1, size - 2]])
    assert isinstance(found, PeftModel) and torch.allclose(found(ids).logits, model.eval()(ids).logits)
    own = load_chat(str(tmp_path / "adapter"), "model")
    check_vocabulary(model_config(str(tmp_path / "adapter")), own, str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    make_llama(tmp_path / "other", size - 2, hidden=64)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(
        config | {"base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(UserError, match="adapter: the model cannot be loaded"):
        load_model(str(tmp_path / "adapter"))


def test_sampling_values_of_an_older_model_can_be_saved(tmp_path: Path, chat: object) -> None:
    """Bug: a temperature without do_sample, as Llama 2 came with: every checkpoint fails, after 100 steps."""
    model = grown(tmp_path, chat)
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    set_special_ids(model, chat)
    save_full(model, tmp_path / "saved", torch.float32)
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["temperature"] == 0.6


def test_saved_in_half_precision_when_asked_and_unchanged_in_memory(tmp_path: Path, chat: object) -> None:
    """Bug: rounding for the export rounds the weights that train on."""
    model = grown(tmp_path, chat)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    save_full(model, tmp_path / "half", torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before) and model.config.dtype == torch.float32
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16 == saved_dtype(AutoConfig.from_pretrained(tmp_path / "half"), None)
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # tied: stored once


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, chat: object, spm_bpe: str, spm_unigram: str) -> None:
    """Bug: ids beyond the vocabulary crash in step 1, or, worse, other words are trained under the same ids."""
    place = make_llama(tmp_path / "small", 100)
    with pytest.raises(UserError, match="another model"):
        check_vocabulary(AutoConfig.from_pretrained(place), chat, place)
    place = make_llama(tmp_path / "large", 5000)
    with pytest.raises(UserError, match="another model"):
        check_vocabulary(AutoConfig.from_pretrained(place), chat, place)
    place = make_llama(tmp_path / "with", 500)
    load_chat(spm_unigram, "raw").save(place)
    check_vocabulary(AutoConfig.from_pretrained(place), chat, place)
    other = load_chat(spm_bpe, "chatml")
    with pytest.raises(UserError, match="disagree"):
        check_vocabulary(AutoConfig.from_pretrained(place), other, place)


def test_a_token_that_the_model_has_no_row_for_and_no_text_gives(tmp_path: Path, chat: object,
                                                                 spm_unigram: str) -> None:
    """Bug: Gemma 3 270m and 1b, whose tokenizer has one token more, for images, are told to be another model's."""
    own = load_chat(spm_unigram, "raw")
    own.tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    place = make_llama(tmp_path / "base", len(own.tokenizer) - 1)
    own.save(place)
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    for name in (str(template), "chatml"):
        given, config = load_chat(place, name), AutoConfig.from_pretrained(place)
        check_vocabulary(config, given, place)
        assert grows(config, given) == (name == "chatml")
    own.tokenizer.add_tokens(["plain"])  # which a text may give
    own.save(place)
    with pytest.raises(UserError, match="another model"):
        check_vocabulary(AutoConfig.from_pretrained(place), load_chat(place, str(template)), place)


def test_what_stands_beside_a_decoder_of_text_is_left_alone(tmp_path: Path) -> None:
    """Bug: Gemma 3's eyes get adapters that text never trains; DDP waits for their gradients for ever."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 60}
    base = AutoConfig.for_model("gemma3", text_config=text,
                                vision_config={**sizes, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(base)
    assert towers_of(model) == ["model.vision_tower", "model.multi_modal_projector"]
    tuned = add_lora(model, SftConfig(model_path="x", dataset_paths=["x"]), [])
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("language_model" in name for name in trained)
    assert towers_of(AutoModelForCausalLM.from_pretrained(make_llama(tmp_path / "llama", 60))) == []


def test_the_precision_of_a_nested_configuration() -> None:
    """Bug: Qwen3.5's bf16 weights, which it names for its text alone, are left behind in fp32."""
    config = AutoConfig.for_model("gemma3", text_config={"dtype": "bfloat16"})
    assert saved_dtype(config, None) == torch.bfloat16 and saved_dtype(config, "float16") == torch.float16


def test_models_that_cannot_be_trained_are_refused_before_their_weights(tmp_path: Path) -> None:
    """Bug: tens of GB are fetched first, and the advice is to check the path."""
    AutoConfig.for_model("qwen2_5_vl").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a qwen2_5_vl model, of which transformers makes no causal language model"):
        model_config(str(tmp_path))
    held = AutoConfig.for_model("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"quantized \(gptq\)"):
        check_unquantized(held, "x")
    check_unquantized(AutoConfig.for_model("llama", quantization_config={"quant_method": "mxfp4"}), "x")


def test_lora_targets_that_do_not_exist_are_named(tmp_path: Path, chat: object) -> None:
    """Bug: a traceback of the library, or an adapter on nothing."""
    model = grown(tmp_path, chat)
    config = SftConfig(model_path="x", dataset_paths=["x"], lora_target_modules=["c_attn"])
    with pytest.raises(UserError, match="q_proj"):
        add_lora(model, config, [])


@pytest.mark.parametrize(("tied", "saved", "new", "finding"), [
    (True, None, False, "are one matrix"), (False, None, True, "rows of new tokens"),
    (False, ["lm_head"], False, "is in --lora_target_modules too")])
def test_adapters_on_head_or_embeddings_are_refused_where_there_can_be_none(
        tmp_path: Path, chat: object, tied: bool, saved: list[str] | None, new: bool, finding: str) -> None:
    """Bug: a traceback of the library, or a merge that fails after the whole training."""
    config = SftConfig(model_path="x", dataset_paths=["x"], lora_target_modules=["q_proj", "lm_head"],
                       modules_to_save=saved)
    with pytest.raises(UserError, match=finding):
        add_lora(load_model(make_llama(tmp_path / "model", 40, tied=tied)), config, [39] if new else [])


def test_the_length_beyond_which_positions_turn_otherwise() -> None:
    """Bug: beside one long example, all short ones of a pass are computed with the frequencies of long ones."""
    from transformers import LlamaConfig, Phi3Config

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    assert rope_limit(Phi3Config(**sizes, original_max_position_embeddings=16, rope_scaling=long)) == 16
    assert rope_limit(LlamaConfig(**sizes, rope_scaling={"rope_type": "dynamic", "factor": 2.0})) == 128
    assert rope_limit(LlamaConfig(**sizes, rope_scaling={"rope_type": "linear", "factor": 2.0})) is None


def test_no_weights_no_model(tmp_path: Path) -> None:
    """Bug: a path without a model is looked up on a hub, or fails with a page of traceback."""
    with pytest.raises(UserError, match="config.json is missing"):
        find_model(str(tmp_path))
    with pytest.raises(UserError, match="no such directory"):
        find_model(str(tmp_path / "nothing"))


def test_pickled_weights_are_not_loaded(tmp_path: Path, chat: object) -> None:
    """Bug: a downloaded pytorch_model.bin runs code when it is unpickled."""
    place = Path(make_llama(tmp_path / "bin", 100))
    torch.save(AutoModelForCausalLM.from_pretrained(place).state_dict(), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_model(str(place))


def test_four_bits_need_a_package(tmp_path: Path, chat: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a page of traceback instead of the name of the missing package."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="bitsandbytes"):
        load_model(make_llama(tmp_path / "m", 100), in_4bit=True)


def test_what_is_saved_gives_the_same_ids(tmp_path: Path, spm_bpe: str) -> None:
    """Bug: the tokenizer beside the model is loaded by another class that splits text differently."""
    chat = load_chat(spm_bpe, "chatml")
    chat.save(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "  The red\n\tcat  <|im_end|> </s>"
    assert loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == \
        chat.encode_texts([text])[0]
    assert np.array_equal(load_chat(str(tmp_path / "saved"), "chatml").encode_rows(ROWS)[0].input_ids,
                          chat.encode_rows(ROWS)[0].input_ids)


def test_only_a_merged_model_is_replaced(tmp_path: Path) -> None:
    """Bug: --overwrite_output_dir removes a run with its checkpoints, or a directory of many."""
    check = importlib.import_module("04_merge_lora").check_replaceable
    run, merged, new = tmp_path / "runs" / "one", tmp_path / "runs" / "one" / "merged", tmp_path / "new"
    for place in (merged, new):
        place.mkdir(parents=True)
    check(new, run)
    (run / "adapter_config.json").touch()
    (merged / "config.json").touch()
    check(merged, run)
    (new / "notes.txt").touch()
    for place in (run, run.parent, tmp_path, new, run / "adapter_config.json"):
        with pytest.raises(UserError, match="Name another"):
            check(place, tmp_path / "elsewhere" if place == run else run)
