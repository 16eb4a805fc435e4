"""Automatic mixed precision on a real UNet: budgets are met, nothing is worse than one format alone."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections import OrderedDict

import pytest
import torch
from comfyui_modelopt.formats import files
from comfyui_modelopt.formats.groups import sharing
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.nodes.auto_and_load import low_precision
from comfyui_modelopt.quantize import (
    assign,
    auto,
    candidates,
    engine,
    local,
    mixed,
    quality,
    sensitivity,
)
from comfyui_modelopt.quantize.auto import Goal
from comfyui_modelopt.quantize.bridge import unet as bridge
from comfyui_modelopt.quantize.calibration import Calibration
from comfyui_modelopt.quantize.layers import DEFAULT_SKIP, LINEAR_AND_CONV
from comfyui_modelopt.quantize.recipe import Recipe

FORMATS = ["int8", "int4"]


@pytest.fixture(scope="module", autouse=True)
def without_slow_algorithms():
    """Searches of scales take ten times as long as the rest; tests/quantize/test_mixed.py and the
    end-to-end tests have them in a mix."""
    with pytest.MonkeyPatch.context() as patch:
        quick = {
            "int8": ({"algorithm": "max"}, {"algorithm": "smoothquant"}),
            "int4": ({"algorithm": "max"},),
            "nvfp4": ({"algorithm": "max"},),
        }
        for name, recipes in quick.items():
            one = dataclasses.replace(candidates.CANDIDATES[name], recipes=recipes)
            patch.setitem(candidates.CANDIDATES, name, one)
        yield


@pytest.fixture(scope="module")
def search(sd15, calibration):
    def run(goal: Goal, formats=FORMATS, tell=lambda text: None, sixteen=True):
        return auto.auto_quantize(
            sd15[0],
            calibration,
            formats,
            goal,
            LINEAR_AND_CONV,
            DEFAULT_SKIP,
            low_precision,
            sixteen,
            tell,
        )

    return run


@pytest.fixture(scope="module")
def sizes(search):
    """Uniform int8's and int4's file sizes, and the SQNR of each."""
    found = search(Goal("bits", 6.0))
    return {recipe.format: (size, sqnr) for recipe, size, sqnr in found.uniform}


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0, 1.3])
def test_a_size_is_met_and_no_format_alone_is_better(search, sizes, tmp_path, share):
    (large, _), (small, _) = sizes["int8"], sizes["int4"]
    target = small + share * (large - small)
    found = search(Goal("size", target))
    files.write(found.made.checkpoint, tmp_path / "made.safetensors")
    size = (tmp_path / "made.safetensors").stat().st_size
    assert 0.99 * target <= size <= target
    for recipe, alone, sqnr in found.uniform:
        assert alone > target or found.measured >= sqnr, recipe


def size_of(made: engine.Quantized) -> int:
    """Bytes of the file, with the quality that the nodes measure."""
    engine.measure(made, loader.load(made.checkpoint))
    return files.size(made.checkpoint)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_no_file_of_quantize_of_that_size_is_better(search, sd15, calibration, form):
    """The target is to the byte what Quantize makes, with that format alone or among others."""
    plain = [Recipe(form, **options) for options in candidates.CANDIDATES[form].recipes]
    for recipe in plain:
        made = engine.quantize_model(sd15[0], recipe, calibration)
        outputs = bridge.run_loaded(low_precision(made.checkpoint), made.records, lambda: None)
        alone, target = quality.decibel(made.references, outputs), size_of(made)
        for formats in ([form], FORMATS):
            found = search(Goal("size", target), formats, sixteen=formats != [form])
            assert size_of(found.made) <= target
            assert found.measured >= alone
            assert target in [size for one, size, _ in found.uniform if one == recipe]
    assert found.made.checkpoint.header["recipe"]["format"] in ("mixed", form)


def test_one_recipe_for_all_layers_is_quantizes_own(search, sd15, calibration, tmp_path):
    """The same bytes, and its JSON gives them again."""
    (recipe,) = [Recipe("int4", **one) for one in candidates.CANDIDATES["int4"].recipes]
    made = engine.quantize_model(sd15[0], recipe, calibration)
    found = search(Goal("size", size_of(made)), ["int4"], sixteen=False)
    assert found.recipe == recipe
    again = engine.quantize_model(sd15[0], mixed.read(mixed.write(found.recipe)), calibration)
    for name, one in (("plain", made), ("auto", found.made), ("again", again)):
        size_of(one)
        files.write(one.checkpoint, tmp_path / name)
    plain, auto_, again_ = ((tmp_path / name).read_bytes() for name in ("plain", "auto", "again"))
    assert plain == auto_ == again_


def test_bits_are_met(search):
    found = search(Goal("bits", 6.0))
    table, tensors = found.made.checkpoint.layers, found.made.checkpoint.tensors
    stored = sum(
        8 * tensors[f"{name}.{key}"].nbytes
        for name, layer in table.items()
        for key in ("weight", *layer.scales)
    )
    left = [name for name in found.all_layers if name not in table]
    stored += sum(8 * tensors[f"{name}.weight"].nbytes for name in left)
    weights = sum(
        math.prod(table[name].shape or tensors[f"{name}.weight"].shape)
        if name in table
        else tensors[f"{name}.weight"].numel()
        for name in found.all_layers
    )
    assert 0.99 * 6 <= stored / weights <= 6


def test_a_quality_is_met_with_fewer_bytes(search, sizes):
    size, sqnr = sizes["int8"]
    found = search(Goal("quality", sqnr - 4))
    assert found.measured >= sqnr - 4
    assert files.size(found.made.checkpoint) < size


def test_a_quality_that_no_mix_is_predicted_to_reach(search, sizes, monkeypatch):
    """The prediction may be too low: a recipe that was measured to keep it is taken."""
    monkeypatch.setattr(assign, "least_size", lambda *_: None)
    found = search(Goal("quality", sizes["int8"][1] - 3), sixteen=False)
    assert found.measured >= sizes["int8"][1] - 3
    assert "One recipe for all layers, int8 " in found.notes[0]


@pytest.mark.parametrize("above", [1.0, 12.0])
def test_a_quality_above_every_recipe_is_met_with_layers_in_16_bits(search, sizes, above):
    """Also where the prediction, too low for so little noise, would leave all in 16 bits."""
    target = sizes["int8"][1] + above
    found = search(Goal("quality", target))
    assert found.measured >= target
    assert found.made.checkpoint.layers


def test_what_was_tried_is_not_tried_again(search, sizes, monkeypatch):
    told, real = [], assign.least_size
    fixed = []

    def same(options, noise):
        fixed.append(real(options, noise) if not fixed else fixed[0])
        return fixed[0]

    monkeypatch.setattr(assign, "least_size", same)
    with contextlib.suppress(ValueError):
        search(Goal("quality", sizes["int8"][1] - 8), tell=told.append)
    assert len(fixed) <= 2
    assert sum(text.startswith("Quantizing: ") for text in told) <= 2  # one of them uniform


def test_samples_stay_within_their_memory(sd15, calibration, monkeypatch):
    model, names = sd15[0], ["middle_block.0.in_layers.2", "input_blocks.1.1.proj_in"]
    monkeypatch.setattr(local, "LIMIT", 2**20)
    with torch.inference_mode(False), torch.no_grad():
        samples, _ = sensitivity.listen(
            bridge.copy_unet(model),
            names,
            list(calibration),
            model.load_device,
            model.model.get_dtype_inference(),
            bridge.differentiable_attention(),
            lambda: None,
        )
    held = [t for those in samples.values() for s in those for t in (s.given, s.made, s.gradient)]
    assert 0 < sum(tensor.nbytes for tensor in held) <= 2**20


class Steep(torch.nn.Module):
    """A model whose gradient is too large for float16 unless it is scaled down."""

    def __init__(self, factor: float):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8, dtype=torch.float16)
        self.factor = factor

    def forward(self, x, timesteps, **_):
        return self.layer(x.flatten(1)[:, :8]) * self.factor


@pytest.mark.parametrize(("factor", "works"), [(1e-6, True), (1e4, True), (torch.inf, False)])
def test_gradients_in_float16(factor, works):
    from comfyui_modelopt.quantize.records import Record

    torch.manual_seed(0)
    model, record = Steep(factor), Record(torch.rand(2, 1, 4, 4) + 0.5, torch.ones(2))

    def listen():
        return sensitivity.listen(
            model, ["layer"], [record], "cpu", torch.float16, {}, lambda: None
        )

    if not works:
        with pytest.raises(ValueError, match="gradients of the UNet's output must be finite"):
            listen()
        return
    (sample,) = listen()[0]["layer"]
    v = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sample.gradient, v * factor, rtol=1e-2)


def test_fused_layers_share_a_format(search, sizes):
    found = search(Goal("size", sum(size for size, _ in sizes.values()) / 2))
    assignment = found.recipe.assignment
    assert one_format_a_group(found.made.checkpoint.layers, found.all_layers) == 8
    assert len(set(assignment.values())) > 1 or len(assignment) < len(found.all_layers)


def one_format_a_group(layers, names) -> int:
    """Checks it of the layers as they are in the file. -> groups of several."""
    groups = [group for group in sharing(names) if len(group) > 1]
    for group in groups:
        assert len({getattr(layers.get(name), "format", None) for name in group}) == 1, group
    return len(groups)


@pytest.mark.parametrize("layers", ["linear only", LINEAR_AND_CONV])
def test_fused_layers_share_a_format_where_one_may_not_have_it(sd15, calibration, layers):
    """ComfyUI reads the architecture from the first cross-attention's k, which nvfp4 must not pack."""
    found = auto.auto_quantize(
        *(sd15[0], calibration, ["nvfp4", "int8"], Goal("bits", 5.0), layers, DEFAULT_SKIP),
        *(low_precision, False),
    )
    made = found.made.checkpoint.layers
    assert one_format_a_group(made, found.all_layers) == 8
    attention = "input_blocks.1.1.transformer_blocks.0.attn2"
    assert {made[f"{attention}.{name}"].format for name in ("to_k", "to_v")} == {"int8"}
    assert made[f"{attention}.to_q"].format == "nvfp4"
    alone = engine.quantize_model(
        sd15[0], Recipe("nvfp4", "max", layers=layers), calibration
    ).checkpoint.layers
    assert one_format_a_group(alone, found.all_layers) == 8


