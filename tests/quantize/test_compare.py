"""Compare: its figures are those of an independent computation, and a damaged layer is named."""

from __future__ import annotations

import dataclasses
import json
import math

import comfy.model_management
import comfy.sd
import comfy.utils
import numpy
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.formats.checkpoint import SIXTEEN, Layer, QuantizedCheckpoint
from comfyui_modelopt.kernels import backends
from comfyui_modelopt.loaders import info
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.loaders.fused import FusedResBlock
from comfyui_modelopt.nodes.compare import Compare, settings_of
from comfyui_modelopt.quantize import compare, engine, local, pictures, quality
from comfyui_modelopt.quantize.calibration import Calibration
from comfyui_modelopt.quantize.mixed import Mixed
from comfyui_modelopt.quantize.recipe import Recipe
from comfyui_modelopt.utils.compare_report import OTHER_WEIGHTS, compare_report, worst_layers

INT8 = Recipe("int8", "max")
# a Linear and a convolution of the first, the middle and the last block
DAMAGED = [
    "input_blocks.1.0.in_layers.2",
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "middle_block.2.out_layers.3",
    "middle_block.1.transformer_blocks.0.ff.net.2",
    "output_blocks.1.0.in_layers.2",
    "output_blocks.1.1.transformer_blocks.0.attn2.to_out.0",
]


@pytest.fixture(scope="module")
def pair(sd15, quantized):
    return sd15[0], loader.load(quantized(INT8).checkpoint)


@pytest.fixture(scope="module")
def short(calibration):
    """Two of the recorded calls."""
    run = calibration.runs[0].thinned(2)
    return Calibration((run,), calibration.signature, calibration.source)


def compared(pair, calibration, settings=None):
    return compare.compare(*pair, calibration, info.quantized_layers(pair[1]), settings)


def db(reference: numpy.ndarray, other: numpy.ndarray) -> float:
    return 20 * math.log10(numpy.linalg.norm(reference) / numpy.linalg.norm(reference - other))


def call(model, record) -> torch.Tensor:
    comfy.model_management.load_models_gpu([model])
    with torch.no_grad():
        return model.model.diffusion_model(
            record.x.float(), record.timesteps, context=record.context.float()
        )


def hooks(model) -> int:
    return sum(len(module._forward_hooks) for module in model.model.modules())


@pytest.fixture(scope="module")
def by_hand(pair, calibration):
    """Outputs of both MODELs for each record, as numpy arrays in float64."""
    return [
        [call(model, record).double().numpy().ravel() for record in calibration] for model in pair
    ]


# ---- figures


def test_output_equals_a_computation_by_hand(pair, calibration, by_hand):
    found = compared(pair, calibration)
    assert found.calls == len(calibration)
    assert found.energy.db == pytest.approx(db(*map(numpy.concatenate, by_hand)), abs=1e-4)
    wanted: dict[float, list] = {}
    for record, *both in zip(calibration, *by_hand, strict=True):
        wanted.setdefault(float(record.timesteps[0]), []).append(both)
    assert [step.timestep for step in found.steps] == sorted(wanted, reverse=True)
    sampling = pair[0].model.model_sampling
    for step in found.steps:
        both = [numpy.concatenate(values) for values in zip(*wanted[step.timestep], strict=True)]
        assert step.energy.db == pytest.approx(db(*both), abs=1e-4)
        assert step.sigma == pytest.approx(float(sampling.sigma(torch.tensor(step.timestep))))
    each = [db(*both) for both in zip(*by_hand, strict=True)]
    assert found.worst.energy.db == pytest.approx(min(each), abs=1e-4)
    figures = json.loads(json.dumps(found.figures(), allow_nan=False))
    assert figures["sqnr_db"] == pytest.approx(found.energy.db, abs=1e-3)


