"""Causal attention over packed rows: examples that lie behind each other in a row never see each other.

Shapes: B rows, T tokens a row, S segments (examples and padding tails), D head size. transformers knows it as PACKED;
the bounds of the segments come with every call.
"""
from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

PACKED = "sft_packed"  # the name under which packed_attention is known to transformers
BLOCK = 192  # queries at a time in causal_blocks: more waste work on what is masked, fewer are small products
LONGEST_KEPT = 1024  # keys up to which the probabilities of a query are kept (4 KiB a head)
# varlen_attn's keyword came and went between releases; without it fewer kv heads are passed straight through
TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters

# cuDNN's attention makes a plan for every new shape, and each token of an answer has one; with fewer than 8 kv heads it
# is known to give wrong greedy answers (pytorch issue 193893)
torch.backends.cuda.enable_cudnn_sdp(False)


def packed_attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
                     sliding_window: int | None = None, cu_seq_lens_q: torch.Tensor | None = None,
                     max_length_q: int | None = None, n_kept: int | None = None, softcap: float | None = None,
                     s_aux: torch.Tensor | None = None, **_: object) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment. query (B, heads, T, D), key and value (B, kv heads, T, D) -> (B, T, heads,
    D).

    CUDA: torch's own varlen kernel (half precision, no dropout). CPU: one small causal attention per segment, which
    beats a masked T x T attention 2.5 times at 16 segments in 2,048 tokens; by causal_blocks where that is possible
    and n_kept is told.
    NotImplementedError for scores that are capped (Gemma 2) and for sinks (gpt-oss).
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("scores are capped" if s_aux is None else "attention has sinks")
    if cu_seq_lens_q is None:
        raise NotImplementedError("it is not told the segment bounds: use sdpa")
    out_dtype = value.dtype
    if query.is_cuda:  # under autocast rotary embeddings promote q and k to fp32, matrices in 4 bits all three
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
        query, key, value = query.to(half), key.to(half), value.to(half)
    else:  # on CPU the backward pass of bf16 attention takes 2 to 4 times as long as that of fp32
        query, key, value = query.float(), key.float(), value.float()
    rows, heads, width, _ = query.shape
    window = sliding_window if sliding_window and sliding_window < (max_length_q or width) else None
    # (B, h, T, D) -> (B * T, h, D): segments are numbered over the flattened rows
    query, key, value = (x.transpose(1, 2).reshape(rows * width, -1, x.shape[-1]) for x in (query, key, value))
    dropout = dropout if module.training else 0.0
    if n_kept is not None and window is None and not dropout:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = causal_blocks(query, *_for_each_head(query, key, value), cu_seq_lens_q, n_kept, scaling)[0]
    elif query.is_cuda:
        out = _varlen_cuda(query, key, value, cu_seq_lens_q, max_length_q, scaling, window)
    else:
        out = _segments(query, key, value, cu_seq_lens_q, scaling, dropout, window)
    return out.reshape(rows, width, heads, -1).to(out_dtype), None


def _for_each_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of each head of the query."""
    group = query.shape[1] // key.shape[1]
    return (key, value) if group == 1 else (key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))


@torch.compiler.disable  # its loop over segments would be compiled anew for every batch
def _segments(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor,
              scaling: float | None, dropout: float, window: int | None) -> torch.Tensor:
    key, value = _for_each_head(query, key, value)
    # split, not slices: the gradient of a slice is a whole tensor of zeros for every segment
    lengths = bounds.diff().tolist()
    pieces = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (query, key, value)))  # (1, heads, length, D)
    parts = []
    for length, (q, k, v) in zip(lengths, pieces):
        mask = None
        if window is not None and length > window:
            gap = torch.arange(length)[:, None] - torch.arange(length)[None]
            mask = (gap >= 0) & (gap < window)
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                                                    scale=scaling).transpose(1, 2))
    return torch.cat(parts, 1)[0]


@torch.library.custom_op("sft::causal_blocks", mutates_args=())  # a compiled layer is one graph around it
def causal_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, n_kept: int,
                  scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside each segment: blocks of queries, each against the keys up to its end. Probabilities are
    kept for the backward pass, but for long segments; torch's own attention on CPU computes all of them anew, and takes
    1.4 times as long on instruction rows.

    query, key (T, heads, D), value (T, heads, E) fp32, bounds (S + 1,) of the segments in T, n_kept as of
    `count_kept`, or 0 where nothing is to be kept -> (T, heads, E), and the probabilities (heads * n_kept,).
    Gradients as in FlashAttention-2 (arXiv:2307.08691, section 3.2).
    """
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    kept = query.new_empty(query.shape[1] * n_kept)
    heads_first = [x.transpose(0, 1) for x in (query, key, value, out)]
    with torch.autocast("cpu", enabled=False):  # a bf16 product of this size saves no more than the casts cost
        for keys, rows, place in _blocks(bounds.tolist(), kept, query.shape[1]):
            q, k, v, o = (x[:, part] for x, part in zip(heads_first, (rows, keys, keys, rows)))
            o.copy_(torch.bmm(_probabilities(q, k, scaling, place), v))
    return out, kept


