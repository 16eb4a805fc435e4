"""Kernels that TMA feeds against their references: Triton's interpreter here, a Hopper GPU where there is
one; and where they are used."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_modelopt.benchmarks import tiles as usual
from comfyui_modelopt.benchmarks import tma
from comfyui_modelopt.kernels import check, conv, gemm, hopper, tiles
from comfyui_modelopt.kernels.tiles import Tiles

from .test_gemm import DEVICE, KINDS, assert_same, inputs, values

NHWC = torch.channels_last
RESULT = json.loads((tma.RESULTS / "tma_nvidia-h200.json").read_text(encoding="utf-8"))
CHIP = usual.chip_of(RESULT)
# the tiles that are chosen, and small ones where the interpreter would take minutes
SMALL = DEVICE.type == "cpu"
PRODUCTS = [Tiles(32, 64, 128, 4, 3), Tiles(64, 32, 128, 4, 3)]
CONVS = [Tiles(64, 32, 128, 4, 3), Tiles(32, 64, 128, 4, 3, 3), Tiles(256, 16, 128, 4, 2)]
if not SMALL:
    PRODUCTS += [Tiles(*found) for found in tiles.TMA["matmul"]]
    CONVS += [Tiles(*found) for found in tiles.TMA["conv2d int8"]]
# images, channels, height, width, outputs, taps, padding
IMAGES = [
    (2, 320, 5, 9, 70, 3, 1),
    (3, 48, 7, 13, 50, 3, 1),
    (2, 64, 8, 8, 40, 3, 1),
    (1, 64, 17, 19, 40, 3, 1),
    (1, 960, 4, 4, 20, 3, 1),
    (2, 160, 6, 6, 33, 1, 0),
    (2, 32, 6, 7, 33, 3, 0),
    (1, 32, 6, 7, 33, 3, 2),
    (1, 16, 1, 1, 16, 3, 1),
]


def name_of(tile: Tiles) -> str:
    return usual.NAME.format(**vars(tile))


@pytest.mark.parametrize("tile", PRODUCTS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(70, 90, 320), (33, 80, 1280), (5, 6, 16), (130, 100, 48)]
)
def test_the_product(m, n, k, kind, tile):
    a, (b,), a_scale, (scale,), (bias,) = inputs(m, n, k, kind, kind == "int8")
    residual = torch.randn(m, n, device=DEVICE).half()
    for more in ({}, {"bias": bias, "residual": residual}):
        found = hopper.scaled_mm(a, b, a_scale, scale, **more, tile=tile)
        assert_same(found, gemm.scaled_mm_reference(a, b, a_scale, scale, **more), kind, a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), [(70, 90, 320), (33, 80, 1280), (5, 6, 16)])
def test_geglu(m, n, k, kind):
    """As the usual kernel, which test_gemm.py compares with PyTorch: they share GELU's arithmetic."""
    a, (b,), a_scale, (scale,), (bias,) = inputs(m, 2 * n, k, kind, kind == "int8")
    small = Tiles(32, 32, 128, 4, 3)
    found = hopper.scaled_mm_geglu(a, b, a_scale, scale, bias, tile=small)
    wanted = gemm.scaled_mm_geglu(a, b, a_scale, scale, bias)
    if kind == "int8":
        assert torch.equal(found, wanted)
    else:
        assert (found.float() - wanted.float()).norm() <= 5e-3 * wanted.float().norm()


def pictures(images, channels, height, width, outputs, taps, kind):
    x = values((images, channels, height, width), kind, 1).contiguous(memory_format=NHWC)
    weight = values((outputs, channels, taps, taps), kind, 2).contiguous(memory_format=NHWC)
    generator = torch.Generator().manual_seed(channels + outputs)
    scale = torch.full((), 0.003)
    if kind == "int8":
        scale = torch.rand(outputs, 1, 1, 1, generator=generator) * 0.01 + 1e-4
    return x, weight, torch.tensor(0.02, device=DEVICE), scale.to(DEVICE)


