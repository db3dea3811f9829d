"""The product of a matrix and its LoRA adapter (arXiv:2106.09685) in one step of autograd.

    x W^T + scaling x' (B A)^T        x' is x after dropout

PEFT computes it as a chain of modules: the input is cast twice, the adapter's part is a tensor of its own that is
scaled, added and gone through again on the way back, and dropout keeps its noise and its output beside the input. Here
the part is added into the product while that is written; kept are the input, the adapter's few columns, and a byte for
each number that may be dropped. The modules stay PEFT's: they are saved, merged and switched off as ever.

Shapes: N positions, I inputs, O outputs, R rank.
"""
from __future__ import annotations

import torch
from peft.tuners.lora import Linear
from torch import nn

LEVELS = 2**16  # dropout's share is a multiple of 1 / LEVELS


class _Product(torch.autograd.Function):
    """x (N, I), keep bool (N, I) or None: all, weight (O, I), bias (O,) or None, a (R, I), b (O, R) -> (N, O).

    Everything is of one precision, but a and b, which may be of a higher one; weight and bias are frozen. What is kept
    is not scaled up: that is the part of `scaling`.
    """

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, keep: torch.Tensor | None, weight: torch.Tensor,
                bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        narrow = _masked(x, keep) @ a.to(x.dtype).t()  # (N, R)
        out = nn.functional.linear(x, weight, bias).addmm_(narrow, b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, keep, narrow, weight, a, b)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: object, d_out: torch.Tensor) -> tuple:
        x, keep, narrow, weight, a, b = ctx.saved_tensors
        d_narrow, d_x = (d_out @ b.to(d_out.dtype)).mul_(ctx.scaling), None
        d_a = (d_narrow.t() @ _masked(x, keep)).to(a.dtype)
        d_b = (narrow.t() @ d_out).t().to(b.dtype).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            d_x, low = d_out @ weight, a.to(d_out.dtype)
            d_x = d_x.addmm_(d_narrow, low) if keep is None else d_x.add_(_masked(d_narrow @ low, keep))
        return d_x, None, None, None, d_a, d_b, None


def _masked(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return x if keep is None else torch.where(keep, x, 0.0)


@torch.library.custom_op("sft::draw_kept", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_kept(x: torch.Tensor, a: torch.Tensor, share: float) -> torch.Tensor:
    """Draw which numbers of x dropout keeps, bool in its shape: each with probability 1 - share. a: the adapter's own
    matrix, which is not looked at; without it a compiler takes the draws of two adapters of one input for the same.

    On CPU four from each number of 64 bits: bernoulli_ takes five times as long, twice as long as the product.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - share)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
    return (bits.view(torch.int16)[:x.numel()] >= round(share * LEVELS) - LEVELS // 2).view(x.shape)


@draw_kept.register_fake
def _(x: torch.Tensor, a: torch.Tensor, share: float) -> torch.Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


class FusedLinear(Linear):
    """PEFT's lora.Linear, whose plain case is one product."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        base, device = self.base_layer, x.device.type
        rounds = torch.is_autocast_enabled(device)  # without, two precisions are a fault, which PEFT's chain shows
        if args or kwargs or self.disable_adapters or self.merged or not (rounds or x.dtype == base.weight.dtype):
            return super().forward(x, *args, **kwargs)
        name, dtype = self.active_adapters[0], torch.get_autocast_dtype(device) if rounds else x.dtype
        flat, a, b = x.reshape(-1, x.shape[-1]).to(dtype), self.lora_A[name].weight, self.lora_B[name].weight
        share = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
        share = min(round(share * LEVELS), LEVELS - 1) / LEVELS
        keep = draw_kept(flat.detach(), a.detach(), share) if share else None
        bias = None if base.bias is None else base.bias.to(dtype)
        out = _Product.apply(flat, keep, base.weight.to(dtype), bias, a, b, self.scaling[name] / (1 - share))
        return out.view(*x.shape[:-1], out.shape[-1])


def fuse(model: nn.Module) -> int:
    """Let the adapters of a model be computed so, where they are plain ones below which all is frozen: not DoRA, nor
    what is held in 4 bits, experts in one tensor, or matrices of another class (GPT-2, Falcon). Returns how many."""
    plain = [m for m in model.modules() if type(m) is Linear and _is_plain(m)]
    for module in plain:
        module.__class__ = FusedLinear
    return len(plain)


def _is_plain(layer: Linear) -> bool:
    base, name = layer.base_layer, layer.active_adapters[0]
    return (type(base) is nn.Linear and not any(p.requires_grad for p in base.parameters()) and not layer.lora_variant
            and layer.active_adapters == [name] == [*layer.lora_A] and layer.lora_B[name].bias is None)
