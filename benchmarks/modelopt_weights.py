"""Weights to quantize, easy and nasty ones, for `modelopt_cuda.py` and tests."""

from __future__ import annotations

import torch

from ..formats import blocks

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALL = [(17, 64), (33, 96), (6, 32, 3, 3), (5, 64, 1, 1), (7, 200), (1, 64)]
LARGE = [(320, 320), (640, 2560), (1280, 1280), (320, 64, 3, 3)]
ORDINARY = ("normal", "outliers", "mixed")
LARGE_KINDS = (*ORDINARY, "ties")  # of small shapes: every kind
BLOCKS = {"nvfp4": 16, "mxfp8": 32, "int4": 128, "w4a8": 128}
TOPS = {"nvfp4": 6.0, "mxfp8": 448.0, "int8": 127.0, "fp8": 448.0, "int4": 7.0, "w4a8": 7.0}


def normal(shape, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator)


def pick(options, size, seed: int) -> torch.Tensor:
    options = torch.tensor(options, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    return options[torch.randint(len(options), size, generator=generator)]


def in_blocks(name: str, kind: str, count: int, block: int, dtype) -> torch.Tensor:
    """Blocks [count, block] of a weight; see KINDS."""
    values, top = normal((count, block)), TOPS[name]
    if kind == "mixed":
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
        return values * torch.logspace(-7, 0, count)[order][:, None]
    if kind == "boundary":
        at = (top * pick([2.0**-i for i in range(9, 24)], (count,), 9)).to(dtype)
        bits = at.view(torch.int32 if dtype == torch.float32 else torch.int16)
        bits[0::3] += 1
        bits[1::3] -= 1
        values, scale = values.clamp(-2, 2) / 2.1, at.float()[:, None]
        values[:, 0] = 1.0
    elif kind == "epsilon":
        values = pick([0.0, 0.25, 0.5, 1.0, -0.25, -0.5, -1.0], (count, block), 11)
        scale = pick([2.0**-24, 2.0**-23, 3 * 2.0**-24, 2.0**-25], (count, 1), 10)
        values[:, 0] = 1.0
    else:
        if name == "nvfp4":  # block scales are E4M3 numbers, the largest among them
            half = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.5, 6.0]
            scale = pick([448.0, 1.0, 1.125, 1.25, 1.875, 0.875, 104.0, 36.0], (count, 1), 1)
            scale[0] = 448.0
        elif top == 448:
            half = [(1 + (2 * i + 1) / 16) * 2.0**e for i in range(7) for e in range(-5, 8)]
            scale = pick([4.0, 1.0, 8.0] if name == "mxfp8" else [4.0], (count, 1), 4)
        else:
            half = [i + 0.5 for i in range(int(top))]
            scale = pick([4.0, 8.0], (count, 1), 6)
        values = pick(half, (count, block), 2) * pick([-1.0, 1.0], (count, block), 7)
        values[:, 3], scale = top, scale * 2.0**-12
    return values * scale


IN_BLOCKS = {
    "mixed": "blocks of magnitudes from 1e-7 to 1",
    "ties": "values half-way between two of the format, in scales that are exact",
    "boundary": "block maxima at, just above and just below the largest number times 2^e",
    "epsilon": "block maxima around 2^-24, below which ModelOpt counts a block as zero",
}
FACTORS = {"all-zero": 0.0, "tiny-1e-4": 1e-4, "tiny-2^-20": 2.0**-20, "subnormal": 1e-39}
KINDS = ("normal", "outliers", *IN_BLOCKS, "zero-row-block", *FACTORS, "huge")


def weight_of(name: str, kind: str, shape: tuple[int, ...], dtype) -> torch.Tensor | None:
    """The weight, in its dtype; None where its numbers are none of the dtype."""
    weight, (n, k) = normal(shape), blocks.flat_shape(shape)
    if kind == "normal":
        weight *= 0.05 * torch.linspace(0.1, 1.1, n).view(n, *[1] * (len(shape) - 1))
    elif kind == "outliers":
        weight.view(-1)[:: max(weight.numel() // 9, 1)] *= 60
        weight *= 0.05
    elif kind == "zero-row-block":
        weight[-1] = 0
        weight.view(n, -1)[0, :128] = 0
    elif kind in FACTORS:
        if kind == "subnormal" and dtype == torch.float16:
            return None
        weight *= FACTORS[kind]
    elif kind == "huge":
        weight = weight.clamp(-3, 3) * (2e4 if dtype == torch.float16 else 1e30)
    else:
        block = BLOCKS.get(name, k)
        values = in_blocks(name, kind, n * -(-k // block), block, dtype)
        weight = blocks.unflatten(values.reshape(n, -1)[:, :k], shape)
    return weight.to(dtype)
