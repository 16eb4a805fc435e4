"""What is stored and computed here is what ModelOpt's own fake-quantized UNet stores and computes."""

from __future__ import annotations

import copy

import comfy.model_management
import pytest
import torch
from comfyui_modelopt.formats import FORMATS
from comfyui_modelopt.formats.groups import sharing
from comfyui_modelopt.loaders import dispatch
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import engine, modelopt, quality
from comfyui_modelopt.quantize.bridge import unet as bridge
from comfyui_modelopt.quantize.layers import select
from comfyui_modelopt.quantize.recipe import LayerPlan, Recipe

RECIPES = {
    "int8-max": Recipe("int8", "max"),
    "int8-smoothquant": Recipe("int8", "smoothquant", 0.5),
    "int8-linear-only": Recipe("int8", "max", layers="linear only"),
    "fp8-max": Recipe("fp8", "max"),
    "fp8-mse": Recipe("fp8", "mse"),
    "fp8-per-token": Recipe("fp8", "max", activations="per token"),
    "fp8-linear-only": Recipe("fp8", "max", layers="linear only"),
}
E4M3 = {"num_bits": (4, 3), "axis": None}
INT8 = {"num_bits": 8, "axis": None}
PER_TOKEN = {
    name: {"num_bits": bits, "type": "dynamic", "block_sizes": {-1: None}}
    for name, bits in (("int8", 8), ("fp8", (4, 3)))
}


def records_of(calibration):
    return [record for run in calibration.runs for record in run.records]


class Rows(torch.nn.Module):
    """Some rows of a Linear that is not this module's own."""

    def __init__(self, whole: torch.nn.Module, first: int, last: int):
        super().__init__()
        self.whole, self.first, self.last = [whole], first, last

    def forward(self, x):
        return self.whole[0](x)[..., self.first : self.last]


def join(unet: torch.nn.Module) -> list[str]:
    """Each attention's layers of one input as one Linear, `whole`, whose rows they become: as ModelOpt
    sees a model with fused projections. The groups' names, first to last."""
    found = []
    for group in sharing(name for name, _ in unet.named_modules()):
        if len(group) == 1:
            continue
        parts = [unet.get_submodule(name) for name in group]
        attention = unet.get_submodule(group[0].rpartition(".")[0])
        whole = parts[0]
        weight = torch.cat([part.weight.data for part in parts])
        first = 0
        for name, part in zip(group, parts, strict=True):
            last = first + len(part.weight)
            setattr(attention, name.rpartition(".")[2], Rows(whole, first, last))
            first = last
        whole.weight = torch.nn.Parameter(weight, requires_grad=False)
        whole.out_features = len(weight)
        attention.whole = whole
        found.append(group)
    return found


def part(unet: torch.nn.Module, groups: list[list[str]]) -> None:
    """Undoes `join` after ModelOpt has calibrated: each layer its rows, of weight and maxima."""
    for group in groups:
        attention = unet.get_submodule(group[0].rpartition(".")[0])
        whole = attention.whole
        del attention.whole
        for name in group:
            rows = unet.get_submodule(name)
            own = copy.deepcopy(whole)
            own.weight = torch.nn.Parameter(whole.weight[rows.first : rows.last].clone())
            own.weight_quantizer.reset_amax()
            own.weight_quantizer.amax = whole.weight_quantizer.amax[rows.first : rows.last].clone()
            own.out_features = len(own.weight)
            setattr(attention, name.rpartition(".")[2], own)


def fake_quantized(model, recipe: Recipe, records, dynamic: bool = True) -> torch.nn.Module:
    """ModelOpt's fake-quantized UNet by ModelOpt's plain way: one `mtq.quantize` with the recipe, for
    SmoothQuant of a model whose projections of one input are one Linear.

    dynamic: INT8 Linears quantize their activations per token afterwards, as ours do.
    """
    import modelopt.torch.quantization as mtq

    unet = bridge.copy_unet(model)
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()
    own = select(unet, recipe.layers, list(recipe.skip))
    groups = join(unet) if recipe.algorithm == "smoothquant" else []
    layers = select(unet, recipe.layers, list(recipe.skip))
    modelopt.register(unet, layers)
    weight = {"num_bits": 8, "axis": 0} if recipe.format == "int8" else E4M3
    activation = INT8 if recipe.format == "int8" else E4M3
    config = [{"quantizer_name": "*", "enable": False}]
    for name in layers:
        config.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight})
        config.append({"quantizer_name": f"{name}.input_quantizer", "cfg": activation})
    algorithm = recipe.algorithm
    if algorithm == "smoothquant":
        algorithm = {"method": "smoothquant", "alpha": recipe.alpha}
    if algorithm == "mse":
        algorithm = modelopt.MSE_SEARCH

    def replay(twin):
        for record in records:
            args, kwargs = record.arguments()
            twin(*args, **kwargs)

    mtq.quantize(unet, {"quant_cfg": config, "algorithm": algorithm}, replay)
    part(unet, groups)
    per_token = PER_TOKEN[recipe.format]
    if dynamic and (recipe.format == "int8" or recipe.activations == "per token"):
        for name, kind in own.items():
            if kind == "linear":
                quantizer = unet.get_submodule(name).input_quantizer
                quantizer.reset_amax()
                quantizer.set_from_attribute_config(per_token)
    return unet


