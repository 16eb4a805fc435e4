"""What the kernels that quantize a layer's input on the way out share, beside their arithmetic.

Quantized activations are values (int8 or float8_e4m3fn) and a float32 scale, x ~ q * scale: the
given 0-dim one (static, calibrated) or [M, 1], one a token. Nothing here imports Triton.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from . import fp8, int8

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# first compute capability whose conversions to the type are hardware's and Triton's
CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}
# elements of a program but for longer rows: 256 threads with one 16-byte load of 16-bit values each
TILE = 2048
# the longest row: 512 threads with 16 values each. Twice that would leave 64 registers a thread
MAX_ROW = 8192


def quantize_reference(
    x: torch.Tensor, kind: str, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (q of x's shape, scale): as kernels/int8.py and kernels/fp8.py quantize."""
    flat = x.reshape(-1, x.shape[-1])
    if kind == "int8":
        if scale is None:
            q, scale = int8.quantize_per_token(flat)
        else:
            q = int8.quantize(flat, scale)
    else:
        if scale is None:
            scale = fp8.token_scale(flat)
        q = fp8.quantize(flat, scale)
    return q.to(DTYPES[kind]).reshape(x.shape), scale


def scaled_reference(x: torch.Tensor, pre_quant_scale: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times pre_quant_scale [K], rounded to x's dtype, as loaders/ops.py does it."""
    return x if pre_quant_scale is None else x * pre_quant_scale.to(x.dtype)


def why_not(device: torch.device, kind: str, width: int) -> str | None:
    """The reason a producer cannot quantize rows of `width` to `kind` here, or None.

    Asked once, at load. Triton's interpreter (TRITON_INTERPRET=1) runs on any device.
    """
    if width > MAX_ROW:
        return f"a row of at most {MAX_ROW} values fits one program, got {width}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (on Windows: the package triton-windows)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton kernels need an NVIDIA GPU, the device is {device.type}"
    found, needed = torch.cuda.get_device_capability(device), CAPABILITY[kind]
    if found < needed:
        return (
            f"quantizing to {kind} in Triton needs compute capability {needed[0]}.{needed[1]}, "
            f"found {found[0]}.{found[1]}"
        )
    if kind == "fp8" and found[0] == 12 and _triton_version() < (3, 5):
        return "Triton older than 3.5 multiplies fp8 in 16 bits on this GPU: update PyTorch"
    return None


def _triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def tile(width: int, whole_row: bool) -> tuple[int, int]:
    """Rows and columns, powers of two, of one program's tile of a matrix with `width` columns.

    With a scale for each token a tile holds whole rows. Otherwise columns are the largest power of
    two that divides the row, so that no lane idles: of 64 (a 128-byte line in 16 bits) and more.
    """
    columns = power_of_two(width)
    if not whole_row:
        divisor = 1
        while divisor < TILE and width % (2 * divisor) == 0:
            divisor *= 2
        columns = divisor if divisor >= 64 else min(columns, TILE)
    return max(1, TILE // columns), columns


def warps(rows: int, columns: int, each: int = 8) -> int:
    """Warps of 32 threads for a tile: `each` values a thread, 16 in the longest rows."""
    if each > 8:
        return min(16, max(1, rows * columns // (32 * each)))
    return min(16, max(4, rows * columns // 256))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n.

    By comparisons, which torch.compile turns into guards where n is a dynamic size.
    """
    power = 1
    while power < n:
        power *= 2
    return power


def new_scale(x: torch.Tensor, tokens: int, scale: torch.Tensor | None) -> torch.Tensor:
    """The static scale, or an uninitialized float32 [tokens, 1] for the kernel to fill."""
    if scale is not None:
        return scale
    return torch.empty((tokens, 1), dtype=torch.float32, device=x.device)
