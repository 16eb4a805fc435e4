"""The file's size is known to the byte before anything is quantized; memory as it is measured."""

from __future__ import annotations

import dataclasses
import gc
import math

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.formats import files
from comfyui_modelopt.formats.checkpoint import PER_TOKEN
from comfyui_modelopt.loaders import expected, info, trial
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.nodes import planning
from comfyui_modelopt.quantize import calling, engine, modelopt, needs, prediction, trying
from comfyui_modelopt.quantize.bridge import sampling
from comfyui_modelopt.quantize.layers import DEFAULT_SKIP, LINEAR_ONLY, MODES
from comfyui_modelopt.quantize.mixed import Mixed
from comfyui_modelopt.quantize.recipe import ALGORITHMS, AWQ_FULL, PERCENTILE, LayerPlan, Recipe
from comfyui_modelopt.utils.memory import Watched, peak_of

from .. import families

# one ResBlock and one transformer are quantized, among them the layer whose width ComfyUI reads
FEW = (*DEFAULT_SKIP, "output_blocks.*", "middle_block.*")
RECIPES = [
    Recipe(form, algorithm, layers=mode, skip=FEW)
    for form, algorithms in ALGORITHMS.items()
    for algorithm in algorithms
    if algorithm != AWQ_FULL
    for mode in MODES
    if algorithm != PERCENTILE or mode != LINEAR_ONLY
] + [
    Recipe("fp8", "max", activations=PER_TOKEN, skip=FEW),
    Recipe("int8", "smoothquant", convolutions="percentile", percentile=0.5, skip=FEW),
    Recipe("int8", "max"),
    Recipe("nvfp4"),
]
WITHOUT = [
    Recipe("int8", "max", layers=LINEAR_ONLY, skip=FEW),
    Recipe("fp8", "max", layers=LINEAR_ONLY, activations=PER_TOKEN, skip=FEW),
    Recipe("mxfp8", layers=LINEAR_ONLY, skip=FEW),
    Recipe("nvfp4", "max", layers=LINEAR_ONLY, skip=FEW),
    Recipe("int4", "max", skip=FEW),
    Recipe("fp8_e5m2", skip=FEW),
]
SMALL, LARGE = (8, 8), (16, 16)  # latents
SAMPLING = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}


def name(recipe: Recipe) -> str:
    few = "all" if recipe.skip == DEFAULT_SKIP else "few"
    return f"{recipe.format} {recipe.algorithm} {recipe.layers} {recipe.activations} {few}"


def predicted(model, recipe: Recipe, calibration=None) -> int:
    recipe, plans, _ = engine.prepared(model.model.diffusion_model, recipe)
    return files.size(prediction.checkpoint(model, recipe, plans, calibration))


def written(made, folder) -> int:
    """Bytes of the file that Quantize and Save make: loaded, measured, taken out of the MODEL."""
    checkpoint = dataclasses.replace(made.checkpoint, header=dict(made.checkpoint.header))
    made = dataclasses.replace(made, checkpoint=checkpoint)
    model = loader.load(checkpoint)
    engine.measure(made, model)
    loader.loaded(model).header.update(checkpoint.header)
    path = folder / "made.safetensors"
    files.write(loader.to_checkpoint(model), path)
    return path.stat().st_size


def record(model, positive, negative, latent):
    return sampling.record(
        model,
        **SAMPLING,
        positive=positive,
        negative=negative,
        latent_image=latent,
        denoise=1.0,
        max_records=4,
    )[1]


@pytest.fixture(scope="module")
def short(sd15, conditionings):
    """Four calls of a picture of 64 x 64."""
    return record(sd15[0], *conditionings, {"samples": torch.zeros(1, 4, 8, 8)})


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_size_is_exact(recipe, sd15, short, tmp_path):
    expected = predicted(sd15[0], recipe, short)
    assert written(engine.quantize_model(sd15[0], recipe, short), tmp_path) == expected


def test_a_recipe_for_each_layer(sd15, short, tmp_path):
    block = "input_blocks.1.1.transformer_blocks.0."
    choices = (
        Recipe("int8", "smoothquant"),
        Recipe("nvfp4", "svdquant", rank=8),
        Recipe("int4", "awq_lite"),
        Recipe("fp8", "max", activations=PER_TOKEN),
    )
    chosen = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_out.0")
    layers = {block + layer: index for index, layer in enumerate(chosen)}
    recipe = Mixed(choices, layers | {"input_blocks.1.0.in_layers.2": 1})
    expected = predicted(sd15[0], recipe, short)
    made = engine.quantize_model(sd15[0], recipe, short)
    assert {one.format for one in made.checkpoint.layers.values()} == {
        "int8",
        "nvfp4",
        "int4",
        "fp8",
    }
    assert written(made, tmp_path) == expected


