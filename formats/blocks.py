"""What the block formats share: the flattened weight their blocks run over, and 4-bit packing.

A convolution's weight [N, C, R, S] is flattened to [N, R * S * C], channels last: blocks then run
over input channels, as they lie in a channels-last activation, and every scale covers a whole block
(blocks along the last axis of the 4-D weight would hold three values).

A Linear of a format that stock ComfyUI knows is arranged as there: padded rows, and the block scales
in cuBLAS' tiles of 128 x 4
(https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout). A convolution, which
stock ComfyUI has none of, has neither padding nor tiles.
"""

from __future__ import annotations

import torch
from comfy_kitchen.float_utils import from_blocked, to_blocked


def flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the flattened weight: [N, K]."""
    length = 1
    for size in shape[1:]:
        length *= size
    return shape[0], length


def flatten(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] as it is, [N, C, R, S] -> [N, R * S * C]."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def unflatten(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `flatten` for a weight of `shape`."""
    if len(shape) == 2:
        return flat.reshape(shape)
    n, c, r, s = shape
    return flat.reshape(n, r, s, c).permute(0, 3, 1, 2).contiguous()


def padded(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[N, K] with zeros added below and to the right, up to multiples of `rows` and `columns`."""
    below, right = -tensor.shape[0] % rows, -tensor.shape[1] % columns
    return torch.nn.functional.pad(tensor, (0, right, 0, below)) if below or right else tensor


def roundup(size: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-size // multiple) * multiple


def arranged(values: torch.Tensor, scale: torch.Tensor, rows: int, linear: bool):
    """[N, K] values and their uint8 [N, K / block] scales, as they are stored."""
    if not linear:
        return values, scale
    return padded(values, rows, 1), to_blocked(padded(scale, rows, 1), flatten=False)


def arranged_shapes(shape: tuple[int, ...], block: int, rows: int):
    """Shapes of what `arranged` gives for a weight of `shape`."""
    n, k = flat_shape(shape)
    if len(shape) == 4:
        return (n, k), (n, k // block)
    n = roundup(n, rows)
    return (n, k), (roundup(n, 128), roundup(k // block, 4))


def plain_scale(scale: torch.Tensor, shape: tuple[int, ...], block: int, rows: int) -> torch.Tensor:
    """The scales of `arranged` for a weight of `shape` -> uint8 [N, K / block]."""
    scale = scale.view(torch.uint8)
    if len(shape) == 4:
        return scale
    n, k = flat_shape(shape)
    return from_blocked(scale, roundup(n, rows), k // block)[:n].contiguous()


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0..15 [..., K], K even -> uint8 [..., K / 2], the even ones in the high nibble."""
    return codes[..., 0::2] << 4 | codes[..., 1::2]


def unpack(data: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    return torch.stack((data >> 4, data & 15), dim=-1).reshape(*data.shape[:-1], -1)


def no_divisor(name: str, block: int, shape: tuple[int, ...]) -> str | None:
    """Why a weight of this shape has no whole blocks of `block` input channels, or None."""
    if shape[1] % block == 0:
        return None
    what = "in_features" if len(shape) == 2 else "input channels"
    return f"{name} needs {what} divisible by {block}, got {shape[1]}"
