"""The loss: packed equals separate on every attention path, the head only where trained, token-weighted."""
from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from common import attention, head
from common.attention import PACKED, count_kept, packed_attention
from common.chat import Encoded
from common.faults import UserError
from common.head import HeadLoss
from common.loss import FLAT_MULTIPLE, LossModel, batch_inputs, make_batch
from common.model import compile_layers
from common.probe import _has_dropout, choose_attention, reference_losses


def example(length: int, seed: int, share: float = 0.5, vocabulary: int = 64) -> Encoded:
    draw = np.random.default_rng(seed)
    trained = draw.random(length) < share
    trained[0] = False
    return Encoded(draw.integers(4, vocabulary, length).astype(np.int32), trained)


EXAMPLES = [example(n, n) for n in (13, 7, 21, 5)]


def llama(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
                "tie_word_embeddings": True, "initializer_range": 0.3, **changes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))


def reference(model: torch.nn.Module, examples: list[Encoded]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss sum and gradients of examples one by one, full logits, eager attention: nothing clever."""
    model.set_attn_implementation("eager")
    model.zero_grad()
    total = 0.0
    for e in examples:
        ids = torch.from_numpy(e.input_ids.astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        keep = torch.from_numpy(e.trained[1:].copy())
        loss = F.cross_entropy(logits[keep], ids[0, 1:][keep], reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def packed(model: torch.nn.Module, attention: str, rows: list[list[Encoded]]) -> tuple[float, dict[str, torch.Tensor]]:
    model.set_attn_implementation(attention)
    model.zero_grad()
    loss = LossModel(model, attention)(**batch_inputs(make_batch(rows, pad_id=0)))
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two gradients relative to the norm."""
    assert a.keys() == b.keys()
    norm = torch.sqrt(sum((x.double() ** 2).sum() for x in a.values()))
    return float(torch.sqrt(sum(((a[n].double() - b[n].double()) ** 2).sum() for n in a)) / norm)


LAYOUTS = {"one row": [EXAMPLES], "two rows": [EXAMPLES[:2], EXAMPLES[2:]], "padded": [[e] for e in EXAMPLES]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", [PACKED, "sdpa", "eager"])
def test_packed_loss_and_gradients_equal_separate_ones(attention: str, layout: str) -> None:
    """Bug: examples in a row see each other, or a padding token, and the loss is quietly another one."""
    model = llama().train()
    loss, gradients = reference(model, EXAMPLES)
    found, found_gradients = packed(model, attention, LAYOUTS[layout])
    assert abs(found - loss) <= 1e-6 * loss
    assert distance(gradients, found_gradients) <= 1e-5


@pytest.mark.parametrize("attention", [PACKED, "sdpa", "eager"])
def test_the_comparison_would_catch_a_leak(attention: str) -> None:
    """Bug: a check that passes whatever happens. One long segment instead of four must be seen."""
    model = llama()
    loss, gradients = reference(model, EXAMPLES)
    joined = Encoded(np.concatenate([e.input_ids for e in EXAMPLES]), np.concatenate([e.trained for e in EXAMPLES]))
    found, found_gradients = packed(model, attention, [[joined]])
    assert abs(found - loss) > 1e-3 * loss
    assert distance(gradients, found_gradients) > 1e-2


def test_untied_head_with_bias_and_frozen_parts() -> None:
    """Bug: the gradient of an untied head is lost, or one is computed for frozen weights."""
    model = llama(tie_word_embeddings=False)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(64))
    model.model.embed_tokens.weight.requires_grad_(False)
    loss, gradients = reference(model, EXAMPLES)
    found, found_gradients = packed(model, PACKED, [EXAMPLES])
    assert "model.embed_tokens.weight" not in found_gradients and "lm_head.bias" in found_gradients
    assert abs(found - loss) <= 1e-6 * loss and distance(gradients, found_gradients) <= 1e-5


def test_head_loss_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the last, shorter chunk is lost or counted twice."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(301, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (301,))
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for size in (1, 4 * 50 * 100, 10**9):
        monkeypatch.setattr("common.head.CHUNK_BYTES", size)
        loss = HeadLoss.apply(hidden, weight, None, targets, torch.float32)
        found = torch.autograd.grad(loss, (hidden, weight))
        torch.testing.assert_close(loss.item(), expected.item(), rtol=1e-6, atol=0)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_left_to_learn_of_known_tokens_survives_bf16() -> None:
    """Bug: p = .999 is rounded to 1 before 1 is taken off, and the gradient of what is nearly learnt (the end of a
    turn) is noise. A plain loop under autocast is the measure."""
    torch.manual_seed(0)
    weight = torch.randn(40, 16).bfloat16().float()
    targets = torch.arange(40).repeat(20)
    hidden = weight[targets] * (14 / weight[targets].square().sum(1, keepdim=True)) + .1 * torch.randn(800, 16)
    hidden, weight = (x.bfloat16().float().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.t()
    assert .99 < logits.softmax(1).gather(1, targets[:, None]).median() < 1
    exact = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), (hidden, weight))
    low = (hidden.bfloat16() @ weight.bfloat16().t()).float()
    plain = torch.autograd.grad(F.cross_entropy(low, targets, reduction="sum"), (hidden, weight))
    found = torch.autograd.grad(HeadLoss.apply(hidden, weight, None, targets, torch.bfloat16), (hidden, weight))
    for wanted, theirs, ours in zip(exact, plain, found):
        assert (ours - wanted).norm() < 1.1 * (theirs - wanted).norm() < .1 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_that_the_model_all_but_excludes_has_its_true_loss(dtype: torch.dtype) -> None:
    """Bug: the probability of a very unlikely target is 0 in fp32, and its loss infinite."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[512.0, 1.0], [0.0, 0.0], [-256.0, 2.0]])
    targets = torch.tensor([2, 0, 1])
    loss = HeadLoss.apply(hidden, weight, None, targets, dtype)
    true = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum")
    assert true > 1000
    torch.testing.assert_close(loss, true, rtol=1e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_the_last_layer_sees_only_trained_positions(changes: dict) -> None:
    """Bug: the last layer is computed everywhere (or, the tests of equality passing, nowhere it matters)."""
    model, seen = llama(**changes), {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        module = model.model.layers[-1].get_submodule(name)
        module.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0].shape[:-1].numel()}))
    loss, gradients = reference(model, EXAMPLES)
    found, found_gradients = packed(model, PACKED, [EXAMPLES[:2], EXAMPLES[2:]])
    trained = sum(int(e.trained.sum()) for e in EXAMPLES)
    assert seen.pop("self_attn.k_proj") == 2 * 26 and set(seen.values()) == {trained}
    assert abs(found - loss) <= 1e-6 * loss and distance(gradients, found_gradients) <= 1e-5
    model.set_attn_implementation("sdpa")
    model(input_ids=torch.ones(1, 9, dtype=torch.int64))  # on its own it is as it was
    assert set(seen.values()) == {9}


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_attention_by_blocks_equals_eager(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a block sees keys after its queries, or the last, shorter block loses its gradient."""
    monkeypatch.setattr("common.attention.BLOCK", 4)
    monkeypatch.setattr("common.attention.LONGEST_KEPT", 14)  # some probabilities are computed anew
    model = llama(num_key_value_heads=kv_heads)
    loss, gradients = reference(model, EXAMPLES)
    found, found_gradients = packed(model, PACKED, [EXAMPLES])
    assert abs(found - loss) <= 1e-6 * loss and distance(gradients, found_gradients) <= 1e-5


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_layers_are_the_same_and_never_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: every batch is compiled anew, attention cuts a layer into pieces, the last layer runs what was compiled for
    the others, at every position, or all of them what another version of attention.py left on the disk."""
    from torch._dynamo.utils import counters

    model = llama()
    losses, gradients = zip(*(reference(model, examples) for examples in (EXAMPLES, EXAMPLES[:1])))
    torch._dynamo.reset()
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    compile_layers(model)
    source = Path(attention.__file__).read_bytes()
    assert torch.compiler.config.cache_key_tag == hashlib.sha256(source).hexdigest()
    counters.clear()
    loss_model = LossModel(model, PACKED)
    model.set_attn_implementation(PACKED)
    for rows, loss, expected in (([EXAMPLES], losses[0], gradients[0]), ([EXAMPLES[:1]], losses[1], gradients[1]),
                                 ([EXAMPLES[2:], EXAMPLES[:2]], losses[0], gradients[0])):
        model.zero_grad()
        found = loss_model(**batch_inputs(make_batch(rows, 0, flat=True)))
        found.backward()
        found_gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert abs(found.item() - loss) <= 1e-6 * loss and distance(expected, found_gradients) <= 1e-5
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # the last layer, and the others


def test_no_targets_give_zero_loss_and_zero_gradients() -> None:
    """Bug: a rank without rows gives NaN, or skips the backward pass and hangs the others."""
    model = llama()
    found, gradients = packed(model, PACKED, [])
    assert found == 0.0 and gradients and all(not g.any() for g in gradients.values())


def test_token_losses_equal_the_references_and_name_their_owners() -> None:
    """Bug: losses of packed examples are booked on the wrong example."""
    model = llama().eval()
    expected = reference_losses(model, EXAMPLES)
    model.set_attn_implementation(PACKED)
    batch = make_batch([EXAMPLES[:2], EXAMPLES[2:]], 0)
    losses, hits = LossModel(model, PACKED).token_losses(batch)
    assert len(hits) == len(losses) == sum(map(len, expected))
    for i, wanted in enumerate(expected):
        np.testing.assert_allclose(losses.numpy()[batch.owners == i], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [4, 16])
def test_sliding_window_models_keep_their_window(window: int) -> None:
    """Bug: the fast CPU path ignores sliding_window and trains another model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mistral", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, sliding_window=window,
                                  initializer_range=0.3, max_position_embeddings=64)
    model = AutoModelForCausalLM.from_config(config)
    loss, gradients = reference(model, EXAMPLES)
    found, found_gradients = packed(model, PACKED, [EXAMPLES])
    assert abs(found - loss) <= 1e-6 * loss and distance(gradients, found_gradients) <= 1e-5