def test_the_recipe_gives_the_same_file(search, sizes, sd15, calibration, tmp_path):
    found = search(Goal("size", sum(size for size, _ in sizes.values()) / 2))
    recipe = mixed.read(mixed.write(found.recipe))
    again = engine.quantize_model(sd15[0], recipe, calibration)
    for name, made in (("first", found.made), ("second", again)):
        engine.measure(made, loader.load(made.checkpoint))
        files.write(made.checkpoint, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_second_target_measures_nothing_anew(search, sizes):
    told = []
    search(Goal("bits", 7.0), tell=told.append)
    assert not [text for text in told if "Sensitivity" in text or "can be made" in text]
    assert told


def test_another_calibration_or_model_is_measured_anew(sd15, calibration):
    told = []

    def run(model, recorded):
        goal = Goal("bits", 9.0)
        auto.auto_quantize(
            model,
            recorded,
            ["int8"],
            goal,
            "linear only",
            DEFAULT_SKIP,
            low_precision,
            True,
            told.append,
        )
        found = sum("Sensitivity: gradients" in text for text in told)
        told.clear()
        return found

    short = Calibration(calibration.runs, calibration.signature, calibration.source)
    patched = sd15[0].clone()
    key = "diffusion_model.input_blocks.1.1.proj_in.weight"
    patched.add_patches({key: (torch.ones(320, 320, 1, 1),)}, 0.01)
    assert [run(sd15[0], short), run(sd15[0], short), run(patched, short)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Goal("size", 1e6), "cannot be reached, the allowed formats need"),
        (Goal("bits", 2.0), "cannot be reached, the allowed formats need 4"),
        (Goal("quality", 500.0), "leaves all in 16 bits|was not reached with the allowed formats"),
    ],
)
def test_what_cannot_be_reached_is_said(search, goal, message):
    with pytest.raises(ValueError, match=message):
        search(goal)


