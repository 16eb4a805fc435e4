"""The products as operators of PyTorch (`torch.library.triton_op`), which torch.compile sees through.

Registered at import; their bodies run when a model is traced. Eager code calls gemm.py and conv.py
directly: an operator's dispatch would cost as much as the launch.
"""

from __future__ import annotations

import torch
from torch.library import triton_op, wrap_triton

from . import conv, gemm

EPILOGUE = "ScalarType dtype, ScalarType? out_kind, Tensor? out_scale) -> Tensor"


@triton_op(
    "modelopt_comfyui::scaled_mm",
    mutates_args={},
    schema="(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, Tensor? residual, "
    + EPILOGUE,
)
def _scaled_mm(a, b, a_scale, b_scale, bias, residual, dtype, out_kind, out_scale):
    return gemm.scaled_mm(
        a, b, a_scale, b_scale, bias, residual, dtype, out_kind, out_scale, wrap_triton
    )


@triton_op(
    "modelopt_comfyui::grouped_scaled_mm",
    mutates_args={},
    schema="(Tensor a, Tensor[] weights, Tensor a_scale, Tensor[] scales, Tensor[]? biases, "
    "ScalarType dtype) -> Tensor",
)
def _grouped_scaled_mm(a, weights, a_scale, scales, biases, dtype):
    return gemm.grouped_scaled_mm(a, weights, a_scale, scales, biases, dtype, wrap_triton)


@triton_op(
    "modelopt_comfyui::scaled_mm_geglu",
    mutates_args={},
    schema="(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, " + EPILOGUE,
)
def _scaled_mm_geglu(a, b, a_scale, b_scale, bias, dtype, out_kind, out_scale):
    return gemm.scaled_mm_geglu(
        a, b, a_scale, b_scale, bias, dtype, out_kind, out_scale, wrap_triton
    )


@triton_op(
    "modelopt_comfyui::conv2d",
    mutates_args={},
    schema="(Tensor x, Tensor weight, Tensor x_scale, Tensor w_scale, Tensor? bias, int[2] stride, "
    "int[2] padding, int[2] dilation, Tensor? row_bias, Tensor? residual, " + EPILOGUE,
)
def _conv2d(x, weight, x_scale, w_scale, bias, stride, padding, dilation, row_bias, residual, dtype,
            out_kind, out_scale):  # fmt: skip
    return conv.conv2d(x, weight, x_scale, w_scale, bias, stride, padding, dilation, row_bias,
                       residual, dtype, out_kind, out_scale, wrap_triton)  # fmt: skip


def scaled_mm(a, b, a_scale, b_scale, bias=None, residual=None, dtype=torch.float16, out_kind=None,
              out_scale=None):  # fmt: skip
    """`gemm.scaled_mm` as an operator."""
    return _scaled_mm(a, b, a_scale, b_scale, bias, residual, dtype, out_kind, out_scale)


def grouped_scaled_mm(a, weights, a_scale, scales, biases=None, dtype=torch.float16):
    """`gemm.grouped_scaled_mm` as an operator."""
    return _grouped_scaled_mm(a, weights, a_scale, scales, biases, dtype)


def scaled_mm_geglu(a, b, a_scale, b_scale, bias=None, dtype=torch.float16, out_kind=None,
                    out_scale=None):  # fmt: skip
    """`gemm.scaled_mm_geglu` as an operator."""
    return _scaled_mm_geglu(a, b, a_scale, b_scale, bias, dtype, out_kind, out_scale)


def conv2d(x, weight, x_scale, w_scale, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
           row_bias=None, residual=None, dtype=torch.float16, out_kind=None,
           out_scale=None):  # fmt: skip
    """`conv.conv2d` as an operator."""
    return _conv2d(x, weight, x_scale, w_scale, bias, stride, padding, dilation, row_bias, residual,
                   dtype, out_kind, out_scale)  # fmt: skip
