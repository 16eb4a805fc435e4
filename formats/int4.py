"""INT4 weights in blocks of 128 input values, activations in 16 bits: a memory format.

Rounding is ModelOpt's (`round(w * (7 / amax))`, clipped to -8..7). A block's amax is stored instead
of its scale, in 16 bits: where it is no such number (32-bit weights, a searched amax) it is rounded
before the weight is, so that what is stored is ModelOpt's fake-quantized weight for the stored amax to
the last bit. An import keeps ModelOpt's amax in 32 bits instead. The last block of a row may be shorter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import blocks

NAME = "int4"
TITLE = "INT4 weights, blocks of 128, activations stay in 16 bits"
COMFY_FORMAT = "modelopt_int4"
STOCK = False
STORAGE = torch.uint8
BITS = 4
BLOCK = 128
SCALES = ("weight_amax",)
SECOND = None
ACTIVATIONS = False
QMAX = 7.0
AMAX_EPSILON = 2.0**-24


def needs_input_scale(kind: str) -> bool:
    """Weight-only: never."""
    return False


def why_not(shape: tuple[int, ...]) -> str | None:
    """Every weight fits."""
    return None


def stored(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> shape and allowed dtypes of the tensors of a weight of this shape."""
    n, k = blocks.flat_shape(shape)
    return {
        "weight": ((n, -(-k // 2)), (torch.uint8,)),
        "weight_amax": ((n, -(-k // BLOCK)), (torch.float16, torch.bfloat16, torch.float32)),
    }


def weight_amax(weight: torch.Tensor) -> torch.Tensor:
    """[N, ...] float -> float32 largest magnitude of every block, [N, blocks]."""
    flat = blocks.padded(blocks.flatten(weight), 1, BLOCK)
    return flat.reshape(len(flat), -1, BLOCK).abs().amax(dim=-1).float()


def in_sixteen_bits(amax: torch.Tensor) -> torch.Tensor:
    """Block maxima in the 16 bits they are stored in: exactly, where they come from 16-bit weights."""
    amax = amax.float()
    for dtype in (torch.float16, torch.bfloat16):
        rounded = amax.to(dtype)
        if torch.equal(rounded.float(), amax):
            return rounded
    normal = amax[amax > AMAX_EPSILON]
    fits = bool((normal >= 2.0**-14).all()) and bool((normal < 65504.0).all())
    return amax.to(torch.float16 if fits else torch.bfloat16)


def _steps(amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 amax [N, blocks] -> multiplier and divisor [N, blocks, 1] of ModelOpt's rounding."""
    dead = (amax <= AMAX_EPSILON).unsqueeze(-1)
    step = torch.full_like(amax, QMAX).unsqueeze(-1) / torch.where(dead, 1.0, amax.unsqueeze(-1))
    return torch.where(dead, 0.0, step), torch.where(dead, 1.0, step)


def quantize(
    weight: torch.Tensor, amax: torch.Tensor, exact: bool = False
) -> dict[str, torch.Tensor]:
    """[N, ...] float and its block maxima -> packed uint8 `weight`, `weight_amax` in 16 bits, or in
    32 if it must be `exact` and is not in 16. The weight is rounded with the maxima that are stored.

    Codes are value + 8, so that every byte is two numbers of 0..15, the first in the high nibble.
    """
    flat = blocks.flatten(weight).float()
    n, k = flat.shape
    amax = amax.reshape(n, -1).float()
    kept = in_sixteen_bits(amax)
    if exact and not torch.equal(kept.float(), amax):
        kept = amax
    step, _ = _steps(kept.float())
    in_blocks = blocks.padded(flat, 1, BLOCK).reshape(n, -1, BLOCK)
    codes = ((in_blocks * step).round_().clamp_(-QMAX - 1, QMAX) + (QMAX + 1)).to(torch.uint8)
    codes = blocks.padded(codes.reshape(n, -1)[:, :k], 1, 2)
    return {"weight": blocks.pack(codes), "weight_amax": kept}


def dequantize(stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """What `quantize` gave -> float32 weight of `shape`, exactly ModelOpt's fake-quantized one."""
    n, k = blocks.flat_shape(shape)
    codes = blocks.unpack(stored["weight"])[:, :k].float() - (QMAX + 1)
    _, step = _steps(stored["weight_amax"].float())
    values = blocks.padded(codes, 1, BLOCK).reshape(n, -1, BLOCK) / step
    return blocks.unflatten(values.reshape(n, -1)[:, :k], shape)
