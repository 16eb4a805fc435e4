"""Mixed recipes as JSON, and what is wrong with one."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import engine, mixed
from comfyui_modelopt.quantize.mixed import Mixed
from comfyui_modelopt.quantize.recipe import ALGORITHMS, Recipe

BLOCK = "input_blocks.1.1.transformer_blocks.0"
MIX = Mixed(
    (
        Recipe("int8", "smoothquant", 0.25),
        Recipe("int4", "awq_lite"),
        Recipe("fp8", activations="per token"),
        Recipe("int8", "mse", activations="16 bits"),
        Recipe("nvfp4"),
    ),
    {
        f"{BLOCK}.attn1.to_q": 0,
        f"{BLOCK}.ff.net.2": 1,
        f"{BLOCK}.attn1.to_out.0": 2,
        "input_blocks.1.0.in_layers.2": 3,
        f"{BLOCK}.attn2.to_k": 4,
    },
    {"kind": "size", "value": 5.0},
)


def plain(recipe: Mixed) -> tuple:
    choices = [dataclasses.replace(c, layers="linear + conv", skip=()) for c in recipe.choices]
    return choices, dict(recipe.assignment), dict(recipe.goal)


def test_json_gives_the_recipe_back():
    assert plain(mixed.read(mixed.write(MIX))) == plain(MIX)


@pytest.mark.parametrize("form", ALGORITHMS)
def test_every_recipe_is_a_choice(form):
    choices = tuple(Recipe(form, algorithm) for algorithm in ALGORITHMS[form])
    for index, _ in enumerate(choices):
        made = Mixed(choices, {"layer": index})
        assert plain(mixed.read(mixed.write(made))) == plain(made)


def test_one_recipe_for_all_layers_that_breaks_a_rule():
    given = json.loads(mixed.write(Recipe("int8", "percentile"))) | {"layers": "linear only"}
    with pytest.raises(
        ValueError, match="my.json breaks a rule of recipes: percentile is for conv"
    ):
        mixed.read(json.dumps(given), "my.json")


@pytest.fixture(scope="module")
def made(sd15, calibration):
    return engine.quantize_model(sd15[0], MIX, calibration)


def test_each_layer_has_its_recipe(made):
    table = made.checkpoint.layers
    assert {name: (x.format, x.smoothed, x.activations) for name, x in table.items()} == {
        f"{BLOCK}.attn1.to_q": ("int8", True, ""),
        f"{BLOCK}.ff.net.2": ("int4", True, ""),
        f"{BLOCK}.attn1.to_out.0": ("fp8", False, "per token"),
        "input_blocks.1.0.in_layers.2": ("int8", False, "16 bits"),
        # ComfyUI reads the architecture from its width
        f"{BLOCK}.attn2.to_k": ("int8", False, ""),
    }
    assert loader.loaded(loader.load(made.checkpoint)).layers == table


def test_a_layer_of_a_mix_is_that_of_its_recipe_alone(made, quantized):
    """To the last places of what AWQ saw, which a processor's matrix products do not always repeat."""
    alone = quantized(Recipe("int4", "awq_lite", layers="linear only")).checkpoint
    name = f"{BLOCK}.ff.net.2"
    for key in alone.layers[name].scales:
        one, other = (x.tensors[f"{name}.{key}"].float() for x in (alone, made.checkpoint))
        assert torch.allclose(one, other, rtol=2e-3), key  # weight_amax has 11 bits
    codes = [x.tensors[f"{name}.weight"] for x in (alone, made.checkpoint)]
    assert (codes[0] == codes[1]).float().mean() > 0.999


def damaged(**changes) -> str:
    given = json.loads(mixed.write(MIX)) | changes
    return json.dumps({key: value for key, value in given.items() if value is not ...})


DAMAGE = {
    "empty": (" \n", "must be JSON, .* is empty"),
    "not JSON": ("{", "must be JSON"),
    "deep": ("[" * 100_000, "must be JSON"),
    "another file": ("{}", "of the kind"),
    "a number": ("7", "of the kind"),
    "newer": (damaged(format_version=2), "format version"),
    "no choices": (damaged(choices=...), "choices must be a list"),
    "a choice without a format": (damaged(choices=[{"algorithm": "max"}]), "a table with a format"),
    "an unknown format": (damaged(choices=[{"format": "int7"}] * 5), "int7"),
    "an unknown option": (damaged(choices=[{"format": "int8", "skip": ["*"]}] * 5), "options"),
    "a strange rank": (damaged(choices=[{"format": "int4", "rank": 10**9}] * 5), "rank must be"),
    "no goal": (damaged(goal=3), "goal must be a table"),
    "no layer": (damaged(assignment={}), "at least one layer"),
    "a choice that is not there": (damaged(assignment={"9": ["a"]}), "must be one of 5"),
    "a layer twice": (damaged(assignment={"0": ["a"], "1": ["a"]}), "assigned once"),
    "no list": (damaged(assignment={"0": "a"}), "lists of layer names"),
    "no number": (damaged(assignment={"x": ["a"]}), "lists of layer names"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name):
    text, message = DAMAGE[name]
    with pytest.raises(ValueError, match=message):
        mixed.read(text, "this text")


def test_layers_of_another_model(sd15, calibration):
    other = Mixed((Recipe("int8", "max"),), {"double_blocks.0.img_mlp.0": 0})
    with pytest.raises(ValueError, match="names 1 that this one has not, the first double_blocks"):
        engine.quantize_model(sd15[0], other, calibration)


def test_two_searches_at_once_are_refused():
    with pytest.raises(ValueError, match="awq_full or with another AWQ"):
        Mixed((Recipe("int4", "awq_full"), Recipe("int4", "awq_lite")), {"a": 0, "b": 1})


@pytest.mark.parametrize("option", ["format", "algorithm", "convolutions", "activations"])
def test_a_long_text_of_a_recipe_is_told_in_brief(option):
    """What a stranger's recipe says goes into a node's error: not thousands of characters of it."""
    given = json.loads(mixed.write(Recipe("int8", "smoothquant"))) | {option: "9" * 5000}
    with pytest.raises(ValueError, match="this text") as caught:
        mixed.read(json.dumps(given), "this text")
    assert "99…99" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_long_pattern_is_told_in_brief(sd15):
    for skip in (("9" * 5000,), tuple(f"*{'?' * number}" for number in range(200))):
        with pytest.raises(ValueError, match="skip pattern") as caught:
            engine.prepared(sd15[0].model.diffusion_model, Recipe("int8", "max", skip=skip))
        assert len(str(caught.value)) < 600
