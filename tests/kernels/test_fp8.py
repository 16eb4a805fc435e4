"""FP8 references against the same sums in float64, and against what stock ComfyUI computes."""

from __future__ import annotations

import comfy.quant_ops  # noqa: F401  registers the layouts
import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfyui_modelopt.kernels import fp8


def test_linear_equals_comfyuis_layout():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 64), torch.randn(32, 64), torch.randn(32)
    name = "TensorCoreFP8E4M3Layout"
    x_scale, w_scale = torch.tensor(0.011), torch.tensor(0.009)
    q = QuantizedTensor.from_float(weight, name, scale=w_scale)
    stock = torch.nn.functional.linear(QuantizedTensor.from_float(x, name, scale=x_scale), q, bias)
    ours = fp8.linear_reference(x, x_scale, q._qdata, w_scale, bias)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_conv_sums_are_those_of_float64():
    torch.manual_seed(0)
    x, bias = torch.randn(2, 640, 5, 5), torch.randn(16)
    weight = (torch.randn(16, 640, 3, 3) * 100).to(torch.float8_e4m3fn)
    x_scale, w_scale = x.abs().amax() / 448, torch.tensor(0.002)
    q = (x * (1 / x_scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    acc = torch.nn.functional.conv2d(q.double(), weight.double(), None, 2, 1)
    expected = acc * (x_scale.double() * w_scale.double()) + bias.double().reshape(1, -1, 1, 1)
    got = fp8.conv2d_reference(x, x_scale, weight, w_scale, bias, (2, 2), (1, 1), (1, 1))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_values_beyond_the_calibrated_range_are_clipped_not_nan():
    q = fp8.quantize(torch.tensor([1e6, -1e6, 0.0]), torch.tensor(1.0))
    assert q.tolist() == [448.0, -448.0, 0.0]