def test_layers_equal_a_computation_by_hand(pair, short, monkeypatch):
    """Every input and output of every layer, kept whole, and what the quantized layer makes of it."""
    seen: dict[str, list] = {name: [] for name in info.quantized_layers(pair[1])}
    unet = pair[0].model.diffusion_model
    handles = [
        unet.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen[name].append((args[0].clone(), output.clone()))
        )
        for name in seen
    ]
    for record in short:
        call(pair[0], record)
    for handle in handles:
        handle.remove()
    comfy.model_management.load_models_gpu([pair[1]])
    wanted = {}
    for name, calls in seen.items():
        layer = pair[1].model.diffusion_model.get_submodule(name)
        with torch.no_grad():
            made = [(output, layer(given)) for given, output in calls]
        both = [torch.cat(one).double().numpy().ravel() for one in zip(*made, strict=True)]
        wanted[name] = db(*both)

    monkeypatch.setattr(local, "POSITIONS", 10**6)
    whole = {one.name: one.energy.db for one in compared(pair, short).layers}
    assert list(whole) == [name for name, _ in unet.named_modules() if name in wanted]
    assert whole == pytest.approx(wanted, abs=0.01)
    monkeypatch.undo()
    sampled = {one.name: one.energy.db for one in compared(pair, short).layers}
    assert sampled == pytest.approx(wanted, abs=2.0)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_window_of_a_convolution_gives_what_the_whole_map_has_there(
    size, stride, padding, dilation
):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, size, stride, padding, dilation).double()
    x = torch.randn(2, 3, 31, 23, dtype=torch.float64)
    with torch.no_grad():
        output = conv(x)
        for number in range(3):
            places = local._windows(conv, x, output, 64, number)
            assert len(places) == 4
            for place in places:
                one = local.Sample(place.given, place.of(output), place.crop)
                assert one.made.shape == (1, 5, 4, 4)
                assert one.given.numel() < x.numel() / 2
                assert one.compare(conv, torch.device("cpu"), torch.float64).db > 250
        for row in range(output.shape[2] - 3):  # every place, edges included
            inner, outer, crop = local._span(row, output.shape[2], 31, conv, 0)
            found = conv(x[:, :, inner])[:, :, crop]
            assert torch.allclose(found, output[:, :, outer], atol=1e-12)


