"""A quantized checkpoint through a file and through a MODEL comes back bit for bit."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import info
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import engine
from comfyui_modelopt.quantize.bridge import unet as bridge
from comfyui_modelopt.quantize.recipe import Recipe

RECIPES = [
    Recipe("int8"),
    Recipe("int8", "smoothquant", 0.5),
    Recipe("fp8", layers="linear only"),
]


@pytest.fixture(scope="module", params=RECIPES, ids=lambda r: f"{r.format}-{r.algorithm}")
def made(request, sd15, calibration):
    return engine.quantize_model(sd15[0], request.param, calibration)


def same(a, b):
    assert a.layers == b.layers
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        assert tensor.dtype == other.dtype, name
        assert torch.equal(tensor.float(), other.float()), name


def test_file(made, tmp_path):
    path = str(tmp_path / "unet.safetensors")
    files.write(made.checkpoint, path)
    same(made.checkpoint, loader.read(path))


@pytest.mark.parametrize("loaded", [False, True])
def test_model(made, loaded):
    model = loader.load(made.checkpoint)
    if loaded:
        comfy.model_management.load_models_gpu([model])
    same(made.checkpoint, loader.to_checkpoint(model.clone()))


def test_output_after_reload(made, tmp_path):
    path = str(tmp_path / "unet.safetensors")
    files.write(made.checkpoint, path)
    with torch.no_grad():
        first = bridge.run_loaded(loader.load(made.checkpoint), made.records, lambda: None)
        second = bridge.run_loaded(loader.load_file(path), made.records, lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_files_of_the_same_checkpoint_are_identical(made, tmp_path):
    for name in "ab":
        files.write(made.checkpoint, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_memory_and_chart_figures_are_the_files(made):
    model = loader.load(made.checkpoint)
    assert info.weight_bytes(model) <= 1.02 * made.checkpoint.nbytes() + 200_000
    blocks = info.blocks(model)
    assert "middle_block" in blocks
    total = sum(size for _, size in blocks.values())
    assert total == pytest.approx(made.checkpoint.nbytes() / 1e6, rel=0.02)


def test_unquantized_model_is_told_apart(sd15):
    with pytest.raises(ValueError, match="needs a MODEL quantized by this pack"):
        loader.to_checkpoint(sd15[0])