@pytest.mark.parametrize("recipe", WITHOUT, ids=name)
def test_without_a_calibration(recipe, sd15, tmp_path):
    expected = predicted(sd15[0], recipe)
    assert written(engine.quantize_model(sd15[0], recipe), tmp_path) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("form", "algorithm"), [("int8", "smoothquant"), ("nvfp4", "svdquant"), ("int4", "awq_lite")]
)
def test_dtypes_of_the_source(dtype, form, algorithm, short, tmp_path):
    state = {name: t.to(dtype) for name, t in synthetic.unet_state_dict("sd15").items()}
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype})
    assert model.model.diffusion_model.input_blocks[1][0].in_layers[2].weight.dtype == dtype
    rank = {"rank": 8} if algorithm == "svdquant" else {}
    recipe = Recipe(form, algorithm, skip=FEW, **rank)
    expected = predicted(model, recipe, short)
    assert written(engine.quantize_model(model, recipe, short), tmp_path) == expected


def test_numbers_that_no_plan_can_know(checkpoints, short, tmp_path):
    """Weights beyond float16, in 32 bits and with a LoRA baked in: other dtypes and exceptions."""
    state = {name: t.float() for name, t in synthetic.unet_state_dict("sd15").items()}
    for key in ("time_embed.0.weight", "input_blocks.1.0.in_layers.2.bias"):
        state[key] = state[key].clone()
        state[key][0] = 1e5
    model = comfy.sd.load_diffusion_model_state_dict(state, {"dtype": torch.float32})
    lora = comfy.utils.load_torch_file(str(checkpoints / "lora.safetensors"))
    model = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]
    recipe = Recipe("int8", "max", skip=FEW)
    expected = predicted(model, recipe, short)
    made = engine.quantize_model(model, recipe, short)
    kept = made.checkpoint.tensors
    assert kept["input_blocks.1.0.in_layers.2.bias"].dtype == torch.bfloat16
    assert kept["input_blocks.1.0.out_layers.3.bias"].dtype == torch.float16
    assert kept["time_embed.0.weight"].dtype == torch.bfloat16
    assert any(one.amax_exceptions for one in made.checkpoint.layers.values())
    assert made.checkpoint.header["baked_patches"] > 0
    assert written(made, tmp_path) == expected
    again = loader.read(str(tmp_path / "made.safetensors"))
    assert again.layers == made.checkpoint.layers


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("int8", "max", skip=FEW),
        Recipe("nvfp4", "max", layers=LINEAR_ONLY),
        Recipe("mxfp8", skip=FEW),
    ],
    ids=name,
)
def test_sdxl(recipe, tmp_path):
    model = comfy.sd.load_diffusion_model_state_dict(synthetic.unet_state_dict("sdxl"))
    generator = torch.Generator().manual_seed(1)
    pooled = {"pooled_output": torch.randn(1, 1280, generator=generator)}
    given = [[torch.randn(1, 77, 2048, generator=generator), pooled]]
    calls = record(model, given, given, {"samples": torch.zeros(1, 4, 8, 8)})
    expected = predicted(model, recipe, calls)
    assert written(engine.quantize_model(model, recipe, calls), tmp_path) == expected


@pytest.mark.parametrize("kind", ["flux", "sd3", "wan", "qwen_image"])
def test_beyond_unets(kind, tmp_path):
    path = families.write(kind, tmp_path / f"{kind}.safetensors")
    model = comfy.sd.load_diffusion_model(str(path))
    given = [families.conditioning(kind, seed) for seed in (1, 2)]
    calls = record(model, *given, families.latent(kind))
    for recipe in (Recipe("nvfp4", "max"), Recipe("int8", "max")):
        expected = predicted(model, recipe, calls)
        made = engine.quantize_model(model, recipe, calls)
        folder = tmp_path / recipe.format
        folder.mkdir()
        assert written(made, folder) == expected


MEASURED = [
    Recipe("int8", "max"),
    Recipe("int8", "max", layers=LINEAR_ONLY),
    Recipe("int8", "smoothquant"),
    Recipe("int8", "mse", layers=LINEAR_ONLY),
    Recipe("fp8"),
    Recipe("fp8", "max"),
    Recipe("nvfp4", "max"),
    Recipe("nvfp4", "max", layers=LINEAR_ONLY),
    Recipe("nvfp4", layers=LINEAR_ONLY, skip=FEW),
    Recipe("mxfp8", skip=FEW),
    Recipe("int4", "max"),
    Recipe("int4", "svdquant", layers=LINEAR_ONLY, skip=FEW),
    Recipe("w4a8", "max"),
    Recipe("int4", layers=LINEAR_ONLY, skip=FEW),
    Recipe("w4a8", layers=LINEAR_ONLY, skip=FEW),
    Recipe("nvfp4", "svdquant", layers=LINEAR_ONLY, skip=FEW),
    # more rows than are searched at once; every other token
    Recipe("int4", AWQ_FULL, layers=LINEAR_ONLY, skip=(*FEW, "*.attn*", "*.ff.net.2")),
    # whole blocks in a row; the prompt's tokens
    Recipe("w4a8", AWQ_FULL, layers=LINEAR_ONLY, skip=(*FEW, "*.attn1.*", "*2.to_[!k]*", "*.ff.*")),
]


