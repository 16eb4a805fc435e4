"""Who computes 8-bit layers: the same functions from several sides, chosen when a layer is loaded.

`REFERENCE` runs anywhere and defines the result. `triton()` launches kernels; inside torch.compile it
becomes producers in plain PyTorch, which Inductor fuses, and products as operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import activations, conv, geglu, gemm, group_norm, layer_norm


@dataclass(frozen=True, eq=False)
class Backend:
    """Producers (float in, 8 bits out) and products (8 bits in), as in the modules of their names.

    compiled: what takes this backend's place while torch.compile traces.
    """

    name: str
    quantize_rows: Callable
    layer_norm_quantize: Callable
    group_norm_quantize: Callable
    geglu_quantize: Callable
    scaled_mm: Callable
    grouped_scaled_mm: Callable
    scaled_mm_geglu: Callable
    conv2d: Callable
    compiled: Backend | None = None

    def current(self) -> Backend:
        """This backend, or what takes its place while torch.compile traces."""
        if self.compiled is not None and torch.compiler.is_compiling():
            return self.compiled
        return self


PLAIN_PRODUCERS = (
    activations.quantize_rows_reference,
    layer_norm.layer_norm_quantize_reference,
    group_norm.group_norm_quantize_reference,
    geglu.geglu_quantize_reference,
)
REFERENCE = Backend(
    "the exact reference",
    *PLAIN_PRODUCERS,
    gemm.scaled_mm_reference,
    gemm.grouped_scaled_mm_reference,
    gemm.scaled_mm_geglu_reference,
    conv.conv2d_reference,
)


@functools.cache
def triton() -> Backend:
    """Our Triton kernels. Ask `gemm.why_not` and `producers.why_not` first."""
    from . import operators

    compiled = Backend(
        "Triton, compiled",
        *PLAIN_PRODUCERS,
        operators.scaled_mm,
        operators.grouped_scaled_mm,
        operators.scaled_mm_geglu,
        operators.conv2d,
    )
    return Backend(
        "Triton",
        activations.quantize_rows,
        layer_norm.layer_norm_quantize,
        group_norm.group_norm_quantize,
        geglu.geglu_quantize,
        gemm.scaled_mm,
        gemm.grouped_scaled_mm,
        gemm.scaled_mm_geglu,
        conv.conv2d,
        compiled,
    )
