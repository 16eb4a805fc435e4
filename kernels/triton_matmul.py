"""The Triton side of gemm.py and conv2d.py: two matrix loops and the epilogue they share.

Products of 8-bit values are summed in int32 (int8) or float32 (float8). The epilogue dequantizes,
adds, and rounds to the output's dtype wherever PyTorch's separate operations would round, so that
a fused layer gives the same numbers as an unfused one. Imported inside functions only.
"""

import triton
import triton.language as tl

from .triton_quantize import to_8_bits

# programs that share columns of weights run next to each other, this many rows of tiles at a time
GROUP = tl.constexpr(8)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 -> the nearest value of fp16 (0), bf16 (1) or fp32 (2), in float32."""
    if DTYPE == 0:
        return x.to(tl.float16).to(tl.float32)
    if DTYPE == 1:
        return x.to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def _tile(pid, rows_of_tiles, columns_of_tiles):
    """Program number -> its tile, in an order that keeps weights in the L2 cache."""
    per_group = GROUP * columns_of_tiles
    first = (pid // per_group) * GROUP
    height = min(rows_of_tiles - first, GROUP)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit
def _gelu(x):
    """The exact one: x * Phi(x)."""
    return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _dequantized(acc, scale, bias, rows, cols, m, n, PER_CHANNEL: tl.constexpr, a_scale,
                 PER_ROW: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """acc * (a_scale * b_scale) + bias, in float32."""
    inside = cols < n
    if PER_CHANNEL:
        column = tl.load(scale + cols, mask=inside, other=1.0)[None, :]
    else:
        column = tl.load(scale)
    if PER_ROW:
        factor = tl.load(a_scale + rows, mask=rows < m, other=1.0)[:, None] * column
    else:
        factor = tl.load(a_scale) * column
    y = acc.to(tl.float32) * factor
    if HAS_BIAS:
        y += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _store(y, out, out_scale, at, inside, QUANTIZE: tl.constexpr):
    """y, already rounded to the layer's dtype, to `out`; quantized with the scale if asked for."""
    if QUANTIZE:
        tl.store(out + at, to_8_bits(y, tl.load(out_scale), QUANTIZE == 1), mask=inside)
    else:
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _epilogue(acc, rows, cols, m, n, a_scale, b_scale, bias, row_bias, rows_per_image, residual,
              out, out_scale, DTYPE: tl.constexpr, PER_ROW: tl.constexpr, PER_CHANNEL: tl.constexpr,
              HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
              QUANTIZE: tl.constexpr):  # fmt: skip
    y = _dequantized(acc, b_scale, bias, rows, cols, m, n, PER_CHANNEL, a_scale, PER_ROW, HAS_BIAS)
    y = rounded(y, DTYPE)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    if HAS_ROW_BIAS:  # a time embedding, one row an image
        image = (rows // rows_per_image)[:, None] * n + cols[None, :]
        y = rounded(y + tl.load(row_bias + image, mask=inside, other=0.0).to(tl.float32), DTYPE)
    at = rows.to(tl.int64)[:, None] * n + cols[None, :]
    if HAS_RESIDUAL:
        y = rounded(y + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32), DTYPE)
    _store(y, out, out_scale, at, inside, QUANTIZE)


@triton.jit
def _geglu_epilogue(value, gate, rows, cols, m, n, a_scale, b_scale, bias, out, out_scale,
                    DTYPE: tl.constexpr, PER_ROW: tl.constexpr, PER_CHANNEL: tl.constexpr,
                    HAS_BIAS: tl.constexpr, QUANTIZE: tl.constexpr):  # fmt: skip
    """The sums of both halves -> the first, dequantized, times GELU of the second."""
    gate_scale = b_scale + n if PER_CHANNEL else b_scale
    y = _dequantized(
        value, b_scale, bias, rows, cols, m, n, PER_CHANNEL, a_scale, PER_ROW, HAS_BIAS
    )
    z = _dequantized(gate, gate_scale, bias + n, rows, cols, m, n, PER_CHANNEL, a_scale, PER_ROW,
                     HAS_BIAS)  # fmt: skip
    z = rounded(_gelu(rounded(z, DTYPE)), DTYPE)
    y = rounded(rounded(y, DTYPE) * z, DTYPE)
    at = rows.to(tl.int64)[:, None] * n + cols[None, :]
    _store(y, out, out_scale, at, (rows < m)[:, None] & (cols < n)[None, :], QUANTIZE)


