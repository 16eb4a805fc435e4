"""Which products are PyTorch's own on a Hopper GPU, asked of tensors that lie on none."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.kernels import gemm, library, tiles
from torch._subclasses.fake_tensor import FakeTensorMode

HOPPER, ADA = tiles.Chip((9, 0), 132, 227 * 1024), tiles.Chip((8, 9), 128, 99 * 1024)
FP8 = torch.float8_e4m3fn


def given(monkeypatch, chip=HOPPER, m=64, n=1280, k=1280, kind=FP8, scales=(1, 1), **more):
    """Arguments of `library.takes`, as `gemm.scaled_mm` gives them."""
    monkeypatch.setattr(tiles, "chip", lambda device: chip)
    with FakeTensorMode():
        a, b = (torch.empty(rows, k, dtype=kind, device="cuda") for rows in (m, n))
        a_scale, b_scale = (torch.empty(size, 1, device="cuda") for size in scales)
    named = {"dtype": torch.float16, "out_kind": None, "residual": None} | more
    return a, b, a_scale, b_scale, named["dtype"], named["out_kind"], named["residual"]


def test_a_product_that_stands_alone(monkeypatch):
    assert library.takes(*given(monkeypatch))
    assert library.takes(*given(monkeypatch, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "other",
    [
        {"chip": ADA},
        {"kind": torch.int8},
        {"scales": (64, 1)},
        {"scales": (1, 1280)},
        {"dtype": torch.float32},
        {"out_kind": torch.int8},
        {"n": 1288},
        {"k": 1288},
        {"residual": torch.empty(64, 1280)},
    ],
    ids=[
        "an Ada GPU",
        "int8",
        "scales of rows",
        "scales of columns",
        "float32",
        "quantized",
        "n 1288",
        "k 1288",
        "residual",
    ],
)
def test_what_stays_with_ours(monkeypatch, other):
    assert not library.takes(*given(monkeypatch, **other))


def test_a_residual_behind_a_long_sum_or_compiled(monkeypatch):
    residual = torch.empty(64, 1280)
    assert library.takes(*given(monkeypatch, k=library.LONG, residual=residual))
    short = given(monkeypatch, residual=residual)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert library.takes(*short)


def test_tensors_on_a_cpu_stay_with_ours():
    a = torch.zeros(16, 32).to(FP8)
    one = torch.ones(())
    assert not library.takes(a, a, one, one, torch.float16, None, None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_it_gives_what_the_reference_gives(bias, residual):
    """PyTorch has the product on CPUs too."""
    torch.manual_seed(0)
    a, b = (torch.randn(rows, 64).mul(20).to(FP8) for rows in (48, 32))
    a_scale, b_scale = torch.tensor(0.02), torch.tensor(0.01)
    more = (
        torch.randn(32) if bias else None,
        torch.randn(48, 32).bfloat16() if residual else None,
        torch.bfloat16,
    )
    found = library.fp8_mm(a, b, a_scale, b_scale, *more)
    wanted = gemm.scaled_mm_reference(a, b, a_scale, b_scale, *more)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert (found.float() - wanted.float()).norm() < 0.01 * wanted.float().norm()
