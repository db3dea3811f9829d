"""Prompts -> answers, in batches, with a key/value cache, and the same answer in any batch.

Shapes: B rows still being written, T tokens so far (prompts padded on the left to the longest), V vocabulary.
Rows that have ended leave the batch, so a long answer does not hold up nor pay for the others.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from common.attention import causal_lm_of, has_state, set_ordinary_attention
from common.faults import NotFinite, UserError
from common.model import rope_limit

# Parameters, and parameters times tokens of a forward pass: what is below both does not pay for waking a second thread
# (3 x 128, 32 rows, two busy cores write 8,500 tokens a second with one thread and 500 with two).
SMALL, LITTLE_WORK = 20_000_000, 500_000_000
ROOM = 64  # tokens by which a cache grows


@dataclass(slots=True)
class Generated:
    """One answer. ids: without the stop id. stopped: it ended by itself. cut: the context was full before."""

    ids: list[int] = field(default_factory=list)
    stopped: bool = False
    cut: bool = False


@dataclass(frozen=True)
class How:
    """How tokens are chosen and where answers end. temperature 0 takes the likeliest token. places, heard: see
    generate."""

    stop_ids: frozenset[int]
    pad_id: int
    vocab_size: int | None
    temperature: float
    top_p: float
    seed: int
    places: Sequence[int]
    heard: Callable[[int, int], None] | None


def context_limit(model: nn.Module) -> int | None:
    """Longest sequence the model has positions for, in tokens; None where it names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # layers compiled for training would be compiled anew for a cache
def generate(model: nn.Module, prompts: list[list[int]], *, max_new_tokens: int | list[int], stop_ids: list[int],
             pad_id: int, vocab_size: int | None = None, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
             places: list[int] | None = None, batch_size: int = 32, max_batch_tokens: int = 32768,
             progress: Callable[[int], None] | None = None,
             heard: Callable[[int, int], None] | None = None) -> list[Generated]:
    """Continue each prompt (token ids, at least one) until a stop id, max_new_tokens (for all, or for each), or the end
    of the context.

    The answers come in the order of the prompts and do not depend on batch_size, max_batch_tokens (prompt and room for
    the answer, padding included) or the other prompts: greedy ones up to rounding of equal logits, sampled ones because
    the draws of prompt i are a function of (seed, places[i], which is i unless given). Ids from `vocab_size` on
    (embedding rows without a token) are never produced. `progress(n)` is told how many prompts have just been answered,
    heard(i, token) each token as it is written. Raises NotFinite for NaN logits.
    """
    causal_lm = causal_lm_of(model)
    if not {"past_key_values", "attention_mask"} <= _accepted(causal_lm):
        raise UserError(f"model {model.config.model_type}: it has no key/value cache, and answers are written with "
                        "one. Take a model with attention.")
    if not all(prompts):
        raise ValueError("an empty prompt cannot be continued: give at least one token id")
    how = How(frozenset(stop_ids), pad_id, vocab_size, temperature, top_p, seed, places or range(len(prompts)), heard)
    limit = context_limit(causal_lm)
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    room = [m if limit is None else max(0, min(m, limit - len(p))) for p, m in zip(prompts, most)]
    answers = [Generated(cut=r < m) for r, m in zip(room, most)]
    report = progress or (lambda n: None)
    report(sum(r == 0 for r in room))
    same_length = has_state(causal_lm)  # padding would pass through it
    was_training = model.training
    model.eval()
    try:
        with ordinary_attention(causal_lm), fitting_threads(causal_lm):
            for rows in _batches(prompts, room, batch_size, max_batch_tokens, same_length, rope_limit(model.config)):
                _answer(causal_lm, prompts, room, rows, answers, how, report)
    finally:
        model.train(was_training)
    for answer in answers:
        answer.cut = answer.cut and not answer.stopped
    return answers


def _accepted(causal_lm: nn.Module) -> set[str]:
    return set(inspect.signature(causal_lm.forward).parameters)


@contextmanager
def ordinary_attention(causal_lm: nn.Module) -> Iterator[None]:
    """A model set to our packed attention generates with sdpa: that path knows rows of segments, not a cache."""
    name = causal_lm.config._attn_implementation
    if name != "sft_packed":
        yield
        return
    set_ordinary_attention(causal_lm)
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(name)


