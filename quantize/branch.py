"""The rank of SVDQuant's low-rank branch, where none is asked for: what the bits of a format leave
room for."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..formats import FORMATS

# format -> bits a weight that quantized layers take at most, scales, smoothing and branches included
WITHIN = {"nvfp4": 4.6, "int4": 4.2}
BRANCH_BITS = 16
# of weights in 32 bits; those in 16 take half, and get the same rank
SMOOTHING_BITS = 32


def largest_rank(
    form: str,
    branched: Iterable[torch.Tensor],
    others: Iterable[tuple[str, torch.Tensor]],
    most: int,
) -> tuple[int, float]:
    """The largest rank, from 1 to `most`, with which all these layers together stay within the bits of
    the format `form`, 1 where there is room for none; and the bits a weight that they take with it.

    branched: weights [N, K] in `form` that get a branch [N, rank] @ [rank, K] and a smoothing scale
    [K], which counts as of 32-bit weights; others: format and weight of layers without. Values are
    not read.
    """
    branched = list(branched)
    weights = taken = 0
    for own, weight in [*((form, weight) for weight in branched), *others]:
        weights += weight.numel()
        taken += _stored_bits(own, tuple(weight.shape))
    taken += sum(weight.shape[1] * SMOOTHING_BITS for weight in branched)

    def bits(rank: int) -> float:
        values = sum(min(rank, *weight.shape) * sum(weight.shape) for weight in branched)
        return (taken + BRANCH_BITS * values) / weights

    rank = 1
    while rank < most and bits(rank + 1) <= WITHIN[form]:
        rank += 1
    return rank, bits(rank)


def _stored_bits(form: str, shape: tuple[int, ...]) -> int:
    """Bits of a weight's tensors in the file, and of the scale of its inputs."""
    numerics = FORMATS[form]
    tensors = numerics.stored(shape).values()
    inputs = 32 if numerics.ACTIVATIONS else 0
    return inputs + sum(8 * math.prod(size) * dtypes[0].itemsize for size, dtypes in tensors)
