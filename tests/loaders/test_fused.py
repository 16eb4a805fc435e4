"""Fused blocks give what the ordinary ones give, on any backend, with and without what users put on.

Blocks are compared one by one on the inputs that the unfused UNet gives them: over a whole UNet one
value rounded the other way moves everything after it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.kernels import backends, check
from comfyui_modelopt.loaders import fused
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.loaders.eight_bit import smoothed_alike
from comfyui_modelopt.quantize import engine
from comfyui_modelopt.quantize.bridge import sampling
from comfyui_modelopt.quantize.quality import sqnr_db
from comfyui_modelopt.quantize.recipe import Recipe

from ..counted import counted

SMOOTH = Recipe("int8", "smoothquant", 0.5)
RECIPES = [
    Recipe("int8", "max"),
    Recipe("fp8"),
    SMOOTH,
    Recipe("fp8", activations="per token"),
    Recipe("w4a8", "max"),
    Recipe("int8", "max", layers="linear only"),
    Recipe("nvfp4", "max"),  # its convolutions that do not fit blocks are int8
]
FUSED = (fused.FusedTransformerBlock, fused.FusedResBlock, fused.FusedSpatialTransformer)


def name_of(recipe: Recipe) -> str:
    return f"{recipe.format}-{recipe.algorithm}-{recipe.activations[:3]}-{recipe.layers[-4:]}"


@pytest.fixture(scope="module", params=RECIPES, ids=name_of)
def made(request, quantized):
    return quantized(request.param)


def load(made, fuse: bool, backend=backends.REFERENCE):
    model = loader.load(made.checkpoint, arithmetic="integer", backend=backend, fuse=fuse)
    comfy.model_management.load_models_gpu([model])
    return model


def blocks(model) -> dict[str, torch.nn.Module]:
    kinds = tuple(kind.__base__ for kind in FUSED)
    unet = model.model.diffusion_model
    return {name: m for name, m in unet.named_modules() if isinstance(m, kinds)}


def calls(model, record, options: dict | None = None) -> dict[str, tuple]:
    """Block -> what it was called with and what it gave, in one UNet call."""
    seen, hooks = {}, []

    def keep(name):
        def hook(module, args, kwargs, output):
            copied = [dict(a) if isinstance(a, dict) else a for a in args]
            named = {k: dict(v) if isinstance(v, dict) else v for k, v in kwargs.items()}
            seen[name] = copied, named, output.clone()

        return hook

    for name, module in blocks(model).items():
        hooks.append(module.register_forward_hook(keep(name), with_kwargs=True))
    args, kwargs = record.arguments("cpu", torch.float32, options)
    with torch.inference_mode():
        model.model.diffusion_model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def counting(backend: backends.Backend) -> tuple[backends.Backend, Counter]:
    """The backend, and how often each of its functions is called."""
    counts: Counter = Counter()

    names = [f.name for f in dataclasses.fields(backend) if callable(getattr(backend, f.name))]
    wrapped = {name: counted(counts, name, getattr(backend, name)) for name in names}
    return dataclasses.replace(backend, **wrapped), counts


def channels_last(value):
    image = isinstance(value, torch.Tensor) and value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if image else value


def test_every_block_gives_the_same(made):
    """The ordinary block is given its pixels in the same order of memory: group norms and float32
    convolutions sum by it, and a last place that differs can round on to a whole 8-bit step."""
    plain, fast = load(made, False), load(made, True)
    ordinary, there = blocks(plain), blocks(fast)
    assert all(isinstance(block, FUSED) for block in there.values())
    assert not any(isinstance(block, FUSED) for block in ordinary.values())
    for name, (args, kwargs, _) in calls(plain, made.records[0]).items():
        args = [channels_last(value) for value in args]
        with torch.inference_mode():
            wanted = ordinary[name](*args, **kwargs)
            found = there[name](*args, **kwargs)
        assert found.shape == wanted.shape
        if isinstance(there[name], fused.FusedTransformerBlock):
            assert torch.equal(found, wanted), name
        else:
            assert relative(found, wanted) < 1e-3, name


@pytest.mark.parametrize("recipe", [Recipe("fp8"), SMOOTH], ids=name_of)
def test_layers_share_launches(quantized, recipe):
    """Queries, keys and values in one; GEGLU, residuals and time embeddings inside products."""
    made = quantized(recipe)
    backend, counts = counting(backends.REFERENCE)
    model = load(made, True, backend)
    calls(model, made.records[0])
    there = Counter(type(block).__name__ for block in blocks(model).values())
    transformers, resblocks = there["FusedTransformerBlock"], there["FusedResBlock"]
    assert counts["grouped_scaled_mm"] == 2 * transformers
    assert counts["scaled_mm_geglu"] == transformers
    assert counts["layer_norm_quantize"] == 3 * transformers
    assert counts["group_norm_quantize"] == 2 * resblocks + there["FusedSpatialTransformer"]
    # attention's outputs, projections out, one context for all that do not smooth it
    spatial = there["FusedSpatialTransformer"]
    others = counts["conv2d"] - 2 * resblocks  # Downsample and Upsample quantize their own input
    own = 2 * transformers + spatial + others
    if recipe.format == "fp8":
        assert counts["quantize_rows"] == own + 1
    else:  # a scale for each token: behind GEGLU too
        assert counts["quantize_rows"] == own + 2 * transformers


def test_layers_that_are_smoothed_apart_are_not_fused(quantized):
    """As in files of ModelOpt, and of this pack's 0.1: each gets its own input."""
    made = quantized(SMOOTH).checkpoint
    tensors = dict(made.tensors)
    apart = [n for n in made.layers if n.endswith(("attn1.to_k", "attn2.to_v"))]
    for name in apart:
        tensors[f"{name}.pre_quant_scale"] = 0.75 * tensors[f"{name}.pre_quant_scale"]
    checkpoint = dataclasses.replace(made, tensors=tensors)
    records = quantized(SMOOTH).records
    backend, counts = counting(backends.REFERENCE)
    plain, fast = (
        loader.load(checkpoint, arithmetic="integer", backend=b, fuse=fuse)
        for b, fuse in ((backends.REFERENCE, False), (backend, True))
    )
    comfy.model_management.load_models_gpu([plain, fast])
    ordinary, there = blocks(plain), blocks(fast)
    for name, (args, kwargs, _) in calls(plain, records[0]).items():
        if isinstance(there[name], fused.FusedTransformerBlock):
            with torch.inference_mode():
                assert torch.equal(there[name](*args, **kwargs), ordinary[name](*args, **kwargs))
    assert apart and counts["grouped_scaled_mm"] == 0
    assert smoothed_alike(made) and not smoothed_alike(checkpoint)


