"""Files quantized in ComfyUI's own form open as stock ComfyUI opens them."""

from __future__ import annotations

import json

import comfy.sd
import pytest
import torch
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import info, stock
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize.bridge import unet as bridge
from comfyui_modelopt.quantize.recipe import Recipe
from safetensors.torch import load_file, save_file

RECIPES = [Recipe(name, layers="linear only") for name in ("int8", "fp8", "nvfp4", "mxfp8")]
RECIPES.append(Recipe("nvfp4", "max", layers="linear only"))


def with_header(tensors, metadata):
    return tensors, {files.COMFY_HEADER: metadata[files.COMFY_HEADER]}


def with_markers(tensors, metadata):
    """The markers alone, under a checkpoint's prefix."""
    return {f"model.diffusion_model.{key}": t for key, t in tensors.items()}, {}


@pytest.mark.parametrize("form", [with_header, with_markers], ids=lambda f: f.__name__)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.format}-{r.algorithm}")
def test_stock_forms(quantized, tmp_path, recipe, form):
    made = quantized(recipe)
    ours, path = tmp_path / "ours.safetensors", str(tmp_path / "x.safetensors")
    files.write(made.checkpoint, ours)
    assert not stock.is_stock(str(ours))
    tensors = load_file(ours)
    if form is with_header:
        tensors = {key: t for key, t in tensors.items() if not key.endswith(".comfy_quant")}
    layers = {name: files.comfy_config(x) for name, x in made.checkpoint.layers.items()}
    metadata = {files.COMFY_HEADER: json.dumps({"format_version": "1.0", "layers": layers})}
    tensors, metadata = form(tensors, metadata)
    save_file(tensors, path, metadata)
    assert stock.is_stock(path)
    model = stock.load(path)
    with torch.no_grad():
        mine = bridge.run_loaded(model, made.records[:2], lambda: None)
        theirs = bridge.run_loaded(
            comfy.sd.load_diffusion_model(path), made.records[:2], lambda: None
        )
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    shown, same = info.blocks(model), info.blocks(loader.load(made.checkpoint))  # on the node
    assert {name: bits for name, (bits, _) in shown.items()} == pytest.approx(
        {name: bits for name, (bits, _) in same.items()}, rel=1e-3
    )
    text = stock.describe(model, path)
    comfy_format = next(iter(layers.values()))["format"]
    count = sum(1 for x in layers.values() if x["format"] == comfy_format)
    assert f"{count} layers in {comfy_format}" in text


def test_the_old_scaled_fp8(quantized, tmp_path):
    made = quantized(Recipe("fp8", layers="linear only"))
    tensors = {}
    for name, tensor in made.checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        old = {"weight_scale": "scale_weight", "input_scale": "scale_input"}.get(leaf, leaf)
        tensors[f"{module}.{old}"] = tensor
    tensors["scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
    path = str(tmp_path / "old.safetensors")
    save_file(tensors, path)
    assert stock.is_stock(path)
    model = stock.load(path)
    count = len(made.checkpoint.layers)
    assert f"{count} layers in float8_e4m3fn" in stock.describe(model, path)


def test_ordinary_and_damaged_files(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    assert not stock.is_stock(str(path))
    save_file({"a.comfy_quant": torch.ones(2, dtype=torch.uint8), "a.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="must be one that stock ComfyUI opens"):
        stock.load(str(path))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="whole safetensors file"):
        stock.is_stock(str(path))
