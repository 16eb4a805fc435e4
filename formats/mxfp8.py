"""MXFP8: E4M3 in blocks of 32 along the input, one power of two (E8M0) a block.

Exponents and rounding are ModelOpt's MXFP8QTensor's. Exponents are stored biased by 127; a Linear is
arranged as in stock ComfyUI (see `blocks`), its rows padded to 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import blocks

NAME = "mxfp8"
TITLE = "MXFP8, E4M3 in blocks of 32 with powers of two as scales"
COMFY_FORMAT = "mxfp8"
STOCK = True
STORAGE = torch.float8_e4m3fn
BITS = 8
BLOCK = 32
ROWS = 32
SCALES = ("weight_scale",)
SECOND = "int8"
ACTIVATIONS = True
QMAX = 448.0
BIAS = 127


def needs_input_scale(kind: str) -> bool:
    """Never: every block of activations has its own scale, taken while the model runs."""
    return False


def why_not(shape: tuple[int, ...]) -> str | None:
    """Why a weight of this shape cannot be stored, or None."""
    return blocks.no_divisor(NAME, BLOCK, shape)


def stored(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> shape and allowed dtypes of the tensors of a weight of this shape."""
    weight, scale = blocks.arranged_shapes(shape, BLOCK, ROWS)
    return {
        "weight": (weight, (torch.float8_e4m3fn,)),
        "weight_scale": (scale, (torch.uint8,)),
    }


def weight_amax(weight: torch.Tensor) -> None:
    """Nothing: the scales follow from the weight alone."""
    return None


def _rounded(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] float32 -> float8_e4m3fn values [N, K / 32, 32], exponents [N, K / 32]."""
    in_blocks = flat.reshape(len(flat), -1, BLOCK)
    needed = in_blocks.abs().amax(dim=-1) / QMAX
    exponent = torch.where(needed > 0, torch.log2(needed).ceil(), -float(BIAS))
    exponent = exponent.clamp_(-BIAS, BIAS)
    values = (in_blocks * torch.exp2(-exponent).unsqueeze(-1)).clamp_(-QMAX, QMAX)
    return values.to(torch.float8_e4m3fn), exponent


def fake_quantize(flat: torch.Tensor, amax: None = None) -> torch.Tensor:
    """[N, K] float32 -> what `dequantize` would give, without packing."""
    values, exponent = _rounded(flat)
    return (values.float() * torch.exp2(exponent).unsqueeze(-1)).reshape(flat.shape)


def quantize(weight: torch.Tensor, amax: None = None) -> dict[str, torch.Tensor]:
    """[N, ...] float -> float8_e4m3fn `weight` [rows, K], uint8 `weight_scale`."""
    flat = blocks.flatten(weight).float()
    values, exponent = _rounded(flat)
    codes, scale = blocks.arranged(
        values.reshape(flat.shape).view(torch.uint8),
        (exponent + BIAS).to(torch.uint8),
        ROWS,
        weight.ndim == 2,
    )
    return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}


def dequantize(stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """What `quantize` gave -> float32 weight of `shape`, exactly ModelOpt's dequantized one."""
    n, k = blocks.flat_shape(shape)
    exponent = blocks.plain_scale(stored["weight_scale"], shape, BLOCK, ROWS).float() - BIAS
    values = stored["weight"][:n].float().reshape(n, -1, BLOCK) * torch.exp2(exponent).unsqueeze(-1)
    return blocks.unflatten(values.reshape(n, k), shape)
