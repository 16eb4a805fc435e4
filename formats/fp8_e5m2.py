"""FP8 E5M2 weights with one scale, activations in 16 bits: more range, fewer digits than E4M3.

ModelOpt has no E5M2 quantizer; the scale is its per-tensor maximum's, as for E4M3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

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
AMAX_EPSILON = 2.0**-24


def needs_input_scale(kind: str) -> bool:
    """Weight-only: never."""
    return False


def why_not(shape: tuple[int, ...]) -> str | None:
    """Every weight fits."""
    return None


def stored(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> shape and allowed dtypes of the tensors of a weight of this shape."""
    return {"weight": (shape, (STORAGE,)), "weight_scale": ((), (torch.float32,))}


def weight_amax(weight: torch.Tensor) -> torch.Tensor:
    """[N, ...] float -> float32 scalar, the largest magnitude."""
    return weight.abs().amax().float()


def quantize(weight: torch.Tensor, amax: torch.Tensor) -> dict[str, torch.Tensor]:
    """[N, ...] float and its amax -> float8_e5m2 `weight`, float32 scalar `weight_scale`."""
    amax = amax.float().reshape(())
    step = QMAX / torch.where(amax <= AMAX_EPSILON, 1.0, amax)
    q = (weight.float() * step).clamp_(-QMAX, QMAX).to(STORAGE)
    return {"weight": q, "weight_scale": 1.0 / step}


def dequantize(stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """What `quantize` gave -> float32 weight of `shape`."""
    return stored["weight"].float() * stored["weight_scale"]
