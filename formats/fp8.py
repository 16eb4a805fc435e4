"""FP8 E4M3, one weight scale and one calibrated activation scale per layer.

Rounding is ModelOpt's (`w * (448 / amax)` cast to E4M3); the stored scale is the reciprocal it
multiplies with afterwards, so a dequantized weight equals its fake-quantized one exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

NAME = "fp8"
TITLE = "FP8 E4M3, per-tensor"
COMFY_FORMAT = "float8_e4m3fn"
STOCK = True
STORAGE = torch.float8_e4m3fn
BITS = 8
BLOCK = None
SCALES = ("weight_scale",)
SECOND = None
ACTIVATIONS = True
QMAX = 448.0
AMAX_EPSILON = 2.0**-24


def needs_input_scale(kind: str) -> bool:
    """Whether a layer of this kind ("linear" or "conv2d") carries a calibrated activation scale."""
    return True


def why_not(shape: tuple[int, ...]) -> str | None:
    """Every weight fits."""
    return None


def stored(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> shape and allowed dtypes of the tensors of a weight of this shape."""
    return {"weight": (shape, (STORAGE,)), "weight_scale": ((), (torch.float32,))}


def weight_amax(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, ...] float -> float32 scalar, the largest magnitude."""
    return weight.abs().amax().float()


def _reciprocal_step(amax: torch.Tensor) -> torch.Tensor:
    amax = amax.float().reshape(())
    return QMAX / torch.where(amax <= AMAX_EPSILON, 1.0, amax)


def quantize(weight: torch.Tensor, amax: torch.Tensor) -> dict[str, torch.Tensor]:
    """[out, in, ...] float and its amax -> float8_e4m3fn `weight`, float32 scalar `weight_scale`.

    weight ≈ weight_q * weight_scale. An all-zero weight gets the scale of amax 1.
    """
    step = _reciprocal_step(amax)
    q = (weight.float() * step).clamp_(-QMAX, QMAX).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": 1.0 / step}


def dequantize(stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """What `quantize` gave -> float32 weight of `shape`."""
    return stored["weight"].float() * stored["weight_scale"]


def amax_of(scale: torch.Tensor) -> torch.Tensor:
    """An amax whose scale this is: float32 scalar such that 1 / (448 / amax) rounds to `scale`."""
    near = scale * QMAX
    found = near
    for toward in (0.0, torch.inf):
        candidate = near
        for _ in range(3):
            candidate = torch.nextafter(candidate, torch.full_like(near, toward))
            exact = (_scale(candidate) == scale) & (_scale(found) != scale)
            found = torch.where(exact, candidate, found)
    return found


def _scale(amax: torch.Tensor) -> torch.Tensor:
    return 1.0 / (QMAX / amax)


def input_scale(amax: torch.Tensor) -> torch.Tensor:
    """Calibrated activation amax (scalar) -> float32 scalar scale, x ≈ x_q * scale."""
    return 1.0 / _reciprocal_step(amax)