def test_tokens_are_taken_from_everywhere():
    index = local._scattered(4096, 64, 0)
    assert len(set(index.tolist())) == 64 and index.max() < 4096
    assert len({int(i) % 64 for i in index}) > 30  # of many columns of a 64 x 64 picture
    assert torch.equal(index // 64, torch.arange(64))  # and every row
    assert not torch.equal(index, local._scattered(4096, 64, 1))
    assert torch.equal(local._scattered(10, 64, 0), torch.arange(10))


@pytest.mark.parametrize("limit", [4 * 2**20, 12 * 2**20])
def test_samples_stay_within_their_memory(pair, short, monkeypatch, limit):
    monkeypatch.setattr(local, "LIMIT", limit)
    monkeypatch.setattr(local, "CALLS", 2)
    kept = []
    real = local.Sample
    monkeypatch.setattr(local, "Sample", lambda *args: kept.append(real(*args)) or kept[-1])
    found = compared(pair, short)
    assert len(found.layers) == len(info.quantized_layers(pair[1]))
    assert 0 < sum(one.given.nbytes + one.made.nbytes for one in kept) <= limit


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_full_models_fit_the_bound_with_all_calls(family):
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {"image_size": 32, "in_channels": 4, "model_channels": 320, "out_channels": 4}
    config |= dict(synthetic.UNETS[family, "full"]) | {"use_spatial_transformer": True}
    config |= {"dtype": torch.float16, "operations": comfy.ops.disable_weight_init}
    with torch.device("meta"):
        unet = UNetModel(**config)
    modules = {n: m for n, m in unet.named_modules() if local.kind(m) and "blocks" in n}
    assert len(modules) > 100
    calls, positions = local.budget(modules, 2)
    assert calls == local.CALLS and positions >= local.WINDOW
    used = calls * positions // local.WINDOW * 2 * sum(map(local._values, modules.values()))
    assert used <= local.LIMIT


# ---- the layer that is damaged


def scaled(checkpoint, key: str, factor: float) -> QuantizedCheckpoint:
    """The checkpoint with one tensor times `factor`."""
    tensors = checkpoint.tensors | {key: checkpoint.tensors[key] * factor}
    return QuantizedCheckpoint(tensors, checkpoint.layers, dict(checkpoint.header))


def advised(found) -> tuple[str, list[str]]:
    """The last sentence of the report, and the lines for `skip` behind it."""
    lines = compare_report(found).splitlines()
    start = next(i for i, line in enumerate(lines) if "Lines to add to `skip`" in line)
    return lines[start], lines[start + 1 :]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_layer_damaged_on_purpose_is_named_worst(sd15, quantized, short, name):
    damaged = scaled(quantized(INT8).checkpoint, f"{name}.weight_scale", 1.3)
    # convolutions of other layers, too, are given blocks that hand on 8 bits
    model = loader.load(damaged, backend=backends.REFERENCE)
    assert any(isinstance(m, FusedResBlock) for m in model.model.diffusion_model.modules())
    found = compared((sd15[0], model), short)
    first, second = worst_layers(found.layers)[:2]
    assert first.name == name
    assert first.energy.db == pytest.approx(20 * math.log10(1 / 0.3), abs=2)
    assert second.energy.db > first.energy.db + 3
    text = compare_report(found)
    assert f"1. {first.energy.db:.1f} dB  {name} (int8): stands out; " in text
    assert text.splitlines()[-8] == name


def layer_result(number: int, form: str, db: float) -> compare.LayerResult:
    energy = quality.Energy(1.0, 10 ** (-db / 10))
    return compare.LayerResult(f"{form}.{number}", Layer(form, "linear"), "linear", 100, energy)


def test_a_damaged_layer_of_8_bits_is_named_before_sound_ones_of_4():
    layers = [layer_result(i, "int4", 18.0 + 0.1 * i) for i in range(10)]
    layers += [layer_result(i, "int8", 40.0 + 0.1 * i) for i in range(9)]
    layers.insert(5, layer_result(9, "int8", 20.0))
    named = [one.name for one in worst_layers(layers)]
    assert named == ["int8.9", *(f"int4.{i}" for i in range(7))]
    step = compare.Step(500.0, 1.0, 1, quality.Energy(1.0, 0.01))
    text = compare_report(compare.Compared([step], step, layers))
    assert "Those that stand out, then those with most noise:" in text
    assert "  1. 20.0 dB  int8.9 (int8): stands out; smoothquant, or skip it" in text
    assert text.count("stands out") == 1


def test_the_furthest_below_an_ordinary_one_is_named_first():
    """20 dB lower is more damage to 8 bits than 10 dB lower to 4, which leave less."""
    layers = [layer_result(i, "int4", 19.0 + 0.1 * i) for i in range(10)]
    layers += [layer_result(i, "int8", 40.0 + 0.1 * i) for i in range(9)]
    layers += [layer_result(10, "int4", 9.0), layer_result(9, "int8", 20.0)]
    assert [one.name for one in worst_layers(layers)][:3] == ["int8.9", "int4.10", "int4.0"]


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_of_few_layers_the_bits_say_what_is_ordinary(form):
    """Of four and more their median does."""
    low = {"int8": 28.0, "int4": 18.0}[form] - 6
    for db, out in ((low + 0.1, False), (low - 0.1, True)):
        layers = [layer_result(i, form, db) for i in range(3)]
        step = compare.Step(500.0, 1.0, 1, quality.Energy(1.0, 0.01))
        text = compare_report(compare.Compared([step], step, layers))
        assert text.count(": stands out; ") == 3 * out
        assert ("No layer stands out. If the whole is not near enough: " in text) != out
        text = compare_report(compare.Compared([step], step, [*layers, layers[0]]))
        assert ": stands out; " not in text


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", 1.05),
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", 1.1),
        ("middle_block.1.transformer_blocks.0.ff.net.2", 1.05),
        ("output_blocks.1.1.transformer_blocks.0.attn2.to_out.0", 1.1),
        ("input_blocks.1.1.proj_in", 1.1),
        ("output_blocks.1.1.proj_out", 1.1),
    ],
)
def test_what_is_far_below_its_kind_is_named_before_sound_convolutions(
    sd15, quantized, short, name, factor
):
    """Convolutions over neighbours have half of a smoothed Linear's dB without any damage."""
    checkpoint = quantized(Recipe("int8", "smoothquant", 0.5)).checkpoint
    damaged = loader.load(scaled(checkpoint, f"{name}.weight_scale", factor))
    found = compared((sd15[0], damaged), short)
    first = worst_layers(found.layers)[0]
    assert first.name == name
    assert min(one.energy.db for one in found.layers) < first.energy.db
    words = f"  1. {first.energy.db:.1f} dB  {name} (int8{', smoothed' * first.layer.smoothed}): stands out; "
    assert words in compare_report(found)


