"""LayerNorm quantized on the way out, against its reference and against float64."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.kernels.layer_norm import layer_norm_quantize, layer_norm_quantize_reference

from .comparison import DTYPES, KINDS, SHAPES, assert_one_step

pytestmark = pytest.mark.usefixtures("on_device")
both = pytest.mark.parametrize("run", [layer_norm_quantize, layer_norm_quantize_reference])


def compare(x, weight, bias, kind, scale=None, pre=None, share=1e-3):
    got = layer_norm_quantize(x, weight, bias, 1e-5, kind, scale, pre)
    expected = layer_norm_quantize_reference(x, weight, bias, 1e-5, kind, scale, pre)
    assert got[0].is_contiguous()
    assert_one_step(got, expected, x.dtype, share)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k", SHAPES)
def test_equals_the_reference(kind, dtype, m, k):
    torch.manual_seed(0)
    x = (torch.randn(m, k) * 3 + torch.randn(m, 1) * 5).to(dtype)
    weight, bias = torch.randn(k).to(dtype), torch.randn(k).to(dtype)
    compare(x, weight, bias, kind)
    compare(x, weight, bias, kind, torch.tensor(0.031), (torch.rand(k) + 0.5).to(dtype))


@pytest.mark.parametrize("weight", [None, *DTYPES])
@pytest.mark.parametrize("bias", [None, *DTYPES])
def test_weight_and_bias_of_any_dtype_or_none(weight, bias):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 640).half()
    weight = None if weight is None else torch.randn(640).to(weight)
    bias = None if bias is None else torch.randn(640).to(bias)
    compare(x, weight, bias, "int8")


@both
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_do_not_cancel(run, offset):
    """A mean of 10,000 deviations: E[x^2] - E[x]^2 has no correct digit in float32."""
    torch.manual_seed(0)
    x = torch.randn(5, 1280) + offset
    wide = x.double()
    normal = (wide - wide.mean(1, keepdim=True)) / wide.var(1, correction=0, keepdim=True).sqrt()
    scale = torch.tensor(0.035)
    q, _ = run(x, None, None, 1e-5, "int8", scale)
    # half a step, and three units in the last place of 10,000 for the mean
    assert (q.double() - normal / 0.035).abs().max() < 0.58
    if offset:
        naive = (x * x).mean(1) - x.mean(1) ** 2
        assert ((naive - wide.var(1, correction=0)).abs() > 0.1).any()


@both
@pytest.mark.parametrize("kind", KINDS)
def test_constant_rows_are_zeros(run, kind):
    x = torch.full((3, 320), 7.5).half()
    x[1] = 0
    q, scale = run(x, None, None, 1e-5, kind)
    assert not q.float().any()
    assert (scale > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_views_and_values_beyond_the_range(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 320, 9).half().transpose(1, 2)
    compare(x, torch.full((320,), 300.0), None, kind, torch.tensor(1.0))
    compare(x * 1e4, torch.randn(320), None, kind)
    q, _ = layer_norm_quantize(x, torch.full((320,), 1e3), None, 1e-5, "int8", torch.tensor(1.0))
    assert (q.min(), q.max()) == (-128, 127)
