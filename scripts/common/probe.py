"""The attention path and the shortened end of a model, chosen for it and proven on real examples.

Packed in one row and each alone through the model's own forward, the examples must give the same losses.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from common.attention import PACKED, has_state, set_ordinary_attention
from common.chat import Encoded
from common.faults import UserError
from common.loss import LossModel, make_batch
from common.ranks import of_a_collective


@torch.no_grad()
def reference_losses(model: nn.Module, examples: list[Encoded]) -> list[np.ndarray]:
    """Per-token losses of each example alone, unpacked, through the model's own forward and full logits.

    model: a LossModel (its weights may be spread over processes) or the causal language model itself.
    """
    forward = getattr(model, "whole_logits", None) or (lambda ids: model(input_ids=ids, use_cache=False).logits)
    losses = []
    for encoded in examples:
        ids = torch.from_numpy(encoded.input_ids.astype(np.int64))[None].to(next(model.parameters()).device)
        logits = forward(ids)[0, :-1].float()
        keep = torch.from_numpy(encoded.trained[1:].copy()).to(ids.device)
        losses.append(F.cross_entropy(logits[keep], ids[0, 1:][keep], reduction="none").cpu().numpy())
    return losses


def choose_attention(loss_model: LossModel, examples: list[Encoded], pad_id: int, asked: str,
                     packing: bool) -> list[str]:
    """Set the attention path and prove it on real examples: packed and apart they must give the same losses.

    asked: auto | packed | sdpa | eager | flash_attention_2. Returns lines for the log. Raises UserError when a path
    that was asked for leaks or is not there, or when no path keeps this model's examples apart. Call it under the
    autocast of training: the path that is chosen, and what is proven, depend on it.
    """
    model, was_training = loss_model.causal_lm, loss_model.training
    names = _candidates(model, asked, packing)
    loss_model.eval()
    if model.config._attn_implementation == PACKED:
        set_ordinary_attention(model)
    reference = np.concatenate(reference_losses(loss_model, examples))
    rows, lines = [examples] if packing else [[e] for e in examples], []
    for name in names:
        proven, line = _prove(loss_model, name, rows, reference, pad_id)
        lines.append(line)
        if proven:
            loss_model.train(was_training)
            return lines
    raise UserError(f"model {model.config.model_type}: {'; '.join(lines)}. Choose another --attn_implementation, "
                    "or train with --no_packing.")


def _candidates(model: nn.Module, asked: str, packing: bool) -> list[str]:
    """transformers' names of the attention paths to try, the fastest first."""
    names = {"auto": _preferences(model), "packed": [PACKED]}.get(asked, [asked])
    if not has_state(model):
        return names
    if packing:  # a small leak would pass for rounding
        raise UserError(f"model {model.config.model_type}: its state passes from one example of a row to the next. "
                        "Train with --no_packing.")
    if not (names := [name for name in names if name in ("sdpa", "eager")]):
        raise UserError(f"model {model.config.model_type}: --attn_implementation {asked} is not for it: use auto.")
    return names


def _prove(loss_model: LossModel, name: str, rows: list[list[Encoded]], reference: np.ndarray,
           pad_id: int) -> tuple[bool, str]:
    """Set an attention path, and the shortest end of the model that gives the reference's losses (M,); whether there is
    one, and a line about it."""
    model, half = loss_model.causal_lm, _computes_in_half(loss_model.causal_lm)
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as fault:
        return False, f"attention {name}: not available ({str(fault).splitlines()[0]:.60} …)"
    loss_model.attention = name
    if name == PACKED and next(model.parameters()).is_cuda and _has_dropout(model):
        return False, f"attention {_spoken(name)}: not for this model (it has dropout, which torch's kernel does not)"
    for plain_head, whole_layers, end in _ends(model):
        loss_model.plain_head, loss_model.whole_layers = plain_head, whole_layers
        # a row is never full: the padding behind it must not be seen either
        batch = make_batch(rows, pad_id, len(rows[0][0].input_ids) + 3, loss_model.flat)
        try:
            with _told_windows(model, name) as windows:
                found = loss_model.token_losses(batch.to(next(model.parameters()).device))[0].cpu().numpy()
        except (NotImplementedError, RuntimeError) as fault:  # a kernel says RuntimeError: head size, dtype, device
            if of_a_collective(fault) or isinstance(fault, (torch.OutOfMemoryError, torch.AcceleratorError)):
                raise
            return False, f"attention {_spoken(name)}: not for this model ({str(fault).splitlines()[0]:.120})"
        if windows is not None and not any(windows):
            return False, f"attention {_spoken(name)}: not for this model (its sliding window stands in the mask alone)"
        apart = np.abs(found - reference) if len(found) else np.zeros(1)
        # half precision: two right paths differ by a rounding of a logit (up to 0.125 at 16 to 32) on single tokens
        if apart.max() <= 1e-3 or (half and apart.max() <= 0.3 and apart.mean() <= 0.03):
            return True, (f"attention {_spoken(name)}, {end} at trained positions only: {sum(map(len, rows))} examples "
                          f"packed and apart differ by at most {apart.max():.1e} nats a token")
    return False, f"attention {_spoken(name)}: examples packed in a row see each other ({apart.max():.1e} nats a token)"


@contextmanager
def _told_windows(model: nn.Module, name: str) -> Iterator[list[int | None] | None]:
    """For a model with a sliding window, and attention that is given no mask: what windows it is told instead. Examples
    of a proof are shorter than a window, so that their losses would not show one that is lost."""
    known, config = AttentionInterface(), model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding"]
    slides = getattr(config, "sliding_window", None) and any("sliding" in kind for kind in kinds)
    if name not in (PACKED, "flash_attention_2") or not slides:
        yield None
        return
    real, told = known[name], []

    def listen(*inputs: object, **more: object) -> tuple:
        told.append(more.get("sliding_window"))
        return real(*inputs, **more)

    AttentionInterface.register(name, listen)
    try:
        yield told
    finally:
        AttentionInterface.register(name, real)


def _ends(model: nn.Module) -> list[tuple[bool, bool, str]]:
    """(plain_head, whole_layers, its name) of each end of a model to try, the shortest first."""
    ends = [(False, False, "head and last layer"), (False, True, "head"), (True, True, "head at its own forward")]
    # what a proof would not see: small logits are not capped, and an adapter begins at zero
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    adapted = hasattr(model.get_output_embeddings(), "lora_A")
    return ends[-1:] if capped or adapted or model.base_model is model else ends


def _spoken(name: str) -> str:
    return "packed (segment by segment)" if name == PACKED else name


def _has_dropout(model: nn.Module) -> bool:
    """Whether attention drops probabilities in training, by the names that architectures have for it."""
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("attention_dropout", "attn_pdrop", "attn_dropout"))


def _computes_in_half(model: nn.Module) -> bool:
    """Whether its matrix products are done in 16 bits: by its own dtype, or under autocast here."""
    parameter = next(model.parameters())
    return parameter.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(parameter.device.type)


def _preferences(model: nn.Module) -> list[str]:
    from transformers.utils import is_flash_attn_2_available

    half = _computes_in_half(model)
    if next(model.parameters()).is_cuda:
        fast = ["flash_attention_2"] if is_flash_attn_2_available() and half else []
        return [*fast, *([PACKED] if half else []), "sdpa", "eager"]
    return [PACKED, "sdpa", "eager"]
