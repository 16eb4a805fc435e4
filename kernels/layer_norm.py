"""LayerNorm whose output is quantized before it leaves the GPU's registers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import producers
from .producers import why_not  # noqa: F401  the same for every producer

# of a thread, as in the runs on an H200 that benchmarks/results has; the two were not timed apart
VALUES = {"int8": 8, "fp8": 32}


def layer_norm_quantize_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    scale: torch.Tensor | None = None,
    pre_quant_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `layer_norm_quantize` computes, but for the order of two float32 sums a row."""
    weight = None if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    normal = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)
    normal = producers.scaled_reference(normal, pre_quant_scale)
    return producers.quantize_reference(normal, kind, scale)


def layer_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    scale: torch.Tensor | None = None,
    pre_quant_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] fp16, bf16 or fp32 -> (q [..., K] contiguous, scale); kind "int8" or "fp8".

    LayerNorm in float32 over K, weight and bias [K] of any float dtype or None, rounded to x's
    dtype; then times pre_quant_scale [K], rounded again. scale: float32 scalar; None gives every
    token its own, [M, 1].
    """
    from .triton_quantize import layer_norm as kernel

    x = x.contiguous()
    k = x.shape[-1]
    m = x.numel() // k
    rows, columns = producers.tile(k, True)
    warps = producers.warps(rows, columns, VALUES[kind])
    q = torch.empty(x.shape, dtype=producers.DTYPES[kind], device=x.device)
    out = producers.new_scale(x, m, scale)
    kernel[(-(-m // rows),)](
        x, weight, bias, pre_quant_scale, out, q, m, k, eps, rows, columns, scale is None,
        num_warps=warps,
    )  # fmt: skip
    return q, out
