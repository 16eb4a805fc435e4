"""The Benchmark node on real small models: numbers, comparison, refusals, cancel."""

from __future__ import annotations

import hashlib
import re

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.loaders import benchmark, dense, unet, unet_inputs
from comfyui_modelopt.nodes.benchmark import Benchmark
from comfyui_modelopt.quantize.recipe import Recipe

from ..families import write

LINEAR = Recipe("int8", "max", layers="linear only")


@pytest.fixture(scope="module")
def model(quantized):
    return unet.load(quantized(LINEAR).checkpoint)


@pytest.fixture(scope="module")
def sdxl():
    return comfy.sd.load_diffusion_model_state_dict(synthetic.unet_state_dict("sdxl"))


def digest(model) -> str:
    found = hashlib.sha256()
    for name, tensor in model.model.diffusion_model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def execute(model, **more) -> str:
    settings = {"width": 64, "height": 64, "batch": 1, "repeats": 1, "compare_eager": True}
    out = Benchmark.execute(model, **settings | {"compare_compiled": False} | more)
    (text,) = out.result
    assert out.ui == {"text": [text]}
    return text


def milliseconds(text: str, label: str) -> float:
    return float(re.search(rf"^{re.escape(label)}: ([\d.]+) ms", text, re.MULTILINE)[1])


def test_a_quantized_model_against_its_own_weights(model):
    before, options = digest(model), repr(model.model_options)
    text = execute(model)
    own, eager = (milliseconds(text, label) for label in (benchmark.OWN, benchmark.EAGER))
    said, ratio = (
        re.search(r"this MODEL is ([\d.]+) times (as fast as|slower than)", text),
        own / eager,
    )
    assert float(said[1]) == pytest.approx(max(ratio, 1 / ratio), abs=0.02)
    assert (said[2] == "slower than") == (own > eager)
    assert "- 40 layers: int8 linear: exact reference (emulated)" in text
    assert "no NVIDIA GPU" in text or torch.cuda.is_available()
    assert "Measured: SD15, 64 x 64 pixels, 1 picture(s): a UNet call of batch 2" in text
    assert (digest(model), repr(model.model_options)) == (before, options)
    assert model.model.current_patcher is None


def test_an_ordinary_model_gives_its_own_numbers(sdxl):
    text = execute(sdxl)
    assert milliseconds(text, benchmark.OWN) > 0
    assert benchmark.EAGER not in text and "times" not in text
    assert "Linear with" in text and "convolution with" in text


@pytest.mark.slow
def test_compiled_is_compared_when_asked_for(model, monkeypatch):
    monkeypatch.setattr(dense, "BACKEND", "eager")  # traced as ever, nothing generated
    text = execute(model, compare_eager=False, compare_compiled=True)
    assert milliseconds(text, benchmark.COMPILED) > 0
    assert benchmark.EAGER not in text


def test_a_compiler_that_fails_is_reported(model, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(dense, "BACKEND", broken)
    text = execute(model, compare_compiled=True)
    found = re.search(rf"{benchmark.COMPILED}: not measured \((.*)\)", text)
    assert "no C compiler" in found[1]
    assert milliseconds(text, benchmark.OWN) and milliseconds(text, benchmark.EAGER)


def test_the_twin_is_the_dequantized_model(model, sd15):
    twin = dense.twin(model)
    theirs = dict(model.model.diffusion_model.named_parameters())
    original = dict(sd15[0].model.diffusion_model.named_parameters())
    assert not dense.is_quantized(twin) and dense.is_quantized(model)
    seen = 0
    for name, parameter in twin.model.diffusion_model.named_parameters():
        wanted = theirs[name]
        if isinstance(wanted, QuantizedTensor):
            seen += 1
            wanted = wanted.to(dtype=torch.float16).dequantize()
        else:
            assert torch.equal(parameter.half(), original[name].half())
        assert torch.equal(parameter.half(), wanted.half()), name
    assert seen == 40


def test_the_twin_has_the_loras_and_options(model, checkpoints):
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(checkpoints / "lora.safetensors"))
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    patched.set_model_attn1_patch(lambda q, k, v, options: (q, k, v))
    twin = dense.twin(patched)
    assert twin.patches.keys() == patched.patches.keys() and twin.patches
    assert len(twin.model_options["transformer_options"]["patches"]["attn1_patch"]) == 1
    comfy.model_management.load_models_gpu([twin])
    name = next(iter(twin.patches))
    loaded = comfy.utils.get_attr(twin.model, name)
    assert not torch.equal(
        loaded.float(), comfy.utils.get_attr(dense.twin(model).model, name).float()
    )


def test_a_quantized_sdxl_has_a_twin(sdxl):
    """Built by stock ComfyUI in fp8, which is no checkpoint of ours."""
    options = {"dtype": torch.float8_e4m3fn}
    stock = comfy.sd.load_diffusion_model_state_dict(
        synthetic.unet_state_dict("sdxl"), model_options=options
    )
    assert dense.is_quantized(stock) and not dense.is_quantized(sdxl)
    text = execute(stock)
    assert milliseconds(text, benchmark.EAGER) > 0
    assert "float8_e4m3fn weights" in text


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_other_families_are_refused(kind, tmp_path):
    other = comfy.sd.load_diffusion_model(str(write(kind, tmp_path / "x.safetensors")))
    with pytest.raises(ValueError, match=r"needs a UNet of SD kind .* found .* in model"):
        execute(other)


@pytest.mark.parametrize("size", [(60, 64), (64, 0)])
def test_sizes_that_cannot_be_are_refused(sdxl, size):
    with pytest.raises(ValueError, match="multiples of 8 pixels"):
        unet_inputs.make(sdxl, *size, 1)


def test_cancel_takes_effect_at_the_next_call(model):
    calls = []
    watched = model.clone()
    watched.set_model_unet_function_wrapper(
        lambda apply, call: (
            calls.append(1),
            len(calls) == 3 and comfy.model_management.interrupt_current_processing(),
            apply(call["input"], call["timestep"], **call["c"]),
        )[-1]
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        execute(watched, compare_eager=False, repeats=50)
    assert len(calls) == 3
    assert model.model.current_patcher is None


@pytest.mark.parametrize("family", ["sd15", "sdxl", "inpainting", "refiner", "sd2"])
def test_inputs_are_scaled_as_a_samplers(family):
    state = synthetic.unet_state_dict(family)
    model = comfy.sd.load_diffusion_model_state_dict(state)
    inputs = unet_inputs.make(model, 128, 64, 2)
    assert inputs.x.shape == (4, 4, 8, 16)
    args, kwargs = unet_inputs.direct(model, inputs)
    assert 0.5 < args[0].std() < 2  # what the UNet sees has about unit variance
    assert args[1].min() > 0 and args[1].max() < 999
    assert ("y" in kwargs) == (family in ("sdxl", "refiner"))
    assert kwargs["context"].abs().amax() > 10  # as the start token's outliers
    again = unet_inputs.make(model, 128, 64, 2)
    assert torch.equal(again.x, inputs.x)
    comfy.model_management.load_models_gpu([model])
    with torch.no_grad():
        output = model.model.diffusion_model(*args, transformer_options={}, **kwargs)
    assert output.shape == (4, 4, 8, 16) and bool(torch.isfinite(output).all())


def test_everything_is_explained():
    schema = Benchmark.GET_SCHEMA()
    for item in (*schema.inputs, *schema.outputs):
        assert item.tooltip and item.tooltip.endswith("."), item
