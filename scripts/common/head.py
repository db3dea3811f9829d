"""The end of a model at trained positions only: the vocabulary head with its loss, and the last layer before it.

Shapes: B rows, T tokens a row, N trained positions, H hidden size, V vocabulary.
"""
from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import nn

# logits that exist at a time: enough for full GEMM speed, and for a row of 1,024 at 32k in bf16; on a GPU more: with
# each chunk the gradient of the whole matrix is read and written
CHUNK_BYTES, CUDA_CHUNK_BYTES = 2**26, 2**29
BLOCK_ELEMENTS = 2**19  # logits whose softmax is taken at a time on CPU (2 MiB in fp32)
SMALL_SHARE = 1e-30  # below it fp32 loses digits of a probability: its logarithm is taken from the logits


class HeadLoss(torch.autograd.Function):
    """Sum of cross entropies of hidden states against a vocabulary matrix, chunk by chunk; the gradient is computed in
    the forward pass, so no logits are kept (the idea of Liger-Kernel's fused linear cross entropy, arXiv:2410.10989).

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) -> float64 scalar. rows (R, H): what stands at `ids`
    (R,) in place of the weight's own rows, so that of a frozen matrix only those have a gradient. GEMMs run in `dtype`,
    the softmax in fp32, the sum in fp64. The gradient of the logits is softmax - onehot(target), taken in fp32: of a
    token that is known, p = .999, what is left is .001, which bf16 beside 1 does not see.
    """

    @staticmethod
    def forward(ctx: object, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                targets: torch.Tensor, dtype: torch.dtype, ids: torch.Tensor | None = None,
                rows: torch.Tensor | None = None) -> torch.Tensor:
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        need_r = rows is not None and ctx.needs_input_grad[6]
        matrix = matrix_of(weight, dtype, ids, rows)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        d_hidden, d_weight, d_bias = torch.empty_like(hidden) if need_h else None, None, None
        d_rows = torch.zeros_like(rows, dtype=torch.float32) if need_r else None
        places = chunks(len(targets), len(matrix) * matrix.itemsize, matrix.is_cuda)
        # memory that all chunks share: it is dear to touch anew. A product in fp32 becomes the sum itself
        room = matrix.new_empty(places[0][1], len(matrix))
        product = matrix.new_empty(matrix.shape) if need_w and dtype != torch.float32 else None
        for start, end in places:
            part, wanted = hidden[start:end].detach().to(dtype), targets[start:end]
            logits = torch.mm(part, matrix.t(), out=room[:end - start])  # (chunk, V)
            logits = logits if bias is None else logits.float().add_(bias.detach().float())
            total += _to_gradient(logits, wanted).sum(dtype=torch.float64)
            d_logits = logits.to(dtype)
            if need_b:
                d_bias = _sum(d_bias, d_logits.sum(0, dtype=torch.float32))
            if need_h:
                d_hidden[start:end] = d_logits @ matrix
            if need_w:
                d_weight = _sum(d_weight, torch.mm(d_logits.t(), part, out=product))
            if need_r:
                d_rows += d_logits[:, ids].float().t() @ part.float()
        ctx.save_for_backward(d_hidden, d_weight, d_bias, d_rows)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple:
        # in place: nobody else has them, and a second pass over the same graph is refused by autograd
        scale = lambda d, dtype: None if d is None else d.mul_(grad.to(d.dtype)).to(dtype)
        d_hidden, d_weight, d_bias, d_rows = ctx.saved_tensors
        return (scale(d_hidden, d_hidden.dtype if d_hidden is not None else None), scale(d_weight, ctx.weight_dtype),
                scale(d_bias, ctx.weight_dtype), None, None, None, scale(d_rows, ctx.weight_dtype))


def chunks(rows: int, row_bytes: int, on_cuda: bool) -> list[tuple[int, int]]:
    """Where chunks of equal size begin and end, such that the logits of one take at most CHUNK_BYTES. No rows are one
    empty chunk."""
    most = max(64, (CUDA_CHUNK_BYTES if on_cuda else CHUNK_BYTES) // row_bytes)
    size = -(-rows // max(1, -(-rows // most)))
    return [(start, min(start + size, rows)) for start in range(0, max(1, rows), max(1, size))]


def _to_gradient(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Replace logits (N, V) by the gradient of the losses' sum; return the losses in nats, fp32 (N,)."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    # on CPU so many rows at a time that their fp32 copy stays in the second-level cache
    block = max(1, len(logits) if logits.is_cuda else BLOCK_ELEMENTS // logits.shape[1])
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
        logits[rows] = shares.scatter_(1, wanted, chosen[:, None] - 1)
    return losses


def _sum(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    """total + more in fp32, in place where there is a total."""
    if total is None:
        return more.float()
    # on CPU so many rows at a time that the fp32 copy of `more` stays in the cache
    for own, part in zip(*(x.split(len(x) if x.is_cuda else 2048) for x in (total, more))):
        own.add_(part)
    return total


def trained_rows(head: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(the frozen matrix, ids, the rows that stand there) of a head of which PEFT trains some rows; None for others."""
    layer = getattr(head, "token_adapter", None)
    if layer is None or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    rows, matrix = layer.trainable_tokens_delta[name], layer.base_layer.weight
    return matrix, torch.tensor(layer.token_indices[name]).to(matrix.device, non_blocking=True), rows


def matrix_of(weight: torch.Tensor, dtype: torch.dtype, ids: torch.Tensor | None,
              rows: torch.Tensor | None) -> torch.Tensor:
    """The vocabulary matrix (V, H) in `dtype`, with `rows` at `ids`; it knows no gradient."""
    matrix = weight.detach().to(dtype)
    return matrix if rows is None else matrix.index_copy(0, ids, rows.detach().to(dtype))


def logits_of(hidden: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    logits = (hidden @ matrix.t()).float()
    return logits if bias is None else logits.add_(bias.detach().float())


class LastLayer:
    """What follows the keys and values of the last layer, computed only at the positions whose hidden state is wanted:
    nothing else reads the others. Its modules that treat each position by itself are given those positions alone, and
    their output is 0 elsewhere.
    """

    def __init__(self, model: nn.Module):
        layers = next((m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)), [None])
        found = (reduce(lambda part, name: getattr(part, name, None), path, layers[-1])
                 for path in (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp",)))
        self.modules = [module for module in found if module is not None and _arguments(module) == 1]
        self.wanted: tuple[torch.Tensor, torch.Tensor] | None = None  # positions in (B, T) flattened, and its tokens
        for module in self.modules:
            module.register_forward_pre_hook(self._take)
            module.register_forward_hook(self._put)

    @contextmanager
    def only(self, positions: torch.Tensor, input_ids: torch.Tensor) -> Iterator[None]:
        """Wanted are these positions (N,) of the flattened input_ids (B, T)."""
        self.wanted = positions, input_ids  # (its shape would be a constant of a compiled layer)
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
        positions, input_ids = self.wanted
        whole = output.new_zeros(input_ids.numel(), output.shape[-1])
        return whole.index_copy(0, positions, output[0]).unflatten(0, input_ids.shape)


def _arguments(module: nn.Module) -> int:
    """The number of arguments that a module's forward must be given."""
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
               for p in inspect.signature(module.forward).parameters.values())
