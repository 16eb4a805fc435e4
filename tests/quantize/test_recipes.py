"""Every format and algorithm on a whole UNet: what is stored, where it runs, which is better."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_modelopt.formats import FORMATS, blocks
from comfyui_modelopt.formats.checkpoint import shaping_layers
from comfyui_modelopt.formats.groups import with_its_input
from comfyui_modelopt.loaders import dispatch
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import engine, modelopt, pack, quality
from comfyui_modelopt.quantize import recipe as recipe_module
from comfyui_modelopt.quantize.bridge import unet as bridge
from comfyui_modelopt.quantize.layers import select
from comfyui_modelopt.quantize.recipe import ALGORITHMS, Recipe, plan

LINEAR = "linear only"
# awq_full and svdquant take long on a CPU: awq_full has a test on one layer, svdquant a smaller rank
RECIPES = [
    Recipe(form, algorithm, layers=layers, **({"rank": 4} if algorithm == "svdquant" else {}))
    for form, algorithms in ALGORITHMS.items()
    for algorithm in algorithms
    for layers in ("linear + conv", LINEAR)
    if algorithm != "awq_full"
    and not (algorithm in ("awq_lite", "svdquant", "percentile") and layers == LINEAR)
]
IDS = [f"{r.format}-{r.algorithm}-{r.layers.split()[-1]}" for r in RECIPES]


def sqnr(made, arithmetic=dispatch.INTEGER) -> float:
    with torch.no_grad():
        model = loader.load(made.checkpoint, arithmetic=arithmetic)
        outputs = bridge.run_loaded(model, made.records, lambda: None)
    return quality.summary(made.references, outputs)["sqnr_db"]


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_every_layer_is_in_its_format(quantized, recipe):
    made = quantized(recipe)
    shaping = shaping_layers(made.checkpoint.layers)
    assert len(shaping) == 1
    shaping = {one for name in shaping for one in with_its_input(name)}  # k, and v with it
    assert len(shaping) == 2
    for name, layer in made.checkpoint.layers.items():
        packed = FORMATS[recipe.format].BITS == 4
        second = name in shaping and packed and FORMATS[recipe.format].SECOND
        assert layer.format == (second or recipe.format), name
        if layer.format != recipe.format:
            assert any(name in note and layer.format in note for note in made.notes)
        linear = layer.kind == "linear" and layer.format == recipe.format
        smooths = recipe.algorithm in ("smoothquant", "awq_lite", "svdquant")
        assert layer.smoothed == (linear and smooths), name
        assert layer.rank == (4 if linear and recipe.algorithm == "svdquant" else 0), name
    assert made.checkpoint.header["recipe"]["algorithm"] == recipe.algorithm


def test_the_default_of_int8_opens_in_stock_where_the_choice_of_layers_promises_it():
    assert Recipe("int8").algorithm == "smoothquant"
    assert Recipe("int8", layers=LINEAR).algorithm == "max"
    assert Recipe("int8", activations="16 bits").algorithm == "max"
    assert Recipe("nvfp4", layers=LINEAR).algorithm == "awq_lite"  # smoothed, and stock knows it


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_opens_in_stock_where_stock_computes_the_same(quantized, recipe):
    stock = recipe.layers == LINEAR and FORMATS[recipe.format].STOCK
    if recipe.format == "int8":
        stock = stock and recipe.algorithm != "smoothquant"
    assert quantized(recipe).checkpoint.opens_in_stock == stock


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_what_a_layer_says_it_does_is_what_ran(quantized, recipe, monkeypatch):
    """Every layer that claims a kernel calls it, every other one dequantizes its weight."""
    made = quantized(recipe)
    model = loader.load(made.checkpoint)
    ran, dense = set(), set()
    unet = model.model.diffusion_model
    for name in made.checkpoint.layers:
        module = unet.get_submodule(name)

        def quantized_run(*args, name=name, real=module._run_quantized):
            ran.add(name)
            return real(*args)

        def dense_run(*args, name=name, real=module._run_dense):
            dense.add(name)
            return real(*args)

        module._run_quantized, module._run_dense = quantized_run, dense_run
    with torch.no_grad():
        bridge.run_loaded(model, made.records[:1], lambda: None)
    kernels = loader.kernels(model)
    assert ran | dense == kernels.keys() == made.checkpoint.layers.keys()
    assert dense == {name for name, kernel in kernels.items() if kernel.dequantizes}
    for kernel in kernels.values():
        weight_only = not FORMATS[kernel.name.split()[0]].ACTIVATIONS
        assert (kernel.level == "weight-only") == weight_only
        assert kernel.level == "weight-only" or kernel.why or kernel.level == "native"


@pytest.mark.parametrize("recipe", [Recipe("int8", "max"), Recipe("fp8"), Recipe("int4", "max")])
def test_a_patch_that_waits_for_a_weight_changes_the_answer(quantized, recipe):
    """As ComfyUI puts a LoRA on a weight under --lowvram."""
    made = quantized(recipe)
    model = loader.load(made.checkpoint)
    comfy.model_management.load_models_gpu([model])
    before = loader.kernels(model)
    name = "middle_block.1.transformer_blocks.0.attn1.to_out.0"
    module = model.model.diffusion_model.get_submodule(name)
    module.weight_function = [lambda weight: weight * 2]
    now = loader.kernels(model)
    assert {n for n in now if now[n] != before[n]} <= {name}
    assert now[name].dequantizes
    if not before[name].dequantizes:
        assert now[name].name.endswith(": dequantized") and "at each call" in now[name].why
    ran = []
    real = module._run_dense
    module._run_dense = lambda *args: ran.append(name) or real(*args)
    dtype = model.model.get_dtype_inference()
    args, kwargs = made.records[0].arguments(model.load_device, dtype)
    with torch.no_grad():
        model.model.diffusion_model(*args, **kwargs)
    assert ran == [name]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (Recipe("int4", "mse"), Recipe("int4", "max")),
        (Recipe("int4", "awq_lite"), Recipe("int4", "max")),
        (Recipe("int4", "svdquant", rank=4), Recipe("int4", "max")),
        (Recipe("w4a8", "awq_lite"), Recipe("w4a8", "max")),
        (Recipe("nvfp4", "svdquant", rank=4), Recipe("nvfp4", "max")),
        (Recipe("int8", "smoothquant", layers=LINEAR), Recipe("int8", "max", layers=LINEAR)),
        (Recipe("int8", "percentile"), Recipe("int8", "max")),
    ],
    ids=lambda r: f"{r.format}-{r.algorithm}",
)
def test_orderings(quantized, better, worse):
    assert sqnr(quantized(better)) > sqnr(quantized(worse))


def test_fp8_per_token_is_no_worse_than_one_calibrated_scale(quantized):
    """Within what rounding alone moves from one machine to another."""
    per_token = Recipe("fp8", "max", activations="per token", layers=LINEAR)
    static = Recipe("fp8", "max", layers=LINEAR)
    assert sqnr(quantized(per_token)) > sqnr(quantized(static)) - 0.3


@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
def test_mse_never_rounds_worse_than_max(quantized, sd15, form):
    """Squared error of the weights, layer by layer."""
    unet = sd15[0].model.diffusion_model
    for name in quantized(Recipe(form, "max")).checkpoint.layers:
        weight = unet.get_submodule(name).weight.float()
        errors = {}
        for algorithm in ("max", "mse"):
            checkpoint = quantized(Recipe(form, algorithm)).checkpoint
            stored = {
                key: checkpoint.tensors[f"{name}.{key}"]
                for key in ("weight", *FORMATS[form].SCALES)
            }
            restored = FORMATS[form].dequantize(stored, tuple(weight.shape))
            errors[algorithm] = (restored - weight).square().sum().item()
        assert errors["mse"] <= errors["max"] * 1.0001, name


def test_awq_full_clips(sd15, calibration):
    """One layer, the rest skipped: blocks are clipped, and the result is no worse than awq_lite's."""
    keep = "output_blocks.0.1.transformer_blocks.0.attn1.to_out.0"
    others = tuple(
        name for name in select(sd15[0].model.diffusion_model, LINEAR, []) if name != keep
    )
    made = {
        algorithm: engine.quantize_model(
            sd15[0], Recipe("int4", algorithm, layers=LINEAR, skip=others), calibration
        )
        for algorithm in ("awq_lite", "awq_full")
    }
    amax = {a: m.checkpoint.tensors[f"{keep}.weight_amax"].float() for a, m in made.items()}
    assert list(made["awq_full"].checkpoint.layers) == [keep]
    assert bool((amax["awq_full"] <= amax["awq_lite"] * 1.001).all())
    assert bool((amax["awq_full"] < amax["awq_lite"] * 0.99).any())
    assert sqnr(made["awq_full"]) > sqnr(made["awq_lite"]) - 0.5


