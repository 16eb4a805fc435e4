"""LoRA on top of a quantized MODEL: nothing at strength 0, the LoRA's own change at strength 1."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.formats import FORMATS, files
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize.bridge import unet as bridge
from comfyui_modelopt.quantize.recipe import Recipe

RECIPES = {
    "int8": Recipe("int8", "max"),
    "int8-smooth": Recipe("int8", "smoothquant", 0.5),
    "fp8": Recipe("fp8"),
    "fp8-e5m2": Recipe("fp8_e5m2"),
    "mxfp8": Recipe("mxfp8"),
    "nvfp4-stock": Recipe("nvfp4", layers="linear only"),
    "nvfp4-svdquant": Recipe("nvfp4", "svdquant", rank=4),
    "int4": Recipe("int4", "awq_lite"),
    "w4a8": Recipe("w4a8", "max"),
}


@pytest.fixture(scope="module", params=RECIPES)
def made(request, quantized):
    return quantized(RECIPES[request.param])


def make_lora(checkpoints, folder, scale, conv=True):
    path = folder / f"{scale}-{conv}.safetensors"
    synthetic.lora(path, checkpoints / "sd15.safetensors", rank=8, scale=scale, conv=conv)
    return comfy.utils.load_torch_file(str(path))


@pytest.fixture(scope="module")
def lora(checkpoints, tmp_path_factory):
    """Over Linears and convolutions, a tenth of each weight's norm."""
    return make_lora(checkpoints, tmp_path_factory.mktemp("lora"), 0.1)


def run(model, made):
    with torch.no_grad():
        outputs = bridge.run_loaded(model, made.records[::3], lambda: None)
    comfy.model_management.unload_all_models()
    return torch.cat([o.flatten() for o in outputs])


def with_lora(model, lora, strength):
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def test_every_lora_key_finds_its_layer(sd15, made, lora):
    model = with_lora(loader.load(made.checkpoint), lora, 1.0)
    reference = with_lora(sd15[0], lora, 1.0)
    assert model.patches.keys() == reference.patches.keys()
    assert len(model.patches) > 20


def test_strength_0_changes_nothing(made, lora):
    model = loader.load(made.checkpoint)
    plain = run(model, made)
    patched = model.clone()
    for key in with_lora(model, lora, 1.0).patches:
        assert key in model.model_state_dict()
    patched.patches = {
        key: [(0.0, *patch[1:]) for patch in patches]
        for key, patches in with_lora(model, lora, 1.0).patches.items()
    }
    assert torch.equal(run(patched, made), plain)
    assert torch.equal(run(model, made), plain)


@pytest.mark.parametrize("conv", [False, True])
def test_strength_1_is_nearer_to_the_patched_original(sd15, made, conv, checkpoints, tmp_path):
    # 0.3: on these random weights a LoRA of 0.1 is smaller than the error of the 4-bit formats
    lora = make_lora(checkpoints, tmp_path, 0.3, conv)
    original = run(sd15[0], made)
    target = run(with_lora(sd15[0], lora, 1.0), made)
    model = loader.load(made.checkpoint)
    base = run(model, made)
    patched = run(with_lora(model, lora, 1.0), made)
    assert (patched - target).norm() < 0.95 * (base - target).norm()
    assert torch.cosine_similarity(patched - base, target - original, dim=0) > 0.3


@pytest.mark.parametrize("scale", [0.003, 0.1])
def test_the_delta_arrives_whole_in_every_layer(made, scale, checkpoints, tmp_path):
    """Patched minus unpatched weight is the LoRA's delta, also where 8-bit steps are wider."""
    import comfy.lora

    lora = make_lora(checkpoints, tmp_path, scale)
    model = with_lora(loader.load(made.checkpoint), lora, 1.0)
    for key in model.patches:
        before = comfy.utils.get_attr(model.model, key)
        if not isinstance(before, QuantizedTensor):
            continue
        dense = before.dequantize()
        wanted = comfy.lora.calculate_weight(model.patches[key], dense.clone(), key) - dense
        after = model.patch_weight_to_device(key, return_weight=True)
        got = after.dequantize() - dense
        # a GPU adds in 16 bits, whose steps are those of the weight
        rounding = torch.finfo(dense.dtype).eps * dense.float().norm()
        assert (got - wanted).float().norm() < 0.01 * wanted.float().norm() + rounding, key


def test_taking_the_lora_off_restores_every_bit(made, lora):
    model = loader.load(made.checkpoint)
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    run(with_lora(model, lora, 1.0), made)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].float(), after[k].float()) for k in before)


def test_lowvram_patches_give_nearly_the_same(made, lora):
    """ComfyUI's --lowvram patches weights while they are cast: smoothing must be undone there too."""
    model = with_lora(loader.load(made.checkpoint), lora, 1.0)
    whole = run(model, made)
    model.load(comfy.model_management.get_torch_device(), lowvram_model_memory=1)
    assert model.model.model_lowvram
    unet, dtype = model.model.diffusion_model, model.model.get_dtype_inference()
    with torch.no_grad():
        parts = []
        for record in made.records[::3]:
            args, kwargs = record.arguments(model.load_device, dtype)
            parts.append(unet(*args, **kwargs).float().cpu().flatten())
    model.unpatch_model()
    partial = torch.cat(parts)
    # patched layers run dequantized there, so the two differ by activation rounding only
    assert (partial - whole).norm() < 0.25 * whole.norm()
    reference = torch.cat([r.flatten() for r in made.references[::3]])
    assert (partial - reference).norm() < 0.6 * reference.norm()


def test_saving_bakes_the_lora_in(made, lora, tmp_path):
    model = with_lora(loader.load(made.checkpoint), lora, 1.0)
    loaded = run(model, made)
    for name, state in (("unloaded", False), ("loaded", True)):
        if state:
            comfy.model_management.load_models_gpu([model])
        path = tmp_path / f"{name}.safetensors"
        files.write(loader.to_checkpoint(model), path)
        again = loader.load_file(str(path))
        assert loader.loaded(again).header["baked_patches"] == len(model.patches)
        difference = (run(again, made) - loaded).norm() / loaded.norm()
        # quantizing anew costs what the format costs
        assert difference < (
            0.7 if FORMATS[loader.loaded(again).header["recipe"]["format"]].BITS == 4 else 0.2
        )
    a, b = (loader.read(str(tmp_path / f"{n}.safetensors")) for n in ("unloaded", "loaded"))
    assert all(torch.equal(a.tensors[k].float(), b.tensors[k].float()) for k in a.tensors)
