"""How much of what the machine can compute goes into useful work (model FLOPs utilisation, arXiv:2204.02311, app. B):
only real tokens count, the vocabulary head only where a token is trained, and attention scores are left out.
"""
from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from common.memory import FLOPS_PER_PARAMETER, Shape


@dataclass(frozen=True)
class Meter:
    """Floating point operations of a real token in the layers, of a trained token in the head; the peak, a second."""

    token: int
    trained_token: int
    peak: float

    def share(self, tokens: int, trained_tokens: int, seconds: float) -> float:
        """Share of the peak, 0 to 1, that went into useful work."""
        return (self.token * tokens + self.trained_token * trained_tokens) / seconds / self.peak


def make_meter(shape: Shape, lora: bool, device: torch.device, processes: int) -> Meter:
    """Measure the peak: the fastest of a few large matrix products in the precision of training (call it under the
    autocast of training), times the number of processes, which are taken to be alike."""
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    # on a GPU a single product is over before its clocks have risen
    size, at_once, wait = (8192, 10, torch.cuda.synchronize) if device.type == "cuda" else (1024, 1, lambda: None)
    numbers, best = torch.Generator(device).manual_seed(0), float("inf")
    a, b = (torch.randn(size, size, device=device, generator=numbers).to(dtype) for _ in range(2))
    for _ in range(6):
        wait()
        started = time.perf_counter()
        for _ in range(at_once):
            torch.mm(a, b)
        wait()
        best = min(best, (time.perf_counter() - started) / at_once)
    each = FLOPS_PER_PARAMETER[lora]
    return Meter(each * shape.layers * shape.layer, each * shape.vocabulary * shape.hidden,
                 processes * 2 * size**3 / best)
