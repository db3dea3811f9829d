"""Load a model, fit it to a chat tokenizer, merge it, and leave it behind in Hugging Face form."""
from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common import attention
from common.attention import causal_lm_of
from common.chat import Chat, load_tokenizer
from common.checkpoint import checkpoints, flush, put_in_place
from common.config import is_hub_name
from common.faults import UserError
from common.forked import cores
from common.hub import local_model

MERGE_TOLERANCE = 1e-5  # difference of merged and adapter logits in fp32, as a share of the largest logit
DEQUANTIZED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}  # formats that models are published in
SPARE_ROWS = 1024  # embeddings are padded to multiples of 64 to 512; more unused rows mean another tokenizer


def use_cores(processes: int, beside_gpu: bool = False) -> list[str]:
    """Undo the one thread that `accelerate launch` gives a process when nobody asked for a number, where it works on
    the CPU, or at the moment does (beside_gpu).

    Returns a line for the log if it did. With several processes on this machine each gets its share of the cores.
    """
    threads = max(1, cores() // processes)
    untouched = os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if (torch.cuda.is_available() and not beside_gpu) or not untouched or threads == torch.get_num_threads():
        return []
    torch.set_num_threads(threads)
    return [f"threads: {threads} a process (the launcher's default is 1; --num_cpu_threads_per_process sets another)"]


def quiet_libraries() -> None:
    """Silence progress bars of loading and saving and warnings about the libraries' own renamings."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")


@dataclass(frozen=True)
class Place:
    """Where a model's weights are: the directory of a base and, for LoRA, that of the adapter on top of it."""

    base: str
    adapter: str | None = None


def find_model(path: str) -> Place:
    """Resolve --model_path (a name of the Hub is fetched); raise UserError if there is no model."""
    place = Path(path)
    if place.is_dir():
        if (place / "adapter_config.json").exists():
            adapter = json.loads((place / "adapter_config.json").read_text())
            # written when the embeddings were resized, beside a run's adapter and its checkpoints
            own = place.parent if re.fullmatch(r"(broken-)?checkpoint-\d+", place.name) else place
            for beside in (place / "base", own / "base"):
                if (beside / "config.json").exists():
                    return Place(str(beside), str(place))
            named, revision = adapter["base_model_name_or_path"], adapter.get("revision")
            if os.path.isabs(named) and not Path(named).is_dir():
                raise UserError(f"{path}: its base {named} is not here. Put it there, or write where it is into "
                                f"{place / 'adapter_config.json'} (base_model_name_or_path).")
            return Place(local_model(f"{named}@{revision}" if revision and is_hub_name(named) else named), str(place))
        if (place / "shards").is_dir():
            raise UserError(f"{path}: a checkpoint in shards, which only 03_sft.py reads (--resume_from_checkpoint). "
                            f"The finished model is in {place.parent}.")
        if not (place / "config.json").exists() and (place / "run.json").exists():
            there = [checkpoint for checkpoint in checkpoints(place) if not (checkpoint / "shards").is_dir()]
            way = f", but {there[-1]} can be used" if there else "; go on with it: --resume_from_checkpoint"
            raise UserError(f"{path}: the run is not finished{way}.")
        if not (place / "config.json").exists():
            raise UserError(f"{path}: no model in this directory (config.json is missing). Give the directory that "
                            "scripts/02_pretrain.py or save_pretrained wrote, or a Hub id.")
    elif is_hub_name(path):
        return find_model(local_model(path))
    else:
        raise UserError(f"{path}: no such directory. --model_path takes a directory in Hugging Face form or a Hub id.")
    return Place(path)


def model_config(path: str) -> object:
    """The model's configuration without its weights. Raises UserError for what is no causal language model."""
    config = _from_pretrained(AutoConfig, find_model(path).base)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{path}: a {config.model_type} model, of which transformers makes no causal language model. "
                        "Take one of text alone.")
    return config


def grows(config: object, chat: Chat) -> bool:
    """Whether the model's embeddings get rows for new tokens."""
    return bool(chat.added_tokens) and len(chat.tokenizer) > config.get_text_config().vocab_size


def check_unquantized(config: object, path: str) -> None:
    """Refuse weights that lie quantized in their files: they could be neither trained nor merged exactly."""
    method = _quantized(config)
    if method and method not in DEQUANTIZED:
        raise UserError(f"{path}: its weights are quantized ({method}), so that they can be neither trained nor merged "
                        "exactly. Name the 16-bit model it was made from; --load_in_4bit quantizes that.")


