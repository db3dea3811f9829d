"""Share of the peak: useful operations only."""
from __future__ import annotations

import torch

from common.flops import Meter, make_meter
from common.memory import Shape

SHAPE = Shape(hidden=4, inner=8, layers=2, heads=2, kv_heads=1, head_size=2, vocabulary=10, tied=True)


def test_share_by_hand() -> None:
    """Bug: the head is counted at prompts, where it never runs, or padding at all."""
    # a layer: q 4*4, k and v 4*2, o 4*4, gate, up, down 4*8 = 144 weights
    assert SHAPE.layer == 144
    meter = Meter(token=6 * 2 * 144, trained_token=6 * 10 * 4, peak=1e6)
    assert meter.share(tokens=100, trained_tokens=10, seconds=2.0) == (172800 + 2400) / 2e6


def test_frozen_weights_need_no_gradient() -> None:
    """Bug: LoRA looks half again as busy as it is, or several processes as one."""
    full, lora = (make_meter(SHAPE, lora, torch.device("cpu"), 2) for lora in (False, True))
    assert (full.token, full.trained_token) == (6 * 288, 6 * 40)
    assert (lora.token, lora.trained_token) == (4 * 288, 4 * 40)
    assert full.peak > 1e8
