"""GroupNorm and SiLU quantized on the way out, against the reference and against float64."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.kernels.group_norm import group_norm_quantize, group_norm_quantize_reference

from .comparison import DTYPES, KINDS, assert_one_step

pytestmark = pytest.mark.usefixtures("on_device")
both = pytest.mark.parametrize("run", [group_norm_quantize, group_norm_quantize_reference])
# N, C, H, W, groups: channels of SDXL and SD1.5, odd sizes, more pixels than stretches, one pixel
SHAPES = [
    (2, 320, 8, 8, 32),
    (1, 640, 5, 7, 32),
    (1, 960, 3, 5, 32),
    (2, 1280, 2, 3, 32),
    (1, 1920, 3, 3, 32),
    (1, 2560, 3, 2, 32),
    (3, 66, 9, 5, 6),
    (1, 32, 37, 29, 32),
    (2, 128, 1, 1, 32),
    (1, 7, 4, 1, 1),
]


def inputs(n, c, h, w, dtype):
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w) * 2 + torch.randn(n, c, 1, 1) * 2
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(c), torch.randn(c)


def compare(x, groups, weight, bias, silu, kind, scale, pre_quant_scale=None, share=1e-3):
    args = (x, groups, weight, bias, 1e-5, silu, kind, scale, pre_quant_scale)
    got, expected = group_norm_quantize(*args), group_norm_quantize_reference(*args)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert_one_step(got, expected, x.dtype, share)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, c, h, w, groups", SHAPES)
def test_equals_the_reference(kind, dtype, n, c, h, w, groups):
    x, weight, bias = inputs(n, c, h, w, dtype)
    weight, bias = weight.to(dtype), bias.to(dtype)
    compare(x, groups, weight, bias, True, kind, None)
    compare(x, groups, weight, bias, True, kind, torch.tensor(0.02))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("weight", [None, *DTYPES])
@pytest.mark.parametrize("bias", [None, torch.float16])
def test_options(silu, weight, bias):
    x, w, b = inputs(1, 64, 4, 3, torch.float16)
    w = None if weight is None else w.to(weight)
    b = None if bias is None else b.to(bias)
    compare(x, 32, w, b, silu, "int8", torch.tensor(0.03))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, torch.tensor(0.04)])
@pytest.mark.parametrize("n, c, h, w, groups", SHAPES[2:8])
def test_smoothing(kind, dtype, scale, n, c, h, w, groups):
    x, weight, bias = inputs(n, c, h, w, dtype)
    smoothing = torch.rand(c).add(0.1).to(torch.float16)
    compare(x, groups, weight, bias, False, kind, scale, smoothing)
    compare(x, groups, weight, bias, True, kind, scale, smoothing.float())


@both
def test_smoothing_multiplies_what_is_normal(run):
    """Against float64; a channel smoothed to nothing stays nothing."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 5, 7)
    wide = x.double().reshape(2, 32, -1)
    variance, mean = torch.var_mean(wide, 2, correction=0, keepdim=True)
    normal = ((wide - mean) / variance.sqrt()).reshape(x.shape)
    smoothing = torch.linspace(0, 2, 64)
    q, _ = run(x, 32, None, None, 1e-9, False, "int8", torch.tensor(0.05), smoothing)
    wanted = (normal * smoothing.double()[:, None, None] / 0.05).clamp(-128, 127)
    assert (q.double() - wanted).abs().max() < 0.51
    assert not q[:, 0].any()


@both
@pytest.mark.parametrize("scale", [None, 0.03])
def test_memory_layout_of_the_input_does_not_matter(run, scale):
    scale = None if scale is None else torch.tensor(scale)
    x, weight, bias = inputs(2, 320, 4, 5, torch.float16)
    expected = run(x, 32, weight, bias, 1e-5, True, "int8", scale)
    views = (x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3), x.repeat(2, 2, 1, 1))
    for view in (views[0], views[1], views[2][2:, 320:]):
        got = run(view, 32, weight, bias, 1e-5, True, "int8", scale)
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@both
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_do_not_cancel(run, offset):
    """A mean of 10,000 deviations: E[x^2] - E[x]^2 has no correct digit in float32."""
    torch.manual_seed(0)
    x = torch.randn(2, 320, 12, 11) + offset
    wide = x.double().reshape(2, 32, -1)
    variance, mean = torch.var_mean(wide, 2, correction=0, keepdim=True)
    normal = ((wide - mean) / variance.sqrt()).reshape(x.shape)
    q, _ = run(x, 32, None, None, 1e-5, False, "int8", torch.tensor(0.04))
    # half a step, and four units in the last place of 10,000 for the mean
    assert (q.double() - (normal / 0.04).clamp(-128, 127)).abs().max() < 0.6
    if offset:
        narrow = x.reshape(2, 32, -1)
        naive = (narrow * narrow).mean(2) - narrow.mean(2) ** 2
        assert ((naive - variance[..., 0]).abs() > 0.1).any()


@both
def test_an_outlier_as_the_first_pixel_does_not_harm(run):
    """The kernel takes its shift from there."""
    torch.manual_seed(0)
    x = torch.randn(1, 64, 16, 16)
    x[:, :, 0, 0] = 3000.0
    wide = x.double().reshape(1, 32, -1)
    variance, mean = torch.var_mean(wide, 2, correction=0, keepdim=True)
    normal = ((wide - mean) / variance.sqrt()).reshape(x.shape)
    q, _ = run(x, 32, None, None, 1e-5, False, "int8", torch.tensor(2e-4))
    assert (q - (normal / 2e-4).clamp(-128, 127)).abs().max() < 0.55


@both
@pytest.mark.parametrize("kind", KINDS)
def test_constant_groups_zeros_and_clipped_values(run, kind):
    x = torch.zeros(1, 64, 3, 3)
    x[:, 2:] = 5.0
    q, scale = run(x, 32, None, None, 1e-5, True, kind)
    assert not q.float().any()
    assert (scale > 0).all()
    q, _ = run(torch.randn(1, 64, 5, 5), 32, torch.full((64,), 1e4), None, 1e-5, False, kind,
               torch.tensor(1.0))  # fmt: skip
    assert q.float().max() == {"int8": 127, "fp8": 448}[kind]
    assert q.float().min() == {"int8": -128, "fp8": -448}[kind]


@both
def test_scales_per_pixel_are_in_the_order_of_n_h_w(run):
    x, weight, bias = inputs(2, 64, 3, 5, torch.float32)
    q, scale = run(x, 32, weight, bias, 1e-5, False, "int8")
    y = torch.nn.functional.group_norm(x, 32, weight, bias, 1e-5)
    assert scale.shape == (30, 1)
    amax = y.abs().amax(1).reshape(-1, 1)
    torch.testing.assert_close(scale, amax / 127)
    assert (q.abs().amax(1) == 127).all()
