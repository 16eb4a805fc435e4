"""The products as operators of PyTorch (`torch.library.triton_op`), which torch.compile sees through.

Registered at import; their bodies run when a model is traced. Eager code calls gemm.py and conv.py
directly: an operator's dispatch would cost as much as the launch. Schemas come from the annotations:
torch before 2.12 infers one even where one is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import conv, gemm


@triton_op("modelopt_comfyui::scaled_mm", mutates_args={})
def _scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    out_kind: torch.dtype | None,
    out_scale: Tensor | None,
) -> Tensor:
    return gemm.scaled_mm(
        a, b, a_scale, b_scale, bias, residual, dtype, out_kind, out_scale, wrap_triton
    )


@triton_op("modelopt_comfyui::grouped_scaled_mm", mutates_args={})
def _grouped_scaled_mm(
    a: Tensor,
    weights: Sequence[Tensor],
    a_scale: Tensor,
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    return gemm.grouped_scaled_mm(a, weights, a_scale, scales, biases or None, dtype, wrap_triton)


@triton_op("modelopt_comfyui::scaled_mm_geglu", mutates_args={})
def _scaled_mm_geglu(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_kind: torch.dtype | None,
    out_scale: Tensor | None,
) -> Tensor:
    return gemm.scaled_mm_geglu(
        a, b, a_scale, b_scale, bias, dtype, out_kind, out_scale, wrap_triton
    )


@triton_op("modelopt_comfyui::conv2d", mutates_args={})
def _conv2d(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    row_bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    out_kind: torch.dtype | None,
    out_scale: Tensor | None,
) -> Tensor:
    return conv.conv2d(x, weight, x_scale, w_scale, bias, stride, padding, dilation, row_bias,
                       residual, dtype, out_kind, out_scale, wrap_triton)  # fmt: skip


def scaled_mm(a, b, a_scale, b_scale, bias=None, residual=None, dtype=torch.float16, out_kind=None,
              out_scale=None):  # fmt: skip
    """`gemm.scaled_mm` as an operator."""
    return _scaled_mm(a, b, a_scale, b_scale, bias, residual, dtype, out_kind, out_scale)


def grouped_scaled_mm(a, weights, a_scale, scales, biases=None, dtype=torch.float16):
    """`gemm.grouped_scaled_mm` as an operator."""
    return _grouped_scaled_mm(a, weights, a_scale, scales, biases or [], dtype)


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
