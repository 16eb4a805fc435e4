"""Triton: GroupNorm, SiLU and quantization of NHWC activations, in two launches.

Statistics first: each program sums a stretch of pixels of some groups, so that two images of 32
groups fill a GPU. Sums are of differences from the stretch's first pixel, channel by channel: one
subtraction more than E[x^2] - E[x]^2 and, unlike it, no cancellation where the mean is large; a
Welford update would divide once a value, a second pass would read memory twice. Stretches and
channels are combined by Chan et al.'s formula, https://doi.org/10.1080/00031305.1983.10483115.
"""

import triton
import triton.language as tl

from .triton_quantize import round_as, store_quantized, times_pre_quant_scale


# what changes with the picture's size or batch is no reason to compile anew
@triton.jit(do_not_specialize=["pixels"])
def statistics(
    x, partial, pixels, channels,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, STRETCHES: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [n, pixels, channels] -> partial [2, n, STRETCHES, GROUPS]: means, sums of squares about them.

    A program takes BLOCK groups of one stretch: COLUMNS >= BLOCK * PER_GROUP channels, ROWS pixels
    at a time. SLOTS >= PER_GROUP.
    """
    blocks: tl.constexpr = (GROUPS + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    block = pid % blocks
    stretch = (pid // blocks) % STRETCHES
    image = pid // (blocks * STRETCHES)
    images = tl.num_programs(0) // (blocks * STRETCHES)
    length = tl.cdiv(pixels, STRETCHES)
    first = stretch * length
    last = tl.minimum(first + length, pixels)

    local = tl.arange(0, COLUMNS)
    column = block * (BLOCK * PER_GROUP) + local
    of_block = (local < BLOCK * PER_GROUP) & (column < channels)
    base = x + image.to(tl.int64) * pixels * channels + column
    zero = base + first.to(tl.int64) * channels
    shift = tl.load(zero, mask=of_block & (first < pixels), other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for top in range(first, last, ROWS):
        pixel = top + tl.arange(0, ROWS)
        inside = (pixel < last)[:, None] & of_block[None, :]
        offsets = pixel.to(tl.int64)[:, None] * channels
        v = tl.load(base[None, :] + offsets, mask=inside, other=0.0).to(tl.float32)
        v = tl.where(inside, v - shift[None, :], 0.0)
        sums += v
        squares += v * v
    count = tl.maximum(last - first, 1).to(tl.float32)
    sums = tl.sum(sums, 0)
    delta = tl.math.div_rn(sums, count)
    mean = shift + delta
    squares = tl.sum(squares, 0) - sums * delta

    # [COLUMNS] channels -> [BLOCK, SLOTS]
    slot = tl.arange(0, BLOCK * SLOTS) % SLOTS
    place = tl.arange(0, BLOCK * SLOTS) // SLOTS * PER_GROUP + tl.minimum(slot, PER_GROUP - 1)
    mean = tl.reshape(tl.gather(mean, place, 0), (BLOCK, SLOTS))
    squares = tl.reshape(tl.gather(squares, place, 0), (BLOCK, SLOTS))
    real = tl.reshape(slot, (BLOCK, SLOTS)) < PER_GROUP
    group_mean = tl.math.div_rn(tl.sum(tl.where(real, mean, 0.0), 1), PER_GROUP * 1.0)
    away = mean - group_mean[:, None]
    group_squares = tl.sum(tl.where(real, squares + count * (away * away), 0.0), 1)

    group = block * BLOCK + tl.arange(0, BLOCK)
    at = partial + (image * STRETCHES + stretch) * GROUPS + group
    tl.store(at, group_mean, mask=group < GROUPS)
    tl.store(at + images * (STRETCHES * GROUPS), group_squares, mask=group < GROUPS)


@triton.jit
def combined(
    partial, image, images, group, pixels, eps,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, STRETCHES: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of the groups [G] of an image."""
    stretch = tl.arange(0, STRETCHES)
    length = tl.cdiv(pixels, STRETCHES)
    count = tl.minimum(tl.maximum(pixels - stretch * length, 0), length).to(tl.float32)
    at = partial + (image * STRETCHES + stretch)[:, None] * GROUPS + group[None, :]
    real = (group < GROUPS)[None, :] & (count > 0.0)[:, None]
    means = tl.load(at, mask=real, other=0.0)
    squares = tl.load(at + images * (STRETCHES * GROUPS), mask=real, other=0.0)
    mean = tl.math.div_rn(tl.sum(means * count[:, None], 0), pixels * 1.0)
    away = means - mean[None, :]
    total = tl.sum(squares, 0) / PER_GROUP + tl.sum(away * away * count[:, None], 0)
    deviation = tl.math.sqrt_rn(tl.math.div_rn(total, pixels * 1.0) + eps)
    return mean, tl.math.div_rn(1.0, deviation)


@triton.jit(do_not_specialize=["images", "pixels", "length"])
def normalize(
    x, partial, weight, bias, pre_quant_scale, scale, q, images, pixels, channels, length, eps,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, STRETCHES: tl.constexpr, NEAR: tl.constexpr,
    SILU: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program takes COLUMNS channels, touching at most NEAR groups, of `length` pixels."""
    across = tl.cdiv(channels, COLUMNS)
    down = tl.cdiv(pixels, length)
    pid = tl.program_id(0)
    block = pid % across
    first = (pid // across) % down * length
    image = pid // (across * down)
    last = tl.minimum(first + length, pixels)

    column = block * COLUMNS + tl.arange(0, COLUMNS)
    real = column < channels
    first_group = block * COLUMNS // PER_GROUP
    group = first_group + tl.arange(0, NEAR)
    mean, factor = combined(
        partial, image, images, group, pixels, eps, GROUPS, PER_GROUP, STRETCHES
    )
    place = tl.minimum(column // PER_GROUP - first_group, NEAR - 1)
    mean = tl.gather(mean, place, 0)
    factor = tl.gather(factor, place, 0)
    if weight is not None:
        factor *= tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    else:
        offset = tl.zeros((COLUMNS,), tl.float32)
    for top in range(first, last, ROWS):
        pixel = top + tl.arange(0, ROWS)
        row = image.to(tl.int64) * pixels + pixel
        inside = (pixel < last)[:, None] & real[None, :]
        offsets = row[:, None] * channels + column[None, :]
        v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        v = round_as((v - mean[None, :]) * factor[None, :] + offset[None, :], x)
        if SILU:
            v = round_as(v / (1.0 + tl.exp(-v)), x)
        if pre_quant_scale is not None:
            v = times_pre_quant_scale(v, pre_quant_scale, column, channels, x)
        v = tl.where(inside, v, 0.0)
        store_quantized(v, q, scale, offsets, inside, row, pixel < last, PER_TOKEN)
