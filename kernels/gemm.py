"""8-bit matrix product with its dequantizing epilogue: bias, residual, GEGLU, requantizing inside.

int8: int32 sums, exact. fp8 (E4M3): float32 sums. The references define the result; sums of fp8
products may differ in their order, and on Hopper (9.0) its matrix units keep fewer bits of a running
sum than float32 has, which is what every fast fp8 product there does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from . import fp8, int8, library, producers, tiles

INTEGER = {torch.int8: True, torch.float8_e4m3fn: False}
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
QUANTIZED = {None: 0, torch.int8: 1, torch.float8_e4m3fn: 2}


def why_not(kind: str, device: torch.device) -> str | None:
    """The reason these kernels (and conv.py's) cannot run a `kind` ("int8", "fp8") there, or None."""
    return producers.why_not(device, kind, 1)


def quantized(
    y: torch.Tensor, scale: torch.Tensor | None, kind: torch.dtype | None
) -> torch.Tensor:
    """y in int8 or float8_e4m3fn with a scalar scale; as it is where kind is None."""
    if kind is None:
        return y
    if kind == torch.int8:
        return int8.quantize(y, scale).to(torch.int8)
    return fp8.quantize(y, scale).to(kind)


def accumulate_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[M, K] x [N, K], both int8 or both float8_e4m3fn -> the sums [M, N]: int32 or float32."""
    if a.dtype == torch.int8:
        return int8.matmul_exact(a.float(), b)
    return F.linear(a.float(), b.float())


def scaled_mm_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    out_kind: torch.dtype | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """a [M, K] times b [N, K] transposed, both int8 or both float8_e4m3fn -> [M, N] in `dtype`.

    a_scale: float32, a scalar or [M, 1]; b_scale: float32, a scalar or [N, 1]; bias [N]; residual
    [M, N] in `dtype`. float32 up to bias, then rounded to `dtype`, then residual added. out_kind:
    int8 or float8_e4m3fn to quantize the result with the scalar out_scale.
    """
    acc = accumulate_reference(a, b).float()
    out = acc.mul_(a_scale * b_scale.reshape(1, -1))
    if bias is not None:
        out = out + bias.float()
    out = out.to(dtype)
    if residual is not None:
        out = out + residual
    return quantized(out, out_scale, out_kind)


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
    launch: Callable | None = None,
) -> torch.Tensor:
    """`scaled_mm_reference` in Triton, or in cuBLASLt where that is faster."""
    from . import hopper
    from . import triton_matmul as kernels

    a, b = a.contiguous(), b.contiguous()
    if library.takes(a, b, a_scale, b_scale, dtype, out_kind, residual):
        return library.fp8_mm(a, b, a_scale, b_scale, bias, residual, dtype)
    residual = None if residual is None else residual.contiguous()
    if launch is None and hopper.takes_product(a, b, hopper.LEAST_INNER):
        return hopper.scaled_mm(a, b, a_scale, b_scale, bias, residual, dtype, out_kind, out_scale)
    m, (n, k) = a.shape[0], b.shape  # a weight's sizes are no symbols while torch.compile traces
    chosen = tiles.choose(tiles.example(m), n, k, tiles.chip(a.device))
    out = torch.empty((m, n), device=a.device, dtype=out_kind or dtype)
    target = out if chosen.split == 1 else partial_sums(chosen.split, m, n, a)
    args = _matmul_args(a, (b,), a_scale, (b_scale,), None if bias is None else (bias,),
                        residual, target, out_scale, dtype, out_kind, chosen)  # fmt: skip
    grid = (cdiv(m, chosen.bm) * cdiv(n, chosen.bn), chosen.split, 1)
    run(launch, kernels.matmul, grid, args, chosen.warps, chosen.stages)
    if chosen.split > 1:
        finish(launch, target, a_scale, b_scale, bias, None, residual, out, out_scale, 1, dtype,
               out_kind)  # fmt: skip
    return out


def grouped_scaled_mm_reference(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    a_scale: torch.Tensor,
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """One `scaled_mm_reference` for each of two or three weights [N, K] -> [weights, M, N]."""
    biases = biases or [None] * len(weights)
    return torch.stack(
        [
            scaled_mm_reference(a, b, a_scale, scale, bias, None, dtype)
            for b, scale, bias in zip(weights, scales, biases, strict=True)
        ]
    )


def grouped_scaled_mm(
    a: torch.Tensor,
    weights: Sequence[torch.Tensor],
    a_scale: torch.Tensor,
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float16,
    launch: Callable | None = None,
) -> torch.Tensor:
    """`grouped_scaled_mm_reference` in Triton, in one launch: the weights stay where they are."""
    from . import triton_matmul as kernels

    a, weights = a.contiguous(), [weight.contiguous() for weight in weights]
    groups = len(weights)
    m, (n, k) = a.shape[0], weights[0].shape
    chosen = tiles.choose(tiles.example(m * groups), n, k, tiles.chip(a.device), splits=False)
    out = torch.empty((groups, m, n), device=a.device, dtype=dtype)
    args = _matmul_args(a, weights, a_scale, scales, biases, None, out, None, dtype, None, chosen)
    grid = (cdiv(m, chosen.bm) * cdiv(n, chosen.bn), 1, groups)
    run(launch, kernels.matmul, grid, args, chosen.warps, chosen.stages)
    return out


def _matmul_args(
    a, weights, a_scale, scales, biases, residual, target, out_scale, dtype, out_kind, chosen
) -> tuple:
    """The arguments of the kernel `matmul`, in its order. What it does not read is `a`."""
    m, (n, k), groups = a.shape[0], weights[0].shape, len(weights)
    three = [min(i, groups - 1) for i in range(3)]
    return (
        a,
        *(weights[i] for i in three),
        a_scale,
        *(scales[i] for i in three),
        *(a if biases is None else biases[i] for i in three),
        a if residual is None else residual,
        target,
        a if out_scale is None else out_scale,
        m,
        n,
        k,
        INTEGER[a.dtype],
        DTYPES[dtype],
        a_scale.numel() > 1,
        scales[0].numel() > 1,
        biases is not None,
        residual is not None,
        groups,
        QUANTIZED[out_kind],
        chosen.split,
        k % chosen.bk == 0,
        chosen.bm,
        chosen.bn,
        chosen.bk,
    )


def scaled_mm_geglu_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    out_kind: torch.dtype | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """a [M, K] times b [2 N, K] transposed -> [M, N]: first half times GELU (exact) of the second."""
    value, gate = scaled_mm_reference(a, b, a_scale, b_scale, bias, None, dtype).chunk(2, dim=-1)
    return quantized(value * F.gelu(gate), out_scale, out_kind)


def scaled_mm_geglu(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    out_kind: torch.dtype | None = None,
    out_scale: torch.Tensor | None = None,
    launch: Callable | None = None,
) -> torch.Tensor:
    """`scaled_mm_geglu_reference` in Triton."""
    from . import hopper
    from . import triton_matmul as kernels

    a, b = a.contiguous(), b.contiguous()
    if launch is None and hopper.takes_product(a, b):
        return hopper.scaled_mm_geglu(a, b, a_scale, b_scale, bias, dtype, out_kind, out_scale)
    m, k, n = a.shape[0], b.shape[1], b.shape[0] // 2
    integer = INTEGER[a.dtype]
    chosen = tiles.choose(
        tiles.example(m), n, k, tiles.chip(a.device), weights=2, integer=integer, splits=False
    )
    out = torch.empty((m, n), device=a.device, dtype=out_kind or dtype)
    args = (
        a,
        b,
        a_scale,
        b_scale,
        a if bias is None else bias,
        out,
        a if out_scale is None else out_scale,
        m,
        n,
        k,
        INTEGER[a.dtype],
        DTYPES[dtype],
        a_scale.numel() > 1,
        b_scale.numel() > 1,
        bias is not None,
        QUANTIZED[out_kind],
        k % chosen.bk == 0,
        chosen.bm,
        chosen.bn,
        chosen.bk,
    )
    grid = (cdiv(m, chosen.bm) * cdiv(n, chosen.bn),)
    run(launch, kernels.matmul_geglu, grid, args, chosen.warps, chosen.stages)
    return out


def finish(launch, parts, a_scale, b_scale, bias, row_bias, residual, out, out_scale, rows_per_image,
           dtype, out_kind) -> None:  # fmt: skip
    """Adds up the parts [split, M, N] of a divided sum and writes the finished result to `out`."""
    from . import triton_matmul as kernels

    split, m, n = parts.shape
    args = (
        parts,
        a_scale,
        b_scale,
        parts if bias is None else bias,
        parts if row_bias is None else row_bias,
        parts if residual is None else residual,
        out,
        parts if out_scale is None else out_scale,
        m,
        n,
        rows_per_image,
        parts.dtype == torch.int32,
        DTYPES[dtype],
        a_scale.numel() > 1,
        b_scale.numel() > 1,
        bias is not None,
        row_bias is not None,
        residual is not None,
        QUANTIZED[out_kind],
        split,
        16,
        128,
    )
    run(launch, kernels.reduce, (cdiv(m, 16), cdiv(n, 128)), args, 4, 2)


def run(launch: Callable | None, kernel, grid: tuple, args: tuple, warps: int, stages: int) -> None:
    """Launches a Triton kernel; through `launch` (torch.library.wrap_triton) where it is traced.

    Fusing a multiplication with an addition would round once where PyTorch rounds twice.
    """
    if launch is None:
        kernel[grid](*args, num_warps=warps, num_stages=stages, enable_fp_fusion=False)
    else:
        launch(kernel)[grid](*args, num_warps=warps, num_stages=stages)


def partial_sums(split: int, m: int, n: int, a: torch.Tensor) -> torch.Tensor:
    """Room for the sums of a product of a's kind that `split` programs share."""
    sums = torch.int32 if INTEGER[a.dtype] else torch.float32
    return torch.empty((split, m, n), device=a.device, dtype=sums)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