# what changes with the picture's size or batch is no reason to compile anew
@triton.jit(do_not_specialize=["m"])
def matmul(a, b0, b1, b2, a_scale, s0, s1, s2, bias0, bias1, bias2, residual, out, out_scale,
           m, n, k, INTEGER: tl.constexpr, DTYPE: tl.constexpr, PER_ROW: tl.constexpr,
           PER_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
           GROUPS: tl.constexpr, QUANTIZE: tl.constexpr, SPLIT: tl.constexpr,
           EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """a [m, k] times b [n, k] transposed -> out [m, n]; `GROUPS` weights give [GROUPS, m, n].

    With SPLIT above 1 raw sums of a share of k go to out [SPLIT, m, n], for `reduce`. Grid:
    (tiles, SPLIT, GROUPS).
    """
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN))
    part = tl.program_id(1)
    group = tl.program_id(2)
    b, b_scale, bias = b0, s0, bias0
    if GROUPS > 1:
        if group == 1:
            b, b_scale, bias = b1, s1, bias1
        if GROUPS > 2:
            if group == 2:
                b, b_scale, bias = b2, s2, bias2
    rows = tile_m * BM + tl.arange(0, BM)
    cols = tile_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    # rows and columns beyond the edge read some other one: a mask would cost more than it saves
    a_at = a + (rows % m).to(tl.int64)[:, None] * k + inner[None, :]
    b_at = b + (cols % n).to(tl.int64)[None, :] * k + inner[:, None]
    acc = tl.zeros((BM, BN), tl.int32 if INTEGER else tl.float32)
    steps = tl.cdiv(k, BK)
    for i in range(part * steps // SPLIT, (part + 1) * steps // SPLIT):
        if EVEN:
            x = tl.load(a_at + i * BK)
            w = tl.load(b_at + i * BK)
        else:
            x = tl.load(a_at + i * BK, mask=(inner < k - i * BK)[None, :], other=0.0)
            w = tl.load(b_at + i * BK, mask=(inner < k - i * BK)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, out_dtype=acc.dtype)
    if SPLIT > 1:
        at = (part * m + rows).to(tl.int64)[:, None] * n + cols[None, :]
        tl.store(out + at, acc, mask=(rows < m)[:, None] & (cols < n)[None, :])
    else:
        out += group * (tl.cast(m, tl.int64) * n)
        _epilogue(acc, rows, cols, m, n, a_scale, b_scale, bias, a, 1, residual, out, out_scale,
                  DTYPE, PER_ROW, PER_CHANNEL, HAS_BIAS, False, HAS_RESIDUAL, QUANTIZE)  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def matmul_geglu(a, b, a_scale, b_scale, bias, out, out_scale, m, n, k, INTEGER: tl.constexpr,
                 DTYPE: tl.constexpr, PER_ROW: tl.constexpr, PER_CHANNEL: tl.constexpr,
                 HAS_BIAS: tl.constexpr, QUANTIZE: tl.constexpr, EVEN: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """a [m, k] times b [2 n, k] transposed; the first half times GELU of the second -> out [m, n]."""
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN))
    rows = tile_m * BM + tl.arange(0, BM)
    cols = tile_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    a_at = a + (rows % m).to(tl.int64)[:, None] * k + inner[None, :]
    b_at = b + (cols % n).to(tl.int64)[None, :] * k + inner[:, None]
    g_at = b_at + tl.cast(n, tl.int64) * k
    value = tl.zeros((BM, BN), tl.int32 if INTEGER else tl.float32)
    gate = tl.zeros((BM, BN), tl.int32 if INTEGER else tl.float32)
    for i in range(0, tl.cdiv(k, BK)):
        if EVEN:
            x = tl.load(a_at + i * BK)
            w = tl.load(b_at + i * BK)
            g = tl.load(g_at + i * BK)
        else:
            x = tl.load(a_at + i * BK, mask=(inner < k - i * BK)[None, :], other=0.0)
            w = tl.load(b_at + i * BK, mask=(inner < k - i * BK)[:, None], other=0.0)
            g = tl.load(g_at + i * BK, mask=(inner < k - i * BK)[:, None], other=0.0)
        value = tl.dot(x, w, value, out_dtype=value.dtype)
        gate = tl.dot(x, g, gate, out_dtype=gate.dtype)
    _geglu_epilogue(value, gate, rows, cols, m, n, a_scale, b_scale, bias, out, out_scale, DTYPE,
                    PER_ROW, PER_CHANNEL, HAS_BIAS, QUANTIZE)  # fmt: skip


