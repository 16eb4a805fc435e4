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
from comfyui_modelopt.kernels import backends, check
from comfyui_modelopt.loaders import fused
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize.quality import sqnr_db
from comfyui_modelopt.quantize.recipe import Recipe

RECIPES = [
    Recipe("int8"),
    Recipe("fp8"),
    Recipe("int8", "smoothquant", 0.5),
    Recipe("fp8", activations="per token"),
    Recipe("w4a8", "max"),
    Recipe("int8", layers="linear only"),
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

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    names = [f.name for f in dataclasses.fields(backend) if callable(getattr(backend, f.name))]
    wrapped = {name: counted(name, getattr(backend, name)) for name in names}
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


def test_layers_share_launches(quantized):
    """Queries, keys and values in one; GEGLU, residuals and time embeddings inside products."""
    made = quantized(Recipe("fp8"))
    backend, counts = counting(backends.REFERENCE)
    model = load(made, True, backend)
    calls(model, made.records[0])
    there = Counter(type(block).__name__ for block in blocks(model).values())
    transformers, resblocks = there["FusedTransformerBlock"], there["FusedResBlock"]
    assert counts["grouped_scaled_mm"] == 2 * transformers
    assert counts["scaled_mm_geglu"] == transformers
    assert counts["layer_norm_quantize"] == 3 * transformers
    assert counts["group_norm_quantize"] == 2 * resblocks + there["FusedSpatialTransformer"]
    # attention's outputs, projections out, one context for all
    spatial = there["FusedSpatialTransformer"]
    others = counts["conv2d"] - 2 * resblocks  # Downsample and Upsample quantize their own input
    assert counts["quantize_rows"] == 2 * transformers + spatial + 1 + others


def test_static_scales_are_shared_by_what_shares_an_input(quantized):
    unet = load(quantized(Recipe("fp8")), True).model.diffusion_model
    found = [m for m in unet.modules() if isinstance(m, fused.FusedTransformerBlock)]
    assert found
    for block in found:
        one, two = block.attn1, block.attn2
        assert one.to_q.input_key == one.to_k.input_key == one.to_v.input_key is not None
        assert two.to_k.input_key == two.to_v.input_key


@pytest.mark.parametrize("recipe", [Recipe("int8"), Recipe("fp8")], ids=name_of)
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
    return comfy.ldm.modules.attention.attention_basic(q, k, v, extra["n_heads"])


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
    made = quantized(Recipe("int8"))
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


@pytest.mark.parametrize("recipe", [Recipe("int8"), Recipe("fp8")], ids=name_of)
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


def test_nothing_is_kept_between_calls(quantized):
    """The quantized context belongs to one UNet call: another one's is not taken for it."""
    made = quantized(Recipe("int8"))
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


def test_the_check_tells_what_failed(monkeypatch):
    def compiler_is_missing(*args):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    broken = dataclasses.replace(backends.triton(), conv2d=compiler_is_missing)
    monkeypatch.setattr(backends, "triton", lambda: broken)
    check.why_not.cache_clear()
    reason = check.why_not(torch.device("cpu"), "int8")
    check.why_not.cache_clear()
    assert "RuntimeError: Failed to find C compiler. Please specify via CC" in reason
