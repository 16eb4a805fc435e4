"""The user's MODEL is never changed; bad input is named; cancel works; LoRAs are baked in."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.formats import FORMATS
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import engine, pack, quality
from comfyui_modelopt.quantize import layers as layer_choice
from comfyui_modelopt.quantize.bridge import unet as bridge
from comfyui_modelopt.quantize.recipe import Recipe
from comfyui_modelopt.utils import sha256
from safetensors.torch import load_file, save_file

INT8 = Recipe("int8", "max")
SMOOTH = Recipe("int8", "smoothquant", 0.5)
# everything but the middle block
MIDDLE = ("input_blocks.*", "output_blocks.*", "time_embed.*", "out.*")


def digest(model) -> str:
    """Hash of every tensor and patch of a MODEL, and of its module types."""
    comfy.model_management.unload_all_models()
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.model.state_dict().items()):
        hasher.update(name.encode() + str(tensor.dtype).encode())
        hasher.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for key, patches in sorted(model.patches.items()):
        hasher.update(f"{key}{[(p[0], p[2], p[3]) for p in patches]}".encode())
        for patch in patches:
            for weight in patch[1].weights:
                if isinstance(weight, torch.Tensor):
                    hasher.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    for name, module in model.model.named_modules():
        hasher.update(f"{name}{type(module).__qualname__}".encode())
    return hasher.hexdigest()


@pytest.fixture(scope="module")
def patched(sd15, checkpoints):
    lora = comfy.utils.load_torch_file(str(checkpoints / "lora.safetensors"))
    return comfy.sd.load_lora_for_models(sd15[0], None, lora, 1.0, 0)[0]


@pytest.mark.parametrize("recipe", [INT8, SMOOTH, Recipe("fp8")])
@pytest.mark.parametrize("loaded", [False, True])
def test_the_model_comes_out_as_it_went_in(patched, calibration, recipe, loaded):
    before = digest(patched)
    if loaded:  # with its patches in place, as after a KSampler
        comfy.model_management.load_models_gpu([patched])
    engine.quantize_model(patched, recipe, calibration)
    assert digest(patched) == before


def quantize_until(model, recipe, calibration, monkeypatch, last: float = math.inf) -> int:
    """Quantizes, the user cancelling at the `last`-th step of progress; the number of steps."""
    steps = 0
    real = engine.progress

    def counting(total):
        step = real(total)

        def counted(size=1):
            nonlocal steps
            steps += 1
            if steps == last:
                comfy.model_management.interrupt_current_processing(True)
            step(size)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(engine, "progress", counting)
        try:
            engine.quantize_model(model, recipe, calibration)
        except comfy.model_management.InterruptProcessingException:
            assert steps == last
    return steps


@pytest.mark.parametrize("recipe", [INT8, SMOOTH])
def test_cancel_at_any_step_leaves_the_model_as_it_was(patched, calibration, recipe, monkeypatch):
    before = digest(patched)
    sha256.of(bridge.source_file(patched))  # its steps come once in a process
    total = quantize_until(patched, recipe, calibration, monkeypatch)
    for fraction in (0, 0.3, 0.6, 0.75, 0.9, 1):
        last = max(1, round(fraction * total))
        assert quantize_until(patched, recipe, calibration, monkeypatch, last) == last
        assert digest(patched) == before


def test_cancel_while_the_source_file_is_hashed(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(3 * sha256.PIECE + 1)
    assert sha256.pieces(path) == 4
    done = []

    def cancel():
        done.append(1)
        if len(done) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sha256.of(path, cancel)
    assert len(done) == 2
    assert sha256.of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256.pieces(path) == 0


def test_failing_half_way_leaves_the_model_as_it_was(patched, calibration, monkeypatch):
    before = digest(patched)

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FORMATS["int8"], "quantize", fail)
    with pytest.raises(RuntimeError, match="ran out: record a smaller"):
        engine.quantize_model(patched, SMOOTH, calibration)
    assert digest(patched) == before


def test_lora_patches_are_baked_in(sd15, patched, calibration):
    plain = engine.quantize_model(sd15[0], INT8, calibration).checkpoint
    baked = engine.quantize_model(patched, INT8, calibration).checkpoint
    assert baked.header["baked_patches"] == len(patched.patches)
    key = next(k for k in patched.patches if k.endswith("attn1.to_q.weight"))
    name = key.removeprefix("diffusion_model.").removesuffix(".weight")
    wanted = patched.patch_weight_to_device(key, return_weight=True).float()
    got = FORMATS["int8"].dequantize(
        {k: baked.tensors[f"{name}.{k}"] for k in ("weight", "weight_scale")}, ()
    )
    step = baked.tensors[f"{name}.weight_scale"]
    assert bool(((got - wanted).abs() <= 0.5001 * step).all())
    assert not torch.equal(plain.tensors[f"{name}.weight"], baked.tensors[f"{name}.weight"])


def test_linear_only_int8_needs_no_calibration(sd15):
    made = engine.quantize_model(sd15[0], Recipe("int8", "max", layers="linear only"))
    engine.measure(made, loader.load(made.checkpoint))
    assert made.figures is None
    assert made.checkpoint.opens_in_stock


@pytest.mark.parametrize("recipe", [INT8, SMOOTH, Recipe("fp8", layers="linear only")])
def test_missing_calibration_is_named(sd15, recipe):
    with pytest.raises(ValueError, match="needs recorded activations, no CALIBRATION"):
        engine.quantize_model(sd15[0], recipe)


def test_calibration_of_another_architecture(sd15, calibration):
    import dataclasses

    other = dataclasses.replace(calibration, signature={**calibration.signature, "model": "SDXL"})
    with pytest.raises(ValueError, match="SDXL"):
        engine.quantize_model(sd15[0], INT8, other)


def test_patterns_that_match_nothing(sd15, calibration):
    recipe = Recipe("int8", "max", skip=("*.no_such_layer",))
    with pytest.raises(ValueError, match=r"'\*.no_such_layer' matches none"):
        engine.quantize_model(sd15[0], recipe, calibration)


def test_patterns_that_match_everything(sd15, calibration):
    with pytest.raises(ValueError, match="at least one layer must be left"):
        engine.quantize_model(sd15[0], Recipe("int8", "max", skip=("*",)), calibration)


def test_default_patterns_may_match_nothing(sd15):
    """label_emb.* is in the defaults and SD1.5 has none."""
    unet = sd15[0].model.diffusion_model
    chosen = layer_choice.select(unet, "linear + conv", list(layer_choice.DEFAULT_SKIP))
    assert len(chosen) > 20


def test_already_quantized(sd15, calibration):
    made = engine.quantize_model(sd15[0], INT8, calibration)
    with pytest.raises(ValueError, match="already quantized"):
        engine.quantize_model(loader.load(made.checkpoint), INT8, calibration)


def test_a_file_that_was_in_float8_is_told(checkpoints, tmp_path):
    """ComfyUI widens it on a CPU, and nothing of the MODEL says so."""
    tensors = load_file(checkpoints / "sd15.safetensors")
    prefix = "model.diffusion_model."
    narrow = {
        name: t.to(torch.float8_e4m3fn) if name.startswith(prefix) and t.ndim > 1 else t
        for name, t in tensors.items()
    }
    said = {}
    for name, held in (("narrow", narrow), ("plain", tensors)):
        path = tmp_path / f"{name}.safetensors"
        save_file(held, path)
        model, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False)
        assert model.model.diffusion_model.dtype.itemsize >= 2
        few = Recipe("int8", layers="linear only", skip=("input_blocks.*", "output_blocks.*"))
        said[name] = "\n".join(engine.quantize_model(model, few).notes)
    assert f"narrow.safetensors holds its UNet in float8 ({prefix}" in said["narrow"]
    assert "float8" not in said["plain"]


@pytest.mark.parametrize(
    "name",
    [
        "middle_block.1.proj_in.weight",
        "middle_block.1.proj_in.bias",
        "middle_block.1.norm.weight",
        "input_blocks.1.0.emb_layers.1.weight",
        "out.2.bias",
    ],
)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_named(name, value):
    """Whether it is quantized or stays in 16 bits; without a recording nothing else would notice."""
    state = synthetic.unet_state_dict("sd15")
    state[name] = state[name].clone()
    state[name].view(-1)[5 % state[name].numel()] = value
    model = comfy.sd.load_diffusion_model_state_dict(state)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity: .*get another copy"):
        engine.quantize_model(model, Recipe("int8", "max", layers="linear only"))


def test_a_lora_that_is_not_finite_is_named(sd15):
    name = "middle_block.1.proj_in.weight"
    model = sd15[0].clone()
    change = torch.full_like(
        comfy.utils.get_attr(model.model, f"diffusion_model.{name}"), torch.nan
    )
    model.add_patches({f"diffusion_model.{name}": ("diff", (change,))})
    with pytest.raises(
        ValueError, match=f"{name} holds NaN or infinity: the LoRAs on the MODEL or"
    ):
        engine.quantize_model(model, Recipe("int8", "max", layers="linear only"))


@pytest.mark.parametrize(
    ("form", "algorithm"), [("int8", "max"), ("int8", "smoothquant"), ("int4", "awq_lite")]
)
@pytest.mark.parametrize("value", [torch.nan, 3e38])
def test_a_call_that_gives_nan_and_is_not_looked_at_is_named(
    sd15, calibration, form, algorithm, value
):
    """Not one of those that the result is compared on: seen while activations are collected."""
    run = calibration.runs[0]
    records = list(run.records) * math.ceil(17 / len(run.records))
    records = [dataclasses.replace(record) for record in records]
    looked_at = [id(one) for one in quality.pick(records, engine.EVALUATION_RECORDS)]
    number = next(i for i, one in enumerate(records) if id(one) not in looked_at)
    x = records[number].x.clone()
    x.view(-1)[0] = value
    records[number] = dataclasses.replace(records[number], x=x)
    damaged = dataclasses.replace(run, records=tuple(records), calls=len(records))
    damaged = dataclasses.replace(calibration, runs=(damaged,))
    expected = f"the UNet must give finite numbers.* on call {number + 1} of the {len(records)} rec"
    with pytest.raises(ValueError, match=expected) as caught:
        engine.quantize_model(sd15[0], Recipe(form, algorithm, skip=MIDDLE), damaged)
    assert "install another version" not in str(caught.value)


def test_sixteen_bits():
    assert pack.sixteen_bits(torch.tensor([1.5])).dtype == torch.float16
    assert pack.sixteen_bits(torch.tensor([1e6])).dtype == torch.bfloat16
    assert pack.sixteen_bits(torch.tensor([1.0]).bfloat16()).dtype == torch.bfloat16


def test_patterns_text():
    text = "a.*\n\n  b # why\n# all\n"
    assert layer_choice.parse_patterns(text) == ["a.*", "b"]


def test_the_copy_owns_nothing_that_loading_left(sd15):
    """ComfyUI keeps pinned memory on the modules; a second owner would free it under the first."""
    unet = sd15[0].model.diffusion_model
    layer = unet.get_submodule("middle_block.1.proj_in")
    owned = object()
    layer._pin_state, layer.comfy_patched_weights = owned, True
    try:
        twin = bridge.copy_unet(sd15[0])
        assert layer._pin_state is owned
    finally:
        del layer._pin_state, layer.comfy_patched_weights
    other = twin.get_submodule("middle_block.1.proj_in")
    assert not hasattr(other, "_pin_state") and not hasattr(other, "comfy_patched_weights")
    assert other is not layer and other.weight.data_ptr() == layer.weight.data_ptr()
    assert [type(m) for m in twin.modules()] == [type(m) for m in unet.modules()]
    assert not {id(m) for m in twin.modules()} & {id(m) for m in unet.modules()}


def test_models_of_several_classes_of_one_name_one_after_the_other(calibration):
    """ComfyUI has a Linear for each way to cast, in one module: ModelOpt must tell them apart."""

    def operations() -> type:
        inner = {
            name: type(name, (getattr(comfy.ops.manual_cast, name),), {"__module__": "comfy.ops"})
            for name in ("Linear", "Conv2d")
        }
        return type("another_cast", (comfy.ops.manual_cast,), inner)

    recipe = Recipe("int8", "max", skip=("output_blocks.*", "middle_block.*", "out.*"))
    for choice in (comfy.ops.disable_weight_init, operations(), operations()):
        state = synthetic.unet_state_dict("sd15")
        options = {"dtype": torch.float16, "custom_operations": choice}
        model = comfy.sd.load_diffusion_model_state_dict(state, model_options=options)
        assert type(model.model.diffusion_model.input_blocks[0][0]) is choice.Conv2d
        assert engine.quantize_model(model, recipe, calibration).checkpoint.layers


def test_many_skip_patterns(monkeypatch):
    """Each is compiled once, and no more are taken than anyone writes."""
    seen = []
    translate = layer_choice.translate
    monkeypatch.setattr(layer_choice, "translate", lambda one: seen.append(one) or translate(one))
    unet = torch.nn.Module()
    for number in range(400):
        unet.add_module(f"a{number}", torch.nn.Linear(1, 1))
    patterns = [f"a{number}" for number in range(399)]
    assert layer_choice.select(unet, "linear only", patterns) == {"a399": "linear"}
    assert seen == patterns
    with pytest.raises(ValueError, match="at most 1000 skip patterns, found 1001 in skip: let one"):
        layer_choice.select(unet, "linear only", ["a*"] * 1001)
