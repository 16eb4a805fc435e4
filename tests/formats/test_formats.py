"""The contract of every format: round trip, zeros, odd shapes, source dtypes."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.formats import FORMATS, get
from comfyui_modelopt.quantize import recipe

SHAPES = [(8, 16), (5, 7), (1, 1), (6, 4, 3, 3), (3, 5, 1, 1)]


@pytest.fixture(params=FORMATS)
def form(request):
    return FORMATS[request.param]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantized_is_within_one_step(form, shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    before = weight.clone()
    stored = form.quantize(weight, form.weight_amax(weight))
    assert torch.equal(weight, before)
    assert stored["weight"].dtype == form.STORAGE
    assert stored["weight"].shape == weight.shape
    assert stored["weight_scale"].dtype == torch.float32
    assert tuple(stored["weight_scale"].shape) == form.scale_shape(shape)
    restored = form.dequantize(stored["weight"], stored["weight_scale"])
    half_step = {"int8": 0.5 / 127, "fp8": 2.0**-4}[form.NAME]
    limit = half_step * form.weight_amax(weight) * 1.001
    assert bool(((restored - weight.float()).abs() <= limit).all())


@pytest.mark.parametrize("zero", ["channel", "all"])
def test_zeros_have_a_positive_scale(form, zero):
    weight = torch.randn(4, 6)
    weight[1 if zero == "channel" else slice(None)] = 0
    stored = form.quantize(weight, form.weight_amax(weight))
    assert bool((stored["weight_scale"] > 0).all())
    assert bool(torch.isfinite(stored["weight_scale"]).all())
    restored = form.dequantize(stored["weight"], stored["weight_scale"])
    assert bool((restored[1] == 0).all())


def test_dead_activations_have_a_positive_scale(form):
    assert form.input_scale(torch.tensor(0.0)).item() > 0
    assert form.input_scale(torch.tensor([2.0])).shape == ()
    assert form.input_scale(torch.tensor(2.0)).item() == pytest.approx(2.0 / form.QMAX)


def test_largest_values_use_the_whole_range(form):
    weight = torch.tensor([[1.0, -1.0, 0.5]])
    stored = form.quantize(weight, form.weight_amax(weight))
    assert stored["weight"].float().abs().max().item() == form.QMAX


def test_recipes_and_formats_belong_together():
    assert set(recipe.ALGORITHMS) == set(recipe.WEIGHTS) == set(recipe.STATIC) == set(FORMATS)
    for name, algorithms in recipe.ALGORITHMS.items():
        assert (recipe.SMOOTHQUANT in algorithms) == FORMATS[name].SMOOTHABLE


def test_unknown_format_is_named():
    with pytest.raises(ValueError, match="int9"):
        get("int9")


def test_amax_comes_back_to_the_last_bit():
    form = FORMATS["int8"]
    torch.manual_seed(0)
    from_16_bits = torch.randn(5000).half().float().abs() + 2.0**-14
    assert form.amax_exceptions(from_16_bits.half().float() / form.QMAX, from_16_bits.half()) == {}
    anything = torch.rand(5000) + 0.01
    found = form.amax_of(anything / form.QMAX)
    exceptions = form.amax_exceptions(anything / form.QMAX, anything)
    for channel, value in exceptions.items():
        found[int(channel)] = value
    assert torch.equal(found, anything)
    assert len(exceptions) < 0.02 * len(anything)
