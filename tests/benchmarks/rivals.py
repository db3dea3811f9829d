"""One optimizer step of the same rows by TRL, by a plain transformers loop and by 03_sft.py's own code.

Each rival lives in a process of its own, so that its allocator and its memory are its own, and does one step whenever
it is asked: `Rival` starts such a process; run as a script this file is one. Rows, weights and optimizer are the same.
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

VOCABULARY = 32_768 + 64  # a 32k tokenizer, its ChatML tokens, rounded up to a multiple of 64
SIZES = {"tiny": dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024),
         "small": dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=2048)}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# (share of rows; mean and deviation of ln tokens of the prompt; of the response): Dolly, OpenAssistant, Alpaca in 32k
LENGTHS = [(0.4, (3.90, 1.08), (3.84, 1.10)), (0.4, (4.48, 1.07), (4.73, 1.08)), (0.2, (3.38, 0.34), (3.60, 1.11))]


@dataclass(frozen=True)
class Task:
    """What every rival is given."""

    model: str = "tiny"
    mode: str = "full"
    rows: int = 32
    max_length: int = 1024
    full_rows: bool = False  # every row max_length long, half of it trained
    rows_per_pass: int = 1


def make_rows(task: Task) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32, trained bool) of each row: random ids, lengths as those of instruction rows."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(task.rows):
        _, *sides = LENGTHS[rng.choice(len(LENGTHS), p=[share for share, _, _ in LENGTHS])]
        prompt, response = (max(4, int(rng.lognormal(*side))) for side in sides)
        if task.full_rows:
            prompt, response = task.max_length // 2, task.max_length - task.max_length // 2
        length = min(prompt + response, task.max_length)
        prompt = min(prompt, length - 4)
        rows.append((rng.integers(4, VOCABULARY, length).astype(np.int32), np.arange(length) >= prompt))
    return rows


def make_model(task: Task, attention: str = "sdpa") -> object:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=task.max_length, tie_word_embeddings=True,
                         pad_token_id=0, bos_token_id=2, eos_token_id=3, **SIZES[task.model])
    config._attn_implementation = attention
    return LlamaForCausalLM(config)


def lora_config() -> object:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")


def with_lora(task: Task, model: object) -> object:
    """LoRA of rank 16, its B not zero, so that every gradient counts."""
    from peft import get_peft_model

    if task.mode != "lora":
        return model
    model = get_peft_model(model, lora_config())
    return fill_lora(model)


def fill_lora(model: object) -> object:
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model


def trl(task: Task, work: Path, bf16: bool) -> tuple[Callable[[], float], object]:
    """TRL's trainer in the configuration that is fastest on CPU: packing by best fit, one row a pass."""
    import logging

    import torch
    from datasets import Dataset, disable_progress_bars
    from peers import need_trl

    need_trl()
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    logging.disable(logging.WARNING)
    rows = [{"input_ids": ids.tolist(), "labels": np.where(trained, ids, -100).tolist()}
            for ids, trained in make_rows(task)]
    settings = SFTConfig(output_dir=str(work), per_device_train_batch_size=task.rows_per_pass,
                         gradient_accumulation_steps=1, packing=True, max_length=task.max_length, bf16=bf16,
                         use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no",
                         disable_tqdm=True, learning_rate=1e-5)
    trainer = SFTTrainer(model=make_model(task), args=settings, train_dataset=Dataset.from_list(rows),
                         processing_class=PreTrainedTokenizerFast(tokenizer_object=_any_tokenizer(), pad_token="<p>",
                                                                  eos_token="<e>"),
                         peft_config=lora_config() if task.mode == "lora" else None)
    if task.mode == "lora":
        fill_lora(trainer.model)
    trainer.create_optimizer_and_scheduler(1000)
    wrapped = trainer.accelerator.prepare(trainer.model)  # as train() does; it is what brings autocast
    wrapped.train()
    trainer.current_gradient_accumulation_steps = 1
    batches = list(trainer.get_train_dataloader())
    targets = torch.tensor(sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches))

    def passes() -> float:
        return sum(float(trainer.training_step(wrapped, dict(b), targets)) for b in batches)

    return _stepper(trainer.model, trainer.optimizer, passes), trainer.model


def _any_tokenizer() -> object:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<p>": 0, "<e>": 1}, unk_token="<p>"))


def plain(task: Task, bf16: bool) -> tuple[Callable[[], float], object]:
    """What one would write with transformers alone: packed rows, position_ids, labels, autocast, all logits."""
    import torch
    import torch.nn.functional as F

    model = with_lora(task, make_model(task)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    rows = make_rows(task)
    total = sum(int(trained[1:].sum()) for _, trained in rows)
    batches = []
    for row in _packed(rows, task.max_length):
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in row]).astype(np.int64))[None]
        # the first token of an example is no target: nothing before it belongs to it
        labels = np.concatenate([np.where(t & (np.arange(len(t)) > 0), ids, -100) for ids, t in row]).astype(np.int64)
        places = np.concatenate([np.arange(len(ids)) for ids, _ in row])
        batches.append((ids, torch.from_numpy(places)[None], torch.from_numpy(labels)[None]))

    def passes() -> float:
        loss_sum = 0.0
        for ids, places, labels in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(input_ids=ids, position_ids=places, use_cache=False).logits
            loss = F.cross_entropy(logits[0, :-1].float(), labels[0, 1:], ignore_index=-100, reduction="sum") / total
            loss.backward()
            loss_sum += float(loss.detach())
        return loss_sum

    return _stepper(model, optimizer, passes), model