@pytest.mark.parametrize("goal", [Goal("size", 1e6), Goal("bits", 2.0)])
def test_what_shapes_cannot_reach_is_said_before_the_search(search, goal, monkeypatch):
    def measure(*_):
        raise AssertionError("it was searched")

    monkeypatch.setattr(auto.candidates, "measure", measure)
    with pytest.raises(ValueError, match="cannot be reached, the allowed formats need"):
        search(goal)
    with pytest.raises(AssertionError, match="it was searched"):
        search(Goal("bits", 6.0))


def test_no_format_allowed(search):
    with pytest.raises(ValueError, match="at least one format"):
        search(Goal("bits", 6.0), formats=[])


def test_costs_are_those_of_modelopts_objective(sd15, calibration, monkeypatch):
    """Squared gradients of <v, output> times squared changes, here over all positions of a layer."""
    monkeypatch.setattr(local, "POSITIONS", 4096)
    model = sd15[0]
    names = ["input_blocks.1.1.transformer_blocks.0.ff.net.2", "middle_block.0.in_layers.2"]
    record = quality.pick(list(calibration), 2)[0]
    dtype, options = model.model.get_dtype_inference(), bridge.differentiable_attention()
    with torch.inference_mode(False), torch.no_grad():
        twin = bridge.copy_unet(model)
        samples, signal = sensitivity.listen(
            twin, names, [record], model.load_device, dtype, options, lambda: None
        )
        plain = bridge.copy_unet(model)
        args, kwargs = record.arguments(model.load_device, dtype, options)
    other = {name: copy.copy(plain.get_submodule(name)) for name in names}
    for module in other.values():
        module._parameters, module._forward_hooks = dict(module._parameters), OrderedDict()
        module._parameters["weight"] = torch.nn.Parameter(module.weight.detach().half().float())
        module._parameters["weight"].data *= 1.01
    heard = {}

    def hook(name):
        def take(module, given, output):
            output.retain_grad()
            heard[name] = (given[0].detach(), output)

        return take

    for name in names:
        plain.get_submodule(name).register_forward_hook(hook(name))
    with torch.inference_mode(False), torch.enable_grad():
        output = plain(args[0].clone().requires_grad_(), *args[1:], **kwargs)
        v = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        (output * v).sum().backward()
    assert math.isclose(signal, output.detach().double().square().sum().item(), rel_tol=1e-5)
    for name in names:
        given, made = heard[name]
        with torch.no_grad():
            change = other[name](given) - made
            wanted = (made.grad.double() * change.double()).square().sum().item()
            found = sum(s.cost(other[name], model.load_device, dtype) for s in samples[name])
        assert math.isclose(found, wanted, rel_tol=1e-3), name


