"""Activations quantized by the kernel and by its reference: exactly what int8.py and fp8.py give."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.kernels import fp8, int8
from comfyui_modelopt.kernels.activations import quantize_rows, quantize_rows_reference, why_not

from .comparison import DTYPES, KINDS, SHAPES, assert_exact

pytestmark = pytest.mark.usefixtures("on_device")
both = pytest.mark.parametrize("run", [quantize_rows, quantize_rows_reference])


def expected(x, kind, scale=None):
    flat = x.reshape(-1, x.shape[-1])
    if kind == "int8" and scale is None:
        q, scale = int8.quantize_per_token(flat)
    elif kind == "int8":
        q = int8.quantize(flat, scale)
    else:
        scale = fp8.token_scale(flat) if scale is None else scale
        q = fp8.quantize(flat, scale)
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    return q.to(dtype).reshape(x.shape), scale


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k", SHAPES)
def test_values_and_scales_are_exact(run, kind, dtype, m, k):
    torch.manual_seed(0)
    x = (torch.randn(m, k) * torch.logspace(-4, 4, m)[:, None]).to(dtype)
    x[-1] = 0
    assert_exact(run(x, kind), expected(x, kind))
    scale = torch.tensor(0.013)
    assert_exact(run(x, kind, scale), expected(x, kind, scale))


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", DTYPES)
def test_pre_quant_scale_is_multiplied_in_the_dtype_of_x(run, kind, dtype, factor):
    torch.manual_seed(0)
    x, pre = torch.randn(2, 9, 320).to(dtype), (torch.rand(320) + 0.5).to(factor)
    for scale in (None, torch.tensor(0.02)):
        assert_exact(run(x, kind, scale, pre), expected(x * pre.to(dtype), kind, scale))


@both
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_contiguous(run, kind):
    torch.manual_seed(0)
    x = torch.randn(3, 320, 6).half()
    for view in (x.transpose(1, 2), x.transpose(1, 2).chunk(2, dim=-1)[1], x[:, ::3, ::2]):
        assert not view.is_contiguous()
        got = run(view, kind)
        assert got[0].is_contiguous()
        assert_exact(got, expected(view.contiguous(), kind))


@both
def test_ties_are_rounded_to_even(run):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.5, 0.49999997]])
    q, _ = run(x, "int8", torch.tensor(1.0))
    assert q.tolist() == [[0, 2, 2, 0, -2, -2, 126, -128, 0]]
    x = torch.tensor([[17.0, 19.0, 21.0, -17.0, 248.0, 1.9375, 1.99, 0.0009765625, 0.0029296875]])
    q, _ = run(x, "fp8", torch.tensor(1.0))
    assert q.float().tolist() == [[16.0, 20.0, 20.0, -16.0, 256.0, 2.0, 2.0, 0.0, 0.00390625]]


@both
def test_values_beyond_the_calibrated_range_are_clipped(run):
    x = torch.tensor([[1e30, -1e30, 448.1, -448.1, 127.5, -128.5, 0.0, -0.0]])
    one = torch.tensor(1.0)
    assert run(x, "int8", one)[0].tolist() == [[127, -128, 127, -128, 127, -128, 0, 0]]
    got = run(x, "fp8", one)[0].float().tolist()
    assert got == [[448.0, -448.0, 448.0, -448.0, 128.0, -128.0, 0.0, 0.0]]


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_the_largest_numbers_have_scales(run, kind, dtype):
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    x = torch.zeros(4, 320, dtype=dtype)
    x[1, 0], x[1, 1] = largest, -largest
    x[2, 7] = smallest
    x[3] = torch.linspace(-largest / 2, largest / 2, 320).to(dtype)
    q, scale = run(x, kind)
    assert (scale > 0).all() and scale.isfinite().all()
    assert not q[0].float().any()
    top = {"int8": 127, "fp8": 448}[kind]
    assert q[1].float().tolist()[:3] == [top, -top, 0]
    assert_exact((q, scale), expected(x, kind))


@both
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_shows_in_its_tokens_scale(run, kind):
    """int8 has no NaN: a lost one would be a wrong picture without a trace."""
    x = torch.randn(3, 77)
    x[1, 5] = torch.nan
    _, scale = run(x, kind)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    if kind == "fp8":
        assert run(x, kind, torch.tensor(1.0))[0].float().isnan().sum() == 1


def test_why_not(monkeypatch):
    gpu = torch.device("cuda")
    assert why_not(gpu, "int8", 8192) is None
    assert "at most 8192" in why_not(gpu, "int8", 8193)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "the device is cpu" in why_not(torch.device("cpu"), "int8", 320)
    for found, int8_runs, fp8_runs in (
        ((7, 5), False, False),
        ((8, 6), True, False),
        ((8, 9), True, True),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=found: found)
        assert (why_not(gpu, "int8", 320) is None) == int8_runs
        assert (why_not(gpu, "fp8", 320) is None) == fp8_runs
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "8.9, found 8.6" in why_not(gpu, "fp8", 320)
