"""The Triton side of hopper.py: the matrix loops of triton_matmul.py, fed by TMA (tensor descriptors).

The copy engine computes addresses and reads 0 outside of a tensor, also in front of its first element:
no masks and no pointers take registers. A convolution's zero padding and a channel count that BK does
not divide come from that. Everything behind the sums is triton_matmul.py's. Imported inside functions
only.
"""

import triton
import triton.language as tl

from .triton_matmul import _dequantized, _epilogue, _geglu_epilogue, _store, _tile, rounded


# what changes with the picture's size or batch is no reason to compile anew
@triton.jit(do_not_specialize=["m"])
def matmul(a, b, a_scale, b_scale, bias, residual, out, out_scale, m, n, k,
           INTEGER: tl.constexpr, DTYPE: tl.constexpr, PER_ROW: tl.constexpr,
           PER_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
           QUANTIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """a: descriptor of [m, k], blocks [BM, BK]; b: of [n, k], blocks [BN, BK] -> out [m, n]."""
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN))
    acc = tl.zeros((BM, BN), tl.int32 if INTEGER else tl.float32)
    for i in range(0, tl.cdiv(k, BK)):
        x = a.load([tile_m * BM, i * BK])
        w = b.load([tile_n * BN, i * BK])
        acc = tl.dot(x, w.T, acc, out_dtype=acc.dtype)
    rows = tile_m * BM + tl.arange(0, BM)
    cols = tile_n * BN + tl.arange(0, BN)
    _epilogue(acc, rows, cols, m, n, a_scale, b_scale, bias, out, 1, residual, out, out_scale, DTYPE,
              PER_ROW, PER_CHANNEL, HAS_BIAS, False, HAS_RESIDUAL, QUANTIZE)  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def matmul_geglu(a, b, a_scale, b_scale, bias, out, out_scale, m, n, k, INTEGER: tl.constexpr,
                 DTYPE: tl.constexpr, PER_ROW: tl.constexpr, PER_CHANNEL: tl.constexpr,
                 HAS_BIAS: tl.constexpr, QUANTIZE: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """a: descriptor of [m, k]; b: of [2, n, k], values and gates, blocks [2, BN, BK] -> out [m, n].

    One product of 2 BN columns.
    """
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN))
    both = tl.zeros((BM, 2 * BN), tl.int32 if INTEGER else tl.float32)
    for i in range(0, tl.cdiv(k, BK)):
        x = a.load([tile_m * BM, i * BK])
        w = b.load([0, tile_n * BN, i * BK]).reshape(2 * BN, BK)
        both = tl.dot(x, w.T, both, out_dtype=both.dtype)
    value, gate = both.reshape(BM, 2, BN).permute(0, 2, 1).split()
    rows = tile_m * BM + tl.arange(0, BM)
    cols = tile_n * BN + tl.arange(0, BN)
    _geglu_epilogue(value, gate, rows, cols, m, n, a_scale, b_scale, bias, out, out_scale, DTYPE,
                    PER_ROW, PER_CHANNEL, HAS_BIAS, QUANTIZE)  # fmt: skip


@triton.jit
def _pixels(first, COUNT: tl.constexpr, image, top, left, images, p, q, m, TH: tl.constexpr,
            TW: tl.constexpr):  # fmt: skip
    """Rows of the output that COUNT pixels of a block are, from its pixel `first` on; m: none."""
    inner = first + tl.arange(0, COUNT)
    i = image + inner // (TH * TW)
    y = top + inner // TW % TH
    z = left + inner % TW
    return tl.where((i < images) & (y < p) & (z < q), (i * p + y) * q + z, m)