def reference(task: Task) -> tuple[Callable[[], float], object]:
    """One example at a time, eager attention, fp32: the slow truth."""
    import torch
    import torch.nn.functional as F

    model = with_lora(task, make_model(task, "eager")).train()
    rows = make_rows(task)
    total = sum(int(trained[1:].sum()) for _, trained in rows)

    def passes() -> float:
        loss_sum = 0.0
        for ids, trained in rows:
            ids = torch.from_numpy(ids.astype(np.int64))
            labels = torch.where(torch.from_numpy(trained), ids, -100)
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / total
            loss.backward()
            loss_sum += float(loss.detach())
        return loss_sum

    return _stepper(model, torch.optim.SGD(model.parameters(), lr=0.0), passes), model


def _stepper(model: object, optimizer: object, passes: Callable[[], float]) -> Callable[..., float]:
    import torch

    def step(gradients: Path | None = None) -> float:
        loss = passes()
        if gradients:
            torch.save(_gradients(model), gradients)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _gradients(model: object) -> dict:
    return {name.removeprefix("model.").removeprefix("module."): p.grad.clone()
            for name, p in model.named_parameters() if p.grad is not None}


def _packed(rows: list, max_length: int) -> list[list]:
    from common.order import pack

    row_of, n = pack(np.array([len(ids) for ids, _ in rows]), max_length)
    return [[rows[i] for i in np.flatnonzero(row_of == r)] for r in range(n)]


def ours(task: Task, bf16: bool, compiled: bool = False) -> tuple[Callable[..., float], object]:
    """The very functions that 03_sft.py calls for a step."""
    import torch
    from accelerate import Accelerator

    from common.adapters import round_frozen
    from common.chat import Encoded
    from common.lora import fuse
    from common.loss import LossModel
    from common.material import Material
    from common.model import compile_layers
    from common.plan import Source, Stage, make_plan
    from common.probe import choose_attention
    from common.settings import SftConfig
    from common.sides import Split
    from common.train import Batches, make_optimizer, train_step

    rows = [Encoded(ids, trained & (np.arange(len(ids)) > 0)) for ids, trained in make_rows(task)]
    packed = len(_packed(make_rows(task), task.max_length))
    plan = make_plan([Source("rows", np.array([len(r.input_ids) for r in rows]),
                             np.array([int(r.trained.sum()) for r in rows]))],
                     [Stage("train", (0,), None, epochs=1.0)], max_seq_length=task.max_length, packing=True,
                     rows_per_step=packed, seed=0)

    class Rows:
        name, example = "rows", staticmethod(lambda index: rows[index])

    everything = np.arange(len(rows))
    material = Material([Rows()], Split([everything], [everything[:0]], [everything[:0]], []), plan, [], [], [], 0)
    config = SftConfig(learning_rate=1e-5, per_device_train_batch_size=task.rows_per_pass, warmup_ratio=0.0,
                       lr_scheduler_type="constant", use_lora=task.mode == "lora", max_grad_norm=0.0)
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=True)
    model = LossModel(with_lora(task, make_model(task)), "sdpa")
    if task.mode == "lora":
        fuse(model.model)
        if bf16:
            round_frozen(model.model, torch.bfloat16)
    if compiled:
        print(compile_layers(model.causal_lm), file=sys.stderr)
    with accelerator.autocast():
        choose_attention(model, rows[:2], 0, "auto", True)
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    wrapped.train()
    batches = Batches(accelerator, model.flat, material, config)

    def step(gradients: Path | None = None) -> float:
        if gradients:  # looked at just before they are used up
            from common import train

            train.fail_point = lambda *_: torch.save(_gradients(model.model), gradients)
        result = train_step(accelerator, wrapped, optimizer, material, config, 0, batches)
        if gradients:
            train.fail_point = lambda *_: None
        return result.loss

    return step, model


class Rival:
    """A process that does a step when asked: loss, seconds, MiB before the model was loaded and at the peak."""

    def __init__(self, name: str, task: Task, *, tuned: bool, threads: int, bf16: bool = True):
        arguments = ["--rival", name, *(["--tuned"] if tuned else []), *(["--bf16"] if bf16 else []),
                     "--threads", str(threads), "--task", json.dumps(vars(task))]
        self.process = subprocess.Popen([sys.executable, __file__, *arguments], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)})

    def _ask(self, **what: object) -> dict:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"{' '.join(self.process.args[2:4])} ended with status {self.process.wait()}")

    def step(self, gradients: Path | None = None) -> dict:
        return self._ask(gradients=str(gradients) if gradients else None)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def _memory(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _serve() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rival", required=True)
    parser.add_argument("--task", type=json.loads, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    from tempfile import TemporaryDirectory

    from common.allocator import tune_allocator
    from common.model import quiet_libraries

    if options.tuned:
        tune_allocator()
    quiet_libraries()
    import torch

    torch.set_num_threads(options.threads)
    task = Task(**options.task)
    makers = {"trl": lambda: trl(task, Path(work), options.bf16), "plain": lambda: plain(task, options.bf16),
              "ours": lambda: ours(task, options.bf16), "ours_compiled": lambda: ours(task, options.bf16, True),
              "reference": lambda: reference(task)}
    if options.rival == "trl":
        from peers import need_trl

        need_trl()
        importlib.import_module("trl")  # its code is not the model's memory
    before = _memory("VmRSS")
    with TemporaryDirectory() as work:
        step, model = makers[options.rival]()
        for line in sys.stdin:
            asked = json.loads(line)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            started = time.perf_counter()
            loss = step(*([Path(asked["gradients"])] if asked["gradients"] else []))
            print("ANSWER", json.dumps({"loss": loss, "seconds": time.perf_counter() - started, "before": before,
                                        "peak": _memory("VmHWM")}), flush=True)


if __name__ == "__main__":
    _serve()
