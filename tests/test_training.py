"""Fine-tuning by the script: what every way of training leaves, that it loads elsewhere, and that resuming is exact."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import chat_rows, make_llama, write_rows
from running import Ran, files_below, metrics, read_json, run_script
from safetensors.torch import load_file

from common.chat import load_saved_chat
from common.generate import generate
from common.model import load_model

START, END = "<|im_start|>", "<|im_end|>"
SHORT = {"max_seq_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6,
         "eval_steps": 3, "save_steps": 3, "logging_steps": 2, "val_split_ratio": 0.2, "report_to": "none"}


@pytest.fixture(scope="module")
def rows(shared: Path) -> str:
    return str(write_rows(shared / "training" / "rows.jsonl", chat_rows(30)))


@pytest.fixture(scope="module")
def train(shared: Path, tiny_model: str, spm_unigram: str, rows: str) -> Callable[..., Ran]:
    """Run 03 with flags over a short set; True stands for a bare flag, None leaves one out."""
    def run(output_dir: Path, precision: str = "no", **flags: object) -> Ran:
        usual = {"model_path": tiny_model, "tokenizer_path": spm_unigram, "dataset_paths": rows,
                 "cache_dir": shared / "training" / "cache", "output_dir": output_dir, **SHORT}
        words = []
        for name, value in {**usual, **flags}.items():
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [] if value is None else [f"--{name}", *map(str, values)]
        return run_script("03_sft", *words, mixed_precision=precision)
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights at the top of a run or in a checkpoint."""
    path = run / "adapter_model.safetensors"
    return load_file(str(path if path.exists() else run / "model.safetensors"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what is left

@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("packing", ["packing", "no_packing"])
@pytest.mark.parametrize("how", ["use_lora", "no_lora"])
def test_matrix(train, tmp_path, spm_unigram, how, packing, tied):
    """Guards against a way of training that leaves something incomplete, and new rows that stay as they were set."""
    base = make_llama(tmp_path / "model", 390, tied=tied)
    flags = {how: True, packing: True, "model_path": base, "learning_rate": 1e-3}
    train(tmp_path / "run", **flags, **({"merge_adapters": True} if how == "use_lora" else {})).ok()
    status = read_json(tmp_path / "run" / "run_status.json")
    assert (status["status"], status["step"], status["total_steps"], status["exit_status"]) == ("finished", 6, 6, 0)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert {"step", "loss", "learning_rate", "grad_norm", "epoch", "stage"} == set(lines[0])
    assert {"step", "eval_loss", "eval_loss/rows"} == set(lines[1])
    generation = read_json(tmp_path / "run" / "generation_config.json")
    assert sorted(generation["eos_token_id"]) == [3, 391] and generation["pad_token_id"] == 0
    if how == "no_lora":
        assert weights(tmp_path / "run")["model.embed_tokens.weight"].shape[0] == 392
        return
    old = load_model(base).get_input_embeddings().weight.detach()
    grown = load_model(str(tmp_path / "run" / "base"))
    merged = load_model(str(tmp_path / "run" / "merged"))
    for name in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(model, name)().weight.detach() for model in (grown, merged))
        assert torch.equal(before[:390], after[:390])
        assert all((before[i] != after[i]).any() for i in (390, 391)), f"{name}: new rows were not trained"
    assert torch.equal(grown.get_input_embeddings().weight.detach()[:390], old)
    assert not torch.equal(*grown.get_input_embeddings().weight.detach()[390:])
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied


@pytest.fixture(scope="module")
def overfit(train, shared) -> dict[str, Path]:
    """A LoRA run, merged, and a full run, both trained until they know four answers by heart."""
    path = write_rows(shared / "overfit" / "four.jsonl", [
        {"prompt": "Who are you?", "response": "a small cat"}, {"prompt": "What is red?", "response": "the stone"},
        {"prompt": "Hello there", "response": "hello"}, {"prompt": "Question two", "response": "answer two"}])
    usual = {"dataset_paths": path, "val_split_ratio": 0, "max_steps": 80, "eval_steps": None, "save_steps": 80,
             "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "packing": None,
             "lr_scheduler_type": "constant_with_warmup"}
    runs = {name: shared / "overfit" / name for name in ("lora", "full")}
    train(runs["lora"], **usual, learning_rate=5e-3, lora_dropout=0, merge_adapters=True).ok()
    train(runs["full"], **usual, learning_rate=5e-3, no_lora=True, no_packing=True).ok()
    return runs | {"merged": runs["lora"] / "merged"}


QUESTIONS = {"Who are you?": "a small cat", "What is red?": "the stone", "Hello there": "hello",
             "Question two": "answer two"}
ELSEWHERE = """
import importlib.util, json, sys
assert importlib.util.find_spec("common") is None
for name in ("accelerate", "peft", "sentencepiece", "google.protobuf", "datasets", "matplotlib", "tensorboard"):
    sys.modules[name] = None  # not installed there
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
found = {}
for path, questions in sorted(json.loads(sys.argv[1]).items(), key=lambda asked: asked[0].endswith("lora")):
    if path.endswith("lora"):
        del sys.modules["peft"], sys.modules["accelerate"]
        from peft import AutoPeftModelForCausalLM as Auto
    else:
        Auto = AutoModelForCausalLM
    model, tokenizer, found[path] = Auto.from_pretrained(path), AutoTokenizer.from_pretrained(path), []
    for question in questions:
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                               return_tensors="pt", return_dict=True)
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()
        n = inputs["input_ids"].shape[1]
        found[path].append([ids[:n], ids[n:], tokenizer.decode(ids[n:], skip_special_tokens=True)])
print(json.dumps(found))
"""


def test_answers_elsewhere_are_ours(overfit, tmp_path):
    """Guards against a model that only works with code of ours, or that never stops: in a process that cannot import
    it, nor what else we need, plain transformers and peft give the same ids, ending with the end of turn."""
    asked = {str(path): list(QUESTIONS) for path in overfit.values()}
    found = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, json.dumps(asked)], cwd=tmp_path, text=True,
                           capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr[-3000:]
    theirs = json.loads(found.stdout.splitlines()[-1])
    for path, answers in theirs.items():
        chat = load_saved_chat(path)
        end = chat.tokenizer.convert_tokens_to_ids(END)
        prompts = [chat.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
        ours = generate(load_model(path).eval(), prompts, max_new_tokens=20, stop_ids=chat.stop_ids,
                        pad_id=chat.pad_id, vocab_size=len(chat.tokenizer))
        assert [answer[0] for answer in answers] == prompts
        assert [answer[1] for answer in answers] == [one.ids + [end] for one in ours], path
        assert all(one.stopped for one in ours)
        assert [answer[2].strip() for answer in answers] == list(QUESTIONS.values())
        assert [chat.decode(one.ids).strip() for one in ours] == list(QUESTIONS.values())


def test_an_adapter_whose_base_does_not_stop_is_told(train, tmp_path):
    """Guards against an adapter on a base that knows the chat's tokens, which runs on elsewhere without a word here."""
    told = "note: plain peft takes the base's generation_config"
    assert told in train(tmp_path / "spare", model_path=make_llama(tmp_path / "model", 448)).ok().out
    assert told not in train(tmp_path / "grown").ok().out


def test_merged_equals_adapter(overfit):
    """Guards against a merge that loses the new rows, a scale or precision."""
    chat = load_saved_chat(str(overfit["lora"]))
    ids = torch.tensor([chat.prompt_ids([{"role": "user", "content": "Who are you?"}])])
    with torch.no_grad():
        adapter, merged = (load_model(str(overfit[name])).eval()(ids).logits for name in ("lora", "merged"))
        base = load_model(str(overfit["lora"] / "base")).eval()(ids).logits
    scale = max(1.0, float(adapter.abs().max()))
    assert float((adapter - merged).abs().max()) <= 1e-5 * scale
    assert float((adapter - base).abs().max()) > 0.1


def test_merge_script(overfit, tmp_path):
    """Guards against a merge that differs from the one at the end of training, or whose rounding nobody sees."""
    ran = run_script("04_merge_lora", "--model_path", overfit["lora"], "--output_dir", tmp_path / "again").ok()
    assert "in fp32" in ran.out and "as saved" in ran.out
    assert sha256(tmp_path / "again" / "model.safetensors") == sha256(overfit["merged"] / "model.safetensors")
    run_script("04_merge_lora", "--config_path", overfit["lora"] / "run.json", "--output_dir", tmp_path / "half",
               "--merge_dtype", "bfloat16").ok()
    assert all(v.dtype == torch.bfloat16 for v in weights(tmp_path / "half").values())
    again = run_script("04_merge_lora", "--model_path", overfit["lora"])
    assert again.status == 2 and "--overwrite_output_dir" in again.err
    full = run_script("04_merge_lora", "--model_path", overfit["full"])
    assert full.status == 2 and "nothing to merge" in full.err


# ---- resume

def stop_after(monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """Let SIGTERM arrive at the end of each of these steps, once."""
    import common.train

    train_step, left = common.train.train_step, list(steps)

    def step_and_signal(*args: object, **options: object) -> object:
        result = train_step(*args, **options)
        step = next(arg for arg in args if type(arg) is int) + 1
        if step in left:
            left.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(common.train, "train_step", step_and_signal)


RESUMES = {
    "lora-packing": {},
    "lora-no_packing": {"no_packing": True, "lora_r": 4},
    "full-packing": {"no_lora": True},
    "full-no_packing": {"no_lora": True, "no_packing": True},
    "early-stopping-lora": {"early_stopping_patience": 6, "early_stopping_threshold": 5, "eval_steps": 1},
    "early-stopping-full": {"early_stopping_patience": 6, "early_stopping_threshold": 5, "eval_steps": 1,
                            "no_lora": True},
    "neftune-adafactor": {"neftune_noise_alpha": 5, "optim": "adafactor"},
}


@pytest.mark.parametrize("flags", RESUMES.values(), ids=RESUMES)
def test_resume_is_exact(train, tmp_path, monkeypatch, flags):
    """Guards against a resumed run that is another run: stopped twice, in the middle of an epoch and of a log line, it
    leaves the same weights, optimizer, state and metrics as the uninterrupted one."""
    flags = {"max_steps": 11, "max_seq_length": 48, **flags}  # an epoch is about 6 steps
    train(tmp_path / "a", **flags).ok()
    stop_after(monkeypatch, [1, 4])
    for _ in range(2):
        ran = train(tmp_path / "b", resume_from_checkpoint=True, **flags)
        assert ran.status == 75 and "--resume_from_checkpoint" in ran.err, ran.err
        assert read_json(tmp_path / "b" / "run_status.json")["status"] == "stopped"
        assert "adapter_model.safetensors" not in os.listdir(tmp_path / "b")
    train(tmp_path / "b", resume_from_checkpoint=True, **flags).ok()
    a, b = tmp_path / "a", tmp_path / "b"
    assert metrics(a) == metrics(b)
    last = max((p.name for p in a.glob("checkpoint-*")), key=lambda name: int(name[11:]))
    for name in ("adapter_model.safetensors", "model.safetensors", f"{last}/adapter_model.safetensors",
                 f"{last}/model.safetensors"):
        assert (a / name).exists() == (b / name).exists()
        assert not (a / name).exists() or sha256(a / name) == sha256(b / name), name
    one, two = (torch.load(run / last / "optimizer.pt", weights_only=True) for run in (a, b))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    status = [read_json(run / "run_status.json")["status"] for run in (a, b)]
    assert status == ["early_stopped" if "early_stopping_patience" in flags else "finished"] * 2


def test_rewind_gives_the_same_run(train, tmp_path):
    """Guards against a named checkpoint that is not what the run was then, and against lost newer ones."""
    train(tmp_path / "run").ok()
    before = sha256(tmp_path / "run" / "adapter_model.safetensors"), metrics(tmp_path / "run")
    train(tmp_path / "run", resume_from_checkpoint=tmp_path / "run" / "checkpoint-3").ok()
    assert before == (sha256(tmp_path / "run" / "adapter_model.safetensors"), metrics(tmp_path / "run"))
    (aside,) = (tmp_path / "run").glob("superseded-*")
    assert {"checkpoint-6", "adapter_model.safetensors", "run_status.json"} <= set(os.listdir(aside))


def test_early_stopping_keeps_the_best(train, tmp_path):
    """Guards against patience that is ignored, and against leaving the last model instead of the best."""
    train(tmp_path, no_lora=True, learning_rate=0.1, max_steps=40, eval_steps=1, save_steps=100,
          early_stopping_patience=3, overwrite_output_dir=True).ok()
    losses = {line["step"]: line["eval_loss"] for line in metrics(tmp_path) if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert list(losses) == list(range(1, best + 4)) and best + 3 < 40
    assert read_json(tmp_path / "run_status.json")["status"] == "early_stopped"
    kept, last = (weights(tmp_path / f"checkpoint-{step}") for step in (best, best + 3))
    assert all(torch.equal(value, kept[name]) for name, value in weights(tmp_path).items())
    assert not torch.equal(kept["model.norm.weight"], last["model.norm.weight"])


def test_time_limit(train, tmp_path):
    """Guards against --max_minutes that trains on, or begins what it cannot go on with."""
    ran = train(tmp_path / "run", max_minutes=1e-6)
    assert ran.status == 75 and "--max_minutes" in ran.err
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", max_minutes=60).ok()


def test_init_from(train, tmp_path, overfit):
    """Guards against --init_from that starts from the base, or with the old optimizer."""
    ran = train(tmp_path / "run", init_from=overfit["lora"], learning_rate=1e-12, lora_dropout=0, max_steps=1).ok()
    assert "step 1/1" in ran.out
    then, now = weights(overfit["lora"]), weights(tmp_path / "run")
    assert set(then) == set(now)
    assert all(torch.allclose(value, now[name], atol=1e-6) for name, value in then.items())


# ---- settings

def plain_modules(run: Path) -> set[str]:
    """The modules that have an adapter."""
    return {name.split(".lora_A")[0].rpartition(".")[2] for name in weights(run) if ".lora_A" in name}


@pytest.mark.parametrize("flags, check", [
    ({"lora_target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_r": 3},
     lambda run: plain_modules(run) == {"q_proj", "v_proj"} and read_json(run / "adapter_config.json")["use_rslora"]),
    ({"use_dora": True, "merge_adapters": True},
     lambda run: any("magnitude" in name for name in weights(run)) and (run / "merged").is_dir()),
    ({"optim": "adafactor"}, lambda run: metrics(run)[-1]["step"] == 6),
    ({"optim": "sgd", "lr_scheduler_type": "linear", "warmup_steps": 2},
     lambda run: metrics(run)[-2]["learning_rate"] < metrics(run)[0]["learning_rate"]),
    ({"neftune_noise_alpha": 5, "gradient_checkpointing": True}, lambda run: metrics(run)[-1]["step"] == 6),
    ({"no_lora": True, "train_on_prompt": True},
     lambda run: read_json(run / "plan.json")["tokens"] - read_json(run / "plan.json")["trained_tokens"] < 60),
    ({"prompt_template": "instruct", "do_gen_test": True, "max_new_tokens": 5, "num_gen_samples": 2},
     lambda run: len((run / "samples.jsonl").read_text().splitlines()) == 2 and not (run / "base").exists()),
    ({"report_to": "tensorboard"}, lambda run: any("tfevents" in name for name in files_below(run))),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_setting(train, tmp_path, flags, check):
    """Guards against a setting that is accepted and does nothing."""
    train(tmp_path / "run", **flags).ok()
    assert check(tmp_path / "run")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_modules_to_save(train, tmp_path, tied):
    """Guards against a head trained whole that is not saved, not merged, or, tied, no longer the embedding; and
    against a resume that loses it."""
    flags = {"model_path": make_llama(tmp_path / "model", 390, tied=tied), "modules_to_save": "lm_head",
             "learning_rate": 1e-3}
    train(tmp_path / "run", **flags, merge_adapters=True).ok()
    ids = torch.tensor([[2, 5, 6, 390, 300, 391]])
    with torch.no_grad():
        adapter, merged, base = (load_model(str(tmp_path / "run" / place)).eval() for place in ("", "merged", "base"))
        logits = [model(ids).logits for model in (adapter, merged)]
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-5 * max(1.0, float(logits[0].abs().max()))
    heads = [model.get_output_embeddings().weight for model in (merged, base)]
    assert not torch.equal(heads[0][5], heads[1][5])  # an old row: the head is trained whole
    assert (merged.get_input_embeddings().weight is heads[0]) == tied
    before = sha256(tmp_path / "run" / "adapter_model.safetensors")
    train(tmp_path / "run", **flags, merge_adapters=True, resume_from_checkpoint=tmp_path / "run" / "checkpoint-3").ok()
    assert sha256(tmp_path / "run" / "adapter_model.safetensors") == before


def test_an_adapter_on_the_head_is_trained_and_merged(train, tmp_path):
    """Guards against a head whose matrix is taken past its adapter: that begins at zero, so no proof sees it."""
    flags = {"model_path": make_llama(tmp_path / "model", 390, tied=False), "prompt_template": "instruct",
             "lora_target_modules": ["q_proj", "lm_head"], "learning_rate": 1e-3}
    done = train(tmp_path / "run", **flags, merge_adapters=True).ok()
    assert "head at its own forward" in done.out and "merged model" in done.out
    trained = [name for name, weight in weights(tmp_path / "run").items() if "lora_B" in name and weight.any()]
    assert len(trained) == 3 and any("lm_head" in name for name in trained)


def test_a_merge_after_gradient_checkpointing(train, tmp_path):
    """Guards against the hook of checkpointing, which cannot be copied: a crash after the last step, at every try."""
    done = train(tmp_path / "run", gradient_checkpointing=True, merge_adapters=True, merge_dtype="bfloat16").ok()
    assert "as saved (bfloat16)" in done.out and (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("flags", [
    {"merge_adapters": True, "do_gen_test": True, "max_new_tokens": 5},
    {"gradient_checkpointing": True, "lora_target_modules": ["q_proj", "lm_head"], "prompt_template": "instruct"}],
    ids=["merged", "checkpointing and head"])
def test_frozen_matrices_in_bf16_change_nothing(train, tmp_path, monkeypatch, flags):
    """Guards against numbers that differ from those of autocast on fp32 matrices, by one bit, and against answers and a
    merge with what was rounded: the base's weights are no numbers of bf16."""
    flags = {**flags, "model_path": make_llama(tmp_path / "model", 390, tied=False)}
    lines, said = {}, {}
    for how in ("rounded", "fp32"):
        if how == "fp32":
            monkeypatch.setattr("common.run.round_frozen", lambda *_: 0)
        said[how] = train(tmp_path / how, precision="bf16", **flags, learning_rate=1e-3).ok().out
        lines[how] = metrics(tmp_path / how)
    assert "frozen ones held in bf16" in said["rounded"] and "held in bf16" not in said["fp32"]
    assert lines["rounded"] == lines["fp32"]
    kept = {how: {str(f.relative_to(tmp_path / how)): sha256(f) for name in ("*.safetensors", "samples.jsonl")
                  for f in (tmp_path / how).rglob(name)} for how in lines}
    assert kept["rounded"] == kept["fp32"]
    assert ("samples.jsonl" in kept["fp32"]) == ("merged/model.safetensors" in kept["fp32"]) == ("do_gen_test" in flags)


def test_lora_in_one_product_learns_what_peft_learns(train, tmp_path, monkeypatch):
    """Guards against a product that no run takes, and against one that learns something else."""
    from common.lora import fuse

    found, losses = [], {}
    for how, chosen in (("fused", lambda model: found.append(fuse(model))), ("PEFT", lambda _: None)):
        monkeypatch.setattr("common.lora.fuse", chosen)
        train(tmp_path / how, lora_dropout=0, learning_rate=1e-3).ok()
        losses[how] = [line["loss"] for line in metrics(tmp_path / how) if "loss" in line]
    assert found[0] > 0 and losses["fused"][-1] < losses["fused"][0]
    assert losses["fused"] == pytest.approx(losses["PEFT"], rel=1e-5)


def test_gradient_checkpointing_and_micro_batch_change_nothing(train, tmp_path):
    """Guards against a loss that depends on how a step is cut or on recomputing activations."""
    usual = {"lora_dropout": 0, "learning_rate": 1e-3}
    train(tmp_path / "a", **usual).ok()
    train(tmp_path / "b", **usual, gradient_checkpointing=True).ok()
    train(tmp_path / "c", **usual, per_device_train_batch_size=1, gradient_accumulation_steps=4).ok()
    for run in ("b", "c"):
        for one, two in zip(metrics(tmp_path / "a"), metrics(tmp_path / run)):
            assert one.pop("stage", None) == two.pop("stage", None)
            assert one == pytest.approx(two, rel=1e-4)


def test_report_to_none_leaves_no_tracker(train, tmp_path):
    """Guards against trackers that start although nobody wants them."""
    train(tmp_path / "run").ok()
    assert not any("tfevents" in name for name in files_below(tmp_path))


def test_validation_and_test_rows(train, tmp_path, rows):
    """Guards against held-out rows that are trained on: train, validation and test are the file, each row once."""
    train(tmp_path / "a", test_split_ratio=0.2).ok()
    held = {name: {json.loads(line)["messages"][0]["content"] for line in (tmp_path / "a" / f"{name}.jsonl").open()}
            for name in ("val", "test")}
    everything = {json.loads(line)["prompt"] for line in open(rows)}
    assert held["val"] and held["test"] and not held["val"] & held["test"]
    assert held["val"] | held["test"] < everything
    assert read_json(tmp_path / "a" / "plan.json")["examples"] == len(everything) - sum(map(len, held.values()))


def test_validation_files_of_ones_own(train, tmp_path):
    """Guards against --val_dataset_paths that still splits rows off, against its rows being trained on, and against
    those of it that are dropped without a word."""
    write_rows(tmp_path / "mine.jsonl", [*chat_rows(30)[:5], {"prompt": "what", "response": ""}])
    ran = train(tmp_path / "run", val_dataset_paths=tmp_path / "mine.jsonl", val_split_ratio=None).ok()
    assert "mine.jsonl: 6 rows -> 5 examples for validation\n  dropped: 1 empty answer" in ran.out
    assert read_json(tmp_path / "run" / "plan.json")["validation_data"]["mine"]["dropped"] == {"empty answer": 1}
    assert "eval_loss/mine" in metrics(tmp_path / "run")[1]
    assert read_json(tmp_path / "run" / "plan.json")["examples"] == 25
    assert len((tmp_path / "run" / "val.jsonl").read_text().splitlines()) == 5


def test_recommended_weights_and_val_from(train, tmp_path, rows):
    """Guards against weights of another size of model, and against validation rows of all data sets."""
    names = ("dolly15k", "oasst1_en", "alpaca")
    paths = [write_rows(tmp_path / f"{name}.jsonl", chat_rows(40, seed)) for seed, name in enumerate(names)]
    train(tmp_path / "run", dataset_paths=paths, dataset_weights="recommended", val_from="alpaca").ok()
    plan = read_json(tmp_path / "run" / "plan.json")
    assert [source["share_asked"] for source in plan["sources"]] == [0.5, 0.3, 0.2]
    assert set(metrics(tmp_path / "run")[1]) == {"step", "eval_loss", "eval_loss/alpaca"}
    assert {json.loads(line)["source"] for line in (tmp_path / "run" / "val.jsonl").open()} == {"alpaca"}


def test_run_json_is_a_config_file(train, tmp_path):
    """Guards against a saved configuration that does not start the same run again."""
    train(tmp_path / "a", weight_decay=0.1, no_packing=True).ok()
    run_script("03_sft", "--config_path", tmp_path / "a" / "run.json", "--output_dir", tmp_path / "b").ok()
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_moved_run_still_loads(train, tmp_path):
    """Guards against an adapter that knows its grown base by an absolute path alone."""
    train(tmp_path / "a").ok()
    shutil.move(tmp_path / "a", tmp_path / "b")
    load_model(str(tmp_path / "b"))
    run_script("04_merge_lora", "--model_path", tmp_path / "b").ok()