def test_a_window_that_stands_in_the_mask_alone_is_not_lost() -> None:
    """Bug: the two examples of the proof are shorter than the window, and attention without a mask is taken."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "doge", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, initializer_range=0.3, max_position_embeddings=64))
    loss_model = LossModel(model, "sdpa").eval()
    lines = choose_attention(loss_model, [EXAMPLES[1], EXAMPLES[3]], 0, "auto", packing=True)
    assert "stands in the mask alone" in lines[0] and loss_model.attention in ("sdpa", "eager")
    found = loss_model.token_losses(make_batch([EXAMPLES], 0))[0].numpy()
    np.testing.assert_allclose(found, np.concatenate(reference_losses(model, EXAMPLES)), rtol=1e-4, atol=1e-4)


def test_a_window_that_no_layer_has_is_not_missed() -> None:
    """Bug: a Qwen2 whose layers are all below max_window_layers is refused packed attention for its sliding_window."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "qwen2", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_position_embeddings=64))
    assert model.config.sliding_window == 8 and {*model.config.layer_types} == {"full_attention"}
    loss_model = LossModel(model, "sdpa").eval()
    choose_attention(loss_model, EXAMPLES, 0, "auto", packing=True)
    assert loss_model.attention == PACKED


@pytest.mark.parametrize("kind, changes, plain", [
    ("llama", {}, False), ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, False),
    ("cohere", {"logit_scale": 0.25}, True), ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}, True),
    ("granite", {"logits_scaling": 8.0}, True), ("qwen2", {}, False), ("qwen3", {"head_dim": 8}, False),
    ("mixtral", {"num_local_experts": 4}, False), ("phi3", {}, False), ("glm4", {"head_dim": 8}, False)])
