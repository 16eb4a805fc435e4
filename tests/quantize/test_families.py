"""Models beyond UNets: recorded, quantized, saved, opened by our loader and by stock ComfyUI's code."""

import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.wan.model import VaceWanModel
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import info
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import calibration as calibrations
from comfyui_modelopt.quantize import engine, families
from comfyui_modelopt.quantize.bridge import sampling
from comfyui_modelopt.quantize.layers import DEFAULT_SKIP
from comfyui_modelopt.quantize.quality import sqnr_db
from comfyui_modelopt.quantize.recipe import Recipe
from safetensors import safe_open

import nodes

from .. import families as small
from ..cpu import assert_as_stock

# kind -> MODEL and CALIBRATION, made once
_made: dict = {}


def made(kind, folders):
    if kind not in _made:
        path = small.write(kind, folders.mktemp(kind) / f"{kind}.safetensors")
        model = comfy.sd.load_diffusion_model(str(path))
        _made.clear()  # Qwen-Image's is not small
        _made[kind] = model, record(kind, model)
    return _made[kind]


def record(kind, model, **other):
    settings = {"steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"} | other
    _, found = sampling.record(
        model,
        seed=0,
        positive=small.conditioning(kind),
        negative=small.conditioning(kind, 1),
        latent_image=small.latent(kind),
        denoise=1.0,
        max_records=4,
        **settings,
    )
    return found


def sample(kind, model):
    (latent,) = nodes.common_ksampler(
        model,
        3,
        2,
        3.0,
        "euler",
        "normal",
        small.conditioning(kind, 2),
        small.conditioning(kind, 3),
        small.latent(kind),
    )
    return latent["samples"]


# what the recipe gives at least, in dB: a hand's breadth below what was measured
FLOORS = {"fp8": 29, "int8": 36, "mxfp8": 29, "nvfp4": 18, "int4": 16, "w4a8": 14}
CASES = [
    (kind, form, algorithm)
    for kind in ("flux", "sd3", "wan")
    for form, algorithm in (
        ("fp8", "mse"),
        ("int8", "max"),
        ("int8", "smoothquant"),
        ("mxfp8", "max"),
        ("nvfp4", "max"),
        ("int4", "max"),
        ("w4a8", "max"),
    )
] + [("flux", "nvfp4", "awq_lite"), ("qwen_image", "fp8", "max"), ("qwen_image", "nvfp4", "max")]


@pytest.mark.parametrize(("kind", "form", "algorithm"), CASES)
def test_the_whole_way(kind, form, algorithm, tmp_path, folders):
    model, calibration = made(kind, folders)
    quantized = engine.quantize_model(model, Recipe(form, algorithm), calibration)
    ours = loader.load(quantized.checkpoint)
    engine.measure(quantized, ours)
    assert quantized.figures["sqnr_db"] > FLOORS[form]
    skip = families.family_of(model.model.diffusion_model).skip
    header = quantized.checkpoint.header["recipe"]
    assert header["skip"] == list(skip) and header["layers"] == "linear only"
    assert any("linear only" in note for note in quantized.notes)
    assert all(layer.format == form for layer in quantized.checkpoint.layers.values())

    path = tmp_path / "out.safetensors"
    files.write(quantized.checkpoint, path)
    again = loader.load_file(str(path))
    samples = sample(kind, ours)
    assert torch.equal(sample(kind, again), samples)
    assert info.describe(again) and len(info.blocks(again)) > 2

    stock = algorithm != "smoothquant" and form not in ("int4", "w4a8")
    assert quantized.checkpoint.opens_in_stock == stock
    if not stock:
        with pytest.raises(RuntimeError, match="Could not detect model type"):
            comfy.sd.load_diffusion_model(str(path))
        return
    theirs = sample(kind, comfy.sd.load_diffusion_model(str(path)))
    if form in ("int8", "fp8"):
        # stock computes a Linear in floating point where its input is not contiguous, and fp8's sums in
        # another order on some processors
        assert sqnr_db(samples, theirs) > 25
    else:
        assert_as_stock(samples, theirs)


@pytest.mark.parametrize("kind", ["flux", "sd3", "wan"])
def test_a_recorded_call_replays_to_the_same_output(kind, tmp_path, folders):
    model, calibration = made(kind, folders)
    path = tmp_path / "calibration.safetensors"
    calibrations.save(calibration, path)
    back = calibrations.load(path)
    assert len(back) == len(calibration) == 3
    seen = []
    clone = model.clone()
    diffusion = clone.model.diffusion_model
    hook = diffusion.register_forward_hook(lambda *call: seen.append(call[-1].clone()))
    try:
        record(kind, clone)
    finally:
        hook.remove()
    for entry, output in zip(back, seen, strict=True):
        args, kwargs = entry.arguments(model.load_device)
        with torch.inference_mode():
            assert torch.equal(diffusion(*args, **kwargs), output)
    assert not diffusion._forward_pre_hooks
    assert calibration.runs[0].width == small.CALLS[kind][0][-1] * 8