def test_static_scales_are_shared_by_what_shares_an_input(quantized):
    unet = load(quantized(Recipe("fp8")), True).model.diffusion_model
    found = [m for m in unet.modules() if isinstance(m, fused.FusedTransformerBlock)]
    assert found
    for block in found:
        one, two = block.attn1, block.attn2
        assert one.to_q.input_key == one.to_k.input_key == one.to_v.input_key is not None
        assert two.to_k.input_key == two.to_v.input_key


@pytest.mark.parametrize("recipe", [Recipe("int8", "max"), SMOOTH, Recipe("fp8")], ids=name_of)
def test_a_lora_turns_its_own_layers_back(quantized, checkpoints, recipe):
    made = quantized(recipe)
    lora = comfy.utils.load_torch_file(str(checkpoints / "lora.safetensors"))
    touched = {key: t for key, t in lora.items() if "attn1_to_q" in key or "in_layers_2" in key}
    assert touched and len(touched) < len(lora)
    backend, counts = counting(backends.REFERENCE)
    models = [load(made, False), load(made, True, backend)]
    calls(models[1], made.records[0])
    without = dict(counts)
    patched = [comfy.sd.load_lora_for_models(m, None, touched, 0.7, 0)[0] for m in models]
    comfy.model_management.load_models_gpu(patched[:1])
    seen = calls(patched[0], made.records[0])
    comfy.model_management.load_models_gpu(patched[1:])
    there = blocks(patched[1])
    for name, (args, kwargs, wanted) in seen.items():
        with torch.inference_mode():
            assert relative(there[name](*args, **kwargs), wanted) < 1e-3, name
    counts.clear()
    calls(patched[1], made.records[0])
    assert 0 < counts["layer_norm_quantize"] < without["layer_norm_quantize"]
    counts.clear()
    patched[1].unpatch_model()
    comfy.model_management.load_models_gpu([models[1]])
    calls(models[1], made.records[0])
    assert dict(counts) == without


