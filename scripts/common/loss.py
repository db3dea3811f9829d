"""Rows of examples -> one batch -> the loss, with the vocabulary head only where a token is trained.

Shapes: B rows, T tokens a row, S segments (examples and padding tails), N trained positions, H hidden size, V
vocabulary.
Examples packed into a row never see each other: positions restart at every segment, and the attention path in use is
told the segments' bounds (our own, flash-attn) or finds them in the positions (sdpa, eager).
"""
from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.attention import PACKED, causal_lm_of, count_kept
from common.chat import Encoded
from common.head import HeadLoss, LastLayer, chunks, logits_of, matrix_of, trained_rows

# tokens of a flat batch are filled up to a multiple of this: beside odd lengths oneDNN's bf16 products take up to 1.1
# times as long (6,083 tokens against 6,096), and the tensor cores of a GPU want multiples of 8
FLAT_MULTIPLE = 16


@dataclass
class Batch:
    """Tensors of one forward. Targets are shifted already: the hidden state at positions[i] predicts targets[i]."""

    input_ids: torch.Tensor  # int64 (B, T)
    position_ids: torch.Tensor  # int64 (B, T), restarting at every segment
    positions: torch.Tensor  # int64 (N,) into the flattened (B * T)
    targets: torch.Tensor  # int64 (N,)
    bounds: torch.Tensor  # int32 (S + 1,) of the segments in the flattened (B * T)
    longest: int  # longest segment
    owners: np.ndarray  # int64 (N,): which example (in order of appearance) a target belongs to

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In page-locked memory, from which a copy to the GPU does not wait for what the GPU is doing."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(**{k: change(v) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()})


def make_batch(rows: list[list[Encoded]], pad_id: int, pad_to_multiple_of: int | None = None,
               flat: bool = False) -> Batch:
    """Lay rows of examples below each other, or (flat) behind each other in one row, which needs no padding between
    them; the padding after the last example of a row is a segment of its own.

    No rows (a rank that has nothing to do in this step) give padding alone and no target.
    """
    multiple = pad_to_multiple_of or (FLAT_MULTIPLE if flat else 1)
    if flat:
        rows = [[e for row in rows for e in row]]
    width = max([1, *(sum(len(e.input_ids) for e in row) for row in rows)])
    width = -(-width // multiple) * multiple
    input_ids = np.full((max(len(rows), 1), width), pad_id, np.int64)
    position_ids = np.zeros_like(input_ids)
    bounds, positions, targets, owners, example = [0], [], [], [], 0
    for b, row in enumerate(rows or [[]]):
        at = 0
        for encoded in row:
            length = len(encoded.input_ids)
            input_ids[b, at:at + length] = encoded.input_ids
            position_ids[b, at:at + length] = np.arange(length)
            predicted = np.flatnonzero(encoded.trained[1:])  # position t predicts token t + 1
            positions.append(b * width + at + predicted)
            targets.append(encoded.input_ids[predicted + 1])
            owners.append(np.full(len(predicted), example))
            example += 1
            at += length
            bounds.append(b * width + at)
        if at < width:
            position_ids[b, at:] = np.arange(width - at)
            bounds.append((b + 1) * width)
    join = lambda parts: np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(position_ids), torch.from_numpy(join(positions)),
                 torch.from_numpy(join(targets)), torch.tensor(bounds, dtype=torch.int32),
                 int(np.diff(bounds).max()), join(owners))