@pytest.mark.parametrize("kind", ["flux", "sd3", "wan", "qwen_image"])
def test_a_family_keeps_its_sensitive_layers(kind):
    cls, config = small.MODELS[kind]
    model = cls(**config, device="meta", operations=torch.nn)
    family = families.family_of(model)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    chosen = engine.select(model, "linear only", family.skip, family.skip)
    assert 0.4 * len(names) < len(chosen) < len(names)
    kept = " ".join(set(names) - set(chosen))
    words = {
        "flux": ("img_in", "txt_in", "final_layer", "modulation", "vector_in", "guidance_in"),
        "sd3": ("context_embedder", "adaLN_modulation", "final_layer", "y_embedder"),
        "wan": ("text_embedding", "time_projection", "head"),
        "qwen_image": ("img_in", "txt_in", "img_mod", "norm_out", "proj_out"),
    }[kind]
    assert all(word in kept for word in words)


def kept_and_chosen(model):
    family = families.family_of(model)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    chosen = engine.select(model, "linear only", family.skip, family.skip)
    return set(names) - set(chosen), set(chosen)


def test_flux_2_belongs_to_its_family():
    changed = {"image_model": "flux2", "vec_in_dim": None, "qkv_bias": False, "ops_bias": False}
    changed |= {"global_modulation": True, "mlp_silu_act": True, "patch_size": 1}
    config = small.MODELS["flux"][1] | changed
    kept, chosen = kept_and_chosen(Flux(**config, device="meta", operations=torch.nn))
    assert "double_stream_modulation_img.lin" in kept and "single_stream_modulation.lin" in kept
    assert all(name.startswith(("double_blocks.", "single_blocks.")) for name in chosen)


def test_a_subclass_belongs_to_its_family():
    config = small.MODELS["wan"][1] | {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}
    model = VaceWanModel(**config, device="meta", operations=torch.nn)
    kept, chosen = kept_and_chosen(model)
    assert families.family_of(model) is families.WAN
    assert "head.head" in kept and "vace_blocks.0.ffn.0" in chosen


def test_a_family_without_a_list_asks_for_one(tmp_path, folders):
    kind = "ltxv"
    model, calibration = made(kind, folders)
    for skip in (Recipe("fp8").skip, ()):
        with pytest.raises(ValueError, match=r"LTXVModel has none: write .* quantize/families.py"):
            engine.quantize_model(model, Recipe("fp8", skip=skip), calibration)
    assert all(entry.plain["frame_rate"] == 25 for entry in calibration)
    own = ("patchify_proj", "caption_projection.*", "adaln_single.*", "proj_out")
    quantized = engine.quantize_model(model, Recipe("int8", "max", skip=own), calibration)
    assert quantized.checkpoint.header["recipe"]["skip"] == list(own)
    ours = loader.load(quantized.checkpoint)
    engine.measure(quantized, ours)
    assert quantized.figures["sqnr_db"] > 30
    path = tmp_path / "out.safetensors"
    files.write(quantized.checkpoint, path)
    theirs = sample(kind, comfy.sd.load_diffusion_model(str(path)))
    assert sqnr_db(sample(kind, ours), theirs) > 22


def test_a_list_of_the_users_is_taken_as_it_is(folders):
    model, calibration = made("flux", folders)
    recipe = Recipe("nvfp4", layers="linear only", skip=("final_layer.*",))
    quantized = engine.quantize_model(model, recipe, calibration)
    layers = quantized.checkpoint.layers
    assert "double_blocks.0.img_mod.lin" in layers and "final_layer.linear" not in layers
    # ComfyUI reads the architecture from their widths: packed to half, it would read another
    moved = {name for name, layer in layers.items() if layer.format == "int8"}
    assert moved == {"img_in", "txt_in", "vector_in.in_layer"}
    assert any("ComfyUI reads the architecture" in note for note in quantized.notes)


def test_a_wrong_pattern_is_refused_in_any_family(folders):
    model, calibration = made("flux", folders)
    with pytest.raises(ValueError, match="'input_blocks.9' matches none"):
        engine.quantize_model(model, Recipe("int8", "max", skip=("input_blocks.9",)), calibration)


def test_a_calibration_of_another_family_is_refused(folders):
    _, calibration = made("flux", folders)
    model, _ = made("wan", folders)
    with pytest.raises(ValueError, match="of the same architecture"):
        engine.quantize_model(model, Recipe("int8", "max"), calibration)


NEEDS_ACTIVATIONS = {
    "fp8": "max",
    "int8": "smoothquant",
    "int4": "awq_lite",
    "w4a8": "awq_full",
    "nvfp4": "svdquant",
}