def test_awq_full_keeps_the_whole_recordings_activations(sd15, calibration):
    """Its last pass replays a few calls only."""
    keep = "output_blocks.0.1.transformer_blocks.0.attn1.to_out.0"
    others = tuple(n for n in select(sd15[0].model.diffusion_model, LINEAR, []) if n != keep)
    amax = {}
    for algorithm in ("awq_lite", "awq_full"):
        recipe = Recipe("w4a8", algorithm, layers=LINEAR, skip=others)
        made = engine.quantize_model(sd15[0], recipe, calibration)
        amax[algorithm] = made.checkpoint.layers[keep].input_amax
    assert amax["awq_full"] == pytest.approx(amax["awq_lite"], rel=1e-3)


def test_awq_stores_what_modelopt_folds(sd15, calibration, quantized):
    """ModelOpt's plain INT4 AWQ, folding into weights of its own, against ours that keeps them."""
    import modelopt.torch.quantization as mtq
    from comfyui_modelopt.quantize import modelopt

    recipe = Recipe("int4", "awq_lite")
    ours = quantized(recipe).checkpoint
    unet = bridge.copy_unet(sd15[0])
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()
    linears = [name for name, layer in ours.layers.items() if layer.kind == "linear"]
    modelopt.register(unet, linears)
    config = [{"quantizer_name": "*", "enable": False}]
    config += [
        {
            "quantizer_name": f"{name}.weight_quantizer",
            "cfg": {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
        }
        for name in linears
    ]

    def replay(twin):
        for record in calibration:
            args, kwargs = record.arguments()
            twin(*args, **kwargs)

    with torch.no_grad():
        mtq.quantize(unet, {"quant_cfg": config, "algorithm": "awq_lite"}, replay)
        for name in linears:
            module = unet.get_submodule(name)
            stored = {k: ours.tensors[f"{name}.{k}"] for k in ("weight", "weight_amax")}
            restored = FORMATS["int4"].dequantize(stored, tuple(module.weight.shape))
            # on a CPU ComfyUI computes in 32 bits: block maxima are rounded to 16 bits first
            kept = stored["weight_amax"].float().reshape(module.weight_quantizer.amax.shape)
            torch.testing.assert_close(
                kept, module.weight_quantizer.amax.float(), rtol=2e-3, atol=0
            )
            module.weight_quantizer._amax = kept
            theirs = module.weight_quantizer(module.weight.float())
            assert torch.equal(restored, theirs), name
            scale = module.input_quantizer.pre_quant_scale.float().reshape(-1)
            assert torch.equal(ours.tensors[f"{name}.pre_quant_scale"].float(), scale), name


def test_convolutions_are_rounded_in_blocks_of_input_channels(quantized, sd15):
    made = quantized(Recipe("int4", "max"))
    unet = sd15[0].model.diffusion_model
    name = next(n for n, layer in made.checkpoint.layers.items() if layer.kind == "conv2d")
    weight = unet.get_submodule(name).weight
    flat = blocks.flatten(weight).float()
    amax = made.checkpoint.tensors[f"{name}.weight_amax"].float()
    assert torch.equal(amax[:, 0], flat[:, :128].abs().amax(dim=1))


def test_a_linear_that_does_not_fit_is_named():
    unet = torch.nn.ModuleDict({"proj_in": torch.nn.Linear(250, 64)})
    with pytest.raises(ValueError) as caught:
        plan(unet, Recipe("nvfp4"), {"proj_in": "linear"})
    expected = "nvfp4 needs in_features divisible by 16, got 250 in proj_in: skip that layer or use"
    assert expected in str(caught.value)


def test_a_convolution_that_does_not_fit_gets_the_second_format():
    unet = torch.nn.ModuleDict({"a": torch.nn.Conv2d(40, 8, 3), "b": torch.nn.Conv2d(32, 8, 3)})
    plans, notes = plan(unet, Recipe("nvfp4"), {"a": "conv2d", "b": "conv2d"})
    assert (plans["a"].format, plans["b"].format) == ("int8", "nvfp4")
    assert notes == [
        "1 layers in int8 instead of nvfp4, because nvfp4 needs input channels divisible by 16, "
        "got 40: a"
    ]


def test_an_option_out_of_range_is_named():
    with pytest.raises(ValueError, match="rank must be from 0 to 256, got -1"):
        Recipe("int4", "svdquant", rank=-1)
    with pytest.raises(
        ValueError, match="algorithm of mxfp8 must be one of max, got 'smoothquant'"
    ):
        Recipe("mxfp8", "smoothquant")


@pytest.mark.parametrize("name", recipe_module.DEFAULTS)
def test_an_option_of_another_algorithm_is_refused(name):
    """Left out of the header, it would change nothing in silence."""
    other = {"alpha": 0.3, "convolutions": "percentile", "percentile": 0.5, "rank": 8}[name]
    with pytest.raises(ValueError, match=f"{name} goes with the algorithm .*, got .* with max"):
        Recipe("int8", "max", **{name: other})
    both = Recipe("int8", "smoothquant", convolutions="percentile", percentile=0.5)
    assert both.describe()["percentile"] == 0.5  # of its convolutions
    owner = next(a for a, own in recipe_module.OPTIONS.items() if name in own)
    form = "int4" if owner == "svdquant" else "int8"
    assert getattr(Recipe(form, owner, **{name: other}), name) == other


@pytest.mark.parametrize(
    ("algorithm", "options"), [("percentile", {}), ("smoothquant", {"convolutions": "percentile"})]
)
def test_percentile_without_convolutions_is_refused(algorithm, options):
    with pytest.raises(ValueError, match="percentile is for convolutions.*'linear only': choose"):
        Recipe("int8", algorithm, layers=LINEAR, **options)


@pytest.mark.parametrize(
    ("recipe", "layer", "said"),
    [
        (Recipe("int4", "svdquant", rank=8), "conv", "algorithm svdquant (max)"),
        (Recipe("int8", "percentile"), "linear", "algorithm percentile (max)"),
        (
            Recipe("int8", "smoothquant", convolutions="percentile"),
            "linear",
            "convolutions percentile (smoothquant)",
        ),
        (Recipe("fp8", "max", activations="per token"), "conv", "activations per token (max)"),
        (Recipe("fp8", "max", activations="per token"), "linear", None),
        (Recipe("int8", "max"), "linear", None),
    ],
)
def test_what_no_layer_takes_is_told(recipe, layer, said):
    net = torch.nn.ModuleDict({"linear": torch.nn.Linear(32, 32), "conv": torch.nn.Conv2d(8, 8, 3)})
    skip = ({"linear", "conv"} - {layer}).pop()
    plans, _ = plan(net, recipe, select(net, recipe.layers, (skip,)))
    assert plans.keys() == {layer}
    wanted = f"Without effect, as no layer left to quantize takes it: {said}."
    assert recipe_module.without_effect(recipe, plans) == ([wanted] if said else [])


SEARCHED = [(x, a) for x, known in ALGORITHMS.items() for a in known if a in recipe_module.AWQ]


@pytest.mark.parametrize(("form", "algorithm"), SEARCHED)
def test_dead_activations_under_awq_are_named(form, algorithm):
    """INT4 stores nothing of activations, and searches by them."""
    net = torch.nn.ModuleDict({"dead": torch.nn.Linear(32, 32), "alive": torch.nn.Linear(32, 32)})
    plans, _ = plan(net, Recipe(form, algorithm), dict.fromkeys(net, "linear"))

    def call(unet) -> None:
        unet["dead"](torch.zeros(4, 32))
        unet["alive"](torch.ones(4, 32))

    with torch.no_grad():
        modelopt.calibrate(net, plans, call)
        with pytest.raises(ValueError, match="must not all be zero, they are in dead: .*skip"):
            pack.pack(net, plans, lambda: None)


def test_dead_activations_of_a_smoothed_layer_are_named(sd15, calibration):
    model = sd15[0].clone()
    name = "middle_block.1.transformer_blocks.0.ff.net.0.proj"
    norm = "diffusion_model.middle_block.1.transformer_blocks.0.norm3"
    for part in ("weight", "bias"):
        model.add_patches({f"{norm}.{part}": ("set", (torch.zeros(part_size(sd15, norm, part)),))})
    with pytest.raises(ValueError, match=f"must not all be zero, they are in {name}: .*skip"):
        engine.quantize_model(model, Recipe("int8", "smoothquant"), calibration)


def test_dead_activations_are_named(sd15, calibration):
    name = "middle_block.0.in_layers.2"
    model = sd15[0].clone()
    norm = "diffusion_model.middle_block.0.in_layers.0"
    for part in ("weight", "bias"):  # the layer's input becomes SiLU(0) = 0
        model.add_patches({f"{norm}.{part}": ("set", (torch.zeros(part_size(sd15, norm, part)),))})
    with pytest.raises(ValueError, match=f"must not all be zero, they are in {name}: .*skip"):
        engine.quantize_model(model, Recipe("int8", "max"), calibration)


def part_size(sd15, norm: str, part: str):
    return comfy.utils.get_attr(sd15[0].model, f"{norm}.{part}").shape


def test_out_of_memory_says_what_lowers_it(sd15, calibration, monkeypatch, quantized):
    def fail(*_args, **_kwargs):
        raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory. Tried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(FORMATS["int8"], "quantize", fail)
        with pytest.raises(comfy.model_management.OOM_EXCEPTION, match="GB free.*--lowvram"):
            engine.quantize_model(sd15[0], Recipe("int8", "max"), calibration)
    assert quantized(Recipe("int8", "max")).checkpoint.layers  # the session goes on


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_memory_of_the_cpu_that_runs_out_is_told(sd15, calibration, monkeypatch, kind):
    def fail(*_args, **_kwargs):
        raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(FORMATS["int8"], "quantize", fail)
    with pytest.raises(MemoryError, match="quantizing needs.*computer's memory.*swap space"):
        engine.quantize_model(sd15[0], Recipe("int8", "max"), calibration)


@pytest.mark.parametrize("kind", [ValueError, KeyError])
def test_a_failure_in_modelopts_quantizers_is_modelopts(sd15, calibration, monkeypatch, kind):
    """A ValueError too, which is no error of ours then."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    def fail(*_args, **_kwargs):
        raise kind("inside" + 999 * "!")

    monkeypatch.setattr(TensorQuantizer, "forward", fail)
    wanted = f"ModelOpt .* failed with {kind.__name__}: .*inside.*choose another algorithm"
    with pytest.raises(ValueError, match=wanted) as caught:
        engine.quantize_model(sd15[0], Recipe("int8", "max"), calibration)
    assert len(str(caught.value)) < 600


def test_a_configuration_that_modelopt_refuses_is_modelopts(sd15, calibration, monkeypatch):
    monkeypatch.setattr(modelopt, "PER_TENSOR", {"num_bits": 8, "strange": 1})
    with pytest.raises(ValueError, match="ModelOpt .* must be able to go on, it failed with"):
        engine.quantize_model(sd15[0], Recipe("int8", "max"), calibration)


def test_a_modelopt_that_asks_for_the_calls_more_often_is_told(sd15, calibration, monkeypatch):
    """Another version's algorithm may; the calls are read once for each time that is known of."""
    calibrate = modelopt.calibrate

    def twice(unet, plans, replay):
        calibrate(unet, plans, lambda twin: (replay(twin), replay(twin)))

    monkeypatch.setattr(modelopt, "calibrate", twice)
    with pytest.raises(ValueError, match="calls 1 times here, .* asked once more: choose another"):
        engine.quantize_model(sd15[0], Recipe("int8", "max"), calibration)


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError])
def test_a_failure_of_the_unet_is_not_modelopts(sd15, calibration, monkeypatch, kind):
    """Of ComfyUI, or of a custom node that patched it: in the replay, below a layer of ModelOpt's."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    given, calls = kind("of a custom node"), 0
    forward = ResBlock.forward

    def fail(self, *args, **kwargs):
        nonlocal calls
        calls += any(hasattr(module, "input_quantizer") for module in self.modules())
        if calls:
            raise given
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ResBlock, "forward", fail)
    with pytest.raises(kind) as caught:
        engine.quantize_model(sd15[0], Recipe("int8", "max"), calibration)
    assert caught.value is given


def test_a_lora_that_memory_does_not_suffice_for_is_not_left_out(
    sd15, checkpoints, calibration, monkeypatch
):
    """ComfyUI logs it and goes on without the LoRA."""

    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    patches = comfy.utils.load_torch_file(str(checkpoints / "lora.safetensors"))
    model, _ = comfy.sd.load_lora_for_models(sd15[0], sd15[1], patches, 1.0, 1.0)
    monkeypatch.setattr(torch, "mm", fail)  # the LoRA's product
    with pytest.raises(torch.OutOfMemoryError, match="quantizing needs"):
        engine.quantize_model(model, Recipe("int8", "max"), calibration)


def test_a_lora_that_fails_is_not_left_out(sd15, checkpoints, calibration, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("shapes cannot be multiplied")

    patches = comfy.utils.load_torch_file(str(checkpoints / "lora.safetensors"))
    model, _ = comfy.sd.load_lora_for_models(sd15[0], sd15[1], patches, 1.0, 1.0)
    monkeypatch.setattr(torch, "mm", fail)  # the LoRA's product
    with pytest.raises(ValueError, match="a LoRA must become part.*shapes cannot be multiplied"):
        engine.quantize_model(model, Recipe("int8", "max"), calibration)
