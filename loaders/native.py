"""Low-precision Linear through comfy-kitchen and torch's scaled GEMM, called so that a failure is
raised: comfy-kitchen's own operators on quantized tensors would dequantize instead, and only log it.

Each takes x [..., K] float, the calibrated scale or None, the weight as our QuantizedTensor and a
bias, and gives [..., N] in x's dtype.
"""

from __future__ import annotations

import comfy_kitchen
import torch
from comfy.quant_ops import TensorCoreMXFP8Layout, TensorCoreNVFP4Layout
from comfy_kitchen.scaled_mm_v2 import scaled_mm_v2

DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def int8_linear(x, input_scale, weight, bias):
    """Dynamic per-token activation scales."""
    return torch.ops.comfy_kitchen.int8_linear(
        x.contiguous(),
        weight._qdata,
        weight._params.scale,
        bias,
        DTYPE_CODE[x.dtype],
        False,
        256,
    )


def fp8_linear(x, input_scale, weight, bias):
    """One calibrated activation scale."""
    return fp8_product(x, input_scale, weight._qdata, weight._params.scale, bias)


def fp8_product(x, input_scale, values, scale, bias):
    """The same with the weight as float8_e4m3fn [N, K] and its scalar scale."""
    flat = x.reshape(-1, x.shape[-1])
    q = comfy_kitchen.quantize_per_tensor_fp8(flat, input_scale, torch.float8_e4m3fn)
    out = scaled_mm_v2(
        q.contiguous(),
        values.t(),
        scale_a=input_scale,
        scale_b=scale,
        bias=bias,
        out_dtype=x.dtype,
    )
    return out.reshape(*x.shape[:-1], len(values))


def nvfp4_linear(x, input_scale, weight, bias):
    """Blocks of 16; the scale of the block scales is calibrated or taken from x."""
    flat = x.reshape(-1, x.shape[-1])
    q, params = TensorCoreNVFP4Layout.quantize(flat, scale=input_scale)
    out = comfy_kitchen.scaled_mm_nvfp4(
        q,
        weight._qdata,
        tensor_scale_a=params.scale,
        tensor_scale_b=weight._params.scale_2,
        block_scale_a=params.block_scale,
        block_scale_b=weight._params.scale,
        bias=_padded(bias, weight),
        out_dtype=x.dtype,
    )
    return _cut(out, x, flat, weight)


def mxfp8_linear(x, input_scale, weight, bias):
    """Blocks of 32, dynamic scales."""
    flat = x.reshape(-1, x.shape[-1])
    q, params = TensorCoreMXFP8Layout.quantize(flat)
    out = comfy_kitchen.scaled_mm_mxfp8(
        q,
        weight._qdata,
        block_scale_a=params.scale,
        block_scale_b=weight._params.scale.view(torch.float8_e8m0fnu),
        bias=_padded(bias, weight),
        out_dtype=x.dtype,
    )
    return _cut(out, x, flat, weight)


def _padded(bias: torch.Tensor | None, weight) -> torch.Tensor | None:
    """The weight's rows are padded to whole blocks, and so must the bias be."""
    missing = len(weight._qdata) - weight.shape[0]
    return bias if bias is None or not missing else torch.nn.functional.pad(bias, (0, missing))


def _cut(out: torch.Tensor, x: torch.Tensor, flat: torch.Tensor, weight) -> torch.Tensor:
    """The product of padded rows, without the padding."""
    return out[: len(flat), : weight.shape[0]].reshape(*x.shape[:-1], weight.shape[0])