def _quantized(config: object) -> str | None:
    """How the weights lie in few bits in their files, if they do."""
    held = getattr(config, "quantization_config", None) or {}
    method = held.get("quant_method") if isinstance(held, dict) else held.quant_method
    return getattr(method, "value", method)


def _as_trained(config: object) -> dict[str, object]:
    """Options to load weights that lie in few bits in the precision that they stand for."""
    import transformers

    name = DEQUANTIZED.get(_quantized(config))
    return {"quantization_config": getattr(transformers, name)(dequantize=True)} if name else {}


def rope_limit(config: object) -> int | None:
    """The longest pass that computes a short example as it would be alone: with dynamic and LongRoPE scaling (as in the
    long Phi models) transformers takes the speeds of rotary positions by the longest example of a pass."""
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or {}
    for rope in [found, *(part for part in found.values() if isinstance(part, dict))]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            return (rope.get("original_max_position_embeddings")
                    or getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings)
    return None


def load_model(path: str, *, dtype: torch.dtype | str = torch.float32, trainable_adapter: bool = False,
               in_4bit: bool = False, empty: bool = False) -> nn.Module:
    """Load a full or merged model, or a base with its adapter. Weights come from safetensors only; no remote code runs.

    A trained checkpoint may be bf16; `dtype` is what it is held in here (trained weights must be fp32). in_4bit: hold
    the base's matrices as NF4 (QLoRA, arXiv:2305.14314). empty: on the meta device, its base without weights.
    """
    place = find_model(path)
    options = {"quantization_config": _four_bits()} if in_4bit else _as_trained(model_config(place.base))
    if empty:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config(place.base), dtype=dtype).eval()
    else:
        model = _from_pretrained(AutoModelForCausalLM, place.base, dtype=dtype, use_safetensors=True, **options)
    if in_4bit:
        for module in model.modules():
            # bitsandbytes 0.50 packs a layer for inference at the first forward in eval mode on CPUs with AVX512-BF16,
            # leaves it so in training, and its packed product has no backward: gradients would be wrong in silence
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if place.adapter is None:
        return model
    from peft import PeftModel

    if (rows := rows_of_adapter(place.adapter)) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)  # all of them are the adapter's
    return _loaded(place.adapter, lambda: PeftModel.from_pretrained(model, place.adapter,
                                                                    is_trainable=trainable_adapter))


def rows_of_adapter(adapter: str | None) -> int:
    """Rows of the embeddings that an adapter brings whole, as TRL and Axolotl save it where they resized them; or 0."""
    file = Path(adapter or "") / "adapter_model.safetensors"
    if adapter is None or not file.is_file():
        return 0
    with safe_open(str(file), "pt") as tensors:
        return max((tensors.get_slice(name).get_shape()[0] for name in tensors.keys()
                    if re.search(r"(embed\w*|wte|lm_head)\.(modules_to_save\.\w+\.)?weight$", name)
                    and "lora_" not in name), default=0)


def _four_bits() -> object:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit: the package bitsandbytes is not installed. Install it (pip install "
                        "bitsandbytes), or leave --load_in_4bit out.")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16)


def _from_pretrained(cls: type, path: str, **options: object) -> object:
    return _loaded(path, lambda: cls.from_pretrained(path, trust_remote_code=False, **options))


def _loaded(path: str, load: Callable[[], object]) -> object:
    try:
        return load()
    except Exception as fault:  # the library raises OSError, ValueError, KeyError, safetensors and Hub errors alike
        reason = " ".join(str(fault).split())[:200]
        raise UserError(f"{path}: the model cannot be loaded ({type(fault).__name__}: {reason}). "
                        "Check the path; weights have to be safetensors.") from fault


