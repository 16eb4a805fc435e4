"""Whether a tensor holds NaN or infinity, in little memory."""

from __future__ import annotations

import torch

PIECE = 2**22  # values looked at together
# what torch can tell the finite values of
JUDGED = frozenset(
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
)


def all_finite(tensor: torch.Tensor) -> bool:
    """Also of dtypes that torch compares in float32 only. Raises ValueError for one that is not in
    `JUDGED`."""
    if tensor.dtype not in JUDGED:
        raise ValueError(f"values of {tensor.dtype}, which cannot be told to be finite")
    pieces = tensor.reshape(-1).split(PIECE)
    return all(bool(torch.isfinite(piece.float()).all()) for piece in pieces)


def working(tensor: torch.Tensor) -> int:
    """Bytes that `all_finite` takes of a contiguous tensor's device: torch compares magnitudes in
    float32, into three masks."""
    cast = 0 if tensor.dtype == torch.float32 else 4
    return (cast + 4 + 3) * min(tensor.numel(), PIECE)
