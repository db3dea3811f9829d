"""Text + a tokenizer -> a small Llama base model in Hugging Face form, its tokenizer beside it.

    python scripts/02_pretrain.py --config_path config/tiny.json --tokenizer_path data/tokenizer/spm32k.model \\
      --input corpus.txt --output_dir checkpoints/pretrain/tiny/final --max_steps 1000

For a machine with nothing on it, and for models small enough to train there; bring your own base model if you have one.
Every step takes `batch_size` windows of `sequence_length` tokens from random places of the text. `--max_steps 0` leaves
random weights. After an interruption: start it again; the model is written whole at the end.
"""
from __future__ import annotations

import math
import os
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.checkpoint import flush, put_in_place
from common.config import nearest, parse, setting
from common.faults import NotFinite, UserError, run_main, say
from common.outputs import check_replaceable, check_writable
from common.structured import read_structured

if TYPE_CHECKING:
    import numpy as np
    from transformers import LlamaConfig, PreTrainedModel

    from common.chat import Chat

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "max_position_embeddings")
GPU_LOGITS = 1 << 28  # as LOGITS, on a GPU, which would wait between small passes
LOGITS = 1 << 26  # of a forward pass, 270 MB in fp32: 16 windows of 1,024 tokens at 32k pieces took 15 GB at once
CHUNK = 1 << 16  # characters the tokenizer is given at once; files are cut at ends of lines


@dataclass
class PretrainConfig:
    """Settings of 02_pretrain.py."""

    config_path: str = setting("config/tiny.json", "Architecture: a JSON file with keys of a Llama config.json.",
                               path=True)
    tokenizer_path: str = setting("data/tokenizer/spm32k.model", "SentencePiece .model, tokenizer directory or Hub id; "
                                  "it decides vocab_size and the special ids.", path="hub")
    input: list[str] = setting([], "Text files, UTF-8 (also .gz). Each is one text: BOS, text, EOS.", path=True)
    output_dir: str = setting("checkpoints/pretrain/tiny/final", "Where the model goes.", path=True)
    overwrite_output_dir: bool = setting(False, "Replace what is in output_dir.", action=True)
    max_steps: int = setting(1000, "Optimizer steps. 0: random weights.", unit="steps", within="[0, inf)")
    batch_size: int = setting(16, "Windows of a step.", within="[1, inf)")
    sequence_length: int | None = setting(None, "Length of a window. Without it: the model's context.", unit="tokens",
                                          within="[2, inf)")
    learning_rate: float = setting(1e-3, "Highest learning rate.", within="(0, 1]")
    min_lr_ratio: float = setting(0.1, "Where the cosine ends, as a share of learning_rate.", within="[0, 1]")
    warmup_ratio: float = setting(0.1, "Share of the steps in which the learning rate rises.", within="[0, 1)")
    weight_decay: float = setting(0.1, "Pull of the matrices towards zero.", within="[0, inf)")
    adam_beta2: float = setting(0.95, "AdamW: memory of the gradient's square.", within="[0, 1)")
    max_grad_norm: float = setting(1.0, "Longer gradients are scaled down to this norm.", within="(0, inf)")
    seed: int = setting(42, "Decides first weights and windows.", within="[0, 4294967295]")
    logging_steps: int = setting(100, "Print a line every so many steps.", unit="steps", within="[1, inf)")

    def problems(self) -> list[str]:
        """Contradictions between settings."""
        return [] if self.input or not self.max_steps else ["--input: it is missing. Text files, or --max_steps 0."]


