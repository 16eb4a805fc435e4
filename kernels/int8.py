"""INT8 Linear and 2-D convolution: exact int32 accumulators, one dequantizing multiply.

The references here define the result: integer products, accumulated exactly, then
`acc * (x_scale * weight_scale) + bias` in float32. CPUs have no fast int8 GEMM in PyTorch
(`torch._int_mm` is some 30 times slower than the float32 one), so the CPU path multiplies the
integers as float32 in slices of K short enough that no partial sum reaches 2**24: every
intermediate is an exactly representable integer, whatever the order of summation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

QMAX = 127
# values beyond the calibrated range are clipped to int8's own ends, as ModelOpt clips them
QMIN = -128
# the longest K for which |sum of K products of an activation and a weight| stays below 2**24
EXACT_K = (2**24 - 1) // (QMIN * QMIN)
# rows of an unfolded convolution input multiplied at once on a GPU, in bytes
UNFOLD_BYTES = 256 * 2**20


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] float -> float32 integers [M, K] in -128..127 and float32 scale [M, 1] (amax / 127).

    For float32 activations the arithmetic is comfy-kitchen's `quantize_int8_rowwise`, operation by
    operation, so that results agree bit for bit with stock ComfyUI's.
    """
    amax = x.abs().amax(dim=-1, keepdim=True).float()
    # by a tensor: CUDA divides by a number as a product with its reciprocal, a bit off
    scale = (amax / torch.full_like(amax, QMAX)).clamp_(min=1e-30)
    return (x.float() / scale).round_().clamp_(QMIN, QMAX), scale


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Float activations, scalar scale -> float32 integers in -128..127."""
    return (x.float() / scale).round_().clamp_(QMIN, QMAX)


def matmul_exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Integer-valued float32 [M, K] and int8 [N, K] -> exact integer accumulators int32 [M, N]."""
    if a.is_cuda:
        return _int_mm(a.to(torch.int8), b)
    acc = None
    for start in range(0, a.shape[1], EXACT_K):
        stop = start + EXACT_K
        part = (a[:, start:stop] @ b[:, start:stop].float().t()).to(torch.int32)
        acc = part if acc is None else acc.add_(part)
    return acc


def _int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] x int8 [N, K] -> int32 [M, N] with torch._int_mm's CUDA shape rules met by zeros."""
    m, k = a.shape
    n = b.shape[0]
    pad_m, pad_k, pad_n = max(0, 32 - m), -k % 16, -n % 16
    if pad_m or pad_k:
        a = F.pad(a, (0, pad_k, 0, pad_m))
    if pad_n or pad_k:
        b = F.pad(b, (0, pad_k, 0, pad_n))
    return torch._int_mm(a.contiguous(), b.t())[:m, :n]


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] float, weight int8 [N, K], weight_scale float32 [N, 1] -> [..., N] in x's dtype.

    Activations are quantized with the scalar input_scale, or per token (row) where there is none.
    """
    flat = x.reshape(-1, x.shape[-1])
    if input_scale is None:
        q, scale = quantize_per_token(flat)
    else:
        q, scale = quantize(flat, input_scale), input_scale
    acc = matmul_exact(q, weight).float()
    out = acc.mul_(scale * weight_scale.reshape(1, -1)).to(x.dtype)
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def conv2d_accumulate(
    q: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> torch.Tensor:
    """Integer-valued float32 [N, C, H, W], int8 [K, C, R, S] -> exact float32 sums [N, K, P, Q].

    The sums are int32 accumulators converted to float32 once, as a kernel's epilogue does.
    """
    if q.is_cuda:
        return _conv2d_unfold(q, weight, stride, padding, dilation)
    step = max(1, EXACT_K // (weight.shape[2] * weight.shape[3]))
    acc = None
    for start in range(0, q.shape[1], step):
        w = weight[:, start : start + step].float()
        part = F.conv2d(q[:, start : start + step], w, None, stride, padding, dilation)
        acc = part.to(torch.int32) if acc is None else acc.add_(part.to(torch.int32))
    return acc.float()


def _conv2d_unfold(q, weight, stride, padding, dilation) -> torch.Tensor:
    """Convolution as a GEMM over unfolded rows: cuDNN may pick an algorithm that is not exact."""
    k, c, r, s = weight.shape
    x = F.pad(q.to(torch.int8), (padding[1], padding[1], padding[0], padding[0]))
    x = x.permute(0, 2, 3, 1).contiguous()
    n, h, w, _ = x.shape
    p = (h - dilation[0] * (r - 1) - 1) // stride[0] + 1
    o = (w - dilation[1] * (s - 1) - 1) // stride[1] + 1
    sn, sh, sw, sc = x.stride()
    rows = x.as_strided(
        (n, p, o, r, s, c),
        (sn, sh * stride[0], sw * stride[1], sh * dilation[0], sw * dilation[1], sc),
    )
    flat = weight.permute(0, 2, 3, 1).reshape(k, -1)
    out = torch.empty((n, p, o, k), device=q.device, dtype=torch.float32)
    lines = max(1, UNFOLD_BYTES // (o * r * s * c))
    for image in range(n):
        for top in range(0, p, lines):
            block = rows[image, top : top + lines].reshape(-1, r * s * c)
            out[image, top : top + lines] = _int_mm(block, flat).reshape(-1, o, k).float()
    return out.permute(0, 3, 1, 2)


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
    """x [N, C, H, W] float, input_scale scalar, weight int8 [K, C, R, S], weight_scale [K, 1, 1, 1].

    Returns [N, K, P, Q] in x's dtype. Zero padding is exact: zero quantizes to zero.
    """
    q = quantize(x, input_scale)
    acc = conv2d_accumulate(q, weight, stride, padding, dilation)
    out = acc.mul_((input_scale * weight_scale).reshape(1, -1, 1, 1))
    if bias is not None:
        out = out + bias.float().reshape(1, -1, 1, 1)
    return out.to(x.dtype)


def fake_quantize(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """ModelOpt's INT8 fake quantization, operation by operation: float32 in, float32 out."""
    step = torch.full_like(amax, QMAX) / amax.clamp(min=2.0**-24)
    return (x.float() * step).round_().clamp_(QMIN, QMAX) / step


def linear_fake(x, input_amax, weight, weight_amax, bias):
    """`linear_reference` as ModelOpt simulates it: float32 products of fake-quantized values.

    For verification: bit-identical to ModelOpt's module where it is given the same input, which
    integer products are not (they agree to float32 rounding).
    """
    q = fake_quantize(x, input_amax)
    return F.linear(q, _fake_weight(weight, weight_amax), _float(bias)).to(x.dtype)


def conv2d_fake(x, input_amax, weight, weight_amax, bias, stride, padding, dilation):
    """`conv2d_reference` as ModelOpt simulates it; see `linear_fake`."""
    w = _fake_weight(weight, weight_amax)
    return F.conv2d(fake_quantize(x, input_amax), w, _float(bias), stride, padding, dilation).to(
        x.dtype
    )


def _fake_weight(weight: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    return weight.float() / (torch.full_like(amax, QMAX) / amax)


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()
