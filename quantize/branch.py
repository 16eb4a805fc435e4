"""The rank of SVDQuant's low-rank branch, where none is asked for: what the bits of a format leave
room for."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..formats import FORMATS
from ..formats.checkpoint import SIXTEEN_BITS

# format -> bits a weight that quantized layers take at most, scales, smoothing and branches included
WITHIN = {"nvfp4": 4.6, "int4": 4.2}
BRANCH_BITS = 16


def largest_rank(
    form: str,
    branched: Iterable[torch.Tensor],
    others: Iterable[tuple[str, torch.Tensor]],
    most: int,
) -> int:
    """The largest rank, from 1 to `most`, with which all these layers together stay within the bits of
    the format `form`; 1 where there is room for none.

    branched: weights [N, K] in `form` that get a branch [N, rank] @ [rank, K] and a smoothing scale
    [K]; others: format and weight of layers without. Values are not read.
    """
    branched = list(branched)
    weights = taken = 0
    for own, weight in [*((form, weight) for weight in branched), *others]:
        weights += weight.numel()
        taken += _stored_bits(own, tuple(weight.shape))
    for weight in branched:
        taken += weight.shape[1] * (BRANCH_BITS if weight.dtype in SIXTEEN_BITS else 32)

    def fits(rank: int) -> bool:
        values = sum(min(rank, *weight.shape) * sum(weight.shape) for weight in branched)
        return taken + BRANCH_BITS * values <= WITHIN[form] * weights

    rank = 1
    while rank < most and fits(rank + 1):
        rank += 1
    return rank


def _stored_bits(form: str, shape: tuple[int, ...]) -> int:
    """Bits of a weight's tensors in the file, and of the scale of its inputs."""
    numerics = FORMATS[form]
    tensors = numerics.stored(shape).values()
    inputs = 32 if numerics.ACTIVATIONS else 0
    return inputs + sum(8 * math.prod(size) * dtypes[0].itemsize for size, dtypes in tensors)