def test_a_lone_layer_of_8_bits_among_those_of_4(sd15, calibration, short):
    """No other of its kind says what is ordinary for it."""
    lone = "middle_block.1.transformer_blocks.0.attn2.to_out.0"
    names = [
        name
        for name, module in sd15[0].model.diffusion_model.named_modules()
        if local.kind(module) == "linear" and "transformer_blocks" in name
    ]
    mix = Mixed(
        (Recipe("int4", "max"), Recipe("int8", "max")), {name: int(name == lone) for name in names}
    )
    checkpoint = engine.quantize_model(sd15[0], mix, calibration).checkpoint
    sound = compared((sd15[0], loader.load(checkpoint)), short)
    assert [one.layer.format for one in sound.layers if one.name == lone] == ["int8"]
    assert sum(one.layer.format == "int4" for one in sound.layers) > 20
    assert lone not in [one.name for one in worst_layers(sound.layers)]
    damaged = loader.load(scaled(checkpoint, f"{lone}.weight_scale", 1.1))
    found = compared((sd15[0], damaged), short)
    first = worst_layers(found.layers)[0]
    assert first.name == lone and 15 < first.energy.db < 22
    assert f"{lone} (int8): stands out; smoothquant, or skip it" in compare_report(found)


def test_nothing_in_8_bits_is_nearer_than_activations_in_16(sd15, quantized, short):
    recipe = Recipe("int8", "max", activations=SIXTEEN)
    name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    for one in (name, "input_blocks.1.0.in_layers.2"):
        damaged = scaled(quantized(recipe).checkpoint, f"{one}.weight_scale", 1.3)
        found = compared((sd15[0], loader.load(damaged)), short)
        words = f"  {one} (int8, activations 16 bits): stands out; skip it\n"
        assert words in compare_report(found)
        sentence, named = advised(found)
        assert sentence.startswith("What to do: skip it. Lines to add") and named[0] == one


# ---- layers that are not quantized


@pytest.mark.parametrize("name", ["out.2", "input_blocks.0.0", "output_blocks.0.0.skip_connection"])
def test_a_layer_with_other_weights_is_named_though_it_is_not_quantized(
    sd15, quantized, short, name
):
    checkpoint = quantized(INT8).checkpoint
    assert name not in checkpoint.layers
    model = loader.load(scaled(checkpoint, f"{name}.weight", 1.5))
    found = compared((sd15[0], model), short)
    text = compare_report(found)
    first = worst_layers(found.layers)[0]
    assert (first.name, first.layer) == (name, OTHER_WEIGHTS)
    assert first.energy.db == pytest.approx(20 * math.log10(1 / 0.5), abs=2)
    assert f"Not quantized, but with other weights than the reference's: {name}. The quant" in text
    assert (
        f"{name} (16 bits, other weights): stands out; quantize the reference's own MODEL" in text
    )
    sentence, named = advised(found)
    assert len(named) == 7 and name not in named and "which leave these 7 in" in sentence
    assert set(named) <= checkpoint.layers.keys()
    assert f"\n{len(checkpoint.layers)} quantized layers, each by itself" in text


def test_a_norm_with_other_weights_is_said(sd15, quantized, short):
    for key in ("middle_block.1.norm.weight", "output_blocks.0.0.in_layers.0.bias"):
        model = loader.load(scaled(quantized(INT8).checkpoint, key, 1.5))
        found = compared((sd15[0], model), short)
        name = key.rpartition(".")[0]
        assert f"other weights than the reference's: {name}. The" in compare_report(found)
        assert all(one.layer != OTHER_WEIGHTS for one in found.layers)


