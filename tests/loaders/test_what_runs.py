"""What a layer says is what multiplies: every format's recipes, loaded with the facts of GPUs that
are not here, each layer called with spies in the places where products are computed."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from comfyui_modelopt.formats import FORMATS
from comfyui_modelopt.formats.checkpoint import PER_TOKEN, SIXTEEN, STATIC, Layer
from comfyui_modelopt.formats.checkpoint import QuantizedCheckpoint as Checkpoint
from comfyui_modelopt.kernels import backends, blocks, fp8, gemm, int8, library, tiles
from comfyui_modelopt.loaders import dispatch, info
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import engine
from comfyui_modelopt.quantize.bridge import unet as bridge
from comfyui_modelopt.quantize.pack import sixteen_bits
from comfyui_modelopt.quantize.recipe import Recipe
from comfyui_modelopt.utils.capability import EMULATED, GPU, NATIVE

LINEAR, SMOOTHED = "linear only", "smoothed"
# recipe, and how its Linears' activations are quantized where that is not the format's own way, or
# SMOOTHED
RECIPES = {
    "int8": (Recipe("int8", "max"), ""),
    "int8-linear": (Recipe("int8", "max", layers=LINEAR), ""),
    "int8-static": (Recipe("int8", "max"), STATIC),
    "int8-16-bits": (Recipe("int8", "max", activations=SIXTEEN), SIXTEEN),
    "fp8": (Recipe("fp8"), ""),
    "fp8-linear": (Recipe("fp8", layers=LINEAR), ""),
    "fp8-token": (Recipe("fp8", activations=PER_TOKEN), PER_TOKEN),
    "fp8-e5m2": (Recipe("fp8_e5m2", layers=LINEAR), ""),
    "mxfp8": (Recipe("mxfp8"), ""),
    "nvfp4": (Recipe("nvfp4", "max"), ""),
    "nvfp4-linear-static": (Recipe("nvfp4", "max", layers=LINEAR), STATIC),
    "nvfp4-linear-smoothed": (Recipe("nvfp4", "max", layers=LINEAR), SMOOTHED),
    "int4": (Recipe("int4", "max"), ""),
    "w4a8": (Recipe("w4a8", "max"), ""),
}
FULL = {"cuda": (13, 0), "backends": frozenset({"cuda", "eager"}), "torch": (2, 11)}
CAPABILITIES = ("7.5", "8.6", "8.9", "9.0", "10.0", "12.0")
GPUS = {
    text: GPU("cuda", f"card {text}", tuple(map(int, text.split("."))), **FULL)
    for text in CAPABILITIES
}
WITHOUT = dict.fromkeys(("int8", "fp8"), "Triton is not installed")
GPUS["8.9-no-triton"] = dataclasses.replace(GPUS["8.9"], no_triton=WITHOUT)
# format -> the numbers that its native products multiply
MULTIPLIES = {"int8": "int8", "fp8": "fp8", "w4a8": "fp8", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
TRITON, KITCHEN, CUBLAS = "Triton", "comfy-kitchen", "cuBLASLt"
REFERENCE, DENSE = "exact reference", "16 bits"


def checkpoint(model, which: str) -> Checkpoint:
    """Packed with the formats' own scales: what multiplies does not depend on their values."""
    recipe, activations = RECIPES[which]
    unet = model.model.diffusion_model
    recipe, plans, _ = engine.prepared(unet, recipe)
    tensors = {name: sixteen_bits(tensor) for name, tensor in unet.state_dict().items()}
    layers = {}
    for name, one in plans.items():
        form, weight = FORMATS[one.format], unet.get_submodule(name).weight.data.float()
        own = activations if one.kind == "linear" or activations == SIXTEEN else ""
        own = own if one.format == recipe.format else ""
        layer = Layer(
            one.format,
            one.kind,
            smoothed=own == SMOOTHED,
            shape=tuple(weight.shape) if form.BLOCK is not None else None,
            activations="" if one.format == "nvfp4" else own,
            input_amax=4.0 if one.format == "nvfp4" and own == STATIC else None,
        )
        stored = form.quantize(weight, form.weight_amax(weight))
        if layer.smoothed:
            stored["pre_quant_scale"] = torch.ones(weight.shape[1])
        if "input_scale" in layer.scales:
            stored["input_scale"] = form.input_scale(torch.tensor(4.0))
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": value for key, value in stored.items()}
        layers[name] = layer
    return Checkpoint(tensors, layers, engine.described(model, recipe, None, bridge))


