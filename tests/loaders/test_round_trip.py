"""A quantized checkpoint through a file and through a MODEL comes back bit for bit."""

from __future__ import annotations

import dataclasses

import comfy.model_management
import pytest
import torch
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import info, layouts
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize.bridge import unet as bridge
from comfyui_modelopt.quantize.recipe import Recipe

RECIPES = [
    Recipe("int8", "max"),
    Recipe("int8", "smoothquant", 0.5),
    Recipe("fp8", layers="linear only"),
    Recipe("fp8_e5m2"),
    Recipe("mxfp8"),
    Recipe("nvfp4", layers="linear only"),
    Recipe("nvfp4", "max", layers="linear only"),
    Recipe("nvfp4", "svdquant", rank=4),
    Recipe("int4", "awq_lite"),
    Recipe("w4a8", "max"),
]


@pytest.fixture(
    scope="module", params=RECIPES, ids=lambda r: f"{r.format}-{r.algorithm}-{r.layers[:8]}"
)
def made(request, quantized):
    return quantized(request.param)


def same(a, b):
    assert a.layers == b.layers
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        assert tensor.dtype == other.dtype, name
        # a loaded model's lie on the GPU
        assert torch.equal(tensor.cpu().float(), other.cpu().float()), name


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
    assert info.weight_bytes(model) <= 1.03 * made.checkpoint.nbytes() + 200_000
    blocks = info.blocks(model)
    assert "middle_block" in blocks
    total = sum(size for _, size in blocks.values())
    assert total == pytest.approx(made.checkpoint.nbytes() / 1e6, rel=0.03)


def test_unquantized_model_is_told_apart(sd15):
    with pytest.raises(ValueError, match="needs a MODEL quantized by this pack"):
        loader.to_checkpoint(sd15[0])


@pytest.mark.parametrize("gone", ["emb_layers.1.weight", "norm1.weight", "skip_connection.bias"])
def test_a_missing_unquantized_tensor_is_named(made, gone):
    name = next(n for n in made.checkpoint.tensors if n.endswith(gone))
    tensors = {k: v for k, v in made.checkpoint.tensors.items() if k != name}
    with pytest.raises(ValueError, match=f"must hold every tensor.*{name}"):
        loader.load(dataclasses.replace(made.checkpoint, tensors=tensors))


def test_a_layer_the_header_does_not_list_is_named(made):
    name = next(iter(made.checkpoint.layers))
    layers = {k: v for k, v in made.checkpoint.layers.items() if k != name}
    with pytest.raises(ValueError, match=f"must belong to a layer of the header.*{name}"):
        loader.load(dataclasses.replace(made.checkpoint, layers=layers))


def test_a_weight_of_another_shape_is_named(made):
    name = next(n for n in made.checkpoint.tensors if n.endswith("time_embed.0.weight"))
    tensors = made.checkpoint.tensors | {name: made.checkpoint.tensors[name][:-8]}
    with pytest.raises(ValueError, match="shapes of their architecture"):
        loader.load(dataclasses.replace(made.checkpoint, tensors=tensors))


def test_a_branch_goes_when_the_plain_weight_is_copied_back(made):
    model = loader.load(made.checkpoint)
    layer = model.model.diffusion_model.get_submodule(next(iter(made.checkpoint.layers)))
    plain, dense = layer.weight.data, layer.weight.dequantize()
    up, down = torch.randn(dense.shape[0], 2), torch.randn(2, dense[0].numel())
    branched = layouts.with_branch(plain.clone(), up, down)
    assert not torch.equal(branched.dequantize(), dense)
    branched.copy_(plain)
    assert torch.equal(branched.dequantize(), dense)


@pytest.mark.parametrize("size", [1, 7])
def test_a_bias_of_another_shape_is_named(made, size):
    name = next(n for n in made.checkpoint.layers if f"{n}.bias" in made.checkpoint.tensors)
    tensors = made.checkpoint.tensors | {f"{name}.bias": torch.zeros(size)}
    with pytest.raises(ValueError, match=f"{name}.bias must have shape"):
        loader.load(dataclasses.replace(made.checkpoint, tensors=tensors))


def test_a_shape_that_hides_in_the_padding_is_refused(quantized):
    checkpoint = quantized(Recipe("int4", "awq_lite")).checkpoint
    name = next(n for n in checkpoint.layers if n.endswith("blocks.0.attn2.to_k"))
    layer = checkpoint.layers[name]
    shape = (layer.shape[0], layer.shape[1] - 1)
    scale = f"{name}.pre_quant_scale"
    tensors = checkpoint.tensors | {scale: checkpoint.tensors[scale][:-1]}
    layers = checkpoint.layers | {name: dataclasses.replace(layer, shape=shape)}
    with pytest.raises(ValueError):
        loader.load(dataclasses.replace(checkpoint, tensors=tensors, layers=layers))


@pytest.mark.parametrize("by", ["the pack", "ComfyUI's node"])
@pytest.mark.parametrize("layers", ["linear + conv", "linear only"])
def test_v_prediction_survives_saving(tmp_path, by, layers):
    """ComfyUI reads it from a marker beside the UNet's weights."""
    import comfy.sd
    from comfy.model_base import ModelType
    from comfy_extras import nodes_model_merging
    from comfyui_modelopt.devtools import synthetic
    from comfyui_modelopt.quantize import engine

    state = synthetic.unet_state_dict("sdxl") | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    model = comfy.sd.load_diffusion_model_state_dict(state)
    assert model.model.model_type == ModelType.V_PREDICTION
    recipe = Recipe("mxfp8", layers=layers)  # needs no recording
    quantized = loader.load(engine.quantize_model(model, recipe).checkpoint)
    path = tmp_path / "x.safetensors"
    if by == "the pack":
        files.write(loader.to_checkpoint(quantized), path)
    else:
        nodes_model_merging.save_checkpoint(
            quantized, filename_prefix="x", output_dir=str(tmp_path)
        )
        (path,) = tmp_path.glob("x_*.safetensors")
    again = loader.load_file(str(path))
    for one in (quantized, again):
        assert one.model.model_type == ModelType.V_PREDICTION
        assert one.model.model_config.sampling_settings.get("zsnr")