def identity(*values):
    return values[0] if len(values) == 2 else values[:3]


def own_attention(q, k, v, extra):
    # 0.9: on some machines it is ComfyUI's own attention to the last bit
    return comfy.ldm.modules.attention.attention_basic(q, k, v, extra["n_heads"]) * 0.9


PATCHED = {
    "attn1_patch": {"patches": {"attn1_patch": [lambda n, c, v, o: (n * 1.1, c, v)]}},
    "attn1_output_patch": {"patches": {"attn1_output_patch": [lambda n, o: n * 0.9]}},
    "middle_patch": {"patches": {"middle_patch": [lambda x, o: x + 0.1]}},
    "attn2_patch": {"patches": {"attn2_patch": [lambda n, c, v, o: (n, c * 0.9, v)]}},
    "attn2_output_patch": {"patches": {"attn2_output_patch": [lambda n, o: n * 0.8]}},
    "attn1 replaced": {"patches_replace": {"attn1": {("middle", 0): own_attention}}},
    "attn2 replaced, one of many": {"patches_replace": {"attn2": {("input", 1, 0): own_attention}}},
}


@pytest.mark.parametrize("patch", PATCHED)
def test_a_patch_turns_its_blocks_back(quantized, patch):
    made = quantized(Recipe("int8", "max"))
    options = {"patches": {}, "patches_replace": {}} | PATCHED[patch]
    backend, counts = counting(backends.REFERENCE)
    plain, fast = load(made, False), load(made, True, backend)
    ordinary = calls(plain, made.records[0])
    seen = calls(plain, made.records[0], options)
    there = blocks(fast)
    moved = set()
    for name, (args, kwargs, wanted) in seen.items():
        if not isinstance(there[name], fused.FusedTransformerBlock):
            continue
        counts.clear()
        with torch.inference_mode():
            assert torch.equal(there[name](*args, **kwargs), wanted), name
        if not torch.equal(wanted, ordinary[name][2]):
            moved.add(name)
        assert counts["layer_norm_quantize"] in (0, 3)
    assert moved  # the patch does something
    if "replaced" in patch:
        counts.clear()
        calls(fast, made.records[0], options)
        assert counts["layer_norm_quantize"] == 3 * (len(ordinary_transformers(there)) - 1)


def ordinary_transformers(there) -> list[str]:
    return [name for name, block in there.items() if isinstance(block, fused.FusedTransformerBlock)]


@pytest.mark.parametrize("recipe", [Recipe("int8", "max"), SMOOTH, Recipe("fp8")], ids=name_of)
def test_triton_gives_what_the_reference_gives(quantized, recipe):
    """One block of each kind through Triton (its interpreter, where there is no GPU)."""
    made = quantized(recipe)
    reference, ours = load(made, True), load(made, True, backends.triton())
    seen, kinds = calls(reference, made.records[0]), set()
    there = blocks(ours)
    for name, (args, kwargs, wanted) in seen.items():
        kind = type(there[name])
        if kind in kinds or kind is fused.FusedSpatialTransformer:  # that holds the others
            continue
        kinds.add(kind)
        with torch.inference_mode():
            found = there[name](*args, **kwargs)
        assert sqnr_db(wanted, found) > 50, name  # a token's largest value rounds on
    assert len(kinds) == 2


