"""Weights that `mtq.compress` packed, of ModelOpt's quantized tensor classes -> tensors of a format.

Their values are kept. What ModelOpt says of them beside the quantizer's state is `_scale` and, for
NVFP4, `_double_scale` among the quantizer's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...formats import blocks, nvfp4
from . import stored

INT4_BLOCK = 128


def is_packed(weight: torch.Tensor) -> bool:
    """Whether these are codes, not weights."""
    return weight.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn)


def shape(weight: torch.Tensor, form: str | None) -> tuple[int, ...]:
    """Shape of the weight that was packed. A convolution's kernel is taken to be square: blocks of
    NVFP4 fill up its last axis."""
    if weight.dtype != torch.uint8:
        return tuple(weight.shape)
    if weight.ndim == 4 and form == "nvfp4":
        return (*weight.shape[:3], weight.shape[2])
    return (*weight.shape[:-1], 2 * weight.shape[-1])


def tensors(
    form: str, weight: torch.Tensor, beside: Mapping[str, torch.Tensor], name: str, where: str
) -> dict[str, torch.Tensor]:
    """The format's tensors for a Linear's (or, of int8 and fp8, a convolution's) packed weight.

    Raises ValueError where the scales are missing or do not fit.
    """
    prefix = "0." if form == "w4a8" else ""
    scale = _scale(beside, prefix, name, where)
    rows, columns = shape(weight, form)[0], shape(weight, form)[-1]
    wanted = {
        "int8": (torch.int8, (1, rows)),
        "fp8": (torch.float8_e4m3fn, (1,)),
        "mxfp8": (torch.float8_e4m3fn, (rows * (columns // 32),)),
        "nvfp4": (torch.uint8, (rows * (columns // 16),)),
        "int4": (torch.uint8, (rows * (columns // INT4_BLOCK),)),
        "w4a8": (torch.uint8, (rows * (columns // INT4_BLOCK),)),
    }
    dtype, sizes = wanted[form]
    aligned = form not in ("int4", "w4a8") or columns % INT4_BLOCK == 0
    if weight.dtype != dtype or scale.numel() not in sizes or not aligned:
        raise ValueError(
            f"a compressed {form} weight must be {dtype} with {sizes[-1]} scales, {name} in {where} "
            f"is {weight.dtype} {tuple(weight.shape)} with {scale.numel()}: save the UNet before "
            "mtq.compress, or get the file again"
        )
    if form == "int8":
        return stored.int8(weight, scale)
    if form == "fp8":
        return stored.fp8(weight, scale)
    if form == "mxfp8":
        return stored.mxfp8_blocks(weight, scale.reshape(rows, -1))
    if form == "nvfp4":
        double = _scale(beside, "", name, where, "_double_scale")
        return stored.nvfp4_pairs(weight, scale.reshape(rows, -1), double)
    # ModelOpt divides by 7 / amax, and packs value + 8 with the first of two in the high nibble
    made = {
        "weight": weight,
        "weight_amax": stored.block_maxima(1 / scale.float().reshape(rows, -1)),
    }
    if form == "w4a8":
        made["weight_amax_2"] = _scale(beside, "1.", name, where, "_amax").float().amax()
    return made


def dense(
    form: str, weight: torch.Tensor, beside: Mapping[str, torch.Tensor], name: str, where: str
) -> torch.Tensor:
    """The weight itself, in float32, where no format of ours holds it."""
    scale = _scale(beside, "", name, where)
    size = shape(weight, form)
    if weight.dtype in (torch.int8, torch.float8_e4m3fn) and scale.is_floating_point():
        return weight.float() * scale.float()
    if weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.uint8:
        values, factor = weight.float(), torch.exp2(scale.float() - 127)
        return values * factor.repeat_interleave(32, dim=-1)[..., : size[-1]]
    if form == "nvfp4" and scale.dtype == torch.float8_e4m3fn:
        codes = blocks.unpack(weight << 4 | weight >> 4)
        total = scale.float() * _scale(beside, "", name, where, "_double_scale").float()
        values = nvfp4.values_of(codes) * total.repeat_interleave(16, dim=-1)
        return values[..., : size[-1]]
    raise ValueError(
        f"a compressed weight must have numerics that this pack reads, {name} in {where} has "
        f"{weight.dtype} with {scale.dtype} scales: save the UNet before mtq.compress, or export it "
        "with export_hf_checkpoint"
    )


def _scale(
    beside: Mapping[str, torch.Tensor], prefix: str, name: str, where: str, leaf: str = "_scale"
) -> torch.Tensor:
    found = beside.get(prefix + leaf)
    if found is None:
        raise ValueError(
            f"a compressed weight must have {leaf[1:]} beside it, {name} in {where} has none: the "
            "file is damaged, get it again"
        )
    return found