PATCHED = [Recipe("int8", "max"), Recipe("nvfp4", "max", layers=LINEAR_ONLY)]


@pytest.mark.parametrize(
    ("recipe", "lora"),
    [(recipe, False) for recipe in MEASURED] + [(recipe, True) for recipe in PATCHED],
    ids=lambda value: name(value) if isinstance(value, Recipe) else ("lora" if value else ""),
)
def test_memory_is_as_measured(recipe, lora, sd15, checkpoints, short):
    check_memory(patched(sd15[0], checkpoints) if lora else sd15[0], recipe, short)


# what is largest where: a cast weight that stays in 16 bits, a weight that is looked through for NaN,
# a quantized convolution's own work space, the picture
HELD = [
    (torch.float16, Recipe("int8", "max"), SMALL, False),
    (torch.bfloat16, Recipe("int8", "max"), LARGE, False),
    (torch.float16, Recipe("int8", "max"), SMALL, True),
    (torch.float16, Recipe("fp8", "max", layers=LINEAR_ONLY, activations=PER_TOKEN), SMALL, False),
    (torch.float16, Recipe("mxfp8"), SMALL, False),
    (torch.bfloat16, Recipe("mxfp8", skip=FEW), SMALL, False),
    # the largest convolutions in floating point, given pictures as quantized ones lay them out
    (torch.bfloat16, Recipe("mxfp8", skip=("*.ff.*", "output_blocks.*")), SMALL, False),
    (torch.bfloat16, Recipe("nvfp4", "max"), SMALL, False),
    (torch.float16, Recipe("int4", layers=LINEAR_ONLY, skip=FEW), SMALL, False),
    (torch.float16, Recipe("int4", "svdquant", layers=LINEAR_ONLY, skip=FEW), SMALL, False),
    (torch.bfloat16, Recipe("nvfp4", "svdquant", layers=LINEAR_ONLY, skip=FEW), SMALL, False),
    # AWQ's search: answers larger than weights, weights larger than answers
    (torch.bfloat16, Recipe("int4", layers=LINEAR_ONLY, skip=FEW), LARGE, False),
    (torch.float32, Recipe("w4a8", layers=LINEAR_ONLY), LARGE, False),
    (torch.float32, Recipe("nvfp4", layers=LINEAR_ONLY, skip=FEW), LARGE, False),
    # convolutions that round what they are given while others are searched
    (torch.float16, Recipe("nvfp4", skip=FEW), LARGE, False),
    (torch.float32, Recipe("w4a8", skip=FEW), LARGE, False),
    # with the embeddings' layers, the largest: a square weight's SVD
    (
        torch.bfloat16,
        Recipe("int4", "svdquant", layers=LINEAR_ONLY, skip=("*.attn*",)),
        SMALL,
        False,
    ),
    # rows of whole blocks, and rows that are padded
    (torch.float16, Recipe("int4", "mse", skip=("*.attn*", "middle_block.*")), SMALL, False),
    (
        torch.bfloat16,
        Recipe("int4", "mse", layers=LINEAR_ONLY, skip=("input_blocks.*",)),
        SMALL,
        False,
    ),
]


@pytest.mark.parametrize(
    ("dtype", "recipe", "latent", "lora"),
    HELD,
    ids=[f"{dtype} {name(recipe)} {size} {lora}" for dtype, recipe, size, lora in HELD],
)
def test_memory_of_what_is_held_in_any_dtype(dtype, recipe, latent, lora, checkpoints):
    """ComfyUI computes in 32 bits on a CPU, and casts each weight in 16 bits for each call."""
    state = {name: t.to(dtype) for name, t in synthetic.unet_state_dict("sd15").items()}
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype})
    assert model.model.diffusion_model.input_blocks[1][0].in_layers[2].weight.dtype == dtype
    assert model.model.get_dtype_inference() == torch.float32
    generator = torch.Generator().manual_seed(1)
    given = [[torch.randn(1, 77, 768, generator=generator), {}]]
    calls = record(model, given, given, {"samples": torch.zeros(1, 4, *latent)})
    check_memory(patched(model, checkpoints) if lora else model, recipe, calls)