def replaced(layer, *ignored):
    """As ComfyUI's bypass LoRAs: another forward, which calls the layer's own."""
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs) * 1.5


def hooked(layer, *ignored):
    layer.register_forward_hook(lambda module, args, output: output * 1.5)


def pack_of_others(layer, block, monkeypatch):
    """A pack that puts its own function into ComfyUI's class."""
    own = type(block.attn1).forward
    monkeypatch.setattr(
        type(block.attn1), "forward", lambda self, *args, **kw: own(self, *args, **kw) * 1.5
    )


PLACES = ["attn1.to_q", "attn2.to_k", "ff.net.2", "ff.net.0", "norm3", "attn1"]
TOUCHED = [(how, where) for how in (replaced, hooked) for where in PLACES]


@pytest.mark.parametrize(("how", "where"), [*TOUCHED, (pack_of_others, "attn1")])
def test_what_others_put_into_modules_is_called(quantized, monkeypatch, how, where):
    made, name = quantized(Recipe("int8", "max")), "middle_block.1.transformer_blocks.0"
    models = [load(made, fuse) for fuse in (False, True)]
    args, kwargs, before = calls(models[0], made.records[0])[name]
    results = []
    for model in models:
        block = blocks(model)[name]
        with monkeypatch.context() as patch:
            how(block.get_submodule(where), block, patch)
            with torch.inference_mode():
                results.append(block(*args, **kwargs))
    plain, fast = results
    assert relative(fast, plain) < 1e-3
    assert relative(plain, before) > 0.01  # it does something


def test_gradients_go_the_ordinary_way(quantized):
    made = quantized(Recipe("int8", "max"))
    models = [load(made, fuse) for fuse in (False, True)]
    seen = calls(models[0], made.records[0])
    for name, kind in (("middle_block.1.transformer_blocks.0", 3), ("middle_block.0", 4)):
        args, kwargs, _ = seen[name]
        assert args[0].ndim == kind
        found = []
        for model in models:
            x = args[0].clone().requires_grad_()
            rest = [a.clone() if torch.is_tensor(a) else a for a in args[1:]]
            with torch.inference_mode(False), torch.enable_grad():
                blocks(model)[name](x, *rest, **kwargs).square().sum().backward()
            found.append(x.grad)
        assert relative(found[1], found[0]) < 1e-5


def test_weights_brought_for_a_call_are_multiplied_one_by_one(quantized, monkeypatch):
    """ComfyUI has two buffers for offloaded weights: a third one's cast overwrites the first."""
    made = quantized(Recipe("int8", "max"))
    backend, counts = counting(backends.REFERENCE)
    model = load(made, True, backend)
    block = blocks(model)["middle_block.1.transformer_blocks.0"]
    args, kwargs, wanted = calls(model, made.records[0])["middle_block.1.transformer_blocks.0"]
    events = []
    for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
        for name in ("cast", "uncast"):
            own = getattr(layer, name)
            monkeypatch.setattr(
                layer, name, lambda *a, own=own, name=name: (events.append(name), own(*a))[1]
            )
    counts.clear()
    with torch.inference_mode():
        assert torch.equal(block(*args, **kwargs), wanted)
    assert events == ["cast"] * 3 + ["uncast"] * 3 and counts["grouped_scaled_mm"] == 2
    events.clear()
    counts.clear()
    elsewhere = property(lambda self: torch.device("meta"))
    monkeypatch.setattr(type(block.attn1.to_q.weight), "device", elsewhere)
    monkeypatch.setattr(
        type(block.attn1.to_q), "cast", lambda layer, *ignored: (layer.weight, layer.bias, None)
    )
    with torch.inference_mode():
        assert torch.equal(block(*args, **kwargs), wanted)
    assert counts["grouped_scaled_mm"] == 0


