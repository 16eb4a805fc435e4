"""The producers compile for every GPU they are for, with 16-byte accesses and without spills."""

from __future__ import annotations

import pytest
from comfyui_modelopt.kernels import group_norm, layer_norm, producers

from .ahead_of_time import CAPABILITIES, FP8_CAPABILITIES, Request, compile_all
from .comparison import KINDS

TYPES = {"int8": "*i8", "fp8": "*fp8e4nv"}


def rows(function, k, kind, capability, per_token, scaled=False, x="*fp16", odd=()):
    tile = producers.tile(k, per_token or function == "layer_norm")
    first = "h" if function == "geglu" else "x"
    arguments = {first: x, "scale": "*fp32", "q": TYPES[kind], "m": "i32", "k": "i32"}
    if function == "layer_norm":
        arguments |= {"weight": x, "bias": "*fp32", "eps": "fp32"}
    constexprs = {"ROWS": tile[0], "COLUMNS": tile[1], "PER_TOKEN": per_token}
    if scaled:
        arguments["pre_quant_scale"] = "*fp32"
    else:
        constexprs["pre_quant_scale"] = None
    each = layer_norm.VALUES[kind] if function == "layer_norm" else 8
    warps = producers.warps(*tile, each)
    module = "kernels.triton_quantize"
    return Request(module, function, arguments, constexprs, capability, warps, odd=odd)


def statistics(channels, pixels, capability, x="*fp16"):
    block, stretches, lines, columns = group_norm.statistics_tile(2, channels, pixels, 32)
    per_group = channels // 32
    constexprs = {
        "GROUPS": 32,
        "PER_GROUP": per_group,
        "STRETCHES": stretches,
        "BLOCK": block,
        "SLOTS": producers.power_of_two(per_group),
        "ROWS": lines,
        "COLUMNS": columns,
    }
    arguments = {"x": x, "partial": "*fp32", "pixels": "i32", "channels": "i32"}
    warps = producers.warps(lines, columns)
    module = "kernels.triton_group_norm"
    return Request(module, "statistics", arguments, constexprs, capability, warps)


def normalize(channels, pixels, kind, capability, per_token, x="*fp16", scaled=False):
    tile = producers.tile(channels, per_token)
    near = group_norm.normalize_tile(2, channels, pixels, 32, *tile)[1]
    arguments = {
        **dict.fromkeys(("x", "weight", "bias"), x),
        **dict.fromkeys(("partial", "scale"), "*fp32"),
        "q": TYPES[kind],
        **dict.fromkeys(("images", "pixels", "channels", "length"), "i32"),
        "eps": "fp32",
    }
    if scaled:
        arguments["pre_quant_scale"] = "*fp16"
    constexprs = {} if scaled else {"pre_quant_scale": None}
    constexprs |= {
        "GROUPS": 32,
        "PER_GROUP": channels // 32,
        "STRETCHES": group_norm.statistics_tile(2, channels, pixels, 32)[1],
        "NEAR": near,
        "SILU": True,
        "PER_TOKEN": per_token,
        "ROWS": tile[0],
        "COLUMNS": tile[1],
    }
    return Request(
        "kernels.triton_group_norm",
        "normalize",
        arguments,
        constexprs,
        capability,
        producers.warps(*tile),
        odd=("images", "length"),
    )


def for_kind(kind, capability):
    """Shapes of SDXL and SD1.5, every type of x."""
    return [
        rows("quantize_rows", 320, kind, capability, True),
        rows("quantize_rows", 1280, kind, capability, False, scaled=True, x="*bf16"),
        rows("layer_norm", 640, kind, capability, True, scaled=True, x="*bf16"),
        rows("layer_norm", 1280, kind, capability, True),
        rows("geglu", 5120, kind, capability, False),
        rows("geglu", 5120, kind, capability, True, scaled=True),
        rows("geglu", 1280, kind, capability, True, x="*fp32"),
        normalize(320, 128 * 128, kind, capability, False),
        normalize(1280, 32 * 32, kind, capability, False, x="*bf16"),
        normalize(2560, 8 * 8, kind, capability, True),
        normalize(640, 64 * 64, kind, capability, True, scaled=True),
    ]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_accesses_are_wide_and_registers_enough(capability):
    requests = [
        statistics(320, 128 * 128, capability),
        statistics(1280, 32 * 32, capability, x="*bf16"),
        statistics(2560, 8 * 8, capability, x="*fp32"),
    ]
    for kind in KINDS if capability in FP8_CAPABILITIES else KINDS[:1]:
        requests += for_kind(kind, capability)
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        assert compiled.spills == 0, request
        assert compiled.registers <= 96, (request, compiled.registers)
        wide = 2 if request.function == "geglu" else 1
        assert compiled.loads.count(128) >= wide, (request, compiled.loads)
        # eight 8-bit values a thread, 16 in the longest rows
        if request.function != "statistics":
            assert max(compiled.stores) >= 64, (request, compiled.stores)


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_is_ieees_and_conversions_hardwares(kind):
    """The interpreter cannot tell: its plain division is exact, a GPU's is not."""
    (ptx,) = (c.ptx for c in compile_all([rows("quantize_rows", 320, kind, 90, True)]))
    assert "div.rn.f32" in ptx
    assert "div.full" not in ptx and "div.approx" not in ptx and "rcp" not in ptx
    assert "ftz" not in ptx
    # int8's quotients take two steps of two each; nothing else is contracted
    fused = ptx.count("fma.rn.f32")
    assert fused == ptx.count("fma") and (fused > 0) == (kind == "int8") and fused % 4 == 0
    assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == (kind == "fp8")


def test_odd_sizes_and_ones_compile():
    """A row that 16 does not divide has narrow accesses; Triton makes constants of ones."""
    odd = rows("quantize_rows", 77, "int8", 80, True, odd=("m", "k"))
    one = rows("layer_norm", 320, "int8", 80, True)
    del one.arguments["m"]
    one.constexprs["m"] = 1
    pixel = normalize(320, 1, "int8", 80, True)
    for name in ("images", "pixels", "length"):
        del pixel.arguments[name]
        pixel.constexprs[name] = 1
    first = statistics(320, 1, 80)
    del first.arguments["pixels"]
    first.constexprs["pixels"] = 1
    compiled = compile_all([odd, one, pixel, first])
    assert max(compiled[0].loads) == 16
    assert all(c.spills == 0 for c in compiled[1:])