def test_no_more_than_a_few_are_named(sd15, quantized, short):
    checkpoint = quantized(INT8).checkpoint
    kept = [key for key in checkpoint.tensors if key.endswith("norm1.weight")]
    kept += [key for key in checkpoint.tensors if key.endswith(("norm2.weight", "norm3.weight"))]
    tensors = checkpoint.tensors | {key: checkpoint.tensors[key] * 2 for key in kept}
    model = loader.load(QuantizedCheckpoint(tensors, checkpoint.layers, dict(checkpoint.header)))
    (note,) = compared((sd15[0], model), short).notes
    assert note.count("norm") == 6 and f" and {len(kept) - 6} more. The" in note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_other_16_bits_makes_no_other_weights(sd15, quantized, short, dtype):
    generator = torch.Generator().manual_seed(0)
    state = {
        name: tensor.float() * (1 + 1e-3 * torch.rand(tensor.shape, generator=generator))
        for name, tensor in sd15[0].model.diffusion_model.state_dict().items()
    }
    tiny = "out.0.bias"  # below what float16 holds
    state[tiny] = torch.full_like(state[tiny], 1e-9)
    reference = comfy.sd.load_diffusion_model_state_dict(dict(state), {"dtype": torch.float32})
    checkpoint = quantized(INT8).checkpoint
    tensors = dict(checkpoint.tensors)
    for key in tensors.keys() & state.keys():
        if key.rpartition(".")[0] not in checkpoint.layers:
            tensors[key] = state[key].to(dtype)
    model = loader.load(QuantizedCheckpoint(tensors, checkpoint.layers, dict(checkpoint.header)))
    found = compared((reference, model), short)
    assert found.notes == [] and all(one.layer != OTHER_WEIGHTS for one in found.layers)


def test_a_lora_makes_no_other_weights(sd15, pair, checkpoints, short):
    """On either MODEL, or on a third that shares the weights and was loaded last."""
    lora = comfy.utils.load_torch_file(str(checkpoints / "lora.safetensors"))
    patched = [comfy.sd.load_lora_for_models(one, None, lora, 1.0, 0)[0] for one in pair]
    layers = info.quantized_layers(pair[1])
    for one in patched:  # layers among them that are not quantized
        keys = [key.removeprefix("diffusion_model.") for key in one.patches]
        assert any(key.removesuffix(".weight") not in layers for key in keys)
    for both in ((patched[0], pair[1]), (pair[0], patched[1]), tuple(patched)):
        assert compared(both, short).notes == []
    for one in patched:
        comfy.model_management.load_models_gpu([one])
        assert compared(pair, short).notes == []


# ---- what has no number


def test_a_reference_equal_to_the_quantized_model_is_exact(pair, short):
    found = compared((pair[1], pair[1]), short)
    text = compare_report(found)
    assert text.startswith("SQNR exact over 2 recorded UNet calls\n")
    assert "40 Linear layers in int8: median exact\n" in text
    assert text.endswith("All of them are exact.")
    assert worst_layers(found.layers) == []
    for words in ("What to do", "No layer stands out", "skip", "stands out"):
        assert words not in text
    figures = json.loads(json.dumps(found.figures(), allow_nan=False))
    assert set(figures["layers"].values()) == {None} and figures["lost"] == []


def test_a_layer_that_gives_nan_is_lost(sd15, pair, quantized, short):
    name = "middle_block.1.transformer_blocks.0.attn2.to_out.0"
    damaged = loader.load(scaled(quantized(INT8).checkpoint, f"{name}.bias", math.nan))
    found, sound = compared((sd15[0], damaged), short), compared(pair, short)
    text = compare_report(found)
    assert f"  1. lost  {name} (int8): stands out; smoothquant, or skip it\n" in text
    assert "\n  lost: it gives NaN, infinity or nothing\n" in text
    figures = json.loads(json.dumps(found.figures(), allow_nan=False))
    assert figures["lost"] == [name] and figures["layers"].pop(name) is None
    others = {one.name: round(one.energy.db, 4) for one in sound.layers if one.name != name}
    assert figures["layers"] == others
    for kind, words in (("linear", "40 Linear"), ("conv2d", None), ("conv2d 1x1", None)):
        of_kind = [one for one in sound.layers if one.kind == kind]
        median = numpy.median([others[one.name] for one in of_kind if one.name != name])
        if words is None:
            words = f"{len(of_kind)} " + ("1x1 convolution" if "1x1" in kind else "convolution")
        assert f"  {words} layers in int8: median {median:.1f} dB\n" in text
    assert sum("stands out; " in line for line in text.splitlines()) == 1 + sum(
        "stands out; " in line for line in compare_report(sound).splitlines()
    )


