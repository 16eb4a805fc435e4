"""Triton: quantize a tile of float32 values, and the row kernels that do so on the way out.

Tiles are [ROWS, COLUMNS] of a contiguous [m, k] matrix. Divisions are IEEE's (`div_rn`; a plain `/`
is approximate on GPUs), and every intermediate that PyTorch would store is rounded to x's dtype, so
that fused and unfused code quantize the same numbers. Imported inside functions only.
"""

import os

import triton
import triton.language as tl

# adding and subtracting 1.5 * 2**23 rounds |v| < 2**22 to an integer, half to even
TO_INTEGER = tl.constexpr(12582912.0)
HALF_ROOT = tl.constexpr(0.7071067811865476)
# Triton's interpreter rounds the product of a fused multiply-add
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_as(v, like):
    """float32 `v` rounded to the dtype that the pointer `like` points to."""
    return v.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def row_amax(v):
    """[R, C] -> [R]. The order of magnitudes is that of their bits as integers; NaN is largest."""
    bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def token_scale(amax, INT8: tl.constexpr):
    """As `int8.quantize_per_token` and `fp8.token_scale` round it."""
    if INT8:
        scale = tl.math.div_rn(amax, 127.0)
        scale = tl.maximum(scale, 1e-30, propagate_nan=tl.PropagateNan.ALL)
    else:
        amax = tl.where(amax <= 5.9604644775390625e-08, 1.0, amax)  # 2**-24
        # PyTorch divides a number by a tensor as its reciprocal times the number
        scale = tl.math.div_rn(1.0, tl.math.div_rn(1.0, amax) * 448.0)
    return scale


@triton.jit
def divided(v, scale):
    """IEEE's float32 quotient, where it is below 200: one division a scale, two of Markstein's steps a
    value (IBM J. Res. Dev. 34 (1990), 111-119: from a correctly rounded reciprocal and a quotient that
    is near, the next is correctly rounded)."""
    if INTERPRETED:
        return tl.math.div_rn(v, scale)
    inverse = tl.math.div_rn(1.0, scale)
    near = v * inverse
    q = tl.math.fma(tl.math.fma(-near, scale, v), inverse, near)
    q = tl.math.fma(tl.math.fma(-q, scale, v), inverse, q)
    return tl.where(tl.abs(near) < 200.0, q, near)


@triton.jit
def to_8_bits(v, scale, INT8: tl.constexpr):
    """float32 [R, C], scale [R, 1] -> int8 or float8e4nv [R, C]; beyond the range it is clipped."""
    if INT8:
        v = tl.clamp(divided(v, scale), -128.0, 127.0)
        q = ((v + TO_INTEGER) - TO_INTEGER).to(tl.int8)
    else:
        v = tl.clamp(
            v * tl.math.div_rn(1.0, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL
        )
        q = v.to(tl.float8e4nv)
    return q


@triton.jit
def store_quantized(v, q, scale, offsets, inside, row, rows_inside, PER_TOKEN: tl.constexpr):
    """Quantizes float32 [R, C], 0 outside; reads the static scale or writes those of the rows."""
    INT8: tl.constexpr = q.dtype.element_ty == tl.int8
    if PER_TOKEN:
        s = token_scale(row_amax(v), INT8)
        tl.store(scale + row, s, mask=rows_inside)
    else:
        s = tl.full((v.shape[0],), 1.0, tl.float32) * tl.load(scale)
    tl.store(q + offsets, to_8_bits(v, s[:, None], INT8), mask=inside)


@triton.jit
def tile_of(m, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows [ROWS], columns [COLUMNS] and which of the tile lie in the matrix."""
    across = tl.cdiv(k, COLUMNS)
    pid = tl.program_id(0)
    # 64 bits: rows * columns may pass 2**31
    row = (pid // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (pid % across) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column, (row < m)[:, None] & (column < k)[None, :]


@triton.jit
def times_pre_quant_scale(v, pre_quant_scale, column, k, x):
    """float32 [R, C] of x's values -> times [k], rounded to x's dtype."""
    factor = tl.load(pre_quant_scale + column, mask=column < k, other=0.0).to(tl.float32)
    return round_as(v * round_as(factor, x)[None, :], x)


# what changes with the picture's size or batch is no reason to compile anew
@triton.jit(do_not_specialize=["m"])
def quantize_rows(
    x, pre_quant_scale, scale, q, m, k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile_of(m, k, ROWS, COLUMNS)
    offsets = row[:, None] * k + column[None, :]
    v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if pre_quant_scale is not None:
        v = times_pre_quant_scale(v, pre_quant_scale, column, k, x)
    store_quantized(v, q, scale, offsets, inside, row, row < m, PER_TOKEN)


@triton.jit(do_not_specialize=["m"])
def layer_norm(
    x, weight, bias, pre_quant_scale, scale, q, m, k, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Whole rows: COLUMNS >= k. Two passes over registers, so the variance does not cancel."""
    row, column, inside = tile_of(m, k, ROWS, COLUMNS)
    offsets = row[:, None] * k + column[None, :]
    v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    count = k * 1.0
    v = tl.where(inside, v - tl.math.div_rn(tl.sum(v, 1), count)[:, None], 0.0)
    deviation = tl.math.sqrt_rn(tl.math.div_rn(tl.sum(v * v, 1), count) + eps)
    v = v * tl.math.div_rn(1.0, deviation)[:, None]
    if weight is not None:
        v *= tl.load(weight + column, mask=column < k, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        v += tl.load(bias + column, mask=column < k, other=0.0).to(tl.float32)[None, :]
    v = round_as(v, x)
    if pre_quant_scale is not None:
        v = times_pre_quant_scale(v, pre_quant_scale, column, k, x)
    store_quantized(v, q, scale, offsets, inside, row, row < m, PER_TOKEN)


@triton.jit(do_not_specialize=["m"])
def geglu(
    h, pre_quant_scale, scale, q, m, k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """h [m, 2k]: values, then gates."""
    row, column, inside = tile_of(m, k, ROWS, COLUMNS)
    halves = h + row[:, None] * (2 * k) + column[None, :]
    value = tl.load(halves, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(halves + k, mask=inside, other=0.0).to(tl.float32)
    gate = round_as(0.5 * gate * (1.0 + tl.math.erf(gate * HALF_ROOT)), h)
    v = round_as(value * gate, h)
    if pre_quant_scale is not None:
        v = times_pre_quant_scale(v, pre_quant_scale, column, k, h)
    offsets = row[:, None] * k + column[None, :]
    store_quantized(v, q, scale, offsets, inside, row, row < m, PER_TOKEN)
