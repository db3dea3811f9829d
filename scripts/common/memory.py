"""How much memory a run needs, before a weight is loaded: a formula over the model's shape, the settings and the plan.

    weights       4 bytes a parameter (trained ones must be fp32); of the matrices below adapters 2 in bf16, .55 in 4
                  bits
    gradients     4 bytes a trained parameter; twice that with several unsharded processes (their buckets)
    optimizer     AdamW 8 bytes a trained parameter, Adafactor and SGD next to nothing
    activations   what a layer keeps for its backward pass, KEPT bytes for each token of a micro-batch, the last layer
                  for its trained ones; attention's probabilities on CPU; with checkpointing only a layer's input,
                  and one layer is computed again at a time
    head          one chunk of logits (on a GPU with its softmax in fp32), and the gradient of a trained vocabulary
                  matrix

FSDP divides the first three by the number of processes and holds two gathered layers besides. KEPT was counted with
torch's saved_tensors_hooks on Llama layers. LIBRARIES, ROUNDED and SLACK (what glibc's allocator cannot use again) were
measured on CPU by tests/benchmarks/bench_estimate.py. Elsewhere the sum is an estimate that nothing has checked; it is
too low (activations by up to 40 %) for LoRA on matrices of a class of their own (GPT-2, Falcon), which stays PEFT's.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from common.plan import Plan

CHUNK_BYTES, CUDA_CHUNK_BYTES = 2**26, 2**29  # logits at a time, as in head.py
BLOCK, LONGEST_KEPT = 192, 1024  # of causal_blocks, as in attention.py
# (mode, bf16) -> bytes a token and layer keeps: a * hidden + b * inner + c * r; PEFT: LoRA that is not FusedLinear's
KEPT = {("full", False): (40, 16, 0), ("full", True): (40, 8, 0), ("LoRA", False): (38, 17, 28),
        ("LoRA", True): (38, 9, 14), ("PEFT", False): (68, 20, 28), ("PEFT", True): (56, 12, 14)}
KEPT_ONCE = 30  # bytes a token and hidden: embeddings, outputs of the last layer (counted 16 to 44, by mode and share)
LIBRARIES = 165 << 20  # bytes that come with training: code of libraries, the probe of the attention path, evaluation
ROUNDED = 115 << 20  # and so many more with LoRA in bf16
CONTEXT = 600 << 20  # what CUDA takes for itself (not measured)
# activations take so much more than the sum of what is kept, by mode and bf16
SLACK = {("full", False): 1.2, ("full", True): 1.2, ("LoRA", False): 1.4, ("LoRA", True): 1.5, ("PEFT", False): 1.65,
         ("PEFT", True): 1.65}
FLOPS_PER_PARAMETER = {False: 6, True: 4}  # of a token, by LoRA: the frozen matrices have no gradient of their own


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of the Llama family."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear modules of a layer."""
        h, q, kv = self.hidden, self.heads * self.head_size, self.kv_heads * self.head_size
        return {"q": (h, q), "k": (h, kv), "v": (h, kv), "o": (q, h), "gate": (h, self.inner), "up": (h, self.inner),
                "down": (self.inner, h)}

    @property
    def layer(self) -> int:
        """Weights of the matrices of one layer."""
        return sum(a * b for a, b in self.matrices.values())

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * (self.layer + 2 * self.hidden) + self.hidden


def shape_of(config: object, vocabulary: int = 0) -> Shape:
    """The shape of a model's configuration; vocabulary: rows of the embeddings where the tokenizer brings more."""
    text = config.get_text_config()
    if getattr(text, "is_heterogeneous", False):  # layers differ (Gemma 4): the first one's
        text = text.per_layer_config[0]
    heads = getattr(text, "num_attention_heads", None) or 1  # a state-space model has none: a rough shape
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner  # Gemma 3n: one for each layer
    return Shape(text.hidden_size, inner, text.num_hidden_layers, heads,
                 getattr(text, "num_key_value_heads", None) or heads,
                 getattr(text, "head_dim", None) or text.hidden_size // heads, max(text.vocab_size, vocabulary),
                 bool(getattr(text, "tie_word_embeddings", False)))


def kept_pairs(lengths: np.ndarray) -> np.ndarray:
    """Pairs of query and key whose probability is kept on CPU for a segment of each length (N,) -> int64 (N,).

    Blocks of queries, each against the keys up to its end; those that reach beyond LONGEST_KEPT are not kept.
    """
    lengths = np.asarray(lengths, np.int64)
    # n blocks are kept, with 1, 2, … n blocks of keys, and what remains of a segment that is kept to its end
    n = np.minimum(lengths, LONGEST_KEPT) // BLOCK
    rest = np.where(lengths <= LONGEST_KEPT, (lengths - n * BLOCK) * lengths, 0)
    return BLOCK * BLOCK * n * (n + 1) // 2 + rest