def test_choose_attention_proves_itself_on_other_architectures(kind: str, changes: dict, plain: bool) -> None:
    """Bug: a head with scaling or soft-capping is trained as if it were a plain matrix; a last layer of another form
    than Llama's is computed at some positions only."""
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
                "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    loss_model = LossModel(model, "sdpa")
    lines = choose_attention(loss_model, EXAMPLES, 0, "auto", packing=True)
    assert loss_model.plain_head == plain, lines
    found = loss_model.eval().token_losses(make_batch([EXAMPLES], 0))[0].numpy()
    model.set_attn_implementation("eager")
    np.testing.assert_allclose(found, np.concatenate(reference_losses(model, EXAMPLES)), rtol=1e-4, atol=1e-4)
    _, gradients = reference(model, EXAMPLES)
    model.set_attn_implementation(loss_model.attention)
    model.zero_grad()
    loss_model(**batch_inputs(make_batch([EXAMPLES], 0))).backward()
    assert distance(gradients, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}) <= 1e-4


def test_a_model_that_cannot_keep_examples_apart_is_refused_for_packing() -> None:
    """Bug: BLOOM and its kind train on packed rows that leak (no position ids, ALiBi)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3))
    with pytest.raises(UserError, match="--no_packing"):
        choose_attention(LossModel(model, "sdpa"), EXAMPLES, 0, "auto", packing=True)
    assert choose_attention(LossModel(model, "sdpa"), EXAMPLES, 0, "auto", packing=False)


def test_batch_layout_by_hand() -> None:
    """Bug: positions run on into the padding, or the first token of an example is predicted from the one before."""
    a = Encoded(np.array([5, 6, 7], np.int32), np.array([False, True, True]))
    b = Encoded(np.array([8, 9], np.int32), np.array([False, True]))
    batch = make_batch([[a, b], [b]], pad_id=1, pad_to_multiple_of=6)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1], [8, 9, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert batch.positions.tolist() == [0, 1, 3, 6] and batch.targets.tolist() == [6, 7, 9, 9]
    assert batch.bounds.tolist() == [0, 3, 5, 6, 8, 12] and batch.owners.tolist() == [0, 0, 1, 2]


def test_flat_batch_is_the_same_loss_without_padding() -> None:
    """Bug: rows laid behind each other see each other, or padding between them is paid for all the same."""
    rows = [EXAMPLES[:1], [], EXAMPLES[1:]]
    flat, below = make_batch(rows, 0, flat=True), make_batch(rows, 0)
    real = sum(len(e.input_ids) for e in EXAMPLES)
    assert flat.input_ids.shape == (1, -(-real // FLAT_MULTIPLE) * FLAT_MULTIPLE) and len(below.input_ids) == 3
    assert real % FLAT_MULTIPLE and flat.bounds[-2:].tolist() == [real, flat.input_ids.numel()]
    assert flat.targets.tolist() == below.targets.tolist() and flat.owners.tolist() == below.owners.tolist()
    model = LossModel(llama(), PACKED)
    model.causal_lm.set_attn_implementation(PACKED)
    a, b = (model(**batch_inputs(batch)).item() for batch in (flat, below))
    assert a == pytest.approx(b, rel=1e-6)
    assert make_batch([], 7, flat=True).input_ids.tolist() == [[7] * FLAT_MULTIPLE]


def test_rows_of_new_tokens_have_the_gradient_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: beside LoRA the gradient of a whole vocabulary matrix is computed for two rows of it; or theirs is wrong."""
    from peft import LoraConfig, get_peft_model

    for tied in (True, False):
        adapted = get_peft_model(llama(tie_word_embeddings=tied), LoraConfig(
            r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 60], "lm_head": [7, 60]}))
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
        model = adapted.get_base_model()
        assert head.trained_rows(model.get_output_embeddings())[1].tolist() == [7, 60]
        loss, gradients = packed(model, PACKED, [EXAMPLES])
        with monkeypatch.context() as patch:  # the slow way, through the matrix in which PEFT has put the rows
            patch.setattr("common.loss.trained_rows", lambda _: None)
            slow, slow_gradients = packed(model, PACKED, [EXAMPLES])
        assert any("trainable_tokens_delta" in name for name in gradients)
        assert abs(loss - slow) <= 1e-6 * slow and distance(slow_gradients, gradients) <= 1e-6
        with adapted.disable_adapter():
            assert head.trained_rows(model.get_output_embeddings()) is None


