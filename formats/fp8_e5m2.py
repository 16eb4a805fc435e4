"""FP8 E5M2 weights with one scale, activations in 16 bits: more range, fewer digits than E4M3.

ModelOpt has no E5M2 quantizer; the scale is its per-tensor maximum's, as for E4M3.
"""

from __future__ import annotations

import torch

from . import fp8

NAME = "fp8_e5m2"
TITLE = "FP8 E5M2 weights, per tensor, activations stay in 16 bits"
COMFY_FORMAT = "float8_e5m2"
STOCK = True
STORAGE = torch.float8_e5m2
BITS = 8
BLOCK = None
SCALES = ("weight_scale",)
SECOND = None
ACTIVATIONS = False
QMAX = 57344.0
AMAX_EPSILON = fp8.AMAX_EPSILON
why_not = fp8.why_not
weight_amax = fp8.weight_amax
dequantize = fp8.dequantize


def needs_input_scale(kind: str) -> bool:
    """Weight-only: never."""
    return False


def stored(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> shape and allowed dtypes of the tensors of a weight of this shape."""
    return {"weight": (shape, (STORAGE,)), "weight_scale": ((), (torch.float32,))}


def quantize(weight: torch.Tensor, amax: torch.Tensor) -> dict[str, torch.Tensor]:
    """[N, ...] float and its amax -> float8_e5m2 `weight`, float32 scalar `weight_scale`."""
    amax = amax.float().reshape(())
    step = QMAX / torch.where(amax <= AMAX_EPSILON, 1.0, amax)
    q = (weight.float() * step).clamp_(-QMAX, QMAX).to(STORAGE)
    return {"weight": q, "weight_scale": 1.0 / step}
