"""INT4 weights in blocks of 128, rounded once more to FP8 E4M3, and FP8 activations.

As ModelOpt's W4A8: memory of INT4, arithmetic of FP8. Both roundings are ModelOpt's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import fp8, int4

NAME = "w4a8"
TITLE = "INT4 weights, blocks of 128, computed as FP8 with FP8 activations"
COMFY_FORMAT = "modelopt_w4a8"
STOCK = False
STORAGE = torch.uint8
BITS = 4
BLOCK = int4.BLOCK
SCALES = ("weight_amax", "weight_amax_2")
SECOND = None
ACTIVATIONS = True
QMAX = fp8.QMAX
input_scale = fp8.input_scale
why_not = int4.why_not


def needs_input_scale(kind: str) -> bool:
    """Always: FP8 activations have one calibrated scale."""
    return True


def stored(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> shape and allowed dtypes of the tensors of a weight of this shape."""
    return int4.stored(shape) | {"weight_amax_2": ((), (torch.float32,))}


def weight_amax(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, ...] float -> block maxima [N, blocks] and the largest magnitude of all, float32."""
    amax = int4.weight_amax(weight)
    return amax, amax.amax()


def quantize(
    weight: torch.Tensor, amax: tuple[torch.Tensor, torch.Tensor], exact: bool = False
) -> dict[str, torch.Tensor]:
    """[N, ...] float, its block maxima and its amax -> as int4, and float32 scalar `weight_amax_2`."""
    whole = amax[1].float().reshape(())
    return int4.quantize(weight, amax[0], exact) | {
        "weight_amax_2": torch.where(whole > 0, whole, 1.0)
    }


def to_fp8(
    stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize` gave -> float8_e4m3fn weight of `shape` and its float32 scalar scale."""
    found = fp8.quantize(int4.dequantize(stored, shape), stored["weight_amax_2"])
    return found["weight"], found["weight_scale"]


def dequantize(stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """What `quantize` gave -> float32 weight of `shape`, exactly ModelOpt's fake-quantized one."""
    weight, scale = to_fp8(stored, shape)
    return weight.float() * scale