@pytest.fixture(scope="module", params=RECIPES)
def case(request, sd15, calibration):
    """(recipe, what we made, ModelOpt's fake-quantized UNet)"""
    recipe = RECIPES[request.param]
    with torch.no_grad():
        made = engine.quantize_model(sd15[0], recipe, calibration)
        theirs = fake_quantized(sd15[0], recipe, records_of(calibration))
    for name, layer in made.checkpoint.layers.items():
        if layer.input_amax is not None:
            # two calibrations may differ in the last place of what the UNet computes in, as two runs
            # of the same GEMM may; from here on both UNets have the same
            quantizer = theirs.get_submodule(name).input_quantizer
            places = 2.0**-9 if torch.cuda.is_available() else 1e-5  # fp16 there, float32 here
            assert quantizer.amax.item() == pytest.approx(layer.input_amax, rel=places)
            quantizer.amax = torch.tensor(layer.input_amax)
    return recipe, made, theirs


@pytest.fixture(scope="module")
def outputs(case):
    """Outputs on the evaluation records: ours in each arithmetic, and ModelOpt's."""
    _, made, theirs = case
    device = comfy.model_management.get_torch_device()
    with torch.no_grad():
        found = {
            arithmetic: bridge.run_loaded(
                loader.load(made.checkpoint, arithmetic=arithmetic), made.records, lambda: None
            )
            for arithmetic in (dispatch.AUTO, dispatch.INTEGER, dispatch.FAKE)
        }
        found["modelopt"] = quality.outputs(
            theirs, made.records, device, torch.float32, lambda: None
        )
    return found


def test_every_selected_layer_is_quantized_and_no_other(case):
    recipe, made, theirs = case
    enabled = {
        name.removesuffix(".weight_quantizer")
        for name, module in theirs.named_modules()
        if name.endswith(".weight_quantizer") and module.is_enabled
    }
    assert set(made.checkpoint.layers) == enabled
    assert any(name.endswith("proj_out") for name in enabled) or recipe.layers == "linear only"
    assert not any("emb_layers" in name or "skip_connection" in name for name in enabled)


def test_stored_values_are_those_modelopt_rounds_to(case):
    _, made, theirs = case
    tensors = made.checkpoint.tensors
    for name, layer in made.checkpoint.layers.items():
        module = theirs.get_submodule(name)
        with torch.no_grad():
            fake = module.weight_quantizer(module.weight.float())
        stored, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert bool((scale > 0).all())
        numerics = FORMATS[layer.format]
        again = numerics.quantize(fake, module.weight_quantizer.amax)["weight"]
        assert torch.equal(stored.float(), again.float()), name
        restored = numerics.dequantize({"weight": stored, "weight_scale": scale}, ())
        # a product with a scale against ModelOpt's quotient: two roundings each
        places = {"int8": 2, "fp8": 0}[layer.format]
        last_place = torch.nextafter(fake.abs(), torch.tensor(torch.inf)) - fake.abs()
        assert bool(((restored - fake).abs() <= places * last_place).all()), name


def test_activation_scales_are_modelopts(case):
    recipe, made, theirs = case
    for name, layer in made.checkpoint.layers.items():
        quantizer = theirs.get_submodule(name).input_quantizer
        if "input_scale" in layer.scales:
            scale = made.checkpoint.tensors[f"{name}.input_scale"]
            qmax = FORMATS[layer.format].QMAX
            torch.testing.assert_close(scale * qmax, quantizer.amax.float().reshape(()))
        if layer.smoothed:
            scale = made.checkpoint.tensors[f"{name}.pre_quant_scale"]
            assert torch.equal(scale, quantizer.pre_quant_scale.float().reshape(-1))
    assert any(x.smoothed for x in made.checkpoint.layers.values()) == (
        recipe.algorithm == "smoothquant"
    )


def distance(a, b):
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def own_spread(case, outputs):
    """How far ModelOpt's UNet comes from itself when its layers' outputs change in the last place:
    some activations then round to the next step, layer after layer."""
    _, made, theirs = case
    torch.manual_seed(0)

    def nudge(_, given, output):
        return output * (1 + 2.0**-23 * torch.randn_like(output))

    hooks = [theirs.get_submodule(n).register_forward_hook(nudge) for n in made.checkpoint.layers]
    device = comfy.model_management.get_torch_device()
    with torch.no_grad():
        nudged = quality.outputs(theirs, made.records, device, torch.float32, lambda: None)
    for hook in hooks:
        hook.remove()
    return distance(nudged, outputs["modelopt"])