@pytest.mark.parametrize("by_blocks", ["kept", "not kept", None])
@pytest.mark.parametrize("lengths", [(5, 1, 9), (200, 3)])
def test_values_of_another_size_than_keys(lengths: tuple[int, ...], by_blocks: str | None) -> None:
    """Bug: values are cut into heads by the size of the queries (DeepSeek's are smaller)."""
    torch.manual_seed(0)
    n = sum(lengths)
    query, key, value = (torch.randn(1, 4, n, size, requires_grad=True) for size in (6, 6, 4))
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    n_kept = {"kept": count_kept(bounds.tolist()), "not kept": 0}.get(by_blocks)
    out = packed_attention(torch.nn.Module(), query, key, value, None, cu_seq_lens_q=bounds, max_length_q=max(lengths),
                           n_kept=n_kept)
    true = torch.cat([F.scaled_dot_product_attention(*(x[:, :, a:b] for x in (query, key, value)), is_causal=True)
                      for a, b in zip(bounds[:-1], bounds[1:])], 2).transpose(1, 2)
    torch.testing.assert_close(out[0], true)
    weights = torch.randn_like(true)
    for found, wanted in zip(*(torch.autograd.grad((x * weights).sum(), (query, key, value)) for x in (out[0], true))):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_kernel_that_refuses_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a head size that a kernel does not know ends the run with a traceback, though sdpa would do."""
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nat some place")

    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED, refuse)
    model = LossModel(llama(), "sdpa")
    lines = choose_attention(model, EXAMPLES, 0, "auto", packing=True)
    assert model.attention == "sdpa" and "not for this model (FlashAttention only supports Ampere" in lines[0]
    with pytest.raises(UserError, match="only supports Ampere"):
        choose_attention(model, EXAMPLES, 0, "packed", packing=True)


def test_on_a_gpu_all_that_attention_is_given_is_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: torch's kernel is given fp32: queries from rotary embeddings, or all three from matrices in 4 bits."""
    seen = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
        seen.extend((query.dtype, key.dtype, value.dtype))
        return query

    monkeypatch.setattr("common.attention._varlen_cuda", kernel)
    query, key, value = (torch.randn(1, 2, 3, 8).as_subclass(OnGpu) for _ in range(3))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, cu_seq_lens_q=torch.tensor([0, 3]))
    assert seen == [torch.bfloat16] * 3 and out.dtype == torch.float32
    assert head._to_gradient(torch.zeros(0, 5).as_subclass(OnGpu), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_a_model_with_dropout_in_attention_is_known() -> None:
    """Bug: a kernel without dropout trains GPT-2 without it."""
    assert _has_dropout(AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=64)))
    assert not _has_dropout(llama()) and _has_dropout(llama(attention_dropout=0.1))