class LossModel(nn.Module):
    """A causal language model whose forward is the loss: accelerate, DDP and FSDP wrap this, so their hooks all run.

    forward(batch) -> sum of the loss over the batch's targets, float64 scalar. `token_losses` gives them one by one.
    """

    def __init__(self, model: nn.Module, attention: str, neftune_noise_alpha: float | None = None):
        super().__init__()
        self.model = model
        self.attention = attention
        self.plain_head = False  # set where the head does more than a product with its matrix (`choose_attention`)
        self.last_layer = LastLayer(self.causal_lm.base_model)
        self.whole_layers = False  # set where the last layer is not one of the known form (`choose_attention`)
        self.takes_positions = "position_ids" in inspect.signature(self.causal_lm.forward).parameters
        self.noisy = bool(neftune_noise_alpha)
        if self.noisy:
            model.get_input_embeddings().register_forward_hook(_neftune(neftune_noise_alpha))

    @property
    def flat(self) -> bool:
        """Whether rows may lie behind each other: attention is told the segments, and nothing depends on the width."""
        return self.attention in (PACKED, "flash_attention_2") and not (self.noisy or self.plain_head)

    @property
    def causal_lm(self) -> nn.Module:
        return causal_lm_of(self.model)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, positions: torch.Tensor,
                targets: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        if self.plain_head:
            logits = self._plain_logits(input_ids, position_ids, positions, bounds, longest)
            return F.cross_entropy(logits.float(), targets, reduction="none").sum(dtype=torch.float64)
        hidden = self._hidden(input_ids, position_ids, positions, bounds, longest)
        weight, bias, dtype, ids, rows = self._head(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return HeadLoss.apply(hidden, weight, bias, targets, dtype, ids, rows)

    def whole_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of the model's own forward pass."""
        return self.causal_lm(input_ids=input_ids, use_cache=False).logits

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss in nats (float32) and whether the most likely token is the target (bool), each (N,)."""
        losses, hits = [], []
        inputs = (batch.input_ids, batch.position_ids, batch.positions, batch.bounds, batch.longest)
        states = self._plain_logits(*inputs) if self.plain_head else self._hidden(*inputs)
        matrix = bias = dtype = None
        if not self.plain_head:
            weight, bias, dtype, ids, rows = self._head(states)
            matrix = matrix_of(weight, dtype, ids, rows)
        with torch.autocast(states.device.type, enabled=False):
            vocabulary = states.shape[1] if matrix is None else len(matrix)
            for start, end in chunks(len(batch.targets), 4 * vocabulary, states.is_cuda):
                part, wanted = states[start:end], batch.targets[start:end]
                logits = part.float() if matrix is None else logits_of(part.to(dtype), matrix, bias)
                losses.append(F.cross_entropy(logits, wanted, reduction="none"))
                hits.append(logits.argmax(1) == wanted)
        return torch.cat(losses), torch.cat(hits)

    def _segments_of(self, bounds: torch.Tensor, longest: int) -> dict:
        if self.attention not in (PACKED, "flash_attention_2"):
            return {}  # sdpa and eager find the segments in position_ids
        told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        if self.attention == PACKED and not bounds.is_cuda:
            told["n_kept"] = count_kept(bounds.tolist()) if torch.is_grad_enabled() else 0
        return told

    def _places(self, position_ids: torch.Tensor) -> dict:
        return {"position_ids": position_ids} if self.takes_positions else {}  # BLOOM and MPT have no such argument

    def _hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, positions: torch.Tensor,
                bounds: torch.Tensor, longest: int) -> torch.Tensor:
        """Last hidden states at `positions`, (N, H)."""
        # with gradient checkpointing a layer is computed again later, outside this block
        whole = self.whole_layers or getattr(self.causal_lm, "is_gradient_checkpointing", False)
        with nullcontext() if whole else self.last_layer.only(positions, input_ids):
            states = self.causal_lm.base_model(input_ids=input_ids, use_cache=False, **self._places(position_ids),
                                               **self._segments_of(bounds, longest)).last_hidden_state
        return states.reshape(-1, states.shape[-1]).index_select(0, positions)

    def _head(self, hidden: torch.Tensor) -> tuple:
        """(weight, bias, dtype, ids, rows) of the vocabulary head, as HeadLoss takes them."""
        head, device = self.causal_lm.get_output_embeddings(), hidden.device.type
        weight, ids, rows = trained_rows(head) or (head.weight, None, None)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return weight, getattr(head, "bias", None), dtype, ids, rows

    def _plain_logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor, positions: torch.Tensor,
                      bounds: torch.Tensor, longest: int) -> torch.Tensor:
        """Logits at `positions` through the model's own forward, row by row, (N, V)."""
        width, logits = input_ids.shape[1], []
        for b in range(len(input_ids)):
            own = positions[(positions >= b * width) & (positions < (b + 1) * width)] - b * width
            inside = (bounds >= b * width) & (bounds <= (b + 1) * width)
            keep = own if len(own) else own.new_zeros(1)
            out = self.causal_lm(input_ids=input_ids[b:b + 1], use_cache=False, logits_to_keep=keep,
                                 **self._places(position_ids[b:b + 1]),
                                 **self._segments_of(bounds[inside] - b * width, longest)).logits[0]
            logits.append(out if len(own) else out[:0])
        return torch.cat(logits)


def _neftune(alpha: float) -> object:
    """Uniform noise on the embeddings while training (NEFTune, arXiv:2310.05914): alpha / sqrt(T * H) in size."""
    def hook(module: nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        size = alpha / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.empty_like(output).uniform_(-size, size)
    return hook


def batch_inputs(batch: Batch) -> dict:
    """What LossModel.forward takes, as keywords (plain tensors, so that every wrapper can pass them on)."""
    names = ("input_ids", "position_ids", "positions", "targets", "bounds", "longest")
    return {name: getattr(batch, name) for name in names}