def test_memory_of_records_of_several_sizes(sd15):
    """As the largest one's, wherever it stands."""
    generator = torch.Generator().manual_seed(1)
    given = [[torch.randn(1, 77, 768, generator=generator), {}]]
    small, large = (
        record(sd15[0], given, given, {"samples": torch.zeros(1, 4, *size)})
        for size in (SMALL, LARGE)
    )
    found = []
    for calls in (small.merge(large), large.merge(small), large):
        check_memory(sd15[0], Recipe("int8", "max"), calls)
        found.append(planning.plan(sd15[0], Recipe("int8", "max"), calls)[1])
    assert len({(one["call_bytes"], one["quantize_bytes"]) for one in found}) == 1


def patched(model, checkpoints):
    """The MODEL with a LoRA."""
    weights = comfy.utils.load_torch_file(str(checkpoints / "lora.safetensors"))
    return comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0)[0]


def check_memory(model, recipe: Recipe, calls) -> None:
    """Weights as held to the byte; what quantizing and a UNet call take within 10%, as torch's own
    allocator counts it."""
    source, device = model.model.diffusion_model, torch.device("cpu")
    _, plans, _ = engine.prepared(source, recipe)
    planned = prediction.checkpoint(model, recipe, plans, calls)
    largest = calling.largest(calls)
    trials, call = trying.layers(source, plans, device), calling.try_call(model, largest)
    chosen = expected.kernels(planned, model)
    dequantized = expected.in_floating_point(chosen, planned.layers)
    tried = trial.calls(planned, model, chosen, call.inputs)
    laid_out = calling.laid_out(model, largest, call, tried.last)
    running = needs.call_peak(source, plans, trials, laid_out, dequantized, tried.working)
    quantizing, ram = needs.memory(model, planned, plans, trials, call)

    comfy.model_management.unload_all_models()  # what quantizing would free is not what it takes
    gc.collect()
    made, peak = peak_of(lambda: engine.quantize_model(model, recipe, calls), device)
    assert ram == 0
    assert quantizing == pytest.approx(peak, rel=0.1)
    loaded = loader.load(made.checkpoint)
    assert chosen == loader.kernels(loaded)
    held = info.weight_bytes(loaded)
    assert expected.held_bytes(planned, model) == held
    real = calling.try_call(loaded, largest)
    assert running == pytest.approx(real.peak, rel=0.1)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# weight [N, K], its dtype, the call's, tokens. A CPU computes in 32 bits; what a GPU computes in, where
# answers are the most (the CPU's mean of 16-bit inputs, which the first pass takes, copies them)
SEARCHED = [
    *((shape, held, F32, tokens)
      for shape in ((1024, 256), (256, 1024), (256, 320))
      for held in (F32, F16, BF16)
      for tokens in (2, 2048)),
    *((shape, held, given, 2048)
      for shape in ((1024, 256), (256, 320))
      for held in (F32, F16, BF16)
      for given in (F16, BF16)),
]  # fmt: skip


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize(("shape", "held", "given", "tokens"), SEARCHED)
def test_memory_of_awqs_search(shape, held, given, tokens, format):
    """One layer, searched as `calibrate` has it done, in each pair of dtypes."""
    unet, device = torch.nn.Module(), torch.device("cpu")
    unet.layer = comfy.ops.manual_cast.Linear(shape[1], shape[0], bias=False, dtype=held)
    generator = torch.Generator().manual_seed(1)
    unet.layer.weight.data = torch.randn(shape, generator=generator).to(held)
    x = torch.randn(1, tokens, shape[1], generator=generator).to(given)
    plans = {"layer": LayerPlan("linear", format, "awq_lite")}
    (tried,) = trying.layers(unet, plans, device).values()
    call = calling.Call(0.0, Watched(0, {"layer": 0}), (), {"layer": tuple(x.shape)}, given)
    planned = needs._searching(unet, {"layer": tried.searching * math.prod(shape)}, call)

    def search():
        modelopt.calibrate(unet, plans, lambda unet: unet.layer(x))

    gc.collect()  # what others left, freed meanwhile, would be taken off
    with torch.no_grad():
        _, peak = peak_of(search, device)
    assert unet.layer.awq_lite.num_search_steps == 1
    assert planned == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("int8", "max", skip=FEW),
        Recipe("int4", "max", skip=FEW),
        Recipe("nvfp4", "awq_lite", skip=FEW),
        Recipe("int4", "awq_full", layers=LINEAR_ONLY, skip=FEW),
    ],
    ids=name,
)
def test_calls_are_counted_as_they_are_made(recipe, sd15, short, monkeypatch):
    made = []

    def counting(total):
        return lambda size=1: made.append(size)

    monkeypatch.setattr(engine, "progress", counting)
    _, plans, _ = engine.prepared(sd15[0].model.diffusion_model, recipe)
    done = engine.quantize_model(sd15[0], recipe, short)
    engine.measure(done, loader.load(done.checkpoint))
    assert made.count(engine.CALL) == needs.calls(plans, len(short))