def test_unet_agrees_with_modelopts(outputs):
    """In ModelOpt's own order of float32 operations the whole UNet agrees."""
    assert distance(outputs[dispatch.FAKE], outputs["modelopt"]) < 1e-3


def test_integer_products_are_as_near_to_modelopt_as_modelopt_is_to_itself(outputs, own_spread):
    """Integer products differ from float32 ones in the last place."""
    found = distance(outputs[dispatch.INTEGER], outputs["modelopt"])
    assert found < max(3 * own_spread, 1e-3)


def test_every_layer_agrees_with_modelopts(case):
    """Given ModelOpt's input, each layer's integer arithmetic gives ModelOpt's output."""
    _, made, theirs = case
    model = loader.load(made.checkpoint, arithmetic=dispatch.INTEGER)
    comfy.model_management.load_models_gpu([model])
    ours = model.model.diffusion_model
    worst = {}

    def compare(name):
        def hook(_, given, output):
            mine = ours.get_submodule(name)(given[0])
            worst[name] = ((mine - output).norm() / output.norm()).item()

        return hook

    hooks = [
        theirs.get_submodule(n).register_forward_hook(compare(n)) for n in made.checkpoint.layers
    ]
    with torch.no_grad():
        args, kwargs = made.records[len(made.records) // 2].arguments()
        theirs(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    assert worst.keys() == made.checkpoint.layers.keys()
    assert max(worst.values()) < 1e-3, max(worst.items(), key=lambda item: item[1])


def test_quality_is_modelopts(case, outputs):
    _, made, _ = case
    figures = {k: quality.summary(made.references, o)["sqnr_db"] for k, o in outputs.items()}
    assert abs(figures[dispatch.INTEGER] - figures["modelopt"]) < 0.5
    # a file that stock opens runs without rounding activations where there are no FP8 units
    assert figures[dispatch.AUTO] > figures["modelopt"] - 0.5


def test_per_token_activations_are_no_worse_than_static(sd15, calibration):
    device = comfy.model_management.get_torch_device()
    records = records_of(calibration)
    recipe = RECIPES["int8-linear-only"]
    with torch.no_grad():
        reference = quality.outputs(
            bridge.copy_unet(sd15[0]), records, device, torch.float32, lambda: None
        )
        figures = {}
        for dynamic in (True, False):
            unet = fake_quantized(sd15[0], recipe, records, dynamic)
            outputs = quality.outputs(unet, records, device, torch.float32, lambda: None)
            figures[dynamic] = quality.summary(reference, outputs)["sqnr_db"]
    assert figures[True] >= figures[False]


def test_smoothquant_beats_max_where_activations_have_outliers():
    """One Linear whose input has a few channels 50 times larger than the rest, per-token INT8."""
    from comfyui_modelopt.kernels import int8 as kernels

    torch.manual_seed(0)
    x = torch.randn(256, 320)
    x[:, ::40] *= 50
    layer = torch.nn.Linear(320, 256, bias=False)
    expected = layer(x)
    errors = {}
    for smoothed in (False, True):
        module = copy.deepcopy(layer)
        scale = None
        if smoothed:
            holder = torch.nn.ModuleDict({"layer": module})
            plan = LayerPlan("linear", "int8", "smoothquant")
            modelopt.calibrate(holder, {"layer": plan}, lambda m: m["layer"](x))
            modelopt.smooth(module, 0.5)
            scale = module.input_quantizer.pre_quant_scale.float().reshape(-1)
        weight = module._parameters["weight"].data
        stored = FORMATS["int8"].quantize(weight, FORMATS["int8"].weight_amax(weight))
        given = x if scale is None else x * scale
        out = kernels.linear_reference(given, stored["weight"], stored["weight_scale"], None)
        errors[smoothed] = (out - expected).norm().item()
    assert errors[True] < 0.7 * errors[False]


def test_a_channel_that_was_silent_is_smoothed_as_the_quietest_other():
    """ModelOpt's 10000 would overflow 16 bits as soon as the channel carries anything."""
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    x[:, 3] = 0
    module = torch.nn.Linear(32, 16, bias=False)
    holder = torch.nn.ModuleDict({"layer": module})
    plan = LayerPlan("linear", "int8", "smoothquant")
    modelopt.calibrate(holder, {"layer": plan}, lambda m: m["layer"](x))
    modelopt.smooth(module, 0.5)
    scale = module.input_quantizer.pre_quant_scale.float().reshape(-1)
    others = torch.cat([scale[:3], scale[4:]])
    weight = module.weight.abs().amax(0)
    assert scale[3] < 4 * others.max() and weight.isfinite().all()
    # where all channels carry something the numbers are ModelOpt's own, as above
