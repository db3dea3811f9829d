"""How much memory a run needs, before a weight is loaded: a formula over the model's shape and the settings.

    weights       4 bytes a parameter (trained ones must be fp32); a base in 4 bits 0.55 a weight of its matrices
    gradients     4 bytes a trained parameter; twice that with several unsharded processes (their buckets)
    optimizer     AdamW 8 bytes a trained parameter, Adafactor and SGD next to nothing; two temporaries of one matrix
    activations   what a layer keeps for its backward pass, KEPT bytes for each token of a micro-batch; with
                  checkpointing only its input, and one layer is computed again at a time
    head          one chunk of logits and its exponentials, and the gradient of a trained vocabulary matrix

FSDP divides the first three by the number of processes and holds two gathered layers besides. KEPT was counted with
torch's saved_tensors_hooks on Llama layers, the two shares of SLACK (what the allocator cannot use again) were measured
on CPU by tests/benchmarks/bench_estimate.py. Elsewhere the sum is an estimate that nothing has checked.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CHUNK_BYTES = 2**26  # logits at a time, as in loss.py
# (LoRA, bf16) -> bytes a token and layer keeps: a * hidden + b * inner
KEPT = {(False, False): (44, 16), (False, True): (36, 8), (True, False): (72, 20), (True, True): (52, 12)}
LIBRARIES = 250 << 20  # bytes that come with training: code of libraries, the probe of the attention path, evaluation
SLACK = {False: 1.1, True: 1.6}  # by LoRA: activations take so much more than the sum of what is kept
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
    heads = text.num_attention_heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return Shape(text.hidden_size, inner, text.num_hidden_layers, heads,
                 getattr(text, "num_key_value_heads", None) or heads,
                 getattr(text, "head_dim", None) or text.hidden_size // heads, max(text.vocab_size, vocabulary),
                 bool(getattr(text, "tie_word_embeddings", False)))


def needed(shape: Shape, *, lora_r: int | None, tokens: int, bf16: bool, checkpointing: bool = False,
           in_4bit: bool = False, optim: str = "adamw", processes: int = 1, sharded: bool = False) -> dict[str, int]:
    """Bytes on one process, by what they are for. lora_r: None for full fine-tuning. tokens: of a micro-batch."""
    lora = lora_r is not None
    matrices = shape.layers * shape.layer
    adapters = shape.layers * sum(lora_r * (a + b) for a, b in shape.matrices.values()) if lora else 0
    trained = adapters if lora else shape.parameters
    share = processes if sharded else 1
    weights = (4 * (shape.parameters - matrices) + int((0.55 if in_4bit else 4) * matrices) + 4 * adapters) // share
    gradients = 4 * trained * (2 if processes > 1 and not sharded else 1) // share
    states = (8 * trained if optim == "adamw" else 0) // share
    largest = max(shape.vocabulary * shape.hidden if not lora else 0, max(a * b for a, b in shape.matrices.values())
                  if not lora else lora_r * shape.inner)
    a, b = KEPT[lora, bf16]
    kept = (a * shape.hidden + b * shape.inner) * tokens
    # autocast's copies of the matrices live until the backward pass; FSDP and 4 bits make each layer's anew
    copies = 2 * matrices if bf16 and not sharded and not in_4bit else 0
    if checkpointing:
        activations = SLACK[lora] * (shape.layers * 4 * shape.hidden * tokens + kept) + copies / shape.layers
    else:
        activations = SLACK[lora] * shape.layers * kept + copies
    gathered = 2 * 4 * (shape.layer + 2 * shape.hidden) if sharded else 0
    size = 2 if bf16 else 4
    logits = min(tokens, max(64, CHUNK_BYTES // (size * shape.vocabulary))) * shape.vocabulary
    head = 2 * size * logits + shape.vocabulary * shape.hidden * ((2 if bf16 else 0) + (0 if lora else 4))
    return {"weights": weights, "gradients": gradients, "optimizer": states + 2 * 4 * largest // share,
            "activations": int(activations) + gathered, "head": head, "libraries": LIBRARIES}


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
