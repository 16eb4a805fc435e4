"""Triton's interpreter with the casts of a GPU.

The interpreter (3.8) truncates float32 to bfloat16, and to float8 it rounds half away from zero and
loses the carry into the exponent (1.99 becomes 1.0). GPUs round to nearest, half to even, as
PyTorch's casts do: those take their place. The kernels under test are not touched.
"""

from __future__ import annotations

import numpy as np
import torch


def correct_casts() -> None:
    """Makes casts between float types PyTorch's own. Idempotent."""
    from triton.runtime import interpreter

    interpreter._convert_float = _convert


def _convert(values: np.ndarray, source, target, rounding_mode) -> np.ndarray:
    """Bits of `source`'s type -> bits of `target`'s as unsigned integers, of the same shape."""
    types = {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp8e4nv": torch.float8_e4m3fn,
        "fp8e5": torch.float8_e5m2,
    }
    flat = torch.frombuffer(bytearray(values.tobytes()), dtype=types[source.name])
    bits = flat.float().to(types[target.name]).view(torch.uint8).numpy()
    return bits.view(f"uint{target.primitive_bitwidth}").reshape(values.shape)
