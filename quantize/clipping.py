"""What AWQ_FULL's search for clipping takes in memory, as ModelOpt's `awq_clip` goes about it."""

from __future__ import annotations

import torch

# clippings tried for each block of BLOCK weights, output channels looked at together, tokens of a
# call looked at (every n-th, so that it is at least so many)
CLIPPINGS, BLOCK, CHANNELS, TOKENS = 11, 128, 1024, 64


def kept(weight: torch.Tensor) -> int:
    """Bytes that stay of a layer until every layer is searched: the errors of each clipping and the
    amax, and what awq_lite found."""
    rows, columns = weight.shape
    size = weight.element_size()
    return rows * -(-columns // BLOCK) * (4 * CLIPPINGS + 2 * size) + columns * (12 + size)


def searching(weight: torch.Tensor, tokens: int, itemsize: int, rounding: float) -> float:
    """Bytes while one layer is searched, given `tokens` of `itemsize` bytes a number.

    rounding: bytes while its weight goes through the quantizer.
    """
    rows, columns = weight.shape
    size, wide = weight.element_size(), max(weight.element_size(), itemsize)
    across = -(-columns // BLOCK)
    tokens = len(range(0, tokens, max(1, tokens // TOKENS)))
    channels = min(rows, CHANNELS)
    # each token's products with each weight before they are summed up in blocks, and the sums
    products = channels * tokens * across * (BLOCK + 1) * wide
    before = rows * columns * size  # the weight as it came out of the quantizer
    if columns % BLOCK:  # copies that fill the last block up
        products += (channels * size + tokens * wide) * across * BLOCK
        before += rows * across * BLOCK * size
    return before + max(products, rounding)