def read_architecture(path: str, chat: Chat) -> LlamaConfig:
    """A Llama configuration from a JSON file, with vocabulary and special ids of the tokenizer, or UserError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig

    values, known = read_structured(path), LlamaConfig().to_dict()
    if not isinstance(values, dict):
        raise UserError(f"{path}: it is no object of settings. Write {{\"hidden_size\": …}}.")
    for key in values:
        if key not in known:
            close = nearest(key, known)
            raise UserError(f"{path}: {key}: a Llama configuration has no such key."
                            + (f" Did you mean {close}?" if close else ""))
    if values.pop("model_type", "llama") != "llama":
        raise UserError(f"{path}: model_type: only llama is made here. Bring other models in Hugging Face form.")
    for key in SIZES:
        if type(size := values.get(key, 1)) is not int or size < 1:
            raise UserError(f"{path}: {key} is {size!r}. It has to be a whole number of 1 or more.")
    special = {"vocab_size": len(chat.tokenizer), "bos_token_id": chat.bos_id, "eos_token_id": chat.eos_id,
               "pad_token_id": chat.pad_id}
    try:
        found = LlamaConfig(**{**values, **special})
    except (StrictDataclassError, LookupError, ValueError, TypeError) as fault:
        raise UserError(f"{path}: {str(fault).splitlines()[-1].strip():.200} Mend the file.") from None
    if found.num_attention_heads % found.num_key_value_heads:
        raise UserError(f"{path}: num_attention_heads {found.num_attention_heads} is no multiple of "
                        f"num_key_value_heads {found.num_key_value_heads}.")
    return found


def read_tokens(paths: list[str], chat: Chat) -> np.ndarray:
    """All texts as one int32 array: BOS, ids, EOS of each file. Raises UserError for a file that is no text."""
    import gzip

    import numpy as np

    parts: list[np.ndarray] = []
    for path in paths:
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
                text = file.read()
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as fault:
            raise UserError(f"{path}: {getattr(fault, 'strerror', None) or fault}. --input takes text files in "
                            "UTF-8.") from None
        chunks, start = [], 0
        while start < len(text):
            end = text.find("\n", start + CHUNK) + 1 or len(text)
            chunks.append(text[start:end])
            start = end
        ids = [np.array(x, np.int32) for x in chat.encode_texts(chunks)]
        ends = [np.array([i] if i is not None else [], np.int32) for i in (chat.bos_id, chat.eos_id)]
        parts += [ends[0], *ids, ends[1]]
    return np.concatenate(parts)


def train(model: PreTrainedModel, tokens: np.ndarray, config: PretrainConfig, length: int) -> None:
    """Train in place on windows of `length` tokens; fp32 weights, bf16 products."""
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, config.adam_beta2), fused=on_gpu)
    losses: list[float] = []
    begun = time.perf_counter()
    for step in range(config.max_steps):
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = np.random.default_rng([config.seed, step]).integers(0, len(tokens) - length, config.batch_size)
        windows = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)).to(device)
        losses.append(0.0)
        for part in windows.split(max(1, (GPU_LOGITS if on_gpu else LOGITS) // (length * model.config.vocab_size))):
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(input_ids=part[:, :-1], use_cache=False).logits  # (windows, length, vocabulary)
            loss = cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()) * (len(part) / len(windows))
            loss.backward()
            losses[-1] += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            raise NotFinite(f"step {step + 1}: loss {losses[-1]}, gradient norm {norm}. Nothing was written. Lower "
                            "--learning_rate.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % config.logging_steps == 0 or step + 1 == config.max_steps:
            seconds = time.perf_counter() - begun
            recent = losses[-config.logging_steps:]
            say(f"step {step + 1}/{config.max_steps}  loss {sum(recent) / len(recent):.4f}  lr {rate:.2e}  "
                f"{(step + 1) * config.batch_size * length / seconds:,.0f} tok/s  {seconds:.0f} s")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise NotFinite(f"step {config.max_steps}: its update left weights that are not finite. Nothing was written. "
                        "Lower --learning_rate.")


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Rise over the warm-up, then half a cosine down to min_lr_ratio of the highest rate."""
    warmup = math.ceil(config.warmup_ratio * config.max_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.max_steps - warmup)))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * falling)


def save(model: PreTrainedModel, chat: Chat, output_dir: Path) -> None:
    """Write model and tokenizer into a new directory beside output_dir and rename it, so that it is whole or absent."""
    part = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        model.to("cpu").save_pretrained(part)
        chat.tokenizer.save_pretrained(part)
        flush(part)
        put_in_place(part, output_dir)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(argv: list[str]) -> int:
    config = parse(PretrainConfig, argv, __doc__, config_flag=None)
    output_dir = Path(config.output_dir)
    taken = output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir()))
    if taken and not config.overwrite_output_dir:
        raise UserError(f"{output_dir}: something is there already. Choose another --output_dir, or replace it with "
                        "--overwrite_output_dir.")
    if taken:
        check_replaceable(output_dir)
    check_writable(output_dir.parent, "--output_dir")
    import torch
    from transformers import LlamaForCausalLM

    from common.allocator import tune_allocator
    from common.chat import load_chat
    from common.model import quiet_libraries

    tune_allocator()
    quiet_libraries()
    chat = load_chat(config.tokenizer_path, "raw")
    architecture = read_architecture(config.config_path, chat)
    length = config.sequence_length or architecture.max_position_embeddings
    if length > architecture.max_position_embeddings:
        raise UserError(f"--sequence_length {length}: the model's context is {architecture.max_position_embeddings} "
                        f"tokens. Lower it, or raise max_position_embeddings in {config.config_path}.")
    torch.manual_seed(config.seed)
    try:
        model = LlamaForCausalLM(architecture)
    except (LookupError, ArithmeticError, RuntimeError, ValueError, TypeError) as fault:
        raise UserError(f"{config.config_path}: no model can be made of it ({type(fault).__name__}: {fault!s:.150}). "
                        "Mend the file.") from None
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # windows are short: 1.3 times the speed of sdpa, slow in bf16 here
    say(f"model     {architecture.num_hidden_layers} layers x {architecture.hidden_size}, "
        f"{architecture.vocab_size:,} pieces, {sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M parameters")
    if config.max_steps:
        tokens = read_tokens(config.input, chat)
        if len(tokens) <= length:
            raise UserError(f"--input: {len(tokens):,} tokens are fewer than one window of {length}. Give more text, "
                            "or a smaller --sequence_length.")
        drawn = config.max_steps * config.batch_size * length
        say(f"text      {len(tokens) / 1e6:,.2f} M tokens; {config.max_steps:,} steps of {config.batch_size} x "
            f"{length} take {drawn / 1e6:,.2f} M, {drawn / len(tokens):.2f} times the text")
        train(model, tokens, config, length)
    save(model, chat, output_dir)
    say(f"wrote     {output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