def test_gradient_checkpointing_changes_nothing(sd15, calibration):
    model, record = sd15[0], next(iter(calibration))
    args, kwargs = record.arguments(
        model.load_device, model.model.get_dtype_inference(), bridge.differentiable_attention()
    )
    outputs = []
    with torch.inference_mode(False):
        for change in (lambda unet: None, sensitivity.checkpointed):
            unet = bridge.copy_unet(model)
            change(unet)
            x = args[0].clone().requires_grad_()
            output = unet(x, *args[1:], **copy.copy(kwargs))
            output.square().sum().backward()
            outputs.append((output.detach(), x.grad))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.allclose(outputs[0][1], outputs[1][1], rtol=1e-5, atol=1e-6)


def test_a_model_loaded_in_inference_mode(checkpoints, calibration):
    """As ComfyUI's server loads it: a backward pass cannot use such tensors, nor such records."""
    import comfy.sd

    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(checkpoints / "sd15.safetensors"))[0]
        before = [p.data_ptr() for p in model.model.diffusion_model.parameters()]
        found = auto.auto_quantize(
            model,
            calibration,
            ["int8"],
            Goal("bits", 9.0),
            "linear only",
            DEFAULT_SKIP,
            low_precision,
        )
    assert found.measured > 0
    assert before == [p.data_ptr() for p in model.model.diffusion_model.parameters()]


def test_weights_only_int8_needs_no_recording(sd15):
    recipe = Recipe("int8", "mse", activations="16 bits")
    made = engine.quantize_model(sd15[0], recipe)
    assert all(layer.weight_only for layer in made.checkpoint.layers.values())
    with pytest.raises(ValueError, match="go with max or mse"):
        Recipe("int8", "smoothquant", activations="16 bits")