def check_vocabulary(config: object, chat: Chat, model_path: str) -> None:
    """Refuse a tokenizer of another model, before any weight is loaded; tokens that the model was given when it was
    trained are not new to it, so they leave `chat.added_tokens`."""
    known, place = len(chat.tokenizer) - len(chat.added_tokens), find_model(model_path)
    rows = max(config.get_text_config().vocab_size, rows_of_adapter(place.adapter))
    beside = next((directory for directory in filter(None, (place.adapter, place.base)) for name in (
        "tokenizer.json", "tokenizer.model") if (Path(directory) / name).exists()), None)
    if beside:
        own = load_tokenizer(beside)[0].get_vocab()
        mine = {t: i for t, i in chat.tokenizer.get_vocab().items() if t not in chat.added_tokens}
        differ = [t for t, i in own.items() if mine.get(t, i) != i or (t not in mine and len(mine) >= len(own))]
        if differ:
            raise UserError(f"{model_path}: its own tokenizer and the one given disagree on {len(differ):,} of "
                            f"{len(own):,} tokens (for example {differ[0]!r}). Give the tokenizer that the model was "
                            "trained with.")
        chat.added_tokens = [token for token in chat.added_tokens if token not in own]
    # small Gemma 3 models have the tokenizer of the large ones, with a token for images that they do not know
    spare = beside and {*range(rows, known)} <= chat.control_ids - {chat.bos_id, chat.pad_id, *chat.stop_ids}
    if known > rows and not spare:
        raise UserError(f"{model_path}: the model knows {rows:,} token ids, the tokenizer {known:,}: it belongs to "
                        "another model. Give the model's own tokenizer with --tokenizer_path.")
    if not beside and rows - known > SPARE_ROWS:
        raise UserError(f"{model_path}: the model has {rows:,} token ids and the tokenizer only {known:,}: it belongs "
                        "to another model. Give the model's own tokenizer with --tokenizer_path.")


def add_tokens(model: PreTrainedModel, chat: Chat, seed: int) -> tuple[list[int], bool]:
    """Give new tokens their rows: spare ones first, then by growing; return their ids and whether it grew.

    A new row is the mean of the old rows plus seeded noise of their spread, separately for input and output, so that
    new tokens differ from each other from the start (the library's default leaves them equal to 1e-6).
    """
    ids = chat.tokenizer.convert_tokens_to_ids(chat.added_tokens)
    if not ids:
        return [], False
    old = model.get_input_embeddings().weight.shape[0]
    grow = len(chat.tokenizer) > old
    if grow:
        model.resize_token_embeddings(len(chat.tokenizer), mean_resizing=False)
    known = min(ids)
    generator = torch.Generator().manual_seed(seed)
    tables = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not tables[0]:
        tables.append(head.weight)
    with torch.no_grad():
        for table in tables:
            rows = table[:known].float()
            noise = torch.randn(len(ids), table.shape[1], generator=generator).to(table.device)
            table[ids] = (rows.mean(0) + noise * rows.std(0)).to(table.dtype)
        if grow and getattr(head, "bias", None) is not None:
            head.bias[ids] = head.bias[:known].mean()
    return ids, grow


def stop_ids_of(model: nn.Module, chat: Chat) -> list[int]:
    """Where answers end: the chat's stop ids, and the control tokens that the model's own files name besides (Llama 3.1
    ends calls of tools with another one)."""
    named = causal_lm_of(model).generation_config.eos_token_id
    named = [] if named is None else [named] if isinstance(named, int) else named
    return list(dict.fromkeys([*chat.stop_ids, *(i for i in named if i in chat.control_ids)]))


def set_special_ids(model: PreTrainedModel, chat: Chat) -> None:
    """Write bos, eos, pad and the stop ids into config and generation_config, where plain `transformers` looks."""
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.pad_token_id = chat.bos_id, chat.pad_id
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # older models name a temperature without do_sample, and a changed file is not saved so
        model.generation_config.do_sample = True
    model.config.eos_token_id = chat.eos_id
    stops = stop_ids_of(model, chat)
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    spare = range(len(chat.tokenizer), model.get_input_embeddings().weight.shape[0])
    # rows without a token would decode to nothing; what was spare before may be a token of this chat
    wanted = {*chat.tokenizer.convert_tokens_to_ids(chat.added_tokens), *chat.stop_ids}
    before = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = sorted({*before, *spare} - wanted) or None


def compile_layers(model: PreTrainedModel) -> str:
    """Compile each layer with torch.compile (attention stays as it is); return a line for the log."""
    layers = next((m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)), [])
    if not len(layers):
        raise UserError(f"--compile: no list of layers in a {model.config.model_type} model. Leave --compile out.")
    named, usual = ("CXX", ("g++", "clang++")) if model.device.type == "cpu" else ("CC", ("gcc", "clang"))  # Triton's
    if not any(map(shutil.which, (os.environ.get(named, usual[0]), *usual))):
        raise UserError(f"--compile: no compiler ({' or '.join(usual)}) on this machine. Install one, or leave it out.")
    # the last layer has hooks that leave positions out (LastLayer): it must not run what was compiled for the others
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False  # nor be compiled anew for other positions
    # torch keeps on disk what it compiled, and knows our operators in it by their names alone
    torch.compiler.config.cache_key_tag = hashlib.sha256(Path(attention.__file__).read_bytes()).hexdigest()
    for layer in layers:
        layer.compile(dynamic=True)
    return f"compile: {len(layers)} layers, at their first use (the first step takes longer)"