@dataclass(frozen=True)
class Load:
    """What one micro-batch holds: tokens, trained tokens, and pairs of which CPU attention keeps the probability."""

    tokens: int
    trained: int
    pairs: int = 0


def largest_load(plan: Plan, rows: int, on_cpu: bool) -> Load:
    """The most of each kind that the first micro-batch of so many rows holds in any step: it has the longest rows."""
    pairs = kept_pairs(np.arange(plan.lengths.max(initial=0) + 1)) * on_cpu  # of each length
    per_step = np.diff(plan.step_bounds)
    step_of, place = (np.repeat(each, per_step) for each in (np.arange(plan.n_steps), plan.step_bounds[:-1]))
    first = np.arange(len(step_of)) - place < rows
    found = []
    for of_example, of_value in ((plan.lengths, None), (plan.trained, None), (plan.lengths, pairs)):
        drawn = of_example[plan.draws]
        per_row = np.add.reduceat(drawn if of_value is None else of_value[drawn], plan.row_bounds[:-1], dtype=np.int64)
        per_row = per_row[np.lexsort((-per_row, step_of))]
        found.append(int(np.add.reduceat(np.where(first, per_row, 0), plan.step_bounds[:-1]).max(initial=0)))
    return Load(*found)


def needed(shape: Shape, load: Load, *, lora_r: int | None, bf16: bool, checkpointing: bool = False,
           in_4bit: bool = False, dora: bool = False, optim: str = "adamw", processes: int = 1, sharded: bool = False,
           on_cpu: bool = True, more: int = 0) -> dict[str, int]:
    """Bytes on one process, by what they are for. lora_r: None for full fine-tuning. load: of a micro-batch. more:
    weights that the shape does not tell of (experts); they stay in fp32."""
    lora = lora_r is not None
    matrices = shape.layers * shape.layer
    adapters = shape.layers * sum(lora_r * (a + b) for a, b in shape.matrices.values()) if lora else 0
    trained = adapters if lora else shape.parameters + more
    share = processes if sharded else 1
    rounded = lora and bf16 and not (sharded or dora)  # as round_frozen does
    per_weight = 0.55 if in_4bit else 2 if rounded else 4
    weights = (4 * (shape.parameters + more - matrices) + int(per_weight * matrices) + 4 * adapters) // share
    gradients = 4 * trained * (2 if processes > 1 and not sharded else 1) // share
    states = (8 * trained if optim == "adamw" else 0) // share
    mode = "full" if not lora else "PEFT" if sharded or dora or in_4bit else "LoRA"
    slack = SLACK[mode, bf16] if on_cpu else 1
    a, b, c = KEPT[mode, bf16]
    kept = a * shape.hidden + b * shape.inner + c * (lora_r or 0)
    shares = 4 * shape.heads * load.pairs
    # autocast's copies of the matrices live until the backward pass; FSDP makes each layer's anew
    copies = 2 * matrices if bf16 and not (sharded or rounded or in_4bit) else 0
    once = KEPT_ONCE * shape.hidden * load.tokens
    if checkpointing:
        activations = slack * ((shape.layers * 4 * shape.hidden + kept) * load.tokens + once) + shares
        activations += copies / shape.layers
    else:
        each = (shape.layers - 1) * load.tokens + load.trained
        activations = slack * (kept * each + once) + shape.layers * shares + copies
    gathered = 2 * 4 * (shape.layer + 2 * shape.hidden) if sharded else 0
    size = 2 if bf16 else 4
    chunk = max(64, (CHUNK_BYTES if on_cpu else CUDA_CHUNK_BYTES) // (size * shape.vocabulary))
    logits = min(load.trained, chunk) * shape.vocabulary
    copy = 2 if bf16 else 0  # of the matrix, and of its gradient
    head = shape.vocabulary * shape.hidden * (copy + (0 if lora else 4 + copy))
    head += logits * (size if on_cpu else size + 4)
    return {"weights": weights, "gradients": gradients, "optimizer": states, "activations": int(activations) + gathered,
            "head": head, "libraries": LIBRARIES + ROUNDED * rounded if on_cpu else CONTEXT}


def spoken(parts: Mapping[str, int], checked: bool) -> str:
    """memory needed about 2.31 GiB (weights 0.05, gradients 0.05, …)"""
    each = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    where = "" if checked else "; an estimate: nothing was measured on such a device"
    return f"memory needed about {sum(parts.values()) / 2**30:.2f} GiB a process ({each}){where}"


def seconds(shape: Shape, *, lora: bool, tokens: int, flops: float, trained_share: float = 0.5) -> float:
    """Time of training on so many tokens at `flops` useful operations a second: matrices at all tokens, the head at
    trained ones (6 or 4 operations a weight and token, Kaplan et al., arXiv:2001.08361)."""
    body = shape.layers * shape.layer * tokens
    head = shape.vocabulary * shape.hidden * tokens * trained_share
    return FLOPS_PER_PARAMETER[lora] * (body + head) / flops
