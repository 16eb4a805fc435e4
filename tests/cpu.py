"""What this machine's CPU can be compared with."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.quantize.quality import sqnr_db


def _int_mm_is_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (64, 512), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (512, 64), generator=generator, dtype=torch.int8)
    return torch.equal(torch._int_mm(a, b).long(), a.long() @ b.long())


# oneDNN's int8 GEMM adds pairs of products in saturating 16 bits on CPUs without VNNI: there stock
# ComfyUI's int8 Linears are wrong, ours are not, and the two cannot be compared bit for bit
INT_MM_EXACT = _int_mm_is_exact()
needs_exact_int_mm = pytest.mark.skipif(
    not INT_MM_EXACT, reason="torch._int_mm saturates on this CPU, which has no VNNI"
)


def assert_as_stock(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Our output is stock ComfyUI's: bit for bit where the CPU multiplies int8 exactly."""
    if INT_MM_EXACT:
        assert torch.equal(ours, theirs)
    else:
        assert sqnr_db(ours, theirs) > 10
