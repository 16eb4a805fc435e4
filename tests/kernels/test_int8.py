"""INT8 references: exact accumulators, whatever the size, stride, dtype or memory layout."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.kernels import int8

from ..cpu import needs_exact_int_mm

SHAPES = [  # N, C, H, W, K, kernel, stride, padding
    (2, 320, 8, 8, 320, 3, 1, 1),
    (1, 2560, 4, 4, 64, 3, 1, 1),
    (2, 640, 9, 7, 32, 3, 2, 1),
    (1, 1280, 4, 4, 16, 1, 1, 0),
    (1, 4, 5, 5, 3, 3, 1, 1),
    (3, 7, 1, 1, 5, 3, 1, 1),
]


def random_int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("m, k, n", [(1, 320, 8), (5, 2560, 33), (2, 10240, 7), (64, 1, 3)])
def test_matmul_is_exact(m, k, n):
    a, b = random_int8(m, k), random_int8(n, k)
    expected = a.long() @ b.long().t()
    assert torch.equal(int8.matmul_exact(a.float(), b).long(), expected)


def test_matmul_is_exact_where_float32_would_not_be():
    """All products of one sign and the largest size: the sum needs 27 bits."""
    a = torch.full((1, 5000), -128, dtype=torch.int8)
    b = torch.full((1, 5000), -127, dtype=torch.int8)
    b[0, 0] = -126
    a[0, 1] = -127
    expected = 128 * 127 * 4998 + 128 * 126 + 127 * 127
    assert int8.matmul_exact(a.float(), b).item() == expected
    assert (a.float() @ b.float().t()).item() != expected


@pytest.mark.parametrize("n, c, h, w, k, kernel, stride, padding", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_conv_accumulators_are_exact(n, c, h, w, k, kernel, stride, padding, channels_last):
    q, weight = random_int8(n, c, h, w), random_int8(k, c, kernel, kernel)
    expected = torch.nn.functional.conv2d(q.double(), weight.double(), None, stride, padding)
    given = q.float()
    if channels_last:
        given = given.contiguous(memory_format=torch.channels_last)
    geometry = ((stride,) * 2, (padding,) * 2, (1, 1))
    got = int8.conv2d_accumulate(given, weight, *geometry)
    assert torch.equal(got, expected.float())


@needs_exact_int_mm
@pytest.mark.parametrize("n, c, h, w, k, kernel, stride, padding", SHAPES)
def test_unfolded_conv_equals_the_direct_one(n, c, h, w, k, kernel, stride, padding):
    """The GPU's way, run on the CPU."""
    q, weight = random_int8(n, c, h, w).float(), random_int8(k, c, kernel, kernel)
    geometry = ((stride,) * 2, (padding,) * 2, (1, 1))
    direct = int8.conv2d_accumulate(q, weight, *geometry)
    assert torch.equal(int8._conv2d_unfold(q, weight, *geometry), direct)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_conv_is_one_scale_and_bias(dtype):
    torch.manual_seed(0)
    x, bias = torch.randn(2, 32, 6, 6).to(dtype), torch.randn(8)
    weight, scale = random_int8(8, 32, 3, 3), torch.rand(8, 1, 1, 1) / 127
    input_scale = x.float().abs().amax() / 127
    q = (x.double() / input_scale.double()).round().clamp(-128, 127)
    acc = torch.nn.functional.conv2d(q, weight.double(), None, 1, 1)
    expected = acc * input_scale.double() * scale.double().reshape(1, -1, 1, 1)
    expected = expected + bias.double().reshape(1, -1, 1, 1)
    got = int8.conv2d_reference(x, input_scale, weight, scale, bias, (1, 1), (1, 1), (1, 1))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-4)


@needs_exact_int_mm
@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 320), (1, 1, 2560)])
def test_linear_equals_comfy_kitchens_bit_for_bit(shape):
    """What stock ComfyUI computes for an int8_tensorwise Linear."""
    import comfy_kitchen  # noqa: F401  registers the operators

    torch.manual_seed(0)
    x = torch.randn(shape)
    x[..., 0, :] = 0  # a row of zeros
    weight, scale, bias = random_int8(24, shape[-1]), torch.rand(24, 1) / 127, torch.randn(24)
    expected = torch.ops.comfy_kitchen.int8_linear(x, weight, scale, bias, 0, False, 256)
    assert torch.equal(int8.linear_reference(x, weight, scale, bias), expected)


def test_values_beyond_the_calibrated_range_are_clipped():
    x = torch.tensor([[[[1000.0, -1000.0]]]])
    weight = torch.ones(1, 1, 1, 1, dtype=torch.int8)
    got = int8.conv2d_reference(
        x, torch.tensor(1.0), weight, torch.ones(1, 1, 1, 1), None, (1, 1), (0, 0), (1, 1)
    )
    assert got.flatten().tolist() == [127.0, -128.0]
