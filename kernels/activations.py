"""Quantizes activations as they are: the pass of its own that no producer has taken over."""

from __future__ import annotations

import torch

from . import producers
from .producers import why_not  # noqa: F401  the same for every producer


def quantize_rows_reference(
    x: torch.Tensor,
    kind: str,
    scale: torch.Tensor | None = None,
    pre_quant_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_rows` computes, in PyTorch, on any device."""
    x = producers.scaled_reference(x, pre_quant_scale)
    return producers.quantize_reference(x, kind, scale)


def quantize_rows(
    x: torch.Tensor,
    kind: str,
    scale: torch.Tensor | None = None,
    pre_quant_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] fp16, bf16 or fp32 -> (q [..., K] contiguous, scale); kind "int8" or "fp8".

    scale: float32 scalar; None gives every token its own, [M, 1]. pre_quant_scale [K] multiplies x
    first, rounded to x's dtype.
    """
    from .triton_quantize import quantize_rows as kernel

    x = x.contiguous()
    k = x.shape[-1]
    m = x.numel() // k
    rows, columns = producers.tile(k, scale is None)
    q = torch.empty(x.shape, dtype=producers.DTYPES[kind], device=x.device)
    out = producers.new_scale(x, m, scale)
    grid = (-(-m // rows) * -(-k // columns),)
    kernel[grid](
        x, pre_quant_scale, out, q, m, k, rows, columns, scale is None,
        num_warps=producers.warps(rows, columns),
    )  # fmt: skip
    return q, out
