"""NVFP4: E2M1 in blocks of 16 along the input, an E4M3 scale a block, one float32 scale a tensor.

Scales and rounding are ModelOpt's NVFP4QTensor's, operation by operation. The first of two values is
in the high nibble; a Linear is arranged as in stock ComfyUI (see `blocks`), its rows padded to 16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import blocks

NAME = "nvfp4"
TITLE = "NVFP4, 4-bit floating point in blocks of 16"
COMFY_FORMAT = "nvfp4"
STOCK = True
STORAGE = torch.uint8
BITS = 4
BLOCK = 16
ROWS = 16
SCALES = ("weight_scale", "weight_scale_2")
SECOND = "int8"
ACTIVATIONS = True
QMAX = 6.0
E4M3_MAX = 448.0
# E2M1's magnitudes by their 3-bit code, and the midpoints between them
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def needs_input_scale(kind: str) -> bool:
    """Not needed: without one the activations' largest magnitude is taken while the model runs."""
    return False


def why_not(shape: tuple[int, ...]) -> str | None:
    """Why a weight of this shape cannot be stored, or None."""
    return blocks.no_divisor(NAME, BLOCK, shape)


def stored(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> shape and allowed dtypes of the tensors of a weight of this shape."""
    (rows, columns), scale = blocks.arranged_shapes(shape, BLOCK, ROWS)
    return {
        "weight": ((rows, columns // 2), (torch.uint8,)),
        "weight_scale": (scale, (torch.float8_e4m3fn,)),
        "weight_scale_2": ((), (torch.float32,)),
    }


def weight_amax(weight: torch.Tensor) -> torch.Tensor:
    """[N, ...] float -> float32 scalar, the largest magnitude."""
    return weight.abs().amax().float()


def input_scale(amax: torch.Tensor) -> torch.Tensor:
    """Calibrated activation amax -> float32 scalar: the scale of the block scales."""
    amax = amax.float().reshape(())
    return torch.where(amax > 0, amax, 1.0) / (QMAX * E4M3_MAX)


def block_scales(flat: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """[N, K] float, scalar -> float8_e4m3fn [N, K / 16]; a block of zeros gets 1."""
    amax = flat.reshape(len(flat), -1, BLOCK).abs().amax(dim=-1).float()
    scale = amax / (QMAX * scale_2)
    scale = torch.where(scale == 0, 1.0, scale)
    return scale.clamp_(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)


def codes_of(values: torch.Tensor) -> torch.Tensor:
    """float32 -> uint8 E2M1 codes, to nearest, ties to the even code, larger ones clipped to 6."""
    bounds = torch.tensor(BOUNDS, device=values.device)
    magnitude = values.abs()
    code = torch.bucketize(magnitude, bounds, out_int32=True)  # a tie goes down ...
    for bound in BOUNDS[1::2]:  # ... which is the odd code here
        code += magnitude == bound
    return (code + (values < 0).int() * 8).to(torch.uint8)


def values_of(codes: torch.Tensor) -> torch.Tensor:
    """uint8 E2M1 codes -> float32, the inverse of `codes_of`."""
    table = torch.tensor(VALUES + tuple(-v for v in VALUES), device=codes.device)
    return table[codes.int()]


def _rounded(flat: torch.Tensor, amax: torch.Tensor):
    """[N, K] float32 and its amax -> values in units of their scales, block scales, scale_2."""
    amax = amax.float().reshape(())
    scale_2 = torch.where(amax > 0, amax, 1.0) / (QMAX * E4M3_MAX)
    scale = block_scales(flat, scale_2)
    return flat.reshape(len(flat), -1, BLOCK) / _total(scale, scale_2), scale, scale_2


def _total(scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    return (scale.float() * scale_2).unsqueeze(-1)


def fake_quantize(flat: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """[N, K] float32 and its amax -> what `dequantize` would give, without packing."""
    values, scale, scale_2 = _rounded(flat, amax)
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    values = values.div_(step).round_().mul_(step).clamp_(-QMAX, QMAX)
    return values.mul_(_total(scale, scale_2)).reshape(flat.shape)


def quantize(weight: torch.Tensor, amax: torch.Tensor) -> dict[str, torch.Tensor]:
    """[N, ...] float and its amax -> packed uint8 `weight`, E4M3 `weight_scale`, float32 scalar
    `weight_scale_2`."""
    flat = blocks.flatten(weight).float()
    in_blocks, scale, scale_2 = _rounded(flat, amax)
    codes, scale = blocks.arranged(
        codes_of(in_blocks.reshape(flat.shape)), scale.view(torch.uint8), ROWS, weight.ndim == 2
    )
    return {
        "weight": blocks.pack(codes),
        "weight_scale": scale.view(torch.float8_e4m3fn),
        "weight_scale_2": scale_2,
    }


def dequantize(stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """What `quantize` gave -> float32 weight of `shape`, exactly ModelOpt's dequantized one."""
    n, k = blocks.flat_shape(shape)
    codes = blocks.unpack(stored["weight"])[:n]
    scale = blocks.plain_scale(stored["weight_scale"], shape, BLOCK, ROWS)
    scale = scale.view(torch.float8_e4m3fn).float() * stored["weight_scale_2"]
    values = values_of(codes).reshape(n, -1, BLOCK) * scale.unsqueeze(-1)
    return blocks.unflatten(values.reshape(n, k), shape)
