"""GroupNorm and SiLU whose output, the input of a convolution, is quantized on the way out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import producers
from .producers import why_not  # noqa: F401  the same for every producer; width is the channels

# programs to aim for: a few for each of a GPU's 100 to 200 multiprocessors
PROGRAMS = 512
# stretches of pixels with statistics of their own; each program of the second launch combines them
MAX_STRETCHES = 32
# channels that a program of the first launch reads of a pixel, 512 bytes in 16 bits
READ = 256


def group_norm_quantize_reference(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    kind: str,
    scale: torch.Tensor | None = None,
    pre_quant_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `group_norm_quantize` computes, but for the order of its float32 sums."""
    weight = None if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    y = F.group_norm(x.float(), groups, weight, bias, eps).to(x.dtype)
    if silu:
        y = F.silu(y)
    y = producers.scaled_reference(y.permute(0, 2, 3, 1), pre_quant_scale)
    q, scale = producers.quantize_reference(y, kind, scale)
    return q.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), scale


def group_norm_quantize(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    kind: str,
    scale: torch.Tensor | None = None,
    pre_quant_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, C, H, W] fp16, bf16 or fp32 -> (q [N, C, H, W] channels_last, scale).

    GroupNorm in float32 (weight, bias [C] of any float dtype or None), rounded to x's dtype; SiLU
    where asked, rounded again; times pre_quant_scale [C], both rounded to x's dtype. kind: "int8" or
    "fp8". scale: float32 scalar; None gives every pixel its own, [N * H * W, 1] in the order n, h, w.
    An x that is not channels_last is copied.
    """
    from .triton_group_norm import normalize, statistics

    x = x.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    pixels = height * width
    per_group = channels // groups
    block, stretches, rows, columns = statistics_tile(n, channels, pixels, groups)
    partial = torch.empty((2, n, stretches, groups), dtype=torch.float32, device=x.device)
    statistics[(n * -(-groups // block) * stretches,)](
        x, partial, pixels, channels, groups, per_group, stretches, block,
        producers.power_of_two(per_group), rows, columns,
        num_warps=producers.warps(rows, columns),
    )  # fmt: skip

    q = torch.empty_like(x, dtype=producers.DTYPES[kind], memory_format=torch.channels_last)
    out = producers.new_scale(x, n * pixels, scale)
    rows, columns = producers.tile(channels, scale is None)
    length, near, programs = normalize_tile(n, channels, pixels, groups, rows, columns)
    normalize[(programs,)](
        x, partial, weight, bias, pre_quant_scale, out, q, n, pixels, channels, length, eps, groups, per_group,
        stretches, near, silu, scale is None, rows, columns,
        num_warps=producers.warps(rows, columns),
    )  # fmt: skip
    return q, out


def statistics_tile(n: int, channels: int, pixels: int, groups: int) -> tuple[int, int, int, int]:
    """Groups of a program, stretches of pixels, and the rows and columns of the tile it loops over.

    All are powers of two. Whole groups that make about 512 bytes of a pixel in 16 bits; as many
    stretches as PROGRAMS asks for, none shorter than a tile.
    """
    per_group = channels // groups
    block = 1
    while 2 * block * per_group <= READ and block < groups:
        block *= 2
    columns = producers.power_of_two(block * per_group)
    rows = max(1, producers.TILE // columns)
    programs = n * -(-groups // block)
    stretches = min(MAX_STRETCHES, -(-PROGRAMS // programs), -(-pixels // rows))
    return block, producers.power_of_two(stretches), rows, columns


def normalize_tile(
    n: int, channels: int, pixels: int, groups: int, rows: int, columns: int
) -> tuple[int, int, int]:
    """Pixels of a program, the most groups its columns touch (to a power of two), and programs."""
    across = -(-channels // columns)
    tiles = n * across * -(-pixels // rows)
    length = rows * max(1, tiles // (2 * PROGRAMS))
    touched = (columns - 2) // (channels // groups) + 2
    return length, producers.power_of_two(min(groups, touched)), n * across * -(-pixels // length)
