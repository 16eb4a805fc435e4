"""A quantized MODEL, exported: `mto.restore` takes it, and its UNet computes the same."""

from __future__ import annotations

import dataclasses
import errno
import io

import comfy.ldm.modules.attention
import pytest
import torch
from comfyui_modelopt.formats import FORMATS
from comfyui_modelopt.loaders import dispatch, foreign
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import diffusers_unet, export
from comfyui_modelopt.quantize.recipe import Recipe

from .. import diffusers_unets as unets

SEED = 7
RECIPES = {
    "int8": Recipe("int8", "max"),
    "int8-smoothquant": Recipe("int8", "smoothquant", 0.5),
    "int8-mse": Recipe("int8", "mse"),
    "fp8": Recipe("fp8"),
    "fp8-per-token": Recipe("fp8", "max", activations="per token"),
    "int4-linear": Recipe("int4", "awq_lite", layers="linear only"),
    "w4a8-linear": Recipe("w4a8", "max", layers="linear only"),
}


@pytest.fixture(autouse=True)
def same_attention(monkeypatch):
    """As in test_foreign.py."""
    module = comfy.ldm.modules.attention
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(module, name, module.attention_pytorch)


def written(checkpoint, path):
    model = loader.load(checkpoint, arithmetic=dispatch.FAKE)
    config, names = model.model.model_config.unet_config, foreign.of_model(model)
    return model, write(checkpoint, config, names, path)


def write(checkpoint, config, names, path):
    """The notes."""
    unet, notes = export.quantized_unet(checkpoint, config, names)
    export.save(unet, path)
    return notes


@pytest.mark.parametrize("name", RECIPES)
def test_mto_restore_gives_the_same_unet(quantized, tmp_path, name):
    import modelopt.torch.opt as mto

    checkpoint = quantized(RECIPES[name]).checkpoint
    path = tmp_path / "x.pt"
    model, notes = written(checkpoint, path)
    assert notes == []
    empty = diffusers_unet.build(model.model.model_config.unet_config).to_empty(device="cpu")
    restored = mto.restore(empty, path).float()
    theirs = unets.run_diffusers(restored, "sd15", SEED)
    ours = unets.run_comfyui(model, "sd15", SEED)
    assert unets.distance(ours, theirs) < 1e-4
    again = foreign.read(path)
    for layers in (again.layers, checkpoint.layers):
        assert layers.keys() == again.layers.keys()
    for name, layer in checkpoint.layers.items():
        theirs = again.layers[name]
        assert (theirs.format, theirs.kind, theirs.smoothed, theirs.activations) == (
            *(layer.format, layer.kind, layer.smoothed, layer.activations),
        ), name


@pytest.mark.parametrize(
    ("form", "algorithm"), [("nvfp4", "max"), ("nvfp4", "awq_lite"), ("mxfp8", "max")]
)
def test_formats_that_modelopt_runs_on_gpus_only(quantized, tmp_path, form, algorithm):
    """Their weights and smoothing scales, read back, are the same to the last bit."""
    checkpoint = quantized(Recipe(form, algorithm, layers="linear only")).checkpoint
    _, notes = written(checkpoint, tmp_path / "x.pt")
    assert notes == []
    again = foreign.read(tmp_path / "x.pt")
    for name, layer in checkpoint.layers.items():
        assert again.layers[name].format == layer.format
        assert (
            again.layers[name].smoothed
            == layer.smoothed
            == (algorithm == "awq_lite" and layer.format == form)
        )
        if layer.smoothed:
            scales = [one.tensors[f"{name}.pre_quant_scale"].float() for one in (again, checkpoint)]
            assert torch.equal(*scales), name
        weights = []
        for one in (again, checkpoint):
            own = {key: one.tensors[f"{name}.{key}"] for key in ("weight", *layer.scales)}
            shape = layer.shape or tuple(own["weight"].shape)
            weights.append(FORMATS[layer.format].dequantize(own, shape))
        assert torch.equal(*weights), name


def test_e5m2_is_refused(quantized, tmp_path):
    with pytest.raises(ValueError, match="it has no fp8_e5m2"):
        written(quantized(Recipe("fp8_e5m2")).checkpoint, tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["sdxl", "sd2", "inpainting", "unclip"])
