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

from ..kernels.blocks import nvfp4_scale
from ..kernels.fp8 import quantize as fp8_quantize
from ..kernels.fp8 import token_scale

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
    """One calibrated activation scale, or one for each token where there is none."""
    return fp8_product(x, input_scale, weight._qdata, weight._params.scale, bias)


def fp8_product(x, input_scale, values, scale, bias):
    """The same with the weight as float8_e4m3fn [N, K] and its scalar scale."""
    flat = _rows(x)
    if input_scale is None:
        return _fp8_per_token(x, flat, values, scale, bias)
    q = comfy_kitchen.quantize_per_tensor_fp8(flat, input_scale, torch.float8_e4m3fn)
    out = scaled_mm_v2(
        q,
        values.t(),
        scale_a=input_scale,
        scale_b=scale,
        bias=bias,
        out_dtype=x.dtype,
    )
    return out.reshape(*x.shape[:-1], len(values))


def _fp8_per_token(x, flat, values, scale, bias):
    """The tensor-wise GEMM, and each row's scale afterwards: row-wise GEMMs are not everywhere."""
    rows = token_scale(flat)
    out = scaled_mm_v2(
        fp8_quantize(flat, rows).to(torch.float8_e4m3fn),
        values.t(),
        scale_a=torch.ones_like(scale),
        scale_b=scale,
        out_dtype=torch.bfloat16,
    )
    out = out.float().mul_(rows)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], len(values))


def nvfp4_linear(x, input_scale, weight, bias):
    """Blocks of 16; the scale of the block scales is calibrated or taken from x."""
    flat = _rows(x)
    scale = nvfp4_scale(flat) if input_scale is None else input_scale
    q, params = TensorCoreNVFP4Layout.quantize(flat, scale=scale)
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
    flat = _rows(x)
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


# format -> what K and N must divide by in torch's scaled GEMMs
MULTIPLES = {"fp8": (16, 16), "w4a8": (16, 16), "nvfp4": (32, 1), "mxfp8": (32, 1)}


def why_not(format_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Why a weight [N, K] of this format cannot run natively while computing in `dtype`, or None."""
    if format_name not in MULTIPLES:
        return None
    if dtype == torch.float32:
        return f"ComfyUI computes in 32 bits here, {format_name} kernels give 16"
    k, n = MULTIPLES[format_name]
    if shape[1] % k or shape[0] % n:
        return f"{format_name} kernels need in_features divisible by {k} and out_features by {n}"
    return None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> contiguous [M, K]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _padded(bias: torch.Tensor | None, weight) -> torch.Tensor | None:
    """The weight's rows are padded to whole blocks, and so must the bias be."""
    missing = len(weight._qdata) - weight.shape[0]
    return bias if bias is None or not missing else torch.nn.functional.pad(bias, (0, missing))


def _cut(out: torch.Tensor, x: torch.Tensor, flat: torch.Tensor, weight) -> torch.Tensor:
    """The product of padded rows, without the padding."""
    return out[: len(flat), : weight.shape[0]].reshape(*x.shape[:-1], weight.shape[0])