@pytest.mark.parametrize("recipe", [SMOOTH, Recipe("fp8")], ids=name_of)
def test_projections_that_are_linear_layers(recipe):
    """As in SDXL and SD2: proj_in stands behind a GroupNorm, and may be smoothed."""
    source = comfy.sd.load_diffusion_model_state_dict(synthetic.unet_state_dict("sd2"))
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 77, 1024, generator=generator)
    _, calibration = sampling.record(
        source,
        **{"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"},
        positive=[[context, {}]],
        negative=[[context * 0.5, {}]],
        latent_image={"samples": torch.zeros(1, 4, 16, 16)},
        denoise=1.0,
        max_records=4,
    )
    made = engine.quantize_model(source, recipe, calibration)
    backend, counts = counting(backends.REFERENCE)
    plain, fast = load(made, False), load(made, True, backend)
    there, found = blocks(fast), 0
    for name, (args, kwargs, _) in calls(plain, made.records[0]).items():
        args = [channels_last(value) for value in args]
        with torch.inference_mode():
            wanted = blocks(plain)[name](*args, **kwargs)
            assert relative(there[name](*args, **kwargs), wanted) < 1e-3, name
        found += isinstance(there[name], fused.FusedSpatialTransformer) and there[name].use_linear
    assert found
    resblocks = sum(isinstance(block, fused.FusedResBlock) for block in there.values())
    assert counts["group_norm_quantize"] == 2 * resblocks + found


@pytest.mark.parametrize("recipe", [Recipe("int8", "max"), SMOOTH], ids=name_of)
def test_nothing_is_kept_between_calls(quantized, recipe):
    """The quantized context belongs to one UNet call: another one's is not taken for it."""
    made = quantized(recipe)
    model = load(made, True)
    options: dict = {}
    unet = model.model.diffusion_model
    for record in (made.records[0], made.records[-1], made.records[0]):
        args, kwargs = record.arguments("cpu", torch.float32)
        kwargs["context"] = kwargs["context"] + len(options)
        with torch.inference_mode():
            wanted = unet(*[a.clone() for a in args], **kwargs)
            kwargs["transformer_options"] = options
            assert torch.equal(unet(*args, **kwargs), wanted)


@pytest.mark.parametrize("kind", check.KINDS)
def test_the_check_before_loading(monkeypatch, kind):
    device = torch.device("cpu")
    assert check.differing(device, kind) == []
    broken = dataclasses.replace(
        backends.triton(), scaled_mm=lambda *args: backends.REFERENCE.scaled_mm(*args) * 1.01
    )
    monkeypatch.setattr(backends, "triton", lambda: broken)
    assert check.differing(device, kind) == ["scaled_mm"]


def test_the_check_tries_a_product_that_stands_alone(monkeypatch):
    """On Hopper that is a library's, and one with a residual is ours."""

    def alone_is_wrong(*args):
        product = backends.REFERENCE.scaled_mm(*args)
        return product if len(args) > 5 else product * 1.01

    broken = dataclasses.replace(backends.triton(), scaled_mm=alone_is_wrong)
    monkeypatch.setattr(backends, "triton", lambda: broken)
    assert check.differing(torch.device("cpu"), "fp8") == ["scaled_mm"]


def test_the_check_tells_what_failed(monkeypatch):
    def compiler_is_missing(*args):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    broken = dataclasses.replace(backends.triton(), conv2d=compiler_is_missing)
    monkeypatch.setattr(backends, "triton", lambda: broken)
    monkeypatch.setattr(check, "_known", {})
    reason = check.why_not(torch.device("cpu"), "int8")
    assert "RuntimeError: Failed to find C compiler. Please specify via CC" in reason


def test_the_check_does_not_remember_a_full_gpu(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(check, "_known", {})
    with monkeypatch.context() as patch:
        broken = dataclasses.replace(backends.triton(), conv2d=full)
        patch.setattr(backends, "triton", lambda: broken)
        assert "no memory was left" in check.why_not(torch.device("cpu"), "int8")
    assert check.why_not(torch.device("cpu"), "int8") is None
