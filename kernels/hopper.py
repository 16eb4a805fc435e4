"""gemm.py's and conv.py's products on Hopper (compute capability 9.0), with operands that TMA brings.

The same results: int8 exactly, fp8 up to the order of sums. gemm.py and conv.py ask `takes_product` and
`takes_conv` whether to call these. On an H200 they took a third less time for 3x3 convolutions, 9
to 22 % less for GEGLU and 2 to 4 % less for other products (benchmarks/results/tma_nvidia-h200.md).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from . import gemm, tiles
from .gemm import cdiv

NHWC = torch.channels_last
ALIGNED = 16  # bytes: of a tensor's first element and of each of its rows
LEAST_ROWS = 2048  # of a product: with fewer nothing was measured
LEAST_INNER = 640  # of a product without GEGLU: 320 took 2 % more time
LEAST_CHANNELS = 64  # half of a block
# device -> why these are not used there, found out before a model is loaded (check.py)
off: dict[torch.device, str] = {}


def why_not(device: torch.device) -> str | None:
    """The reason these kernels are not used on a device, or None."""
    if device.type != "cuda" or tiles.chip(device).capability[0] != 9:
        return "TMA kernels are for compute capability 9.0"
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "this Triton has no tensor descriptors"
    return off.get(device)


def _aligned(*tensors: torch.Tensor) -> bool:
    return all(t.data_ptr() % ALIGNED == 0 for t in tensors)


def takes_product(a: torch.Tensor, b: torch.Tensor, least: int = ALIGNED) -> bool:
    """Whether contiguous a [M, K] and b [N, K] are for `scaled_mm` or `scaled_mm_geglu`; K from `least`
    on."""
    return (
        a.shape[0] >= LEAST_ROWS
        and a.shape[1] >= least
        and a.shape[1] % ALIGNED == 0
        and why_not(a.device) is None
        and _aligned(a, b)
    )


def takes_conv(
    x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether channels-last x and weight are for `conv2d`."""
    plain = tuple(stride) == (1, 1) and tuple(dilation) == (1, 1)
    channels = x.shape[1]
    return (
        plain
        and channels >= LEAST_CHANNELS
        and channels % ALIGNED == 0
        and x.numel() > 0
        and why_not(x.device) is None
        and _aligned(x, weight)
    )


