"""LoRA's product in one step: the numbers of PEFT's chain of modules, in less memory; PEFT's own where it is not
plain."""
from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from common.lora import LEVELS, FusedLinear, draw_kept, fuse

LLAMA = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    attention_bias=True)


def adapted(base: nn.Module | None = None, **settings: object) -> nn.Module:
    """A small model with adapters whose B is not zero."""
    torch.manual_seed(0)
    model = get_peft_model(base or LlamaForCausalLM(LLAMA), LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    return model.train()


def both(**settings: object) -> tuple[nn.Module, nn.Module]:
    plain = adapted(**settings)
    fused = copy.deepcopy(plain)
    assert fuse(fused) == 14
    return plain, fused


def step(model: nn.Module, bf16: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of a loss."""
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, 9))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids).logits
    model.zero_grad()
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> float:
    assert found.keys() == true.keys()
    size = sum(float(g.square().sum()) for g in true.values()) ** 0.5
    return sum(float((found[n] - true[n]).square().sum()) for n in true) ** 0.5 / size


class SameDraws(nn.Module):
    """Dropout for PEFT's own chain that drops what draw_kept says."""

    def __init__(self, share: float):
        super().__init__()
        self.share = round(share * LEVELS) / LEVELS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(draw_kept(x, x[:0], self.share), x, 0.0) / (1 - self.share)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_gives_the_logits_and_gradients_of_peft(dropout: float) -> None:
    """A factor that is left out, or a gradient that takes the input before dropout for the one after it."""
    plain, fused = both(lora_dropout=dropout)
    for module in plain.modules():
        if dropout and isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict):
            module.lora_dropout["default"] = SameDraws(dropout)
    (expected, true), (logits, found) = step(plain), step(fused)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert any("lora_A" in name for name in true) and apart(found, true) < 1e-6


def test_in_bf16_it_is_no_further_from_fp32_than_peft() -> None:
    """What is saved in passes over the numbers paid for with their precision."""
    plain, fused = both()
    _, true = step(plain)
    assert 0 < apart(step(fused, bf16=True)[1], true) < 1.1 * apart(step(plain, bf16=True)[1], true)


def test_dropout_drops_the_share_that_is_asked_for() -> None:
    """Bits that are not used alike: a sign taken for a number, two halves of one draw, the same draw twice."""
    torch.manual_seed(0)
    x = torch.zeros(400, 1003)
    for share in (0.05, 0.5, 0.9):
        first, second = draw_kept(x, x[:0], share), draw_kept(x, x[:0], share)
        sigma = (share * (1 - share) / x.numel()) ** 0.5
        flat = first.flatten().float()
        assert abs(1 - float(flat.mean()) - share) < 5 * sigma
        assert abs(float((first == second).float().mean()) - share ** 2 - (1 - share) ** 2) < 8 * sigma
        for gap in (1, 2, 4):  # four numbers come from one draw
            assert abs(float((flat[:-gap] * flat[gap:]).mean()) - (1 - share) ** 2) < 8 * sigma


def test_compiled_adapters_of_one_input_have_draws_of_their_own() -> None:
    """The compiler's search for common terms took the masks of q, k and v for one."""
    _, fused = both(lora_dropout=0.5)
    first, second, *_ = (m for m in fused.modules() if isinstance(m, FusedLinear))
    second.load_state_dict(first.state_dict())
    x = torch.randn(6, first.in_features, requires_grad=True)
    torch._dynamo.reset()
    found = {}
    for how in ("eager", "aot_eager_decomp_partition"):  # the latter divides forward and backward as inductor's does
        torch.manual_seed(0)
        found[how] = torch.compile(lambda x: (first(x), second(x)), backend=how)(x)
        (found[how][0].sum() + found[how][1].sum()).backward()
    (a, b), (c, d) = found.values()
    assert torch.allclose(a, c) and torch.allclose(b, d) and not torch.allclose(a, b)


def test_two_precisions_without_autocast_stay_a_fault() -> None:
    """Answers in bf16 of a model whose base was rounded for training, in silence."""
    _, fused = both()
    layer = next(m for m in fused.modules() if isinstance(m, FusedLinear))
    layer.base_layer.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.zeros(2, layer.in_features))


def test_without_training_nothing_is_dropped() -> None:
    _, fused = both(lora_dropout=0.5)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(fused.eval()(input_ids=ids).logits, fused(input_ids=ids).logits)
        assert not torch.equal(fused.train()(input_ids=ids).logits, fused(input_ids=ids).logits)


def test_it_keeps_less_for_the_backward_pass() -> None:
    def kept(model: nn.Module) -> int:
        found: dict[int, int] = {}
        pack = lambda tensor: (found.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}),
                               tensor)[1]
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
                torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=torch.arange(60)[None]).logits
        found = {place: size for place, size in found.items() if place not in weights}
        assert logits.requires_grad
        return sum(found.values())

    plain, fused = both(lora_dropout=0.1)
    assert kept(fused) < 0.8 * kept(plain)


def test_it_is_switched_off_and_merged_as_before() -> None:
    plain, fused = both()
    with fused.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        ids = torch.arange(8)[None]
        assert torch.equal(fused(input_ids=ids).logits, plain(input_ids=ids).logits)
    with torch.no_grad():
        before = fused.eval()(input_ids=ids).logits
        merged = fused.merge_and_unload()
        assert not any(isinstance(m, FusedLinear) for m in merged.modules())
        assert torch.allclose(merged(input_ids=ids).logits, before, atol=1e-5)


def test_a_pass_without_positions_has_a_gradient() -> None:
    """A process that has no rows in a step: shapes with a zero in them."""
    _, fused = both(lora_dropout=0.3)
    layer = next(m for m in fused.modules() if isinstance(m, FusedLinear))
    x = torch.zeros(1, 0, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and float(layer.lora_A["default"].weight.grad.abs().sum()) == 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's about the last two
def test_what_is_not_plain_stays_with_peft() -> None:
    """DoRA computed without its magnitudes, a transposed matrix as if it were none, a bias that nothing trains."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=1,
                                      eos_token_id=2))
    assert fuse(adapted(use_dora=True)) == fuse(adapted(gpt2)) == fuse(adapted(lora_bias=True)) == 0
    assert fuse(adapted(bias="all")) == 6  # the feed-forward modules have none