@triton.jit(do_not_specialize=["images", "height", "width", "p", "q"])
def conv2d(x, w, x_scale, w_scale, bias, row_bias, residual, out, out_scale,
           images, height, width, channels, n, p, q, stride_h, stride_w, pad_h, pad_w, step_h, step_w,
           R: tl.constexpr, S: tl.constexpr, INTEGER: tl.constexpr, DTYPE: tl.constexpr,
           PER_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr,
           HAS_RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, SPLIT: tl.constexpr,
           EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """x [images, height, width, channels], w [n, R, S, channels] -> out [images, p, q, n].

    A matrix product over unfolded rows that are never written down: row (image, p, q), inner index
    (r, s, channel). Pixels outside read 0, which is exact. step_h, step_w: dilation.
    """
    m = images * p * q
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN))
    part = tl.program_id(1)
    rows = tile_m * BM + tl.arange(0, BM)
    cols = tile_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    image = rows // (p * q)
    top = (rows // q) % p * stride_h - pad_h
    left = rows % q * stride_w - pad_w
    start = (image * height + top) * width + left  # of the pixel at r = s = 0, may lie outside
    w_at = w + (cols % n).to(tl.int64)[None, :] * (R * S * channels) + inner[:, None]
    acc = tl.zeros((BM, BN), tl.int32 if INTEGER else tl.float32)
    blocks = tl.cdiv(channels, BK)
    steps = R * S * blocks
    for i in range(part * steps // SPLIT, (part + 1) * steps // SPLIT):
        tap = i // blocks
        first = (i % blocks) * BK
        down = tap // S * step_h
        right = tap % S * step_w
        seen = (rows < m) & (top + down >= 0) & (top + down < height)
        seen = seen & (left + right >= 0) & (left + right < width)
        pixel = (start + down * width + right).to(tl.int64) * channels + first
        x_at = x + pixel[:, None] + inner[None, :]
        if EVEN:
            a = tl.load(x_at, mask=seen[:, None], other=0.0)
            b = tl.load(w_at + tap * channels + first)
        else:
            real = inner < channels - first
            a = tl.load(x_at, mask=seen[:, None] & real[None, :], other=0.0)
            b = tl.load(w_at + tap * channels + first, mask=real[:, None], other=0.0)
        acc = tl.dot(a, b, acc, out_dtype=acc.dtype)
    if SPLIT > 1:
        at = (part * m + rows).to(tl.int64)[:, None] * n + cols[None, :]
        tl.store(out + at, acc, mask=(rows < m)[:, None] & (cols < n)[None, :])
    else:
        _epilogue(acc, rows, cols, m, n, x_scale, w_scale, bias, row_bias, p * q, residual, out,
                  out_scale, DTYPE, False, PER_CHANNEL, HAS_BIAS, HAS_ROW_BIAS, HAS_RESIDUAL,
                  QUANTIZE)  # fmt: skip


@triton.jit(do_not_specialize=["m", "rows_per_image"])
def reduce(parts, a_scale, b_scale, bias, row_bias, residual, out, out_scale, m, n, rows_per_image,
           INTEGER: tl.constexpr, DTYPE: tl.constexpr, PER_ROW: tl.constexpr,
           PER_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr,
           HAS_RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, SPLIT: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Sums parts [SPLIT, m, n] in order and finishes them -> out [m, n]. Grid: (rows, columns)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    acc = tl.zeros((BM, BN), tl.int32 if INTEGER else tl.float32)
    for part in range(SPLIT):
        at = (part * m + rows).to(tl.int64)[:, None] * n + cols[None, :]
        acc += tl.load(parts + at, mask=inside, other=0)
    _epilogue(acc, rows, cols, m, n, a_scale, b_scale, bias, row_bias, rows_per_image, residual, out,
              out_scale, DTYPE, PER_ROW, PER_CHANNEL, HAS_BIAS, HAS_ROW_BIAS, HAS_RESIDUAL,
              QUANTIZE)  # fmt: skip