@pytest.mark.parametrize("db", [math.inf, -math.inf])
def test_a_median_is_of_those_that_have_a_number(db):
    layers = [layer_result(i, "int8", 30.0 + i) for i in range(3)]
    layers += [layer_result(i, "int8", db) for i in range(3, 8)]
    step = compare.Step(500.0, 1.0, 1, quality.Energy(1.0, 0.01))
    text = compare_report(compare.Compared([step], step, layers))
    assert "  8 Linear layers in int8: median 31.0 dB\n" in text
    assert text.count("(int8): stands out; ") == (0 if db > 0 else 5)


def test_psnr_of_several_pictures_is_that_of_all_pixels(sd15):
    """One that is identical does not make it exact."""
    step = compare.Step(500.0, 1.0, 1, quality.Energy(1.0, 0.01))
    likeness = [(math.inf, 1.0), (20.0, 0.5)]
    made = compare.Compared(
        [step], step, [], likeness=likeness, settings=pictures.Settings([], [], {})
    )
    assert "PSNR 23.0 dB, SSIM 0.750 (1 is identical), of 2 together" in compare_report(made)
    assert "worst of them: PSNR 20.0 dB, SSIM 0.500" in compare_report(made)
    broken = compare.Compared(
        [step],
        step,
        [],
        likeness=[(20.0, 0.5), (math.nan, math.nan)],
        settings=pictures.Settings([], [], {}),
    )
    assert compare_report(broken).count("PSNR not a number") == 2  # of all, and the worst


# ---- MODELs that give NaN


@pytest.fixture(scope="module")
def broken(quantized):
    """A quantized checkpoint whose output is NaN."""
    checkpoint = quantized(INT8).checkpoint
    key = "out.2.bias"  # behind the last layer that quantizes, which would make a number of it
    tensors = checkpoint.tensors | {key: torch.full_like(checkpoint.tensors[key], math.nan)}
    return QuantizedCheckpoint(tensors, checkpoint.layers, dict(checkpoint.header))


def test_nan_is_said(sd15, broken, short):
    found = compared((sd15[0], loader.load(broken)), short)
    assert "gives NaN or infinity on 2 of 2 recorded calls" in compare_report(found)
    json.loads(json.dumps(found.figures(), allow_nan=False))
    report = compare_report(compared((loader.load(broken), loader.load(broken)), short))
    assert report.count("gives NaN or infinity on 2 of 2 recorded calls") == 2


def test_a_quantized_unet_that_gives_nan_is_refused(quantized, broken):
    """Its figures would be no JSON, and its pictures black."""
    made = dataclasses.replace(quantized(INT8), checkpoint=broken, figures=None)
    with pytest.raises(ValueError, match="NaN or infinity on call 1 of .*choose another format"):
        engine.measure(made, loader.load(broken))
    assert made.figures is None
    assert "quality" not in broken.header


# ---- MODELs of all kinds


def test_loras_on_both(sd15, pair, checkpoints, calibration):
    """Baked in with the original, or on top of the quantized MODEL: it is compared as it samples."""
    lora = comfy.utils.load_torch_file(str(checkpoints / "lora.safetensors"))
    patched = comfy.sd.load_lora_for_models(sd15[0], None, lora, 1.0, 0)[0]
    made = engine.quantize_model(patched, INT8, calibration)
    model = loader.load(made.checkpoint)
    engine.measure(made, model)
    found = compared((patched, model), calibration)
    assert found.notes == []  # layers that are not quantized hold the LoRA, too
    assert found.energy.db == pytest.approx(made.figures["sqnr_db"], abs=2e-3)
    without = compared((sd15[0], model), calibration)
    assert without.energy.db < found.energy.db - 3
    on_top = comfy.sd.load_lora_for_models(pair[1], None, lora, 1.0, 0)[0]
    assert compared((patched, on_top), calibration).energy.db > without.energy.db + 3
    layers = {one.name: one.energy.db for one in compared((patched, on_top), calibration).layers}
    without = {one.name: one.energy.db for one in compared((sd15[0], on_top), calibration).layers}
    assert sum(layers[name] > without[name] + 3 for name in layers) > len(layers) / 2