@pytest.mark.parametrize("tile", CONVS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", IMAGES, ids=lambda shape: "x".join(map(str, shape)))
def test_the_convolution(shape, kind, tile):
    images, channels, height, width, outputs, taps, pad = shape
    if SMALL and kind == "fp8" and tile.bm == 256 and height > 8:
        tile = CONVS[0]  # minutes otherwise
    args = pictures(*shape[:6], kind)
    p, q = height + 2 * pad - taps + 1, width + 2 * pad - taps + 1
    full = {
        "bias": torch.randn(outputs, device=DEVICE),
        "row_bias": torch.randn(images, outputs, device=DEVICE).half(),
        "residual": torch.randn(images, outputs, p, q, device=DEVICE)
        .half()
        .contiguous(memory_format=NHWC),
    }
    for more in ({}, full) if kind == "int8" else (full,):
        found = hopper.conv2d(*args, padding=(pad, pad), **more, tile=tile)
        assert found.is_contiguous(memory_format=NHWC)
        wanted = conv.conv2d_reference(*args, padding=(pad, pad), **more)
        assert_same(found, wanted, kind, args[0], args[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_quantized_on_the_way_out(kind):
    args = pictures(2, 64, 8, 8, 40, 3, kind)
    more = {"out_kind": KINDS[kind], "out_scale": torch.tensor(4.0, device=DEVICE)}
    found = hopper.conv2d(*args, padding=(1, 1), **more, tile=CONVS[0])
    wanted = conv.conv2d_reference(*args, padding=(1, 1), **more)
    assert found.dtype == KINDS[kind]
    share = (found.float() != wanted.float()).float().mean()
    assert share == 0 if kind == "int8" else share <= 0.02


@pytest.mark.parametrize("bm", [32, 64, 128, 256])
def test_a_block_is_of_that_many_pixels(bm):
    for p in (1, 3, 8, 13, 16, 32, 64, 104, 128):
        for q in (1, 5, 8, 16, 33, 152, 128):
            images, rows, columns = hopper.block_of(bm, p, q)
            assert images * rows * columns == bm
            assert columns < 2 * q and rows < 2 * p  # no more than half of a block lies beyond


# ---- where they are used


@pytest.fixture
def used(monkeypatch):
    """As on a Hopper GPU."""
    monkeypatch.setattr(hopper, "why_not", lambda device: hopper.off.get(device))


def test_what_is_taken(used):
    def eight(*shape):
        return torch.zeros(shape, dtype=torch.int8)

    assert hopper.takes_product(eight(2048, 64), eight(8, 64))
    assert not hopper.takes_product(eight(2048, 64), eight(8, 64), hopper.LEAST_INNER)
    assert hopper.takes_product(eight(2048, 640), eight(8, 640), hopper.LEAST_INNER)
    assert not hopper.takes_product(eight(2047, 64), eight(8, 64))
    assert not hopper.takes_product(eight(2048, 72), eight(8, 72))
    assert not hopper.takes_product(eight(2048 * 64 + 8)[8:].view(2048, 64), eight(8, 64))
    x, weight = eight(1, 64, 4, 4), eight(8, 64, 3, 3)
    assert hopper.takes_conv(x, weight, (1, 1), (1, 1))
    assert not hopper.takes_conv(x, weight, (2, 2), (1, 1))
    assert not hopper.takes_conv(x, weight, (1, 1), (2, 2))
    assert not hopper.takes_conv(eight(1, 48, 4, 4), eight(8, 48, 3, 3), (1, 1), (1, 1))


def test_other_gpus_have_none():
    assert "compute capability 9.0" in hopper.why_not(torch.device("cpu"))


def test_the_public_functions_call_them(used, monkeypatch):
    called = []
    for name in ("scaled_mm", "scaled_mm_geglu", "conv2d"):
        monkeypatch.setattr(hopper, name, lambda *args, name=name: called.append(name))
    a, b = torch.zeros(2048, 640, dtype=torch.int8), torch.zeros(8, 640, dtype=torch.int8)
    one = torch.ones(())
    gemm.scaled_mm(a, b, one, one)
    gemm.scaled_mm_geglu(a, b, one, one)
    conv.conv2d(a[:16].view(1, 640, 4, 4), b.view(8, 640, 1, 1), one, one)
    assert called == ["scaled_mm", "scaled_mm_geglu", "conv2d"]
    # torch.compile, which traces through a launcher of its own, gets the usual ones
    traced = []

    class Launched:
        def __init__(self, kernel):
            traced.append(kernel)

        def __getitem__(self, grid):
            return lambda *args, **options: None

    gemm.scaled_mm(a, b, one, one, launch=Launched)
    assert len(called) == 3 and len(traced) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_tried_before_a_model_is_loaded(monkeypatch, kind):
    """Here with tiles of the interpreter's size."""
    if SMALL:
        table = {(64, 64, 128, 4, 3): (1, 1, 1), (256, 32, 128, 4, 2): (1, 1, 1)}
        monkeypatch.setitem(tiles.TMA, f"conv2d {kind}", table)
        monkeypatch.setattr(hopper, "LEAST_ROWS", 64)
    assert check.tiles_that_differ(DEVICE, kind) == []
    real = hopper.conv2d

    def wrong(*args, tile, **more):
        return real(*args, tile=tile, **more) * (1.0 if tile.split == 1 else 1.1)

    monkeypatch.setattr(hopper, "conv2d", wrong)
    found = check.tiles_that_differ(DEVICE, kind)
    assert len(found) == len(tiles.TMA[f"conv2d {kind}"]) and all("split=3" in x for x in found)


@pytest.mark.parametrize("failure", ["differs", "raises"])
def test_where_they_fail_the_usual_ones_remain(used, monkeypatch, caplog, failure):
    device = torch.device("cpu")

    def differing(where, kind, rows=48):
        if rows == 48:
            return []
        if failure == "raises":
            raise RuntimeError("ptxas fatal")
        return ["conv2d"]

    monkeypatch.setattr(check, "differing", differing)
    monkeypatch.setattr(check, "tiles_that_differ", lambda *args: [])
    monkeypatch.setattr(hopper, "off", {})
    with caplog.at_level("WARNING"):
        assert check._reason(device, "int8") is None
    words = {"differs": "conv2d differ here", "raises": "RuntimeError: ptxas fatal"}[failure]
    assert words in hopper.off[device]
    assert "kernels with TMA are not used, the others are" in caplog.text


# ---- the tables


@pytest.mark.parametrize("kernel", ["matmul", "conv2d", "geglu"])
def test_what_is_chosen_costs_little_over_the_best(kernel):
    """Summed over the layers of both UNets."""
    chosen = best = ordinary = 0.0
    for row in RESULT["rows"]:
        short = kernel == "matmul" and row["inner"] < hopper.LEAST_INNER
        if row["kernel"] != kernel or short:
            continue
        chosen += row["layers"] * row["us"][tma.picked(row, CHIP)]
        best += row["layers"] * min(row["us"].values())
        ordinary += row["layers"] * row["usual_us"]
    assert best <= chosen < 1.11 * best
    assert chosen < {"matmul": 0.98, "conv2d": 0.7, "geglu": 0.9}[kernel] * ordinary


@pytest.mark.parametrize("table", tiles.TMA)
def test_rates_are_the_fitted_ones(table):
    fitted = tma.fit(RESULT["rows"], RESULT["sms"])[table]
    for tile, numbers in tiles.TMA[table].items():
        assert numbers == pytest.approx(fitted[tile], abs=0.006), tile


def test_the_page():
    page = tma.markdown(RESULT)
    assert page.count("\n| linear") + page.count("\n| conv2d") == len(RESULT["rows"])
    assert "these differ: none." in page
