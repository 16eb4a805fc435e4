"""SmoothQuant smooths the layers of one input alike, so that they can be fused, and no others."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.formats.groups import sharing
from comfyui_modelopt.loaders.eight_bit import smoothed_alike
from comfyui_modelopt.quantize import engine, modelopt, pack
from comfyui_modelopt.quantize.layers import select
from comfyui_modelopt.quantize.mixed import Mixed
from comfyui_modelopt.quantize.recipe import LayerPlan, Recipe

SMOOTH = Recipe("int8", "smoothquant", layers="linear only")
BLOCK = "middle_block.1.transformer_blocks.0"
Q, K, V = (f"{BLOCK}.attn1.to_{letter}" for letter in "qkv")


def scales(made) -> dict[str, torch.Tensor]:
    ending = ".pre_quant_scale"
    return {
        name.removesuffix(ending): tensor
        for name, tensor in made.checkpoint.tensors.items()
        if name.endswith(ending)
    }


def test_layers_of_one_input_and_no_others(quantized):
    made = quantized(SMOOTH)
    found = scales(made)
    groups = sharing(made.checkpoint.layers)
    several = [group for group in groups if len(group) > 1]
    assert {len(group) for group in several} == {2, 3}
    for group in several:
        assert all(torch.equal(found[group[0]], found[name]) for name in group[1:]), group
    firsts = [found[group[0]] for group in groups]
    for index, one in enumerate(firsts):
        assert not any(torch.equal(one, other) for other in firsts[:index])
    assert smoothed_alike(made.checkpoint) == {name for group in several for name in group}


def mixed_of(sd15, calibration, *choices: Recipe, **assigned: int):
    """A quantized UNet whose q, k and v of one block have these choices, the rest of it the first."""
    names = select(sd15[0].model.diffusion_model, SMOOTH.layers, SMOOTH.skip)
    assignment = {name: 0 for name in names if name.startswith(BLOCK)} | assigned
    return engine.quantize_model(sd15[0], Mixed(choices, assignment), calibration)


@pytest.mark.parametrize(
    "other",
    [Recipe("int8", "smoothquant", alpha=0.8), Recipe("int8", "max")],
    ids=["another alpha", "not smoothed"],
)
def test_a_layer_of_another_recipe_stands_alone(sd15, calibration, other):
    made = mixed_of(sd15, calibration, Recipe("int8", "smoothquant"), other, **{Q: 1})
    found = scales(made)
    assert not torch.equal(found[K], found[V])  # q, k and v are fused together or not at all
    assert Q not in found or not torch.equal(found[Q], found[K])
    assert smoothed_alike(made.checkpoint) == {f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v"}


def test_layers_that_saw_another_input_stand_alone():
    """A patch that gives the keys another input while it is recorded."""
    torch.manual_seed(0)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.to_v = (torch.nn.Linear(32, 32, bias=False) for _ in "qkv")

        def forward(self, x):
            return self.to_q(x) + self.to_k(2 * x) + self.to_v(x)

    unet = torch.nn.ModuleDict({"attn1": Attention()})
    unet["attn1"] = torch.nn.ModuleDict({"attn1": unet["attn1"]})
    names = [f"attn1.attn1.to_{letter}" for letter in "qkv"]
    plans = dict.fromkeys(names, LayerPlan("linear", "int8", "smoothquant"))
    x = torch.randn(8, 32)
    with torch.no_grad():
        modelopt.calibrate(unet, plans, lambda m: m["attn1"]["attn1"](x))
        assert pack._beside(unet, plans) == {}
        unet["attn1"]["attn1"].to_k.input_quantizer.amax /= 2
        beside = pack._beside(unet, plans)
        assert pack._beside(unet, {name: plans[name] for name in names[1:]}) == {}
    assert list(beside) == names
    weights = [unet.get_submodule(name).weight for name in names]
    assert torch.equal(beside[names[1]], torch.stack([w.abs().amax(0) for w in weights[::2]]))
