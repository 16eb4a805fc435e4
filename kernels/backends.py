"""Who computes 8-bit layers: the same functions three times, chosen for a layer when it is loaded.

TRITON launches kernels. COMPILED is what TRITON becomes inside torch.compile: producers in plain
PyTorch, which Inductor fuses, products as operators. REFERENCE runs anywhere and defines the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import activations, conv, geglu, gemm, group_norm, layer_norm, operators


@dataclass(frozen=True)
class Backend:
    """Producers (float in, 8 bits out) and products (8 bits in), as in the modules of their names."""

    name: str
    quantize_rows: Callable
    layer_norm_quantize: Callable
    group_norm_quantize: Callable
    geglu_quantize: Callable
    scaled_mm: Callable
    grouped_scaled_mm: Callable
    scaled_mm_geglu: Callable
    conv2d: Callable


REFERENCE = Backend(
    "the exact reference",
    activations.quantize_rows_reference,
    layer_norm.layer_norm_quantize_reference,
    group_norm.group_norm_quantize_reference,
    geglu.geglu_quantize_reference,
    gemm.scaled_mm_reference,
    gemm.grouped_scaled_mm_reference,
    gemm.scaled_mm_geglu_reference,
    conv.conv2d_reference,
)
TRITON = Backend(
    "Triton",
    activations.quantize_rows,
    layer_norm.layer_norm_quantize,
    group_norm.group_norm_quantize,
    geglu.geglu_quantize,
    gemm.scaled_mm,
    gemm.grouped_scaled_mm,
    gemm.scaled_mm_geglu,
    conv.conv2d,
)
COMPILED = Backend(
    "Triton, compiled",
    activations.quantize_rows_reference,
    layer_norm.layer_norm_quantize_reference,
    group_norm.group_norm_quantize_reference,
    geglu.geglu_quantize_reference,
    operators.scaled_mm,
    operators.grouped_scaled_mm,
    operators.scaled_mm_geglu,
    operators.conv2d,
)


def current(backend: Backend) -> Backend:
    """The backend, or what it becomes while torch.compile traces."""
    if backend is TRITON and torch.compiler.is_compiling():
        return COMPILED
    return backend
