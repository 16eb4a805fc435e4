"""Weights that ModelOpt has already packed -> our formats' tensors, value for value.

Each function takes what ModelOpt stored and gives the tensors of a format of `formats/`; values and
scales are kept, only their arrangement changes.
"""

from __future__ import annotations

import torch

from ...formats import blocks, int4, mxfp8, nvfp4


def fp8(weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """float8_e4m3fn [N, ...] and its scalar scale."""
    return {"weight": weight, "weight_scale": scale.float().reshape(())}


def int8(weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """int8 [N, ...] and a scale an output channel, [N], [N, 1, …] or a scalar."""
    rows = (len(weight), *(1 for _ in weight.shape[1:]))
    scale = scale.float().reshape(-1).expand(len(weight)).reshape(rows)
    return {"weight": weight, "weight_scale": scale.contiguous()}


def int4_rows(packed: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two rows a byte, the even one in the low nibble, two's complement: uint8 [N / 2, K], and
    scales [N, K / 128]. Of `modelopt.torch.export.quant_utils.pack_int4_in_uint8`."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=1).reshape(-1, packed.shape[1])
    codes = (nibbles + 8) & 15  # value + 8
    codes = blocks.padded(codes, 1, 2)
    return {"weight": blocks.pack(codes), "weight_amax": block_maxima(scale.float())}


def block_maxima(scale: torch.Tensor) -> torch.Tensor:
    """The maxima whose scales these are, in 16 bits where that gives the scales back."""
    amax = scale * int4.QMAX
    kept = int4.in_sixteen_bits(amax)
    return kept if torch.equal(kept.float() / int4.QMAX, scale) else amax


def w4a8(packed: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor):
    """As `int4_rows`, and the scalar scale of the FP8 values that the INT4 ones are rounded to."""
    return int4_rows(packed, scale) | {"weight_amax_2": (scale_2.float() * 448.0).reshape(())}


def nvfp4_pairs(packed: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor):
    """Two E2M1 a byte, the first in the low nibble: uint8 [N, K / 2], block scales float8_e4m3fn
    [N, K / 16], scalar scale. Of ModelOpt's `NVFP4QTensor`."""
    swapped = packed << 4 | packed >> 4
    weight, tiles = blocks.arranged(swapped, scale.view(torch.uint8), nvfp4.ROWS, True)
    return {
        "weight": weight,
        "weight_scale": tiles.view(torch.float8_e4m3fn),
        "weight_scale_2": scale_2.float().reshape(()),
    }


def mxfp8_blocks(weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """float8_e4m3fn [N, K] and biased exponents uint8 [N, K / 32]. Of ModelOpt's `MXFP8QTensor`."""
    weight, tiles = blocks.arranged(weight.view(torch.uint8), scale, mxfp8.ROWS, True)
    return {"weight": weight.view(torch.float8_e4m3fn), "weight_scale": tiles}