def test_what_modelopt_wrote_comes_back_from_an_export(tmp_path, kind):
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq

    unet = unets.make(kind)
    with torch.no_grad():
        mtq.quantize(unet, mtq.FP8_DEFAULT_CFG, lambda u: unets.run_diffusers(u, kind, 0))
    first = foreign.from_module(unet)
    written(first, tmp_path / "x.pt")
    restored = mto.restore(unets.make(kind, seed=1), tmp_path / "x.pt")
    theirs = unets.run_diffusers(restored, kind, SEED)
    assert unets.distance(unets.output(first, kind, SEED), theirs) < 1e-5


def test_a_unet_that_diffusers_does_not_know_is_refused(quantized, tmp_path):
    """ComfyUI's x4 upscaler has an embedding of noise levels, which diffusers' UNet is built without."""
    checkpoint = quantized(Recipe("fp8")).checkpoint
    other = dataclasses.replace(
        checkpoint, tensors=checkpoint.tensors | {"label_emb.weight": torch.ones(8, 4)}
    )
    model = loader.load(checkpoint)
    config, names = model.model.model_config.unet_config, foreign.of_model(model)
    with pytest.raises(ValueError, match="its label_emb is not in diffusers"):
        write(other, config, names, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []
    marked = dataclasses.replace(checkpoint, tensors=checkpoint.tensors | {"v_pred": torch.ones(1)})
    write(marked, config, names, tmp_path / "x.pt")


def test_block_formats_of_convolutions_are_told(quantized, tmp_path):
    _, notes = written(quantized(Recipe("int4", "awq_lite")).checkpoint, tmp_path / "x.pt")
    assert "are in 16 bits in the export" in notes[0] and "in_layers.2" in notes[0]


def test_svdquant_is_refused_and_nothing_is_written(quantized, tmp_path):
    with pytest.raises(ValueError, match="branches cannot be exported yet"):
        written(quantized(Recipe("nvfp4", "svdquant", rank=4)).checkpoint, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_overwritten(quantized, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="never overwritten"):
        written(quantized(Recipe("int8", "max")).checkpoint, path)
    assert path.read_bytes() == b"mine"


def test_a_full_disk_is_told(tmp_path):
    """torch.save's writer says "unexpected pos" instead."""

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with (
        pytest.raises(OSError, match="No space left"),
        Full(tmp_path / "x.pt", "w") as file,
        export.disk_errors(),
    ):
        torch.save({"a": torch.ones(2**16)}, file)


def test_a_name_that_is_taken_meanwhile_quantizes_no_second_time(quantized, tmp_path, monkeypatch):
    import folder_paths
    from comfyui_modelopt.nodes import folders
    from comfyui_modelopt.nodes.export_checkpoint import ExportCheckpoint
    from comfyui_modelopt.utils.whole_file import NameTaken

    folders.register()
    places = {
        **folder_paths.folder_names_and_paths,
        folders.CHECKPOINTS: ([str(tmp_path)], {".pt"}),
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", places)
    made, saves, build, save = [], [], export.quantized_unet, export.save

    def built(*args):
        made.append(args)
        return build(*args)

    def beaten(unet, path):
        saves.append(path)
        if len(saves) < 3:
            raise NameTaken(f"{path} exists")
        save(unet, path)

    monkeypatch.setattr(export, "quantized_unet", built)
    monkeypatch.setattr(export, "save", beaten)
    model = loader.load(quantized(Recipe("fp8")).checkpoint)
    path = ExportCheckpoint.execute(model, "x").args[0]
    assert len(made) == 1 and len(saves) == 3
    assert foreign.read(path).layers


def test_a_failure_of_modelopt_in_the_export_says_what_to_do(quantized, tmp_path, monkeypatch):
    import modelopt.torch.quantization as mtq

    def fails(*_args):
        raise KeyError("inside")

    monkeypatch.setattr(mtq, "quantize", fails)
    with pytest.raises(ValueError, match="ModelOpt .* failed with KeyError: 'inside' while it was"):
        written(quantized(Recipe("fp8")).checkpoint, tmp_path / "x.pt")
