"""FP8 E4M3 Linear and 2-D convolution: exact products, float32 accumulation, one dequantizing multiply."""

from __future__ import annotations

import torch
import torch.nn.functional as F

QMAX = 448.0


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Float activations, scalar scale -> float32 tensor of values that E4M3 holds exactly."""
    return (x.float() * (1.0 / scale)).clamp_(-QMAX, QMAX).to(torch.float8_e4m3fn).float()


def token_scale(x: torch.Tensor) -> torch.Tensor:
    """[..., K] float -> float32 [..., 1]: each token's own scale, its largest magnitude over 448."""
    amax = x.abs().amax(dim=-1, keepdim=True).float()
    return 1.0 / (QMAX / torch.where(amax <= 2.0**-24, 1.0, amax))


def linear_reference(
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [..., K] float, weight float8_e4m3fn [N, K], scalar scales -> [..., N] in x's dtype.

    Without an input_scale every token gets its own.
    """
    if input_scale is None:
        input_scale = token_scale(x)
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


def fake_quantize(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """ModelOpt's E4M3 fake quantization, operation by operation: float32 in, float32 out."""
    step = QMAX / amax.clamp(min=2.0**-24)
    q = (x.float() * step).clamp(-QMAX, QMAX).to(torch.float8_e4m3fn)
    return q.float() * (1 / step)


def linear_fake(x, input_amax, weight, weight_scale, bias):
    """`linear_reference` as ModelOpt simulates it: float32 products of fake-quantized values.

    For verification: bit-identical to ModelOpt's module where it is given the same input.
    """
    return F.linear(fake_quantize(x, input_amax), weight.float() * weight_scale, _float(bias)).to(
        x.dtype
    )


def conv2d_fake(x, input_amax, weight, weight_scale, bias, stride, padding, dilation):
    """`conv2d_reference` as ModelOpt simulates it; see `linear_fake`."""
    w = weight.float() * weight_scale
    return F.conv2d(fake_quantize(x, input_amax), w, _float(bias), stride, padding, dilation).to(
        x.dtype
    )


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()
