"""Every format and algorithm, layer by layer: bits in the file, odd shapes, which is the better one."""

from __future__ import annotations

import math

import comfy.ops
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.formats import FORMATS, files
from comfyui_modelopt.formats.checkpoint import QuantizedCheckpoint
from comfyui_modelopt.quantize import engine, modelopt, pack, prediction
from comfyui_modelopt.quantize.layers import DEFAULT_SKIP, LINEAR_AND_CONV, LINEAR_ONLY
from comfyui_modelopt.quantize.recipe import (
    ALGORITHMS,
    AWQ_FULL,
    AWQ_LITE,
    MAX,
    MSE,
    SMOOTHQUANT,
    SVDQUANT,
    Recipe,
    plan,
)
from safetensors import safe_open
from safetensors.torch import load_file

from .. import bits

PAIRS = [(form, algorithm) for form, known in ALGORITHMS.items() for algorithm in known]
# of SD1.5's first level: attention, attention to the prompt, feed-forward, ResBlock
LAYERS = {
    "to_q": (320, 320),
    "to_k": (320, 768),
    "ff": (320, 1280),
    "conv": (320, 320, 3, 3),
}
# of its second level, wide enough for branches
WIDER = {"to_q": (640, 640), "to_k": (640, 768), "ff": (640, 2560), "conv": (320, 640, 3, 3)}
ODD = {
    "one_row": (1, 32),
    "few_rows": (7, 96),
    "ragged_block": (33, 160),
    "conv": (6, 32, 3, 3),
    "point": (5, 64, 1, 1),
    "odd_conv": (3, 7, 3, 3),
}
# and for formats that need no whole blocks
ODDER = {"odd": (5, 33), "narrow": (3, 2)}


def formats_of(*algorithms: str) -> list[str]:
    """Formats that have all of the algorithms."""
    return [form for form, known in ALGORITHMS.items() if set(algorithms) <= set(known)]


def module_of(weight: torch.Tensor) -> torch.nn.Module:
    if weight.ndim == 2:
        module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        module = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], bias=False)
    module.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return module


def random_weights(shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        for name, shape in shapes.items()
    }