def block_of(bm: int, p: int, q: int) -> tuple[int, int, int]:
    """A block (images, rows, columns) of bm pixels, near a square (its border is read again by its
    neighbours), that covers p x q pixels with little beyond them."""
    high, wide = _power(p), _power(q)
    columns = min(wide, 16 if bm >= 128 else 8)
    rows = min(high, max(bm // columns, 1))
    columns = min(bm // rows, max(columns, wide))
    return bm // (rows * columns), rows, columns


def _power(x: int) -> int:
    """The least power of 2 that is not below x."""
    return 1 << (x - 1).bit_length()


def _descriptor(tensor: torch.Tensor, shape: Sequence[int], block: Sequence[int]):
    """Of `tensor`'s memory, contiguous in `shape`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(tensor, list(shape), strides, list(block))


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    out_kind: torch.dtype | None = None,
    out_scale: torch.Tensor | None = None,
    tile: tiles.Tiles | None = None,
) -> torch.Tensor:
    """`gemm.scaled_mm_reference` of contiguous tensors. tile: in place of the one that is chosen."""
    from . import triton_hopper as kernels

    m, (n, k) = a.shape[0], b.shape
    tile = tile or tiles.choose_tma(m, n, k, tiles.chip(a.device), "matmul")
    out = torch.empty((m, n), device=a.device, dtype=out_kind or dtype)
    args = (
        _descriptor(a, (m, k), (tile.bm, tile.bk)),
        _descriptor(b, (n, k), (tile.bn, tile.bk)),
        a_scale,
        b_scale,
        a if bias is None else bias,
        a if residual is None else residual,
        out,
        a if out_scale is None else out_scale,
        m,
        n,
        k,
        gemm.INTEGER[a.dtype],
        gemm.DTYPES[dtype],
        a_scale.numel() > 1,
        b_scale.numel() > 1,
        bias is not None,
        residual is not None,
        gemm.QUANTIZED[out_kind],
        tile.bm,
        tile.bn,
        tile.bk,
    )
    grid = (cdiv(m, tile.bm) * cdiv(n, tile.bn),)
    gemm.run(None, kernels.matmul, grid, args, tile.warps, tile.stages)
    return out


def scaled_mm_geglu(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    out_kind: torch.dtype | None = None,
    out_scale: torch.Tensor | None = None,
    tile: tiles.Tiles = tiles.TMA_GEGLU,
) -> torch.Tensor:
    """`gemm.scaled_mm_geglu_reference` of contiguous tensors. tile.bn: columns of the result."""
    from . import triton_hopper as kernels

    m, k, n = a.shape[0], b.shape[1], b.shape[0] // 2
    out = torch.empty((m, n), device=a.device, dtype=out_kind or dtype)
    args = (
        _descriptor(a, (m, k), (tile.bm, tile.bk)),
        _descriptor(b, (2, n, k), (2, tile.bn, tile.bk)),
        a_scale,
        b_scale,
        a if bias is None else bias,
        out,
        a if out_scale is None else out_scale,
        m,
        n,
        k,
        gemm.INTEGER[a.dtype],
        gemm.DTYPES[dtype],
        a_scale.numel() > 1,
        b_scale.numel() > 1,
        bias is not None,
        gemm.QUANTIZED[out_kind],
        tile.bm,
        tile.bn,
        tile.bk,
    )
    grid = (cdiv(m, tile.bm) * cdiv(n, tile.bn),)
    gemm.run(None, kernels.matmul_geglu, grid, args, tile.warps, tile.stages)
    return out


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    padding: Sequence[int] = (0, 0),
    row_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    out_kind: torch.dtype | None = None,
    out_scale: torch.Tensor | None = None,
    tile: tiles.Tiles | None = None,
) -> torch.Tensor:
    """`conv.conv2d_reference` with stride and dilation 1, of channels-last tensors; so is the result."""
    from . import triton_hopper as kernels

    images, _, height, width = x.shape
    n, channels, r, s = weight.shape
    p, q = height + 2 * padding[0] - r + 1, width + 2 * padding[1] - s + 1
    m, integer = images * p * q, gemm.INTEGER[x.dtype]
    if tile is None:
        kernel = "conv2d int8" if integer else "conv2d fp8"
        tile = tiles.choose_tma(m, n, channels, tiles.chip(x.device), kernel, r * s)
    ti, th, tw = block_of(tile.bm, p, q)
    out = torch.empty((images, n, p, q), device=x.device, dtype=out_kind or dtype,
                      memory_format=NHWC)  # fmt: skip
    target = out if tile.split == 1 else gemm.partial_sums(tile.split, m, n, x)
    args = (
        _descriptor(x, (images, height, width, channels), (ti, th, tw, tile.bk)),
        _descriptor(weight, (n, r * s * channels), (tile.bn, tile.bk)),
        x_scale,
        w_scale,
        x if bias is None else bias,
        x if row_bias is None else row_bias,
        x if residual is None else residual,
        target,
        x if out_scale is None else out_scale,
        images,
        channels,
        n,
        p,
        q,
        *padding,
        r,
        s,
        integer,
        gemm.DTYPES[dtype],
        w_scale.numel() > 1,
        bias is not None,
        row_bias is not None,
        residual is not None,
        gemm.QUANTIZED[out_kind],
        tile.split,
        2 if tile.bm > 128 else 1,
        ti,
        th,
        tw,
        tile.bn,
        tile.bk,
    )
    programs = cdiv(images, ti) * cdiv(p, th) * cdiv(q, tw) * cdiv(n, tile.bn) * tile.split
    gemm.run(None, kernels.conv2d, (programs,), args, tile.warps, tile.stages)
    if tile.split > 1:
        gemm.finish(None, target, x_scale, w_scale, bias, row_bias, residual, out, out_scale, p * q,
                    dtype, out_kind)  # fmt: skip
    return out
