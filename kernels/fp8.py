"""FP8 E4M3 Linear and 2-D convolution: exact products, float32 accumulation, one dequantizing multiply."""

from __future__ import annotations

import torch
import torch.nn.functional as F

QMAX = 448.0


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Float activations, scalar scale -> float32 tensor of values that E4M3 holds exactly."""
    return (x.float() * (1.0 / scale)).clamp_(-QMAX, QMAX).to(torch.float8_e4m3fn).float()


def linear_reference(
    x: torch.Tensor,
    input_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [..., K] float, weight float8_e4m3fn [N, K], scalar scales -> [..., N] in x's dtype."""
    out = F.linear(quantize(x, input_scale), weight.float()).mul_(input_scale * weight_scale)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


def conv2d_reference(
    x: torch.Tensor,
    input_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> torch.Tensor:
    """x [N, C, H, W] float, weight float8_e4m3fn [K, C, R, S], scalar scales -> [N, K, P, Q]."""
    acc = F.conv2d(quantize(x, input_scale), weight.float(), None, stride, padding, dilation)
    out = acc.mul_(input_scale * weight_scale)
    if bias is not None:
        out = out + bias.float().reshape(1, -1, 1, 1)
    return out.to(x.dtype)
