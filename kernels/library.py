"""torch's own fp8 matrix product (cuBLASLt) in place of ours, where it was measured to be faster."""

from __future__ import annotations

import torch

from . import tiles

# the first number of the compute capability: on an H200 every fp8 Linear of 640 inputs and more that was
# timed took up to 31 % less time in it, none more; of 320 inputs one took 28 % more
# (benchmarks/results/tiles_nvidia-h200.md, tma_nvidia-h200.md)
FASTER = (9,)
LEAST = 640
# its residual is a pass of its own: by its bytes that costs more than is saved in front of a shorter
# sum, which was not timed
LONG = 2048
MULTIPLE = 16
# said of a Linear with calibrated scales that `fits`
WHY = "PyTorch's own product (cuBLASLt) takes its place where the layer stands alone"


def fits(capability: tuple[int, int], n: int, k: int) -> bool:
    """Whether a weight [n, k] is one for `fp8_mm` on a GPU."""
    return capability[0] in FASTER and k >= LEAST and not (n % MULTIPLE or k % MULTIPLE)


def takes(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    dtype: torch.dtype,
    out_kind: torch.dtype | None,
    residual: torch.Tensor | None,
) -> bool:
    """Whether `fp8_mm` is to compute a `gemm.scaled_mm` of these."""
    if a.dtype != torch.float8_e4m3fn or a.device.type != "cuda" or out_kind is not None:
        return False
    if a_scale.numel() != 1 or b_scale.numel() != 1 or dtype == torch.float32:
        return False
    if not fits(tiles.chip(a.device).capability, *b.shape):
        return False
    # compiled, the addition is part of whatever comes next
    return residual is None or b.shape[1] >= LONG or torch.compiler.is_compiling()


def fp8_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`gemm.scaled_mm` of contiguous float8_e4m3fn a [M, K], b [N, K] and scalar scales."""
    if bias is not None:
        bias = bias.to(dtype)
    out = torch._scaled_mm(
        a,
        b.t(),
        scale_a=a_scale.reshape(()),
        scale_b=b_scale.reshape(()),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out if residual is None else out + residual
