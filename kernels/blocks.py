"""Block-quantized Linear and 2-D convolution (NVFP4, MXFP8): the arithmetic of a block-scaled GEMM.

Activations are quantized in blocks along their channels, as the weight is; a product of two blocks
is exact in float32, sums are float32. The quantizers are comfy-kitchen's, whose kernels run natively
on GPUs that have block-scaled tensor cores.
"""

from __future__ import annotations

import comfy_kitchen
import torch
import torch.nn.functional as F


def nvfp4_scale(x: torch.Tensor) -> torch.Tensor:
    """The scale of the block scales from `x` itself; 1 for zeros, which 0 would turn into NaN."""
    scale = x.abs().amax().float() / (6.0 * 448.0)
    return torch.where(scale > 0, scale, 1.0)


def quantize_nvfp4(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """[M, K] float, scalar scale of the block scales or None -> float32 values NVFP4 holds.

    Without a scale the largest magnitude of `x` gives it, as in ComfyUI's layout.
    """
    if scale is None:
        scale = nvfp4_scale(x)
    q, blocks = comfy_kitchen.quantize_nvfp4(x.float(), scale, pad_16x=x.shape[0] % 16 != 0)
    return comfy_kitchen.dequantize_nvfp4(q, scale, blocks, torch.float32)[: len(x)]


def quantize_mxfp8(x: torch.Tensor, scale: None = None) -> torch.Tensor:
    """[M, K] float -> float32 values MXFP8 holds."""
    q, blocks = comfy_kitchen.quantize_mxfp8(x.float(), pad_32x=x.shape[0] % 32 != 0)
    return comfy_kitchen.dequantize_mxfp8(q, blocks, torch.float32)[: len(x)]


def linear_reference(quantize, x, input_scale, weight, bias):
    """x [..., K] float, float32 weight [N, K] dequantized -> [..., N] in x's dtype."""
    q = quantize(x.reshape(-1, x.shape[-1]), input_scale)
    out = F.linear(q, weight)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], len(weight))


def conv2d_reference(quantize, x, input_scale, weight, bias, stride, padding, dilation):
    """x [N, C, H, W] float, float32 weight [K, C, R, S] dequantized -> [N, K, P, Q] in x's dtype.

    Every pixel's channels are quantized in blocks; zero padding is exact.
    """
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, c)
    q = quantize(pixels, input_scale).reshape(n, h, w, c).permute(0, 3, 1, 2)
    out = F.conv2d(q, weight, None, stride, padding, dilation)
    if bias is not None:
        out = out + bias.float().reshape(1, -1, 1, 1)
    return out.to(x.dtype)
