"""Adapters: LoRA on a model, where it may be, and what of it lies frozen below."""
from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.faults import UserError
from common.model import add_tokens, count_parameters

if TYPE_CHECKING:
    from common.chat import Chat
    from common.settings import SftConfig


def add_lora(model: PreTrainedModel, config: SftConfig, token_ids: list[int], loaded: bool = True) -> nn.Module:
    """Wrap the model with a fresh LoRA adapter that also trains the rows of new tokens, tied or not.

    loaded: it has its weights; without them what its configuration calls tied may not be so in its file.
    """
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules
    targets = targets[0] if len(targets) == 1 and targets[0] == "all-linear" else list(targets)
    names = {name.rpartition(".")[2]: module for name, module in model.named_modules()
             if module in (model.get_input_embeddings(), model.get_output_embeddings())}
    saved = set(config.modules_to_save or [])
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                     if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()})
    tied = len({id(module.weight) for module in names.values()}) < len(names)
    modules = [name for name, _ in model.named_modules()]
    for flag, asked in (("lora_target_modules", [] if isinstance(targets, str) else targets),
                        ("modules_to_save", config.modules_to_save or [])):
        unknown = [name for name in asked if not any(f".{module}".endswith(f".{name}") for module in modules)]
        if unknown:  # PEFT says so only where none of them is there
            raise UserError(f"--{flag} {' '.join(unknown)}: there is no such module in a {model.config.model_type} "
                            f"model. It has {', '.join([*linear, *names])}.")
    _check_ends([] if isinstance(targets, str) else targets, set(names), saved, tied and loaded, bool(token_ids))
    whole = set(names) if tied and saved & set(names) else saved  # tied: what trains one whole trains the other
    rows = {name: token_ids for name in names if name not in whole} if token_ids else None
    for name in rows or ():
        if getattr(names[name], "bias", None) is not None:  # PEFT 0.21 computes such a head without its bias
            raise UserError(f"--use_lora: the head of a {model.config.model_type} model has a bias, beside which rows "
                            f"of new tokens cannot be trained. Set --modules_to_save {name}, take a --prompt_template "
                            "without new tokens (instruct), or --no_lora.")
    towers = "|".join(map(re.escape, towers_of(model)))
    try:
        return get_peft_model(model, LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets,
            modules_to_save=list(config.modules_to_save) if config.modules_to_save else None,
            use_rslora=config.use_rslora, use_dora=config.use_dora, task_type="CAUSAL_LM",
            exclude_modules=rf"({towers})(\..*)?" if towers else None,
            trainable_token_indices=rows or None, ensure_weight_tying=tied and bool(saved & set(names))))
    except ValueError as fault:
        reason = str(fault).splitlines()[0]
        if "ParamWrapper does not work with" in reason:  # experts in one tensor, to which no module is given its input
            raise UserError(f"--lora_target_modules {' '.join(config.lora_target_modules)}: adapters on the experts of "
                            f"a {model.config.model_type} model know neither dropout nor DoRA. Set --lora_dropout 0 "
                            f"without --use_dora, or leave the experts alone with --lora_target_modules "
                            f"{' '.join(linear)}.") from None
        raise UserError(f"--lora_target_modules {' '.join(config.lora_target_modules)}: {reason:.200} "
                        f"This model has {', '.join(linear)}.") from None


def _check_ends(targets: list[str], names: set[str], saved: set[str], tied: bool, new_tokens: bool) -> None:
    """Refuse an adapter on the embeddings or the head (`names`) where there can be none. Raises UserError."""
    for name in targets:
        end = name.rpartition(".")[2]
        if end not in names:
            continue
        whole = f"train the matrix whole with --modules_to_save {end}"
        if end in saved:
            raise UserError(f"--modules_to_save {end}: is in --lora_target_modules too. Leave it out of one of them.")
        if tied:
            raise UserError(f"--lora_target_modules {name}: embeddings and head are one matrix in this model, and an "
                            f"adapter on one of them could not be merged. Leave it out, or {whole}.")
        if new_tokens:
            raise UserError(f"--lora_target_modules {name}: rows of new tokens are trained there, beside which there "
                            f"can be no adapter. Leave it out, {whole}, or take a --prompt_template without new tokens "
                            "(instruct).")


def towers_of(model: PreTrainedModel) -> list[str]:
    """Names of what stands beside the decoder of text (eyes, ears): text alone gives it no gradient."""
    body, decoder = model.base_model, model.get_decoder()
    place = next((name for name, module in model.named_modules() if module is body), "")
    return [f"{place}.{name}".lstrip(".") for name, child in body.named_children()
            if body is not decoder and decoder not in {*child.modules()} and child not in {*decoder.modules()}]


def planned_parameters(config: SftConfig, base: object, chat: Chat) -> tuple[int, int]:
    """(all, trained) parameters of the model that training will make of this base, before any weight is fetched.

    base: its configuration. Raises UserError for an adapter that does not fit it.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(base))  # it is changed where embeddings grow
    with torch.random.fork_rng(devices=[]):  # PEFT draws the adapter's first weights
        token_ids, _ = add_tokens(model, chat, config.seed)
        return count_parameters(add_lora(model, config, token_ids, loaded=False) if config.use_lora else model)


def round_frozen(model: nn.Module, dtype: torch.dtype) -> int:
    """Hold the matrices that lie frozen below an adapter in `dtype`, to which autocast rounds them for every product
    anyway: no number changes, and a weight takes 2 bytes instead of 4 and 2 more for its copy. Returns how many.

    As they are stay the head (it may be the embedding), what is in 4 bits, experts in one tensor, and what lies below
    DoRA, which takes the norm of weights and adapter together.
    """
    from peft.tuners.lora import LoraLayer

    ends, found = (model.get_input_embeddings(), model.get_output_embeddings()), 0
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and layer not in ends and not layer.lora_variant:
            matrix = layer.get_base_layer()
            if type(matrix) in (nn.Linear, Conv1D):
                found += matrix.to(dtype).weight.numel()
    return found


def save_adapter(model: nn.Module, directory: Path, weights: dict | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors (new rows included, whole embeddings not)."""
    model.save_pretrained(str(directory), save_embedding_layers=False, state_dict=weights)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; the run writes its own
