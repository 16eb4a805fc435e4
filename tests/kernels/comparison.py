"""What the tests of kernels that quantize their output share."""

from __future__ import annotations

import torch

KINDS = ("int8", "fp8")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# M, K: tokens and channels of SDXL and SD1.5, odd ones, one of each
SHAPES = [(154, 320), (2, 640), (1, 768), (2, 1280), (3, 1920), (2, 2560), (2, 5120), (77, 77)]
SHAPES += [(1, 1), (5, 3), (130, 64)]


def levels(q: torch.Tensor) -> torch.Tensor:
    """The place of each int8 or E4M3 value among those of its type, -0 and 0 the same."""
    if q.dtype == torch.int8:
        return q.int()
    bits = q.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def assert_exact(got, expected) -> None:
    """Both (q, scale): the same types, shapes and numbers."""
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
    assert_scale(got[1], expected[1], 0)
    different = levels(got[0]) != levels(expected[0])
    assert not different.any(), f"{different.sum()} differ, first {different.nonzero()[0]}"


def assert_one_step(got, expected, dtype: torch.dtype, share: float) -> None:
    """q at most one step apart, in at most `share` of the values (or one value of a small tensor).

    Scales per token follow the row's largest magnitude, rounded to `dtype`: at most one unit in the
    last place apart, 1e-5 where x is float32 (a small sum of large terms).
    """
    assert got[0].dtype == expected[0].dtype
    assert got[0].shape == expected[0].shape
    assert_scale(got[1], expected[1], max(torch.finfo(dtype).eps, 1e-5))
    apart = (levels(got[0]) - levels(expected[0])).abs()
    assert apart.max() <= 1, f"{apart.max()} steps"
    count = int((apart > 0).sum())
    assert count <= max(1, share * apart.numel()), f"{count} of {apart.numel()} values differ"


def assert_scale(got, expected, tolerance: float) -> None:
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert (expected > 0).all()
    assert ((got - expected).abs() <= tolerance * expected).all()