@contextmanager
def fitting_threads(model: nn.Module) -> Iterator[None]:
    """On a CPU, one thread for what is little work of a small model."""
    causal_lm = causal_lm_of(model)
    threads, size = torch.get_num_threads(), sum(p.numel() for p in causal_lm.parameters())
    if next(causal_lm.parameters()).device.type != "cpu" or size >= SMALL:
        yield
        return

    def fit(_: nn.Module, given: tuple, named: dict) -> None:
        ids = [*given, *named.values()][0]
        torch.set_num_threads(1 if ids.numel() * size < LITTLE_WORK else threads)

    # what every forward pass begins with; not every one calls base_model (OPT's does not)
    hook = causal_lm.get_input_embeddings().register_forward_pre_hook(fit, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        torch.set_num_threads(threads)


class _RoomyLayer(DynamicLayer):
    """Keys and values with room behind them, where those of the next tokens are written: DynamicLayer copies all that
    there is for each. What else DynamicLayer does to its tensors (for beams, offloading) is not known to the room."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object,
               **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stores = [new[:, :, :0] for new in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._stores[0].shape[-2]:
            self._stores = [self._larger(store, start, end + ROOM) for store in self._stores]
        for store, new in zip(self._stores, (key_states, value_states)):
            store[:, :, start:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self._stores)
        return self.keys, self.values

    @staticmethod
    def _larger(store: torch.Tensor, used: int, size: int) -> torch.Tensor:
        larger = store.new_zeros(*store.shape[:2], size, store.shape[-1])
        larger[:, :, :used] = store[:, :, :used]
        return larger

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        end = self.get_seq_length()
        if end:
            self._stores = [store[indices] for store in self._stores]
            self.keys, self.values = (store[:, :, :end] for store in self._stores)


def _cache(causal_lm: nn.Module) -> DynamicCache:
    cache = DynamicCache(config=causal_lm.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _keep_rows(cache: DynamicCache, index: torch.Tensor) -> None:
    """Go on with these rows of the batch alone."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):  # states have no other method; keys go too
            layer.reorder_cache(index)
        else:
            layer.batch_select_indices(index)


def _batches(prompts: list[list[int]], room: list[int], batch_size: int, max_batch_tokens: int,
             same_length: bool = False, longest: int | None = None) -> Iterator[list[int]]:
    """Indices of prompts for each batch, long prompts first, so that what does not fit in memory shows at once. What
    may come to more tokens than `longest` has a batch of its own."""
    batch: list[int] = []
    for i in sorted((i for i, r in enumerate(room) if r), key=lambda i: -len(prompts[i])):
        if longest is not None and len(prompts[i]) + room[i] > longest:
            yield [i]
            continue
        if batch:
            widest = len(prompts[batch[0]]) + max(room[i], max(room[j] for j in batch))
            full = len(batch) == batch_size or (len(batch) + 1) * widest > max_batch_tokens
            if full or (same_length and len(prompts[i]) != len(prompts[batch[0]])):
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def _answer(causal_lm: nn.Module, prompts: list[list[int]], room: list[int], rows: list[int],
            answers: list[Generated], how: How, report: Callable[[int], None]) -> None:
    """Write the answers of one batch into `answers`."""
    device, accepted = next(causal_lm.parameters()).device, _accepted(causal_lm)
    width, most = max(len(prompts[i]) for i in rows), max(room[i] for i in rows)
    ids = np.full((len(rows), width), how.pad_id, np.int64)
    mask = np.ones((len(rows), width + most), np.int64)  # the room for the answer is seen as it is filled
    for b, i in enumerate(rows):
        ids[b, width - len(prompts[i]):] = prompts[i]
        mask[b, :width - len(prompts[i])] = 0
    padded = not mask.all()
    ids, mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
    positions = (mask[:, :width].cumsum(1) - 1).clamp_(min=0)
    draws = None if how.temperature == 0 else np.stack(
        [np.random.default_rng([how.seed, how.places[i]]).random(most) for i in rows])  # (B, most)
    cache, extra = _cache(causal_lm), {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    for step in range(most):
        if "position_ids" in accepted:
            extra["position_ids"] = positions
        logits = causal_lm(input_ids=ids, attention_mask=mask[:, :width + step] if padded else None,
                           past_key_values=cache, use_cache=True, **extra).logits[:, -1, :how.vocab_size]  # (B, V)
        chosen = _choose(logits.float(), how, None if draws is None else draws[:, step])
        keep = []
        for b, (i, token) in enumerate(zip(rows, chosen.tolist())):
            answers[i].stopped = token in how.stop_ids
            if not answers[i].stopped:
                answers[i].ids.append(token)
                if how.heard:
                    how.heard(i, token)
            if not answers[i].stopped and len(answers[i].ids) < room[i]:
                keep.append(b)
        if len(keep) < len(rows):
            report(len(rows) - len(keep))
            if not keep:
                return
            rows = [rows[b] for b in keep]
            draws = None if draws is None else draws[keep]
            index = torch.tensor(keep, device=device)
            chosen, mask, positions = chosen[index], mask[index], positions[index]
            _keep_rows(cache, index)
        ids, positions = chosen[:, None], positions[:, -1:] + 1


def _choose(logits: torch.Tensor, how: How, draws: np.ndarray | None) -> torch.Tensor:
    """The next token of each row, (B, V) -> (B,): the likeliest, or the one at the drawn place of the nucleus.

    Nucleus (top-p) sampling, arXiv:1904.09751: of the tokens in falling probability as many as it takes to reach top_p.
    """
    best, token = logits.max(-1)
    if not torch.isfinite(best).all():
        raise NotFinite("the model's logits are not finite while it generates. Its weights are broken, or overflow in "
                        "this precision: try --dtype float32.")
    if draws is None:
        return token
    chances, order = (logits.double() / how.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if how.top_p < 1:
        chances[chances.cumsum(-1) - chances >= how.top_p] = 0
    reached = chances.cumsum(-1)
    wanted = torch.from_numpy(draws).to(logits.device)[:, None] * reached[:, -1:]
    return order.gather(1, (reached > wanted).int().argmax(-1, keepdim=True))[:, 0]