def save_full(model: nn.Module, directory: Path, dtype: torch.dtype, weights: dict | None = None) -> None:
    """Write config, generation_config and weights, rounded to `dtype`, without touching the model in memory."""
    rounded = model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
    rounded.save_pretrained(str(directory), state_dict=weights)


def read_full(model: PreTrainedModel, directory: Path) -> set[str]:
    """Read what `save_full` wrote into a model of the same form; return the names of weights that do not fit.

    Files have the names and shapes of the architecture's published models. Where transformers holds them otherwise
    (GPT-NeoX's head is called differently, the experts of a mixture lie in one tensor), it loads them itself, into a
    second model.
    """
    if getattr(model, "_weight_conversions", None) == []:  # set by from_pretrained: nothing had to be converted
        state, wrong = {}, set()
        for file in directory.glob("*.safetensors"):
            state.update(load_file(str(file)))
    else:
        found, info = _from_pretrained(type(model), str(directory), dtype=torch.float32, use_safetensors=True,
                                       output_loading_info=True)
        state, wrong = found.state_dict(), {*info["missing_keys"], *info["unexpected_keys"]}
    result = model.load_state_dict(state, strict=False)
    return wrong | set(result.unexpected_keys) | (set(result.missing_keys) - set(model.all_tied_weights_keys or ()))


def merge_and_save(model: nn.Module, chat: Chat, directory: Path, dtype: torch.dtype, samples: list[list[int]]) -> dict:
    """Merge an adapter into its base and save it, stand-alone, in `dtype`; `model` is used up.

    The merge is done and compared in fp32 on `samples` (token ids), then reloaded from disk and compared again.
    Returns the largest logit differences {"fp32", "saved"} and the largest logit; raises UserError beyond
    MERGE_TOLERANCE in fp32.
    """
    model.eval().to("cpu")  # a GPU that could train it may not hold it twice; and all logits are of one device
    before = _logits(model, samples)
    merged = model.merge_and_unload()
    fp32 = _largest_difference(before, _logits(merged, samples))
    largest = max(float(x.abs().max()) for x in before)
    if fp32 > MERGE_TOLERANCE * max(1.0, largest):
        raise UserError(f"{directory}: merged and adapter logits differ by {fp32:.1e} in fp32, more than "
                        f"{MERGE_TOLERANCE:g} of their size. The adapter is kept; please report the model and LoRA "
                        "settings.")
    merged.disable_input_require_grads()  # of gradient checkpointing: its hook cannot be copied
    set_special_ids(merged, chat)  # a base that knew the chat's tokens has other stop ids in its files
    work = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    try:
        save_full(merged, work, dtype)
        chat.save(work)
        flush(work)
        put_in_place(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    saved = load_model(str(directory)).eval()
    return {"fp32": fp32, "saved": _largest_difference(before, _logits(saved, samples)), "largest": largest,
            "dtype": str(dtype)[6:]}


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def _logits(model: nn.Module, samples: list[list[int]]) -> list[torch.Tensor]:
    causal_lm_of(model).set_attn_implementation("eager")
    device = next(model.parameters()).device
    inputs = [torch.tensor([ids], device=device) for ids in samples]
    return [model(input_ids=ids, use_cache=False).logits.float().cpu() for ids in inputs]


def _largest_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b))


def saved_dtype(config: object, asked: str | None) -> torch.dtype:
    """--merge_dtype, or the dtype of the base model's own weights."""
    own = getattr(config, "dtype", None) or (config and getattr(config.get_text_config(), "dtype", None))
    name = asked or str(own or "float32").removeprefix("torch.")
    return {"float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
            "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}[name]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def sample_prompts(examples: list, count: int = 4, length: int = 256) -> list[list[int]]:
    """Token ids of a few examples, for comparing logits."""
    return [np.asarray(e.input_ids[:length]).tolist() for e in examples[:count]]
