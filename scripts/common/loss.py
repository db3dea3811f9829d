"""Rows of examples -> one batch -> the loss, with the vocabulary head only where a token is trained.

Shapes: B rows, T tokens a row, S segments (examples and padding tails), N trained positions, H hidden size, V
vocabulary.
Examples packed into a row never see each other: positions restart at every segment, and the attention path in use is
told the segments' bounds (our own, flash-attn) or finds them in the positions (sdpa, eager).
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.attention import PACKED, set_ordinary_attention
from common.chat import Encoded
from common.faults import UserError

CHUNK_BYTES = 2**26  # logits that exist at a time: enough for full GEMM speed, and for a row of 1,024 at 32k in bf16
BLOCK_ELEMENTS = 2**19  # logits whose softmax is taken at a time on CPU (2 MiB in fp32)
SMALL_SHARE = 1e-30  # below it fp32 loses digits of a probability: its logarithm is taken from the logits


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


def make_batch(rows: list[list[Encoded]], pad_id: int, pad_to_multiple_of: int = 1, flat: bool = False) -> Batch:
    """Lay rows of examples below each other, or (flat) behind each other in one row, which needs no padding between
    them; the padding after the last example of a row is a segment of its own.

    No rows (a rank that has nothing to do in this step) give one padding token and no target.
    """
    if flat:
        rows = [[e for row in rows for e in row]]
    width = max([1, *(sum(len(e.input_ids) for e in row) for row in rows)])
    width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
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


class HeadLoss(torch.autograd.Function):
    """Sum of cross entropies of hidden states against a vocabulary matrix, chunk by chunk; the gradient is computed in
    the forward pass, so no logits are kept (the idea of Liger-Kernel's fused linear cross entropy, arXiv:2410.10989).

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) -> float64 scalar. GEMMs run in `dtype`, the softmax
    in fp32, the sum in fp64. The gradient of the logits is softmax - onehot(target); the target is taken off the
    products with it, which are V / H times smaller.
    """

    @staticmethod
    def forward(ctx: object, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        matrix = weight.detach().to(dtype)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        d_hidden, d_weight, d_bias = torch.empty_like(hidden) if need_h else None, None, None
        for start, end in _chunks(len(targets), len(weight), dtype):
            part, wanted = hidden[start:end].detach().to(dtype), targets[start:end]
            logits = part @ matrix.t() if bias is None else _logits(part, matrix, bias)  # (chunk, V)
            total += _to_shares(logits, wanted).sum(dtype=torch.float64)
            shares = logits.to(dtype)
            if need_b:
                d_bias = _sum(d_bias, shares.sum(0, dtype=torch.float32))
                d_bias.index_add_(0, wanted, torch.full(wanted.shape, -1.0, device=wanted.device))
            if need_h:
                d_hidden[start:end] = shares @ matrix - matrix[wanted]
            if need_w:
                d_weight = _sum(d_weight, shares.t() @ part)
                d_weight.index_add_(0, wanted, part.float(), alpha=-1)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple:
        # in place: nobody else has them, and a second pass over the same graph is refused by autograd
        scale = lambda d, dtype: None if d is None else d.mul_(grad.to(d.dtype)).to(dtype)
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        return (scale(d_hidden, d_hidden.dtype if d_hidden is not None else None), scale(d_weight, ctx.weight_dtype),
                scale(d_bias, ctx.weight_dtype), None, None)


def _chunks(rows: int, vocabulary: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Where chunks of equal size begin and end, such that the logits of one take at most CHUNK_BYTES. No rows are one
    empty chunk."""
    most = max(64, CHUNK_BYTES // (vocabulary * dtype.itemsize))
    size = -(-rows // max(1, -(-rows // most)))
    return [(start, min(start + size, rows)) for start in range(0, max(1, rows), max(1, size))]


def _to_shares(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Replace logits (N, V) by their softmax; return the losses in nats, fp32 (N,)."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    # on CPU so many rows at a time that their fp32 copy stays in the second-level cache
    block = len(logits) if logits.is_cuda else max(1, BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), block):
        rows = slice(start, start + block)
        own, wanted = logits[rows], targets[rows, None]
        shares = torch.softmax(own, 1, dtype=torch.float32)
        chosen = shares.gather(1, wanted)[:, 0]
        if logits.is_cuda or chosen.min() < SMALL_SHARE:  # (a look at a number would make the GPU wait)
            nats = own.amax(1).float() - shares.amax(1).log() - own.gather(1, wanted)[:, 0].float()
        else:
            nats = -chosen.log()
        losses[rows] = nats
        logits[rows] = shares
    return losses


def _sum(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    """total + more in fp32, in place where there is a total."""
    if total is None:
        return more.float()
    # on CPU so many rows at a time that the fp32 copy of `more` stays in the cache
    for own, part in zip(*(x.split(len(x) if x.is_cuda else 2048) for x in (total, more))):
        own.add_(part)
    return total


def _logits(hidden: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    logits = (hidden @ matrix.t()).float()
    return logits if bias is None else logits.add_(bias.detach().float())


class LastLayer:
    """What follows the keys and values of the last layer, computed only at the positions whose hidden state is wanted:
    nothing else reads the others. Its modules that treat each position by itself are given those positions alone, and
    their output is 0 elsewhere.
    """

    def __init__(self, model: nn.Module):
        layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList)), [None])
        found = (reduce(lambda part, name: getattr(part, name, None), path, layers[-1])
                 for path in (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp",)))
        self.modules = [module for module in found if module is not None and _arguments(module) == 1]
        self.wanted: tuple[torch.Tensor, torch.Size] | None = None  # positions in the flattened (B, T), and that shape
        for module in self.modules:
            module.register_forward_pre_hook(self._take)
            module.register_forward_hook(self._put)

    @contextmanager
    def only(self, positions: torch.Tensor, shape: torch.Size) -> Iterator[None]:
        self.wanted = positions, shape
        try:
            yield
        finally:
            self.wanted = None

    def _take(self, _: nn.Module, inputs: tuple) -> tuple | None:
        """(B, T, H) -> (1, N, H)"""
        if self.wanted is None:
            return None
        return inputs[0].flatten(0, 1).index_select(0, self.wanted[0])[None], *inputs[1:]

    def _put(self, _: nn.Module, __: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple | None:
        """(1, N, H) -> (B, T, H)"""
        if self.wanted is None:
            return None
        if isinstance(output, tuple):  # gpt-oss gives the scores of its experts as well
            return self._put(_, __, output[0]), *output[1:]
        positions, shape = self.wanted
        whole = output.new_zeros(shape.numel(), output.shape[-1])
        return whole.index_copy(0, positions, output[0]).unflatten(0, shape)


def _arguments(module: nn.Module) -> int:
    """The number of arguments that a module's forward must be given."""
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
               for p in inspect.signature(module.forward).parameters.values())


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
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, positions: torch.Tensor,
                targets: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
        if self.plain_head:
            logits = self._plain_logits(input_ids, position_ids, positions, bounds, longest)
            return F.cross_entropy(logits.float(), targets, reduction="none").sum(dtype=torch.float64)
        hidden = self._hidden(input_ids, position_ids, positions, bounds, longest)
        weight, bias, dtype = self._head(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return HeadLoss.apply(hidden, weight, bias, targets, dtype)

    def whole_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of the model's own forward pass."""
        return self.causal_lm(input_ids=input_ids, use_cache=False).logits

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss in nats (float32) and whether the most likely token is the target (bool), each (N,)."""
        losses, hits = [], []
        inputs = (batch.input_ids, batch.position_ids, batch.positions, batch.bounds, batch.longest)
        states = self._plain_logits(*inputs) if self.plain_head else self._hidden(*inputs)
        weight, bias, dtype = (None, None, None) if self.plain_head else self._head(states)
        with torch.autocast(states.device.type, enabled=False):
            matrix = None if weight is None else weight.to(dtype)
            vocabulary = states.shape[1] if matrix is None else len(matrix)
            for start, end in _chunks(len(batch.targets), vocabulary, torch.float32):
                part, wanted = states[start:end], batch.targets[start:end]
                logits = part.float() if matrix is None else _logits(part.to(dtype), matrix, bias)
                losses.append(F.cross_entropy(logits, wanted, reduction="none"))
                hits.append(logits.argmax(1) == wanted)
        return torch.cat(losses), torch.cat(hits)

    def _segments_of(self, bounds: torch.Tensor, longest: int) -> dict:
        if self.attention not in (PACKED, "flash_attention_2"):
            return {}  # sdpa and eager find the segments in position_ids
        return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}

    def _places(self, position_ids: torch.Tensor) -> dict:
        return {"position_ids": position_ids} if self.takes_positions else {}  # BLOOM and MPT have no such argument

    def _hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, positions: torch.Tensor,
                bounds: torch.Tensor, longest: int) -> torch.Tensor:
        """Last hidden states at `positions`, (N, H)."""
        # with gradient checkpointing a layer is computed again later, outside this block
        whole = self.whole_layers or getattr(self.causal_lm, "is_gradient_checkpointing", False)
        with nullcontext() if whole else self.last_layer.only(positions, input_ids.shape):
            states = self.causal_lm.base_model(input_ids=input_ids, use_cache=False, **self._places(position_ids),
                                               **self._segments_of(bounds, longest)).last_hidden_state
        return states.reshape(-1, states.shape[-1]).index_select(0, positions)

    def _head(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.dtype]:
        head, device = self.causal_lm.get_output_embeddings(), hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        return head.weight, getattr(head, "bias", None), dtype

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
    model, lines, half = loss_model.causal_lm, [], _computes_in_half(loss_model.causal_lm)
    device = next(model.parameters()).device
    names = {"auto": _preferences(model), "packed": [PACKED]}.get(asked, [asked])
    was_training = loss_model.training
    loss_model.eval()
    if model.config._attn_implementation == PACKED:
        set_ordinary_attention(model)
    reference = np.concatenate(reference_losses(loss_model, examples))
    if stateful := getattr(model, "_is_stateful", False):  # Mamba: a small leak would pass for rounding
        names = [name for name in names if name in ("sdpa", "eager")]
    if stateful and packing:
        raise UserError(f"model {model.config.model_type}: its state passes from one example of a row to the next. "
                        "Train with --no_packing.")
    rows = [examples] if packing else [[e] for e in examples]
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # small logits would not show it
    for name in names:
        try:
            model.set_attn_implementation(name)
        except (ImportError, ValueError) as fault:
            lines.append(f"attention {name}: not available ({str(fault).splitlines()[0]:.60} …)")
            continue
        loss_model.attention = name
        for plain, whole in ((True, True),) if capped else ((False, False), (False, True), (True, True)):
            loss_model.plain_head, loss_model.whole_layers = plain, whole
            batch = make_batch(rows, pad_id, len(examples[0].input_ids) + 3, loss_model.flat).to(device)
            try:
                found = loss_model.token_losses(batch)[0].cpu().numpy()
            except NotImplementedError as fault:
                lines.append(f"attention {_spoken(name)}: not for this model ({fault})")
                break
            apart = np.abs(found - reference) if len(found) else np.zeros(1)
            difference = float(apart.max())
            # half precision: two right paths differ by a rounding of a logit (up to 0.125 at 16 to 32) on single tokens
            if difference <= 1e-3 or (half and difference <= 0.3 and apart.mean() <= 0.03):
                head = "head at its own forward" if plain else (
                    "head" if whole else "head and last layer") + " at trained positions only"
                lines.append(f"attention {_spoken(name)}, {head}: {len(examples)} examples packed and apart "
                             f"differ "
                             f"by at most {difference:.1e} nats a token")
                loss_model.train(was_training)
                return lines
        else:
            lines.append(f"attention {_spoken(name)}: examples packed in a row see each other ({difference:.1e} nats a "
                         f"token)")
    raise UserError(f"model {model.config.model_type}: {'; '.join(lines)}. Choose another --attn_implementation, "
                    "or train with --no_packing.")


def _spoken(name: str) -> str:
    return "packed (segment by segment)" if name == PACKED else name


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