def random_inputs(shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {n: (16, s[1]) if len(s) == 2 else (1, s[1], 3, 3) for n, s in shapes.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in given.items()}


@torch.no_grad()
def quantized(recipe: Recipe, weights, inputs) -> QuantizedCheckpoint:
    """Layers of these weights, calibrated with what they are given, and packed."""
    net = torch.nn.ModuleDict({name: module_of(weight) for name, weight in weights.items()})
    kinds = {name: "linear" if w.ndim == 2 else "conv2d" for name, w in weights.items()}
    plans, _ = plan(net, recipe, kinds)

    def call(twin) -> None:
        for name, given in inputs.items():
            twin[name](given)

    modelopt.calibrate(net, plans, call)
    tensors, table = pack.pack(net, plans, lambda: None)
    return QuantizedCheckpoint(tensors, table, {"recipe": recipe.describe()})


def through_file(made: QuantizedCheckpoint, path) -> QuantizedCheckpoint:
    files.write(made, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return files.parse(load_file(path), metadata, str(path))


def own(made: QuantizedCheckpoint, name: str) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in made.tensors.items()
        if key.startswith(f"{name}.")
    }


def dense(made: QuantizedCheckpoint, name: str, shape, smoothed: bool = False) -> torch.Tensor:
    """The weight that a layer stands for, in the basis of its input, or of its smoothed input."""
    stored = own(made, name)
    weight = FORMATS[made.layers[name].format].dequantize(stored, shape)
    if "svd_up" in stored:
        weight = weight + stored["svd_up"].float() @ stored["svd_down"].float()
    if "pre_quant_scale" in stored and not smoothed:
        weight = weight * stored["pre_quant_scale"].float()
    return weight


@pytest.mark.parametrize(("form", "algorithm"), PAIRS)
def test_bits_of_layers_in_a_file(form, algorithm, tmp_path):
    weights = {name: weight.half() for name, weight in random_weights(LAYERS).items()}
    inputs = {name: given.half() for name, given in random_inputs(LAYERS).items()}
    made = quantized(Recipe(form, algorithm), weights, inputs)
    assert {layer.format for layer in made.layers.values()} == {form}
    files.write(made, tmp_path / "made.safetensors")
    sizes = bits.bytes_in_file(tmp_path / "made.safetensors")
    assert FORMATS[form].BITS <= bits.per_weight(sizes, LAYERS) <= bits.LIMITS[form]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("form", formats_of(SVDQUANT))
def test_a_branch_takes_what_its_rank_asks_for(form, dtype, tmp_path):
    weights = {name: weight.to(dtype) for name, weight in random_weights(WIDER).items()}
    inputs = {name: given.to(dtype) for name, given in random_inputs(WIDER).items()}
    found = {}
    for rank in (0, 32):
        made = quantized(Recipe(form, SVDQUANT, rank=rank), weights, inputs)
        assert ("rank" in made.header["recipe"]) == bool(rank)
        files.write(made, tmp_path / f"{rank}.safetensors")
        sizes = bits.bytes_in_file(tmp_path / f"{rank}.safetensors")
        ranks = {name: layer.rank for name, layer in made.layers.items() if layer.rank}
        assert ranks.keys() == {name for name, shape in WIDER.items() if len(shape) == 2}
        found[rank] = set(ranks.values())
        base = bits.per_weight(sizes, WIDER, without=bits.BRANCH)
        whole = base + bits.branches(WIDER, ranks)
        assert bits.per_weight(sizes, WIDER) == pytest.approx(whole, rel=1e-9)
        if not rank:
            more = {name: own + 1 for name, own in ranks.items()}
            assert whole <= bits.LIMITS[form] < base + bits.branches(WIDER, more)
    assert found[32] == {32} and len(found[0]) == 1 and 0 < min(found[0]) < 32


def test_a_branch_has_a_rank_of_at_least_one():
    net = torch.nn.ModuleDict({"layer": module_of(torch.ones(8, 32))})
    plans, notes = plan(net, Recipe("int4", SVDQUANT), {"layer": "linear"})
    assert plans["layer"].rank == 1
    assert (
        len(notes) == 1 and "about 11.00 bits a weight with them, over the 4.2 of int4" in notes[0]
    )


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def whole(request):
    """A whole UNet without its weights."""
    config = synthetic.unet_config(request.param, "full")
    return UNetModel(
        **config, device="meta", dtype=torch.float16, operations=comfy.ops.disable_weight_init
    )


# format and layers -> the rank of branches where none is asked for, in SD1.5 and in SDXL; README has them
RANKS = {
    ("nvfp4", LINEAR_AND_CONV): {"sd15": 12, "sdxl": 4},
    ("nvfp4", LINEAR_ONLY): {"sd15": 2, "sdxl": 4},
    ("int4", LINEAR_AND_CONV): {"sd15": 9, "sdxl": 3},
    ("int4", LINEAR_ONLY): {"sd15": 2, "sdxl": 2},
}


@pytest.mark.parametrize(("form", "layers"), RANKS)
def test_ranks_of_whole_models(whole, form, layers, request):
    _, plans, _ = engine.prepared(whole, Recipe(form, SVDQUANT, layers=layers))
    family = request.node.callspec.params["whole"]
    found = {one.rank for one in plans.values() if one.algorithm == SVDQUANT}
    assert found == {RANKS[form, layers][family]}


def test_an_algorithm_that_no_layer_takes_is_told(whole):
    linears = ("*transformer_blocks*", "*.proj_*")
    _, plans, notes = engine.prepared(
        whole, Recipe("int4", SVDQUANT, skip=(*DEFAULT_SKIP, *linears))
    )
    assert {one.kind for one in plans.values()} == {"conv2d"}
    assert notes == [
        "Without effect, as no layer left to quantize takes it: algorithm svdquant (max)."
    ]


@pytest.mark.parametrize(("form", "algorithm"), PAIRS)
def test_bits_of_whole_models_as_predicted(whole, form, algorithm):
    _, plans, _ = engine.prepared(whole, Recipe(form, algorithm))
    sizes, shapes, ranks = {}, {}, {}
    for name, one in plans.items():
        module = whole.get_submodule(name)
        tensors, entry = prediction.layer(module, one, calibrated=True)
        sizes |= bits.bytes_of({f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()})
        shapes[name] = tuple(module.weight.shape)
        if entry.rank:
            ranks[name] = entry.rank
    assert len(shapes) > 150
    found = bits.per_weight(sizes, shapes)
    assert FORMATS[form].BITS <= found <= bits.LIMITS[form]
    assert bool(ranks) == (algorithm == SVDQUANT)
    if ranks:
        base = bits.per_weight(sizes, shapes, without=bits.BRANCH)
        assert found == pytest.approx(base + bits.branches(shapes, ranks), rel=1e-9)
        more = {name: rank + 1 for name, rank in ranks.items()}
        weights = sum(math.prod(shape) for shape in shapes.values())
        in_32_bits = 16 * sum(shapes[name][1] for name in ranks) / weights  # of smoothing scales
        assert base + in_32_bits + bits.branches(shapes, more) > bits.LIMITS[form]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize(("form", "algorithm"), PAIRS)
def test_odd_shapes_come_back_from_a_file(form, algorithm, dtype, tmp_path):
    shapes = ODD if FORMATS[form].why_not((5, 33)) else ODD | ODDER
    weights = {name: weight.to(dtype) for name, weight in random_weights(shapes).items()}
    inputs = {name: given.to(dtype) for name, given in random_inputs(shapes).items()}
    made = through_file(quantized(Recipe(form, algorithm), weights, inputs), tmp_path / "x")
    assert made.layers.keys() == shapes.keys()
    for name, shape in shapes.items():
        found, weight = dense(made, name, shape), weights[name].float()
        assert found.shape == weight.shape and found.isfinite().all(), name
        limit = 0.15 if FORMATS[made.layers[name].format].BITS == 4 else 0.06
        assert (found - weight).norm() <= limit * weight.norm(), name


# --- which algorithm is better, on a layer with outliers ---

ROWS, COLUMNS = 64, 256


def with_outliers() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of which a few values are large, and an input of which a few channels are."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) / 16
    weight.view(-1)[torch.randperm(weight.numel(), generator=generator)[:200]] *= 4
    x = torch.randn(128, COLUMNS, generator=generator)
    x[:, ::32] *= 30
    return weight, x


def of_weight(form: str, algorithm: str) -> float:
    """Error of the weight."""
    weight, x = with_outliers()
    made = quantized(Recipe(form, algorithm), {"layer": weight}, {"layer": x})
    return (dense(made, "layer", weight.shape) - weight).norm().item()


def of_output(form: str, algorithm: str, activations: bool = False) -> float:
    """Error of the output for the input it was calibrated with. activations: which is rounded to
    int8, a scale for each token."""
    weight, x = with_outliers()
    made = quantized(Recipe(form, algorithm), {"layer": weight}, {"layer": x})
    given = x * own(made, "layer").get("pre_quant_scale", torch.ones(COLUMNS)).float()
    if activations:
        scale = given.abs().amax(dim=1, keepdim=True) / 127
        given = (given / scale).round() * scale
    out = given @ dense(made, "layer", weight.shape, smoothed=True).T
    return (out - x @ weight.T).norm().item()


@pytest.mark.parametrize("form", formats_of(MSE, MAX))
def test_mse_has_the_smaller_error_of_the_weight(form):
    assert of_weight(form, MSE) <= (0.9 if FORMATS[form].BITS == 4 else 1.0) * of_weight(form, MAX)


@pytest.mark.parametrize("form", formats_of(AWQ_LITE, MAX))
def test_awq_has_the_smaller_error_of_the_output(form):
    assert of_output(form, AWQ_LITE) <= 0.6 * of_output(form, MAX)


@pytest.mark.parametrize("form", formats_of(AWQ_FULL, AWQ_LITE))
def test_clipping_makes_it_smaller_still(form):
    assert of_output(form, AWQ_FULL) <= 0.95 * of_output(form, AWQ_LITE)


@pytest.mark.parametrize("form", formats_of(SVDQUANT, MAX))
def test_svdquant_has_the_smaller_error_of_the_output(form):
    assert of_output(form, SVDQUANT) <= 0.6 * of_output(form, MAX)


@pytest.mark.parametrize("form", formats_of(SMOOTHQUANT, MAX))
def test_smoothquant_has_the_smaller_error_where_activations_are_rounded(form):
    smoothed = of_output(form, SMOOTHQUANT, activations=True)
    assert smoothed <= 0.6 * of_output(form, MAX, activations=True)
