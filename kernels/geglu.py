"""GEGLU (value * gelu(gate), https://arxiv.org/abs/2002.05202) with a quantized output."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import producers
from .producers import why_not  # noqa: F401  the same for every producer; width is that of q


def geglu_quantize_reference(
    h: torch.Tensor,
    kind: str,
    scale: torch.Tensor | None = None,
    pre_quant_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `geglu_quantize` computes, but for the last bit of erf: ComfyUI's GEGLU, quantized."""
    value, gate = h.chunk(2, dim=-1)
    x = producers.scaled_reference(value * F.gelu(gate), pre_quant_scale)
    return producers.quantize_reference(x, kind, scale)


def geglu_quantize(
    h: torch.Tensor,
    kind: str,
    scale: torch.Tensor | None = None,
    pre_quant_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h [..., 2K] fp16, bf16 or fp32 -> (q [..., K] contiguous, scale); kind "int8" or "fp8".

    The first K of a row are values, the others gates; gelu(gate), the product and the product times
    pre_quant_scale [K] are each rounded to h's dtype. scale: float32 scalar; None gives every token
    its own, [M, 1].
    """
    from .triton_quantize import geglu as kernel

    h = h.contiguous()
    k = h.shape[-1] // 2
    m = h.numel() // (2 * k)
    rows, columns = producers.tile(k, scale is None)
    q = torch.empty((*h.shape[:-1], k), dtype=producers.DTYPES[kind], device=h.device)
    out = producers.new_scale(h, m, scale)
    grid = (-(-m // rows) * -(-k // columns),)
    kernel[grid](
        h, pre_quant_scale, out, q, m, k, rows, columns, scale is None,
        num_warps=producers.warps(rows, columns),
    )  # fmt: skip
    return q, out