@pytest.fixture(scope="module")
def packed(sd15):
    """Name of RECIPES -> its checkpoint."""
    return functools.cache(functools.partial(checkpoint, sd15[0]))


@pytest.fixture
def on(monkeypatch):
    """A GPU -> a list that fills with (who, numbers) of each product from then on."""
    called: list[tuple[str, str]] = []
    half = lambda *_: torch.float16  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", half)

    def spy(place, name: str, note, instead=None) -> None:
        original = getattr(place, name)

        def heard(*args, **kwargs):
            if (said := note(*args, **kwargs)) is not None:
                called.append(said)
            return (instead or original)(*args, **kwargs)

        monkeypatch.setattr(place, name, heard)

    # libraries
    def scaled(a, b, *, scale_recipe_a, **_):
        first = scale_recipe_a[0] if isinstance(scale_recipe_a, list) else scale_recipe_a
        kinds = {"TensorWise": "fp8", "BlockWise1x32": "mxfp8", "BlockWise1x16": "nvfp4"}
        return KITCHEN, kinds[first.name]

    def zeros(a, b, *, out_dtype=None, output_dtype=None, **_):
        return torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype or output_dtype)

    def int8_zeros(x, weight, *_):
        return torch.zeros(*x.shape[:-1], len(weight), dtype=x.dtype)

    spy(torch.nn.functional, "scaled_mm", scaled, zeros)
    spy(torch.ops.comfy_kitchen, "int8_linear", lambda *_: (KITCHEN, "int8"), int8_zeros)
    spy(torch, "_scaled_mm", lambda *_, **__: (CUBLAS, "fp8"), zeros)
    # references: the activations are quantized, the products are of wider numbers
    spy(int8, "matmul_exact", lambda *_: (REFERENCE, "int8"))
    spy(int8, "conv2d_accumulate", lambda *_: (REFERENCE, "int8"))
    spy(fp8, "quantize", lambda *_: (REFERENCE, "fp8"))
    for form, name in (("nvfp4", "quantize_nvfp4"), ("mxfp8", "quantize_mxfp8")):
        spy(blocks.comfy_kitchen, f"de{name}", lambda *_, form=form: (REFERENCE, form))

    # products of floating-point numbers as the layer was given them
    def dense(x, *_, **__):
        return (DENSE, "float16") if x.dtype == torch.float16 else None

    spy(torch.nn.functional, "linear", dense)
    spy(torch.nn.functional, "conv2d", dense)

    # our kernels, up to their launch
    def launched(launch, kernel, grid, args, *_):
        numbers = "int8" if any(getattr(a, "dtype", None) == torch.int8 for a in args) else "fp8"
        name = getattr(kernel, "__name__", "") or kernel.fn.__name__
        return (TRITON, numbers) if name in ("matmul", "conv2d", "matmul_geglu") else None

    spy(gemm, "run", launched, lambda *_: None)
    ours = backends.triton()
    plain = backends.REFERENCE
    producers = {
        name: _unheard(getattr(plain, name), called)
        for name in (
            "quantize_rows",
            "layer_norm_quantize",
            "group_norm_quantize",
            "geglu_quantize",
        )
    }
    spied = dataclasses.replace(ours, **producers)
    monkeypatch.setattr(backends, "triton", lambda: spied)
    takes = library.takes

    def choose(gpu: GPU) -> list[tuple[str, str]]:
        monkeypatch.setattr(loader, "describe", lambda device, kinds: gpu)
        chip = tiles.Chip(gpu.capability, 100, 99 * 1024)
        monkeypatch.setattr(tiles, "chip", lambda device: chip)

        def as_there(a, *rest):
            there = SimpleNamespace(dtype=a.dtype, device=torch.device("cuda:0"))
            return takes(there, *rest)

        monkeypatch.setattr(library, "takes", as_there)
        return called

    return choose


def _unheard(function, called: list):
    """A producer of ours in plain PyTorch: no spy of a reference hears it."""

    def call(*args, **kwargs):
        before = len(called)
        result = function(*args, **kwargs)
        del called[before:]
        return result

    return call


def given(module) -> torch.Tensor:
    """An input of a layer, small."""
    if hasattr(module, "in_features"):
        return torch.full((1, 2, module.in_features), 0.5, dtype=torch.float16)
    return torch.full((1, module.in_channels, 4, 4), 0.5, dtype=torch.float16)