@torch.library.custom_op("sft::causal_blocks_backward", mutates_args=())
def _causal_blocks_backward(d_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                            kept: torch.Tensor, bounds: torch.Tensor,
                            scaling: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    query, key, value, d_out, d_query, d_key, d_value = (
        x.transpose(0, 1) for x in (query, key, value, d_out, *found))
    begin = -1
    # from the last block on: it is the one that reaches all keys of its segment, what the others find is added to that.
    # (a product into a slice of another tensor would be made head by head)
    for keys, rows, place in reversed(list(_blocks(bounds.tolist(), kept, len(query)))):
        q, k, v, d = query[:, rows], key[:, keys], value[:, keys], d_out[:, rows]
        shares = _probabilities(q, k, scaling) if place is None else place
        d_scores = torch.bmm(d, v.mT)
        torch.ops.aten._softmax_backward_data.out(d_scores, shares, -1, d_scores.dtype, grad_input=d_scores)
        torch.mul(torch.bmm(d_scores, k), scaling, out=d_query[:, rows])
        of_key, of_value = torch.bmm(d_scores.mT, q), torch.bmm(shares.mT, d)
        if keys.start != begin:
            torch.mul(of_key, scaling, out=d_key[:, keys])
            d_value[:, keys].copy_(of_value)
        else:
            d_key[:, keys].add_(of_key, alpha=scaling)
            d_value[:, keys].add_(of_value)
        begin = keys.start
    return found


@causal_blocks.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, n_kept: int,
      scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    return value.new_empty(value.shape), query.new_empty(query.shape[1] * n_kept)


@_causal_blocks_backward.register_fake
def _(_: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
      *__: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: object, inputs: tuple, output: tuple) -> None:
    query, key, value, bounds, _, ctx.scaling = inputs
    ctx.save_for_backward(query, key, value, output[1], bounds)
    ctx.set_materialize_grads(False)  # of what is kept: it would be as large


def _differentiate(ctx: object, d_out: torch.Tensor, _: torch.Tensor) -> tuple:
    return *_causal_blocks_backward(d_out, *ctx.saved_tensors, ctx.scaling), None, None, None


causal_blocks.register_autograd(_differentiate, setup_context=_save)


def count_kept(bounds: list[int]) -> int:
    """How many probabilities of a head causal_blocks keeps for segments with these bounds."""
    return sum((rows.stop - rows.start) * (keys.stop - keys.start) for keys, rows in _parts(bounds) if _is_kept(keys))


def _blocks(bounds: list[int], kept: torch.Tensor,
            heads: int) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
    """(keys, queries, place of the probabilities in what is kept, (heads, N, L), or None) of each block."""
    start = 0
    for keys, rows in _parts(bounds):
        place = None
        if len(kept) and _is_kept(keys):
            shape = heads, rows.stop - rows.start, keys.stop - keys.start
            place = kept[start:start + math.prod(shape)].view(shape)
            start += place.numel()
        yield keys, rows, place


def _parts(bounds: list[int]) -> Iterator[tuple[slice, slice]]:
    """(keys, queries) of each block: the keys reach from the begin of the segment to the end of the queries."""
    for begin, end in zip(bounds, bounds[1:]):
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            yield slice(begin, stop), slice(start, stop)


def _is_kept(keys: slice) -> bool:
    return keys.stop - keys.start <= LONGEST_KEPT


def _probabilities(query: torch.Tensor, key: torch.Tensor, scaling: float,
                   place: torch.Tensor | None = None) -> torch.Tensor:
    """Causal, of the last queries of a segment: query (heads, N, D), key (heads, L, D) -> (heads, N, L), in `place` if
    there is one."""
    heads, count, _ = query.shape
    scores = query.new_empty(heads, count, key.shape[1]) if place is None else place
    torch.baddbmm(scores, query, key.mT, beta=0, alpha=scaling, out=scores)
    scores[..., -count:] += _later(BLOCK)[:count, :count]
    return torch.softmax(scores, -1, out=scores)


@functools.cache
def _later(size: int) -> torch.Tensor:
    """(size, size): -inf where the key comes after the query."""
    return torch.full((size, size), -math.inf).triu_(1)


def _varlen_cuda(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
                 scaling: float | None, window: int | None) -> torch.Tensor:
    gqa = {"enable_gqa": query.shape[1] != key.shape[1]} if TAKES_GQA else {}
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling,
                       window_size=(window - 1, 0) if window else (-1, 0), **gqa)


def has_state(causal_lm: nn.Module) -> bool:
    """Whether something passes from token to token beside attention: Mamba's state, LFM2's convolution."""
    kinds = getattr(causal_lm.config.get_text_config(), "layer_types", None) or []
    return bool(getattr(causal_lm, "_is_stateful", False)) or any(
        "attention" not in kind or "linear" in kind for kind in kinds)


def causal_lm_of(model: nn.Module) -> nn.Module:
    """The causal language model itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def set_ordinary_attention(model: nn.Module) -> None:
    """Set a model to transformers' own attention: sdpa, or eager where the model has no sdpa (Gemma 2, gpt-oss)."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")


AttentionInterface.register(PACKED, packed_attention)
