"""What the Quantize nodes say of a recipe before anything runs."""

from __future__ import annotations

import pytest
from comfyui_modelopt.loaders import device
from comfyui_modelopt.nodes import recipe_inputs
from comfyui_modelopt.nodes.auto_and_load import auto_and_load
from comfyui_modelopt.quantize import mixed
from comfyui_modelopt.quantize.recipe import Recipe
from comfyui_modelopt.utils.capability import GPU

APPLE = GPU("mps", "an M3")


@pytest.mark.parametrize("form", ["fp8", "nvfp4", "mxfp8", "w4a8"])
def test_a_format_that_the_device_refuses(monkeypatch, form):
    monkeypatch.setattr(device, "current", lambda kinds=(): APPLE)
    said = recipe_inputs.why_not({"format": form, "algorithm": {"algorithm": "max"}})
    assert "Apple's GPUs have none in torch: choose another format" in said


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_format_that_it_runs(monkeypatch, form):
    monkeypatch.setattr(device, "current", lambda kinds=(): APPLE)
    assert recipe_inputs.why_not({"format": form, "algorithm": {"algorithm": "max"}}) is None


@pytest.mark.parametrize(
    ("allowed", "said"),
    [(["int8", "fp8"], "switch fp8 off"), (["int8_weights", "nvfp4"], "nvfp4 off")],
)
def test_auto_quantize_refuses_a_format_before_it_tries_any(monkeypatch, allowed, said):
    monkeypatch.setattr(device, "current", lambda kinds=(): APPLE)
    target = {"target": "bits", "bits": 6.0}
    with pytest.raises(ValueError, match=f"Apple's GPUs have none in torch: .*{said}"):
        auto_and_load(None, None, target, allowed, True, "linear + conv", "")
    recipe = {"target": "recipe", "recipe": mixed.write(Recipe("fp8", "max"))}
    with pytest.raises(ValueError, match="Apple's GPUs have none in torch: take another recipe"):
        auto_and_load(None, None, recipe, [], True, "linear + conv", "")
    spare = mixed.Mixed((Recipe("int8", "max"), Recipe("fp8", "max")), {"a": 0})
    assert [one.format for one in mixed.used(spare)] == ["int8"]


def test_an_option_that_does_not_apply_is_named():
    given = {"format": "int8", "algorithm": {"algorithm": "max", "rank": 8}}
    assert "rank goes with the algorithm svdquant" in recipe_inputs.why_not(given)
