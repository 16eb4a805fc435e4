"""8-bit 2-D convolution as an implicit matrix product on NHWC, with the epilogue of gemm.py.

No library has one for these GPUs; unfolding the input instead would write nine times its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from . import gemm, hopper, int8, tiles
from .gemm import why_not  # noqa: F401  the same conditions

NHWC = torch.channels_last


def conv2d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    row_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    out_kind: torch.dtype | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [N, C, H, W], weight [K, C, R, S], both int8 or both float8_e4m3fn -> [N, K, P, Q] in `dtype`.

    x_scale: float32 scalar; w_scale: float32, a scalar or one a channel [K, 1, 1, 1]; bias [K];
    row_bias [N, K] (a time embedding) and residual [N, K, P, Q] in `dtype`, each added after
    rounding to it. out_kind, out_scale: as in `gemm.scaled_mm_reference`.
    """
    if x.dtype == torch.int8:
        acc = int8.conv2d_accumulate(x.float(), weight, stride, padding, dilation)
    else:
        acc = F.conv2d(x.float(), weight.float(), None, stride, padding, dilation)
    out = acc * (x_scale * w_scale).reshape(1, -1, 1, 1)
    if bias is not None:
        out = out + bias.float().reshape(1, -1, 1, 1)
    out = out.to(dtype)
    if row_bias is not None:
        out = out + row_bias[:, :, None, None]
    if residual is not None:
        out = out + residual
    return gemm.quantized(out, out_scale, out_kind)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    row_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    out_kind: torch.dtype | None = None,
    out_scale: torch.Tensor | None = None,
    launch: Callable | None = None,
) -> torch.Tensor:
    """`conv2d_reference` in Triton; the result is channels-last. x, weight and residual are copied
    where they are not channels-last already."""
    from . import triton_matmul as kernels

    x = x.contiguous(memory_format=NHWC)
    weight = weight.contiguous(memory_format=NHWC)
    if residual is not None:
        residual = residual.contiguous(memory_format=NHWC)
    if row_bias is not None:
        row_bias = row_bias.contiguous()
    if launch is None and hopper.takes_conv(x, weight, stride, dilation):
        return hopper.conv2d(x, weight, x_scale, w_scale, bias, padding, row_bias, residual, dtype,
                             out_kind, out_scale)  # fmt: skip
    images, _, height, width = x.shape
    n, channels, r, s = weight.shape
    p = (height + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    q = (width + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    m = images * p * q
    integer = gemm.INTEGER[x.dtype]
    chosen = tiles.choose(
        tiles.example(m), n, channels, tiles.chip(x.device), taps=r * s, integer=integer
    )
    out = torch.empty((images, n, p, q), device=x.device, dtype=out_kind or dtype,
                      memory_format=NHWC)  # fmt: skip
    target = out if chosen.split == 1 else gemm.partial_sums(chosen.split, m, n, x)
    args = (
        x,
        weight,
        x_scale,
        w_scale,
        x if bias is None else bias,
        x if row_bias is None else row_bias,
        x if residual is None else residual,
        target,
        x if out_scale is None else out_scale,
        images,
        height,
        width,
        channels,
        n,
        p,
        q,
        *stride,
        *padding,
        *dilation,
        r,
        s,
        integer,
        gemm.DTYPES[dtype],
        w_scale.numel() > 1,
        bias is not None,
        row_bias is not None,
        residual is not None,
        gemm.QUANTIZED[out_kind],
        chosen.split,
        channels % chosen.bk == 0,
        chosen.bm,
        chosen.bn,
        chosen.bk,
    )
    grid = (gemm.cdiv(m, chosen.bm) * gemm.cdiv(n, chosen.bn), chosen.split)
    gemm.run(launch, kernels.conv2d, grid, args, chosen.warps, chosen.stages)
    if chosen.split > 1:
        gemm.finish(launch, target, x_scale, w_scale, bias, row_bias, residual, out, out_scale, p * q,
                    dtype, out_kind)  # fmt: skip
    return out
