"""Training beside a base held in 4 bits; these tests need bitsandbytes and are skipped without it."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import chat_rows, make_llama, write_rows
from running import metrics, run_script
from safetensors.torch import load_file

from common.model import load_model

pytest.importorskip("bitsandbytes")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a loss with respect to the inputs' embeddings."""
    model.train().zero_grad()
    model.get_input_embeddings().weight.requires_grad_(True)
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_after_an_evaluation(tmp_path: Path) -> None:
    """Guards against layers that an evaluation packs for inference, through which no gradient comes back."""
    model = load_model(make_llama(tmp_path / "model", 390, hidden=64), in_4bit=True)
    before = gradients(model)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(6).view(1, 6))
    after = gradients(model)
    assert set(before) == set(after) and "model.embed_tokens.weight" in before
    for name, gradient in before.items():
        torch.testing.assert_close(gradient, after[name], rtol=1e-3, atol=1e-5)


def test_train_resume_and_merge_into_the_unquantised_base(tmp_path: Path, spm_unigram: str) -> None:
    """Guards against a merge into weights that were rounded to 4 bits, and against a resume that is another run."""
    base = make_llama(tmp_path / "model", 390, hidden=64)
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(30))
    words = ["--model_path", base, "--tokenizer_path", spm_unigram, "--dataset_paths", rows, "--output_dir",
             tmp_path / "run", "--cache_dir", tmp_path / "cache", "--max_seq_length", "64", "--report_to", "none",
             "--load_in_4bit", "--merge_adapters", "--max_steps", "8", "--save_steps", "4", "--eval_steps", "4",
             "--learning_rate", "1e-2", "--lora_target_modules", "q_proj", "--gradient_accumulation_steps", "1"]
    run_script("03_sft", *words).ok()
    before = load_file(str(tmp_path / "run" / "adapter_model.safetensors")), metrics(tmp_path / "run")
    old, merged = (load_model(str(path)).state_dict() for path in (base, tmp_path / "run" / "merged"))
    kept = "model.layers.0.mlp.up_proj.weight"  # without an adapter: as it was, not as 4 bits left it
    assert torch.equal(old[kept], merged[kept])
    run_script("03_sft", *words, "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-4").ok()
    after = load_file(str(tmp_path / "run" / "adapter_model.safetensors")), metrics(tmp_path / "run")
    assert before[1] == after[1] and all(torch.equal(value, after[0][name]) for name, value in before[0].items())
