"""GEGLU quantized on the way out, against its reference and ComfyUI's own module."""

from __future__ import annotations

import comfy.ldm.modules.attention as attention
import comfy.ops
import pytest
import torch
from comfyui_modelopt.kernels.activations import quantize_rows_reference
from comfyui_modelopt.kernels.geglu import geglu_quantize, geglu_quantize_reference

from .comparison import DTYPES, KINDS, SHAPES, assert_exact, assert_one_step

pytestmark = pytest.mark.usefixtures("on_device")
both = pytest.mark.parametrize("run", [geglu_quantize, geglu_quantize_reference])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k", SHAPES)
def test_equals_the_reference(kind, dtype, m, k):
    """But for the last bit of erf, in which PyTorch's on a CPU and the interpreter's differ."""
    torch.manual_seed(0)
    h = (torch.randn(m, 2 * k) * 2).to(dtype)
    pre = torch.rand(k) + 0.5
    for scale, factor in ((None, None), (torch.tensor(0.03), None), (torch.tensor(0.02), pre)):
        got = geglu_quantize(h, kind, scale, factor)
        assert got[0].is_contiguous()
        expected = geglu_quantize_reference(h, kind, scale, factor)
        assert_one_step(got, expected, dtype, 1e-3)


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_comfyuis_geglu(run, dtype):
    torch.manual_seed(0)
    module = attention.GEGLU(32, 64, dtype=dtype, operations=comfy.ops.disable_weight_init)
    torch.nn.init.normal_(module.proj.weight)
    torch.nn.init.normal_(module.proj.bias)
    x = torch.randn(2, 9, 32).to(dtype)
    with torch.no_grad():
        expected, h = module(x), module.proj(x)
        assert_one_step(run(h, "int8"), quantize_rows_reference(expected, "int8"), dtype, 1e-3)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_gates_open_and_shut_are_exact(run, kind):
    """gelu is the gate itself beyond 6, zero below -6 and at 0: no erf to differ."""
    torch.manual_seed(0)
    value = torch.randn(6, 320).half()
    gate = torch.tensor([7.0, 30.0, 1000.0, -30.0, 0.0, -1000.0]).half()[:, None].expand(6, 320)
    h = torch.cat([value, gate], dim=1)
    expected = value * torch.where(gate > 0, gate, 0.0)
    for scale in (None, torch.tensor(0.5)):
        q, s = run(h, kind, scale)
        assert_exact((q, s), quantize_rows_reference(expected, kind, scale))


@both
def test_values_beyond_the_range_are_clipped_and_views_read(run):
    h = torch.randn(2, 128, 7).half().transpose(1, 2) * 100
    q, _ = run(h, "int8", torch.tensor(1.0))
    assert q.shape == (2, 7, 64)
    assert (q.min(), q.max()) == (-128, 127)
    q, _ = run(h, "fp8", torch.tensor(1.0))
    assert q.float().abs().max() == 448