@triton.jit
def _finish(acc, rows, cols, part, image, m, n, x_scale, w_scale, bias, row_bias, rows_per_image,
            residual, out, out_scale, DTYPE: tl.constexpr, PER_CHANNEL: tl.constexpr,
            HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
            QUANTIZE: tl.constexpr, SPLIT: tl.constexpr, TI: tl.constexpr):  # fmt: skip
    if SPLIT > 1:
        at = (part * m + rows).to(tl.int64)[:, None] * n + cols[None, :]
        tl.store(out + at, acc, mask=(rows < m)[:, None] & (cols < n)[None, :])
    elif TI > 1 or not HAS_ROW_BIAS:
        _epilogue(acc, rows, cols, m, n, x_scale, w_scale, bias, row_bias, rows_per_image, residual,
                  out, out_scale, DTYPE, False, PER_CHANNEL, HAS_BIAS, HAS_ROW_BIAS, HAS_RESIDUAL,
                  QUANTIZE)  # fmt: skip
    else:  # `_epilogue`, but with one row of row_bias for the tile
        y = _dequantized(
            acc, w_scale, bias, rows, cols, m, n, PER_CHANNEL, x_scale, False, HAS_BIAS
        )
        y = rounded(y, DTYPE)
        inside = (rows < m)[:, None] & (cols < n)[None, :]
        row = tl.load(row_bias + image * n + cols, mask=cols < n, other=0.0).to(tl.float32)
        y = rounded(y + row[None, :], DTYPE)
        at = rows.to(tl.int64)[:, None] * n + cols[None, :]
        if HAS_RESIDUAL:
            y = rounded(y + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32), DTYPE)
        _store(y, out, out_scale, at, inside, QUANTIZE)


@triton.jit(do_not_specialize=["images", "p", "q"])
def conv2d(x, w, x_scale, w_scale, bias, row_bias, residual, out, out_scale,
           images, channels, n, p, q, pad_h, pad_w,
           R: tl.constexpr, S: tl.constexpr, INTEGER: tl.constexpr, DTYPE: tl.constexpr,
           PER_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr,
           HAS_RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, SPLIT: tl.constexpr,
           PARTS: tl.constexpr, TI: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
           BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Stride 1, dilation 1. x: descriptor of [images, height, width, channels], blocks [TI, TH, TW,
    BK]; w: of [n, R * S * channels], blocks [BN, BK] -> out [images, p, q, n].

    A program's rows are a block of pixels, so that one tap of it is a block of x too, shifted. PARTS:
    1, or 2 that are finished one after the other, for fewer registers. Grid: (tiles * SPLIT,).
    """
    BM: tl.constexpr = TI * TH * TW
    m = images * p * q
    down, across = tl.cdiv(p, TH), tl.cdiv(q, TW)
    tiles_m, tiles_n = tl.cdiv(images, TI) * down * across, tl.cdiv(n, BN)
    part = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = _tile(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n)
    image = tile_m // (down * across) * TI
    top = tile_m // across % down * TH
    left = tile_m % across * TW
    # pixels are the right operand: Triton reads a reshaped left one from registers
    acc = tl.zeros((BN, BM), tl.int32 if INTEGER else tl.float32)
    blocks = tl.cdiv(channels, BK)
    steps = R * S * blocks
    for i in range(part * steps // SPLIT, (part + 1) * steps // SPLIT):
        tap = i // blocks
        first = (i % blocks) * BK
        a = x.load([image, top - pad_h + tap // S, left - pad_w + tap % S, first])
        # beyond the last channel this reads the next tap, which a's zeros take out again
        b = w.load([tile_n * BN, tap * channels + first])
        acc = tl.dot(b, a.reshape(BM, BK).T, acc, out_dtype=acc.dtype)
    cols = tile_n * BN + tl.arange(0, BN)
    if PARTS == 1:
        rows = _pixels(0, BM, image, top, left, images, p, q, m, TH, TW)
        _finish(acc.T, rows, cols, part, image, m, n, x_scale, w_scale, bias, row_bias, p * q, residual,
                out, out_scale, DTYPE, PER_CHANNEL, HAS_BIAS, HAS_ROW_BIAS, HAS_RESIDUAL, QUANTIZE,
                SPLIT, TI)  # fmt: skip
    else:
        one, two = acc.reshape(BN, 2, BM // 2).permute(0, 2, 1).split()
        rows = _pixels(0, BM // 2, image, top, left, images, p, q, m, TH, TW)
        _finish(one.T, rows, cols, part, image, m, n, x_scale, w_scale, bias, row_bias, p * q, residual,
                out, out_scale, DTYPE, PER_CHANNEL, HAS_BIAS, HAS_ROW_BIAS, HAS_RESIDUAL, QUANTIZE,
                SPLIT, TI)  # fmt: skip
        rows = _pixels(BM // 2, BM // 2, image, top, left, images, p, q, m, TH, TW)
        _finish(two.T, rows, cols, part, image, m, n, x_scale, w_scale, bias, row_bias, p * q, residual,
                out, out_scale, DTYPE, PER_CHANNEL, HAS_BIAS, HAS_ROW_BIAS, HAS_RESIDUAL, QUANTIZE,
                SPLIT, TI)  # fmt: skip
