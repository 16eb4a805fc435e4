"""8-bit matrix product with its dequantizing epilogue: bias, residual, GEGLU, requantizing inside.

int8: int32 sums, exact. fp8 (E4M3): float32 sums. The references define the result; sums of fp8
products may differ in their order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import fp8, int8, tiles

INTEGER = {torch.int8: True, torch.float8_e4m3fn: False}
QUANTIZED = {None: 0, torch.int8: 1, torch.float8_e4m3fn: 2}


def why_not(kind: str, device: torch.device) -> str | None:
    """The reason these kernels (and conv.py's) cannot run a `kind` ("int8", "fp8") there, or None."""
    if not triton_found():
        return "Triton is not installed (on Windows: the package triton-windows)"
    if device.type == "cuda":
        needed = {"int8": (8, 0), "fp8": (8, 9)}[kind]
        found = torch.cuda.get_device_capability(device)
        if torch.version.hip or found < needed:
            return (
                f"Triton's {kind} products need compute capability {needed[0]}.{needed[1]}, "
                f"found {found[0]}.{found[1]}"
            )
        return None
    return None if _interpreted() else "Triton kernels run on NVIDIA GPUs"


def triton_found() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _interpreted() -> bool:
    from . import triton_matmul

    return (
        not hasattr(triton_matmul.matmul, "cache_hook")
        and "Interpreted" in type(triton_matmul.matmul).__name__
    )


def _quantized(y: torch.Tensor, scale: torch.Tensor | None, kind: torch.dtype | None):
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
    return _quantized(out, out_scale, out_kind)


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
) -> torch.Tensor:
    """`scaled_mm_reference` in Triton. a and b contiguous."""
    return grouped_scaled_mm(
        a, (b,), a_scale, (b_scale,), (bias,), residual, dtype, out_kind, out_scale
    )[0]


def grouped_scaled_mm_reference(
    a, weights, a_scale, scales, biases, residual=None, dtype=torch.float16, out_kind=None,
    out_scale=None,
):  # fmt: skip
    """One `scaled_mm_reference` for each of up to three weights [N, K] -> [weights, M, N]."""
    return torch.stack(
        [
            scaled_mm_reference(a, b, a_scale, scale, bias, residual, dtype, out_kind, out_scale)
            for b, scale, bias in zip(weights, scales, biases, strict=True)
        ]
    )


def grouped_scaled_mm(
    a, weights, a_scale, scales, biases, residual=None, dtype=torch.float16, out_kind=None,
    out_scale=None,
):  # fmt: skip
    """`grouped_scaled_mm_reference` in Triton, in one launch: the weights stay where they are."""
    from . import triton_matmul as kernels

    groups = len(weights)
    (m, k), n = a.shape, weights[0].shape[0]
    chosen = tiles.choose(m * groups, n, k, tiles.chip(a.device), splits=groups == 1)
    out = torch.empty((groups, m, n), device=a.device, dtype=out_kind or dtype)
    split = chosen.split
    target = out if split == 1 else _partial(split, m, n, a)
    bias = biases[0]
    none = out  # a pointer that is not read
    shared = (
        INTEGER[a.dtype],
        triton_dtype(dtype),
        a_scale.numel() > 1,
        scales[0].numel() > 1,
        bias is not None,
    )
    pick = [min(i, groups - 1) for i in range(3)]
    grid = (_cdiv(m, chosen.bm) * _cdiv(n, chosen.bn), split, groups)
    kernels.matmul[grid](
        a,
        *(weights[i] for i in pick),
        a_scale,
        *(scales[i] for i in pick),
        *(none if bias is None else biases[i] for i in pick),
        none if residual is None else residual,
        target,
        none if out_scale is None else out_scale,
        m,
        n,
        k,
        *shared,
        residual is not None,
        groups,
        QUANTIZED[out_kind],
        split,
        k % chosen.bk == 0,
        chosen.bm,
        chosen.bn,
        chosen.bk,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        enable_fp_fusion=False,
    )
    if split > 1:
        finish(target, a_scale, scales[0], bias, None, residual, out, out_scale, 1, dtype, out_kind)
    return out


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
    return _quantized(value * F.gelu(gate), out_scale, out_kind)


def scaled_mm_geglu(
    a, b, a_scale, b_scale, bias=None, dtype=torch.float16, out_kind=None, out_scale=None
):
    """`scaled_mm_geglu_reference` in Triton."""
    from . import triton_matmul as kernels

    (m, k), n = a.shape, b.shape[0] // 2
    chosen = tiles.choose(m, n, k, tiles.chip(a.device), weights=2, splits=False)
    out = torch.empty((m, n), device=a.device, dtype=out_kind or dtype)
    kernels.matmul_geglu[(_cdiv(m, chosen.bm) * _cdiv(n, chosen.bn),)](
        a,
        b,
        a_scale,
        b_scale,
        out if bias is None else bias,
        out,
        out if out_scale is None else out_scale,
        m,
        n,
        k,
        INTEGER[a.dtype],
        triton_dtype(dtype),
        a_scale.numel() > 1,
        b_scale.numel() > 1,
        bias is not None,
        QUANTIZED[out_kind],
        k % chosen.bk == 0,
        chosen.bm,
        chosen.bn,
        chosen.bk,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        enable_fp_fusion=False,
    )
    return out


def finish(parts, a_scale, b_scale, bias, row_bias, residual, out, out_scale, rows_per_image, dtype,
           out_kind) -> None:  # fmt: skip
    """Adds up the parts [split, M, N] of a divided product and writes the finished result to `out`."""
    from . import triton_matmul as kernels

    split, m, n = parts.shape
    kernels.reduce[(_cdiv(m, 16), _cdiv(n, 128))](
        parts,
        a_scale,
        b_scale,
        out if bias is None else bias,
        out if row_bias is None else row_bias,
        out if residual is None else residual,
        out,
        out if out_scale is None else out_scale,
        m,
        n,
        rows_per_image,
        parts.dtype == torch.int32,
        triton_dtype(dtype),
        a_scale.numel() > 1,
        b_scale.numel() > 1,
        bias is not None,
        row_bias is not None,
        residual is not None,
        QUANTIZED[out_kind],
        split,
        16,
        128,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _partial(split: int, m: int, n: int, a: torch.Tensor) -> torch.Tensor:
    sums = torch.int32 if INTEGER[a.dtype] else torch.float32
    return torch.empty((split, m, n), device=a.device, dtype=sums)


def triton_dtype(dtype: torch.dtype):
    """torch's dtype as Triton's."""
    import triton.language as tl

    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[
        dtype
    ]


def _cdiv(a: int, b: int) -> int:
    return math.ceil(a / b)