def test_models_that_others_quantized(sd15, short, checkpoints):
    model = comfy.sd.load_diffusion_model(
        str(checkpoints / "sd15.safetensors"), model_options={"dtype": torch.float8_e4m3fn}
    )
    found = compared((sd15[0], model), short)
    assert {one.layer for one in found.layers} == {"float8_e4m3fn"}
    assert len(found.layers) > 58  # it takes every layer
    assert all(20 < one.energy.db < 60 for one in found.layers)
    assert "in float8_e4m3fn: median" in compare_report(found)
    note = "The reference MODEL is quantized itself"
    assert note in compare_report(compared((model, sd15[0]), short))


def test_a_model_beside_itself(sd15, short):
    found = compared((sd15[0], sd15[0]), short)
    text = compare_report(found)
    assert text.startswith("SQNR exact over 2 recorded UNet calls\n")
    assert "no quantized layer to compare" in text
    assert found.figures()["sqnr_db"] is None
    output = Compare.execute(sd15[0], sd15[0], short)  # the chart can be drawn
    assert output.args[1].shape[-1] == 3


def test_other_architectures_are_refused(pair, short):
    other = comfy.sd.load_diffusion_model_state_dict(synthetic.unet_state_dict("sd2"))
    with pytest.raises(
        ValueError, match="of one architecture, got .* in quantized where reference"
    ):
        compared((pair[0], other), short)
    with pytest.raises(ValueError, match="must come from a UNet of the same architecture"):
        compared((other, other), short)


# ---- cancel


@pytest.mark.parametrize("last", [1, 2, 4, 20])
def test_cancel_leaves_no_hook_and_both_models_as_they_were(
    pair, short, by_hand, calibration, monkeypatch, last
):
    """At a call of the reference, at one of the quantized MODEL, among the layers."""
    real, steps = compare.progress, 0

    def counting(total):
        step = real(total)

        def counted(size=1):
            nonlocal steps
            steps += 1
            if steps == last:
                assert last > 2 or hooks(pair[0]) > 50
                comfy.model_management.interrupt_current_processing(True)
            step(size)

        return counted

    monkeypatch.setattr(compare, "progress", counting)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        compared(pair, short)
    assert steps == last
    assert hooks(pair[0]) == hooks(pair[1]) == 0
    record = next(iter(calibration))
    for model, outputs in zip(pair, by_hand, strict=True):
        assert numpy.array_equal(call(model, record).double().numpy().ravel(), outputs[0])


# ---- pictures