@pytest.mark.parametrize("name", NEEDS_ACTIVATIONS)
def test_layers_that_the_recording_never_called(folders, name):
    """They stay in 16 bits, all of them named, and the file is as good as without them."""
    model, calibration = made("flux", folders)
    block = model.model.diffusion_model.double_blocks[0]
    spares = [comfy.ops.disable_weight_init.Linear(128, 128, dtype=torch.float16) for _ in "ab"]
    recipe = Recipe(name, NEEDS_ACTIVATIONS[name])
    expected = engine.quantize_model(model, recipe, calibration)
    block.spare, block.other = spares
    for spare in spares:
        spare.weight.data.fill_(1.0)
        spare.bias.data.zero_()
    try:
        quantized = engine.quantize_model(model, recipe, calibration)
    finally:
        del block.spare, block.other
    names = [f"double_blocks.0.{spare}" for spare in ("spare", "other")]
    assert any("never called" in note and ", ".join(names) in note for note in quantized.notes)
    tensors = quantized.checkpoint.tensors
    for name in names:
        assert torch.equal(tensors.pop(f"{name}.weight"), spares[0].weight)
        tensors.pop(f"{name}.bias")
    assert quantized.checkpoint.layers == expected.checkpoint.layers
    assert tensors.keys() == expected.checkpoint.tensors.keys()
    assert all(torch.equal(t, expected.checkpoint.tensors[key]) for key, t in tensors.items())


def test_a_recording_that_called_nothing(folders):
    model, calibration = made("flux", folders)
    with pytest.raises(
        ValueError, match=r"must be called in the recording, none was of double_blocks.0.spare"
    ):
        _only_a_spare(model, calibration)


def _only_a_spare(model, calibration):
    """Quantizes a layer that the model has, and never calls."""
    block = model.model.diffusion_model.double_blocks[0]
    block.spare = comfy.ops.disable_weight_init.Linear(32, 32, bias=False, dtype=torch.float16)
    block.spare.weight.data.fill_(1.0)
    kept = [n for n, m in model.model.diffusion_model.named_modules() if hasattr(m, "in_features")]
    kept = tuple(n for n in kept if not n.endswith("spare"))
    try:
        engine.quantize_model(model, Recipe("fp8", "max", skip=kept), calibration)
    finally:
        del block.spare


def test_a_users_pattern_beside_the_default_list(folders):
    """What the node shows is a UNet's list: it gives way to the family's, the user's own stays."""
    model, _ = made("flux", folders)
    own = "double_blocks.0.img_attn.*"
    found, notes = families.settle(
        model.model.diffusion_model, Recipe("int8", "max", skip=(*DEFAULT_SKIP, own))
    )
    assert found.skip == (*families.FLUX.skip, own)
    assert own in notes[0]
    alone, notes = families.settle(model.model.diffusion_model, Recipe("int8", "max", skip=(own,)))
    assert alone.skip == (own,)
    assert "final_layer.*" in notes[0] and "yours alone" in notes[0]
    shorter, _ = families.settle(
        model.model.diffusion_model, Recipe("int8", "max", skip=DEFAULT_SKIP[1:])
    )
    assert shorter.skip == families.FLUX.skip


def test_percentile_is_for_unets(folders):
    unet = made("flux", folders)[0].model.diffusion_model
    for recipe in (Recipe("int8", "percentile"), Recipe("int8", convolutions="percentile")):
        with pytest.raises(ValueError, match="in UNets alone, this model is a FLUX: choose max"):
            families.settle(unet, recipe)


def test_a_family_without_a_list_takes_the_users_alone():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    found, _ = families.settle(model, Recipe("int8", "max", skip=(*DEFAULT_SKIP, "0")))
    assert found.skip == ("0",)
    with pytest.raises(ValueError, match=r"Sequential has none: write its first"):
        families.settle(model, Recipe("int8", "max"))


def test_the_file_says_what_it_is(tmp_path, folders):
    model, calibration = made("sd3", folders)
    quantized = engine.quantize_model(model, Recipe("fp8", "max"), calibration)
    path = tmp_path / "out.safetensors"
    files.write(quantized.checkpoint, path)
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
    assert "joint_blocks.0.x_block.attn.qkv.weight_scale" in keys and "pos_embed" in keys
    assert quantized.checkpoint.header["model"] == "SD3"


def test_a_lora_on_top(folders):
    """Kept beside the quantized weights, as on a UNet."""
    model, calibration = made("flux", folders)
    ours = loader.load(engine.quantize_model(model, Recipe("nvfp4"), calibration).checkpoint)
    generator = torch.Generator().manual_seed(5)
    lora = {}
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith(("attn.qkv", "linear2")):
            rows, columns = module.weight.shape
            key = f"diffusion_model.{name}"
            lora[f"{key}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
            lora[f"{key}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    (plain, _), (with_lora, _) = (
        comfy.sd.load_lora_for_models(one, None, lora, 1.0, 0) for one in (model, ours)
    )
    wanted = sample("flux", plain)
    change = sqnr_db(wanted, sample("flux", model))
    assert len(with_lora.patches) == len(lora) // 2 == 6
    error = sqnr_db(wanted, sample("flux", with_lora))
    assert error > change + 6  # nearer to the model with the LoRA than that without it
    assert error > sqnr_db(sample("flux", model), sample("flux", ours)) - 3