def wanted(kernel: dispatch.Kernel, form: str) -> set[tuple[str, str]]:
    """What the words of a kernel mean."""
    words = kernel.name.partition(": ")[2]
    if words in ("dequantized", f"weights in {FORMATS[form].BITS} bits"):
        return {(DENSE, "float16")}
    if words in (REFERENCE, "the exact reference"):
        return {(REFERENCE, form if form != "w4a8" else "fp8")}
    assert words in (TRITON, KITCHEN)
    who = CUBLAS if kernel.why == library.WHY else words
    return {(who, MULTIPLIES[form])}


LEVELS = {
    TRITON: {NATIVE},
    KITCHEN: {NATIVE},
    CUBLAS: {NATIVE},
    REFERENCE: {EMULATED},
    DENSE: {dispatch.DEQUANTIZED, dispatch.WEIGHT_ONLY},
}


@pytest.mark.parametrize("card", GPUS)
@pytest.mark.parametrize("which", RECIPES)
def test_what_a_layer_says_is_what_multiplies(packed, on, which, card):
    made = packed(which)
    called = on(GPUS[card])
    model = loader.load(made)
    kernels, lines = loader.kernels(model), Counter()
    assert set(kernels) == set(made.layers)
    heard: dict[tuple, str] = {}
    for name, kernel in kernels.items():
        layer, module = made.layers[name], model.model.diffusion_model.get_submodule(name)
        alike = (kernel, layer, tuple(module.weight.shape))
        if alike not in heard:
            called.clear()
            with torch.no_grad():
                module(given(module))
            assert set(called) == wanted(kernel, layer.format), name
            (who,) = {who for who, _ in called}
            assert kernel.level in LEVELS[who], name
            heard[alike] = who
        lines[f"layers run as {kernel.name}" + (f": {kernel.why}" if kernel.why else "")] += 1
    text = info.describe(model).splitlines()
    assert sorted(line for line in text if " layers run as " in line) == sorted(
        f"{count} {line}" for line, count in lines.items()
    )
    kinds = {kernel.name.partition(":")[0].rpartition(" ")[2] for kernel in kernels.values()}
    assert kinds == ({"linear"} if RECIPES[which][0].layers == LINEAR else {"linear", "conv2d"})


def test_the_cases_hear_every_way(packed, on):
    """The spies are not deaf: over all recipes and GPUs each of them is heard."""
    heard = set()
    for which, card in (
        ("fp8", "8.6"),
        ("fp8", "9.0"),
        ("fp8", "8.9-no-triton"),
        ("int8", "7.5"),
        ("int8", "8.6"),
        ("nvfp4", "10.0"),
        ("mxfp8", "12.0"),
    ):
        called = on(GPUS[card])
        model = loader.load(packed(which))
        with torch.no_grad():
            for name in loader.kernels(model):
                module = model.model.diffusion_model.get_submodule(name)
                module(given(module))
        heard |= set(called)
    assert heard >= {(TRITON, "int8"), (TRITON, "fp8"), (CUBLAS, "fp8"), (DENSE, "float16")}
    assert heard >= {(KITCHEN, form) for form in ("int8", "fp8", "mxfp8", "nvfp4")}
    assert heard >= {(REFERENCE, form) for form in ("int8", "mxfp8", "nvfp4")}


@pytest.mark.parametrize("which", ["int8", "fp8"])
def test_a_fused_unet_runs_each_layer_as_it_says(packed, on, monkeypatch, which):
    """A whole call: every layer is in one product of ours, alone or with others."""
    called, layers = on(GPUS["8.9"]), Counter()

    def counted(name: str, function):
        def call(a, weights, *args, **kwargs):
            layers[name] += len(weights) if name.startswith("grouped") else 1
            return function(a, weights, *args, **kwargs)

        return call

    ours = backends.triton()
    products = ("scaled_mm", "grouped_scaled_mm", "scaled_mm_geglu", "conv2d")
    spied = {name: counted(name, getattr(ours, name)) for name in products}
    monkeypatch.setattr(backends, "triton", lambda: dataclasses.replace(ours, **spied))
    model = loader.load(packed(which))
    kernels = loader.kernels(model).values()
    assert {kernel.name for kernel in kernels} == {
        f"{which} linear: Triton",
        f"{which} conv2d: Triton",
    }
    comfy.model_management.load_models_gpu([model])
    called.clear()
    context = torch.zeros(1, 7, model.model.model_config.unet_config["context_dim"])
    with torch.inference_mode():
        model.model.diffusion_model(
            torch.zeros(1, 4, 8, 8).half(), torch.tensor([5.0]), context=context.half()
        )
    assert all(layers[name] for name in products)
    assert layers.total() == len(kernels)
    assert set(called) == {(TRITON, which), (DENSE, "float16")}  # the latter: not quantized
