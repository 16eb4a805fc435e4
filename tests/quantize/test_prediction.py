"""The file's size is known to the byte before anything is quantized; memory as it is measured."""

from __future__ import annotations

import dataclasses

import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.formats import files
from comfyui_modelopt.formats.checkpoint import PER_TOKEN
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import engine, prediction
from comfyui_modelopt.quantize.bridge import sampling
from comfyui_modelopt.quantize.layers import LINEAR_AND_CONV, LINEAR_ONLY, MODES
from comfyui_modelopt.quantize.recipe import ALGORITHMS, AWQ_FULL, SVDQUANT, Recipe

from .. import families

RECIPES = [
    Recipe(form, algorithm, layers=mode)
    for form, algorithms in ALGORITHMS.items()
    for algorithm in algorithms
    if algorithm != AWQ_FULL
    for mode in MODES
] + [
    Recipe("fp8", "max", activations=PER_TOKEN),
    Recipe("nvfp4", SVDQUANT, rank=200, layers=LINEAR_ONLY),  # beyond the width of none
    Recipe("int8", "smoothquant", convolutions="percentile", percentile=0.5),
]


def name(recipe: Recipe) -> str:
    return f"{recipe.format} {recipe.algorithm} {recipe.layers} {recipe.activations} {recipe.rank}"


def predicted(model, recipe: Recipe, calibration=None) -> int:
    recipe, plans, _ = engine.prepared(model.model.diffusion_model, recipe)
    return files.size(prediction.checkpoint(model, recipe, plans, calibration))


def written(made, tmp_path) -> int:
    """Bytes of the file that Quantize and Save make: loaded, measured, taken out of the MODEL."""
    checkpoint = dataclasses.replace(made.checkpoint, header=dict(made.checkpoint.header))
    made = dataclasses.replace(made, checkpoint=checkpoint)
    model = loader.load(checkpoint)
    engine.measure(made, model)
    loader.loaded(model).header.update(checkpoint.header)
    path = tmp_path / "made.safetensors"
    files.write(loader.to_checkpoint(model), path)
    return path.stat().st_size


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_size_is_exact(recipe, sd15, calibration, quantized, tmp_path):
    expected = predicted(sd15[0], recipe, calibration)
    assert written(quantized(recipe), tmp_path) == expected