def gaussian_ssim(a: numpy.ndarray, b: numpy.ndarray, size: int) -> float:
    """Wang et al. 2004: a Gaussian window of sigma 1.5, `size` pixels wide, at every place where it
    lies within the picture."""
    taps = numpy.exp(-0.5 * (numpy.arange(-(size // 2), size // 2 + 1) / 1.5) ** 2)
    window = numpy.outer(taps, taps) / taps.sum() ** 2
    total = []
    for channel in range(a.shape[2]):
        x, y = a[:, :, channel], b[:, :, channel]
        for i in range(a.shape[0] - size + 1):
            for j in range(a.shape[1] - size + 1):
                p, q = x[i : i + size, j : j + size], y[i : i + size, j : j + size]
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p = (window * (p - mean_p) ** 2).sum()
                var_q = (window * (q - mean_q) ** 2).sum()
                both = (window * (p - mean_p) * (q - mean_q)).sum()
                total.append(
                    (2 * mean_p * mean_q + 0.01**2)
                    * (2 * both + 0.03**2)
                    / ((mean_p**2 + mean_q**2 + 0.01**2) * (var_p + var_q + 0.03**2))
                )
    return float(numpy.mean(total))


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(14, 18, 11), (11, 12, 11), (10, 30, 9), (8, 7, 7), (5, 4, 3), (2, 6, 1)],
)
def test_psnr_and_ssim_are_the_formulas(height, width, window):
    """The window is the largest odd one that fits, of at most 11 pixels."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, height, width, 3, generator=generator)
    b = (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    b[1] = a[1]
    (psnr, ssim), same = pictures.likeness(a, b)
    error = ((a[0] - b[0]).double() ** 2).mean().item()
    assert psnr == pytest.approx(-10 * math.log10(error), abs=1e-4)
    assert ssim == pytest.approx(
        gaussian_ssim(a[0].double().numpy(), b[0].double().numpy(), window), abs=1e-6
    )
    assert 0.3 < ssim < 0.995
    assert same == (math.inf, pytest.approx(1.0, abs=1e-12))
    assert pictures.likeness(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3))[0][1] == 1


def test_latents_become_pictures_of_the_references_range():
    reference = torch.randn(2, 4, 3, 6, 5)
    first, second = pictures.of_latents(reference, reference * 2)
    assert first.shape == second.shape == (6, 6, 5, 4)
    whole = first.reshape(2, -1)
    assert torch.equal(whole.amin(1), torch.zeros(2)) and torch.equal(whole.amax(1), torch.ones(2))
    assert second.amax() > 1


@pytest.fixture(scope="module")
def settings(sd15, conditionings):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    latent = {"samples": noise, "batch_index": [4, 2]}
    more = {"seed": 5, "steps": 2, "cfg": 3.0, "denoise": 0.8, "scheduler": "karras"}
    return pictures.Settings(*conditionings, latent, sd15[2], **more)


def test_pictures_are_those_of_ksampler_and_vae_decode(pair, short, settings):
    import nodes

    found = compared(pair, short, settings)
    one = settings
    for model, image in zip(pair, found.images, strict=True):
        with torch.no_grad():
            (latent,) = nodes.common_ksampler(
                *(model, one.seed, one.steps, one.cfg, one.sampler_name, one.scheduler),
                *(one.positive, one.negative, one.latent),
                denoise=one.denoise,
            )
            assert torch.equal(nodes.VAEDecode().decode(one.vae, latent)[0], image)
    psnrs = [
        10 * math.log10(1 / ((a - b) ** 2).mean().item())
        for a, b in zip(*found.images, strict=True)
    ]
    assert [psnr for psnr, _ in found.likeness] == pytest.approx(psnrs, abs=0.01)
    assert "decoded by the VAE: PSNR" in compare_report(found)


def test_latents_are_compared_without_a_vae(pair, short, settings):
    inputs = vars(settings) | {"latent_image": settings.latent}
    del inputs["latent"], inputs["vae"]
    output = Compare.execute(*pair, short, **inputs)
    text, chart, *images = output.args
    assert "of the latents, as no VAE is connected: PSNR" in text
    assert all(isinstance(one, ExecutionBlocker) and "vae" in one.message for one in images)
    assert output.ui["text"] == [text] and len(output.ui["images"]) == 1
    assert chart.ndim == 4 and 0 <= chart.min() < chart.max() <= 1


@pytest.mark.parametrize(
    ("sampler", "steps", "denoise"),
    [
        ("euler", 3, 1.0),
        ("euler", 3, 0.0),
        ("euler", 3, 0.5),
        ("dpm_fast", 5, 1.0),
        ("heun", 3, 1.0),
    ],
)
def test_the_bar_ends_at_its_end_with_every_sampler(
    pair, short, settings, monkeypatch, sampler, steps, denoise
):
    bars = []

    def counting(total):
        bars.append((total, []))
        return lambda size=1: bars[-1][1].append(size)

    monkeypatch.setattr(compare, "progress", counting)
    more = {"sampler_name": sampler, "steps": steps, "denoise": denoise, "scheduler": "normal"}
    found = compared(pair, short, dataclasses.replace(settings, **more))
    assert len(found.likeness) == 2
    ((total, sizes),) = bars
    assert min(sizes) >= 0 and sum(sizes) == total


@pytest.mark.parametrize("calls", [0, 1, 3, 4, 9])
def test_sampling_moves_the_bar_by_as_many_steps_as_were_asked_for(settings, calls):
    """Adaptive samplers take more of them, or fewer."""
    sizes = []

    class Sampling:
        @staticmethod
        def sample(*args):
            (callback,) = (one for one in args if callable(one))
            for _ in range(calls):
                callback(0, None, None, 3)
                assert sum(sizes) <= 3 * engine.CALL
            return {"samples": calls}

    found = compare._sampled(Sampling, None, dataclasses.replace(settings, steps=3), sizes.append)
    assert found == {"samples": calls}
    assert min(sizes) >= 0 and sum(sizes) == 3 * engine.CALL


def test_some_of_the_inputs_of_pictures_are_an_error(settings):
    assert settings_of(None, {"seed": 1}) is None
    with pytest.raises(ValueError, match="got nothing in negative, latent_image: connect"):
        settings_of(None, {"positive": settings.positive})
    with pytest.raises(ValueError, match="got nothing in positive"):
        settings_of(settings.vae, {})
