"""The convolution kernel against its reference: every channel count of SDXL and SD1.5, odd ones too."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.kernels import conv, tiles

from .comparison import levels
from .test_gemm import DEVICE, DTYPES, KINDS, assert_same, on_hopper, share_moved, values

# (channels in, out) of SDXL's and SD1.5's convolutions
CHANNELS = [
    (4, 320), (320, 4), (320, 320), (320, 640), (640, 640), (640, 1280), (960, 320), (960, 640),
    (1280, 640), (1280, 1280), (1920, 640), (1920, 1280), (2560, 1280), (9, 320), (640, 320),
]  # fmt: skip


def given(n, c, h, w, k, r, kind):
    generator = torch.Generator().manual_seed(c + k)
    x = values((n, c, h, w), kind, 1).contiguous(memory_format=torch.channels_last)
    weight = values((k, c, r, r), kind, 2)
    if kind == "int8":
        scale = (torch.rand(k, 1, 1, 1, generator=generator) * 0.01 + 1e-4).to(DEVICE)
    else:
        scale = torch.tensor(0.003, device=DEVICE)
    return x, weight, torch.tensor(0.02, device=DEVICE), scale


def check(x, weight, x_scale, scale, kind, **more):
    found = conv.conv2d(x, weight, x_scale, scale, **more)
    wanted = conv.conv2d_reference(x, weight, x_scale, scale, **more)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_same(found, wanted, kind, x, weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("c", "k"), CHANNELS)
@pytest.mark.parametrize(("r", "stride"), [(3, 1), (1, 1), (3, 2)])
def test_every_channel_count(c, k, r, stride, kind):
    if kind == "fp8" and DEVICE.type == "cpu" and c > 1280 and (r, stride) != (3, 1):
        c = 192 + c % 64  # the interpreter converts float8 by hand, and larger ones are in (3, 1)
    k = k if torch.cuda.is_available() else min(k, 160)  # columns are independent of one another
    size = 32 if torch.cuda.is_available() else 3
    tensors = given(2, c, size, size, k, r, kind)
    bias = torch.randn(k, device=DEVICE).half()
    check(*tensors, kind, bias=bias, stride=(stride, stride), padding=(r // 2, r // 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "w"), [(1, 1), (5, 9), (8, 3), (13, 1)])
def test_odd_sizes_and_every_addition(h, w, dtype, kind):
    """Bias, time embedding and residual, rounded where PyTorch's separate additions round."""
    n, c, k = 3, 37, 50
    tensors = given(n, c, h, w, k, 3, kind)
    bias = torch.randn(k, device=DEVICE)
    row_bias = torch.randn(n, k, device=DEVICE).to(dtype)
    residual = torch.randn(n, k, h, w, device=DEVICE).to(dtype)  # not channels-last
    for extra in ({}, {"row_bias": row_bias}, {"row_bias": row_bias, "residual": residual}):
        check(*tensors, kind, bias=bias, padding=(1, 1), dtype=dtype, **extra)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [((2, 1), (0, 2), (1, 1)), ((1, 1), (2, 2), (2, 2)), ((3, 3), (1, 0), (1, 2))],
)
def test_any_geometry(stride, padding, dilation, kind):
    tensors = given(2, 64, 7, 8, 40, 3, kind)
    check(*tensors, kind, stride=stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_any_layout(kind):
    x, weight, x_scale, scale = given(2, 32, 6, 6, 40, 3, kind)
    wanted = conv.conv2d(x, weight, x_scale, scale, padding=(1, 1))
    cut = torch.nn.functional.pad(x.float(), (2, 1)).to(x.dtype)[..., 2:-1]
    for other in (x.contiguous(), cut, x.transpose(2, 3).contiguous().transpose(2, 3)):
        last = weight.contiguous(memory_format=torch.channels_last)
        assert torch.equal(conv.conv2d(other, last, x_scale, scale, padding=(1, 1)), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [2, 8])
def test_a_divided_sum(monkeypatch, kind, split):
    """As on grids with fewer tiles than the GPU has multiprocessors (8 x 8 pixels of 1280 channels)."""
    chosen = tiles.Tiles(64, 64, 64, 4, 3, split)
    monkeypatch.setattr(tiles, "choose", lambda *args, **kwargs: chosen)
    tensors = given(2, 320, 4, 4, 70, 3, kind)
    bias, row_bias = torch.randn(70, device=DEVICE), torch.randn(2, 70, device=DEVICE).half()
    residual = torch.randn(2, 70, 4, 4, device=DEVICE).half()
    more = {"bias": bias, "row_bias": row_bias, "residual": residual}
    check(*tensors, kind, padding=(1, 1), **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", KINDS)
def test_quantized_on_the_way_out(kind, out):
    tensors = given(1, 64, 5, 5, 40, 3, kind)
    wide = conv.conv2d_reference(*tensors, padding=(1, 1))
    scale = wide.float().abs().flatten().quantile(0.9) / (127 if out == "int8" else 448)
    more = {"padding": (1, 1), "out_kind": KINDS[out], "out_scale": scale}
    found, wanted = conv.conv2d(*tensors, **more), conv.conv2d_reference(*tensors, **more)
    moved = levels(found) != levels(wanted)
    assert moved.float().mean() <= (0 if kind == "int8" else share_moved(kind))
    assert (levels(found) - levels(wanted)).abs().max() <= (2 if on_hopper(kind) else 1)


def test_sums_are_exact():
    x, weight = values((2, 40, 5, 5), "int8", 1), values((30, 40, 3, 3), "int8", 2)
    one = torch.ones((), device=DEVICE)
    found = conv.conv2d(x, weight, one, one, padding=(1, 1), dtype=torch.float32)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), None, 1, 1)
    assert torch.equal(found.double(), exact)
