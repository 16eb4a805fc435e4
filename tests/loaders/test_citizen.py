"""What users put on a MODEL works on a quantized one as on the original, through ComfyUI's own nodes.

Each row does the same to both; the quantized MODEL's latents must come as near to the original's as
they are without it, and what the row does must be there.
"""

from __future__ import annotations

import hashlib
import shutil

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.sd
import comfy.t2i_adapter.adapter
import comfy.utils
import pytest
import torch
from comfy.hooks import EnumHookMode
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import (
    nodes_freelunch,
    nodes_hypertile,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_model_merging,
    nodes_multigpu,
    nodes_pag,
    nodes_sag,
    nodes_tomesd,
    nodes_torch_compile,
)
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.kernels import backends
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.loaders.fused import FusedResBlock
from comfyui_modelopt.quantize import engine
from comfyui_modelopt.quantize.recipe import Recipe

import nodes as comfy_nodes

from ..cpu import assert_as_stock

RECIPE = Recipe("int8", "smoothquant", 0.5)
SAMPLING = (3, 3, 1.5, "euler", "normal")  # seed, steps, cfg, sampler, scheduler
SIZE = 16
HIGH, LOW = 10.0, 4.0  # dB


@pytest.fixture(scope="module")
def made(quantized):
    return quantized(RECIPE)


@pytest.fixture(scope="module", params=["ordinary blocks", "fused blocks"])
def both(request, sd15, made):
    """The original MODEL and the quantized one; also as on a GPU, where blocks are fused."""
    backend = backends.REFERENCE if request.param == "fused blocks" else None
    model = loader.load(made.checkpoint, backend=backend)
    unet = model.model.diffusion_model
    assert any(isinstance(m, FusedResBlock) for m in unet.modules()) == (backend is not None)
    return sd15[0], model


def digest_of(model) -> str:
    """Of every tensor of the MODEL's UNet."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.model.diffusion_model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        state.update(name.encode() + data.numpy().tobytes())
    return state.hexdigest()


@pytest.fixture(scope="module")
def loras(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    found = []
    for seed in (1, 2):
        path = folder / f"{seed}.safetensors"
        synthetic.lora(path, checkpoints / "sd15.safetensors", rank=8, scale=0.2, seed=seed)
        found.append(comfy.utils.load_torch_file(str(path)))
    return found


def sample(model, positive, negative, batch=1, sampling=SAMPLING, channels=4) -> torch.Tensor:
    latent = {"samples": torch.zeros(batch, channels, SIZE, SIZE)}
    with torch.no_grad():
        (out,) = comfy_nodes.common_ksampler(model, *sampling, positive, negative, latent)
    return out["samples"]


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    return (10 * torch.log10(reference.square().sum() / (reference - other).square().sum())).item()


@pytest.fixture(scope="module")
def plain(both, conditionings):
    """Latents of the two MODELs as they are, and how near they are."""
    found = [sample(model, *conditionings) for model in both]
    return found, sqnr(*found)


@pytest.fixture(scope="module")
def two_levels(conditionings):
    """A larger SD1.5, both ways; latents of both, and how near they are."""
    model = comfy.sd.load_diffusion_model_state_dict(
        synthetic.unet_state_dict("sd15", "two levels")
    )
    recipe = Recipe("mxfp8", layers="linear only")  # needs no recording
    pair = model, loader.load(engine.quantize_model(model, recipe).checkpoint)
    found = [sample(one, *conditionings) for one in pair]
    return pair, *found, sqnr(*found)


def result(node_output):
    return node_output.result[0] if hasattr(node_output, "result") else node_output[0]


def two_loras(model, loras):
    for lora, strength in zip(loras, (0.8, -0.5), strict=True):
        model = comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]
    return model


def attention_patches(model, loras):
    """As IP-Adapter and its kind hook in."""
    model = model.clone()
    model.set_model_attn1_patch(lambda q, k, v, options: (q * 1.1, k, v))
    model.set_model_attn2_patch(lambda q, k, v, options: (q, k * 0.9, v))
    model.set_model_attn1_output_patch(lambda x, options: x * 0.9)
    model.set_model_attn2_output_patch(lambda x, options: x * 1.1)
    model.set_model_input_block_patch(lambda h, options: h * 1.02)
    model.set_model_output_block_patch(lambda h, skip, options: (h, skip * 0.98))
    return model


def attention_replaced(model, loras):
    def attention(q, k, v, options):
        heads = options["n_heads"]
        return comfy.ldm.modules.attention.optimized_attention(q * 0.5, k, v, heads)

    model = model.clone()
    model.set_model_attn1_replace(attention, "middle", 0, 0)
    model.set_model_attn2_replace(attention, "input", 1, 0)
    return model


def lcm(model, loras):
    return comfy_nodes_lcm().patch(model, "lcm", False)[0]


def comfy_nodes_lcm():
    return nodes_model_advanced.ModelSamplingDiscrete()


def merged(model, loras):
    """Half of it is the same MODEL with a LoRA."""
    other = comfy.sd.load_lora_for_models(model, None, loras[0], 1.0, 0)[0]
    return nodes_model_merging.ModelMergeSimple().merge(model, other, 0.5)[0]


MODEL_ROWS = {
    "several LoRAs": two_loras,
    "attention patches": attention_patches,
    "attention replaced": attention_replaced,
    "FreeU": lambda m, _: result(nodes_freelunch.FreeU.execute(m, 1.1, 1.2, 0.9, 0.2)),
    "FreeU_V2": lambda m, _: result(nodes_freelunch.FreeU_V2.execute(m, 1.3, 1.4, 0.9, 0.2)),
    "HyperTile": lambda m, _: result(nodes_hypertile.HyperTile.execute(m, 64, 2, 0, False)),
    "PAG": lambda m, _: result(nodes_pag.PerturbedAttentionGuidance.execute(m, 1.0)),
    "SAG": lambda m, _: result(nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0)),
    "ToMe": lambda m, _: result(nodes_tomesd.TomePatchModel.execute(m, 0.3)),
    "DeepShrink": lambda m, _: result(
        nodes_model_downscale.PatchModelAddDownscale.execute(
            m, 1, 2.0, 0.0, 0.5, True, "bicubic", "bicubic"
        )
    ),
    "LCM": lcm,
    "RescaleCFG": lambda m, _: nodes_model_advanced.RescaleCFG().patch(m, 0.7)[0],
    "ModelMerge": merged,
}
# it does nothing to so small a picture
IDLE = ("HyperTile",)
# what needs a UNet of several levels to do anything
LEVELS = ("FreeU", "FreeU_V2")


@pytest.mark.parametrize("name", MODEL_ROWS)
def test_on_the_model(both, two_levels, plain, conditionings, loras, name):
    pair, (original, quantized), near = both, *plain
    if name in LEVELS:
        pair, original, quantized, near = two_levels
    outputs = [sample(MODEL_ROWS[name](model, loras), *conditionings) for model in pair]
    assert torch.isfinite(outputs[1]).all()
    assert sqnr(*outputs) > near - LOW
    if name not in IDLE:
        assert not torch.equal(outputs[1], quantized)
    # and the MODEL is as it was
    assert torch.equal(sample(pair[1], *conditionings), quantized)


# ---- on the conditioning


def control_net(model):
    config = dict(model.model.model_config.unet_config)
    for name in ("out_channels", "transformer_depth_output", "disable_unet_model_creation"):
        config.pop(name, None)
    torch.manual_seed(0)
    net = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, operations=comfy.ops.disable_weight_init, device="cpu"
    )
    state = {}
    for key, tensor in net.state_dict().items():
        state[key] = torch.randn(tensor.shape) * (0.5 / max(tensor[0].numel(), 1) ** 0.5)
    return comfy.controlnet.load_controlnet_state_dict(state)


def t2i_adapter(model):
    torch.manual_seed(0)
    adapter = comfy.t2i_adapter.adapter.Adapter(
        cin=192, channels=[320, 640, 1280, 1280], nums_rb=2, ksize=1, sk=True, use_conv=False
    )
    return comfy.controlnet.load_t2i_adapter(adapter.state_dict())


@pytest.mark.parametrize("make", [control_net, t2i_adapter], ids=lambda f: f.__name__)
def test_control(two_levels, conditionings, make):
    pair, _, quantized, near = two_levels
    control = make(pair[0])
    image = torch.rand(1, 8 * SIZE, 8 * SIZE, 3, generator=torch.Generator().manual_seed(1))
    positive, negative = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet(
        *conditionings, control, image, 0.6, 0.0, 1.0
    )
    outputs = [sample(model, positive, negative) for model in pair]
    assert sqnr(*outputs) > near - LOW
    assert not torch.equal(outputs[1], quantized)


def test_batch_and_areas(both, plain, conditionings):
    positive, negative = conditionings
    left = comfy_nodes.ConditioningSetArea().append(positive, 64, 128, 0, 0, 1.0)[0]
    right = comfy_nodes.ConditioningSetArea().append(negative, 64, 128, 64, 0, 0.8)[0]
    combined = comfy_nodes.ConditioningCombine().combine(left, right)[0]
    outputs = [sample(model, combined, negative, batch=2) for model in both]
    assert outputs[1].shape[0] == 2
    assert sqnr(*outputs) > plain[1] - LOW


@pytest.mark.parametrize("mode", [EnumHookMode.MaxSpeed, EnumHookMode.MinVram])
def test_a_scheduled_lora(both, conditionings, loras, plain, mode):
    """One LoRA on the positive prompt, which changes its strength half way, another on the negative."""
    outputs, before = [], sample(both[1], *conditionings)
    stored = digest_of(both[1])
    for model in both:
        hooks = [
            comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
            for lora in loras[:2]
        ]
        frames = comfy.hooks.HookKeyframeGroup()
        for start, strength in ((0.0, 1.0), (0.5, 0.3)):
            frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        hooks[0].set_keyframes_on_hooks(frames)
        conds = [
            comfy.hooks.set_hooks_for_conditioning(cond, hook)
            for cond, hook in zip(conditionings, hooks, strict=True)
        ]
        model = model.clone()
        model.hook_mode = mode
        outputs.append(sample(model, *conds))
    assert sqnr(outputs[0], sample(both[0], *conditionings)) < HIGH  # the LoRAs do something
    assert sqnr(*outputs) > plain[1] - LOW
    assert torch.equal(sample(both[1], *conditionings), before)
    assert digest_of(both[1]) == stored


@pytest.mark.parametrize("mode", [EnumHookMode.MaxSpeed, EnumHookMode.MinVram])
def test_a_scheduled_lora_on_every_layer(both, conditionings, mode):
    """Also on layers left in 16 or 32 bits: what ComfyUI keeps of a step is not written into."""
    unet = both[1].model.diffusion_model
    dense = [n for n, m in unet.named_modules() if n.endswith((".emb_layers.1", "time_embed.0"))]
    lora = {}
    for name in [*dense, "middle_block.1.transformer_blocks.0.attn1.to_q"]:
        rows, columns = both[0].model.diffusion_model.get_submodule(name).weight.shape
        generator = torch.Generator().manual_seed(rows)
        key = f"diffusion_model.{name}"
        lora[f"{key}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.2
        lora[f"{key}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    hook = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    conds = [comfy.hooks.set_hooks_for_conditioning(cond, hook) for cond in conditionings]
    for dtype in (None, torch.float32):
        model = both[1].clone()
        if dtype is not None:
            for name in dense:
                layer = model.model.diffusion_model.get_submodule(name)
                layer.weight = torch.nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        model.hook_mode = mode
        hooked = sample(model, *conds)
        static = comfy.sd.load_lora_for_models(both[1], None, lora, 1.0, 0.0)[0]
        assert sqnr(sample(static, *conditionings), hooked) > 30
        assert sqnr(sample(both[1], *conditionings), hooked) < 25


# ---- merging, in every order


def test_an_ordinary_model_with_a_quantized_one(both, conditionings, plain):
    """ModelMerge reads the quantized MODEL's weights, dequantized."""
    model = nodes_model_merging.ModelMergeSimple().merge(both[0], both[1], 0.0)[0]
    assert sqnr(plain[0][0], sample(model, *conditionings)) > plain[1] - LOW
    half = nodes_model_merging.ModelMergeSimple().merge(both[0], both[1], 0.5)[0]
    assert sqnr(plain[0][0], sample(half, *conditionings)) > plain[1]


@pytest.mark.parametrize("node", ["ModelMergeSimple", "ModelMergeBlocks", "ModelAdd"])
def test_a_quantized_model_with_an_ordinary_one(both, conditionings, plain, node):
    def merge(model, other):
        merger = getattr(nodes_model_merging, node)()
        if node == "ModelMergeBlocks":
            return merger.merge(model, other, input=0.5, middle=0.5, out=0.5)[0]
        return merger.merge(model, other, *([0.5] if node == "ModelMergeSimple" else []))[0]

    quantized = merge(both[1], both[0])
    if node == "ModelAdd":  # twice the weights, which random ones do not stand
        assert quantized.patches.keys() <= set(both[1].model_state_dict())
        assert len(quantized.patches) > 100
        return
    assert sqnr(plain[0][0], sample(quantized, *conditionings)) > plain[1] - LOW


# ---- saving with ComfyUI's own nodes


@pytest.mark.parametrize("layers", ["linear + conv", "linear only"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_model_save(quantized, sd15, conditionings, loras, tmp_path, layers, with_lora):
    checkpoint = quantized(Recipe("int8", "max", layers=layers)).checkpoint
    model = loader.load(checkpoint)
    if with_lora:
        model = comfy.sd.load_lora_for_models(model, None, loras[0], 0.5, 0)[0]
    expected = sample(model, *conditionings)
    nodes_model_merging.save_checkpoint(
        model, vae=sd15[2], filename_prefix="x", output_dir=str(tmp_path)
    )
    (path,) = tmp_path.glob("x_*.safetensors")
    again = sample(loader.load_file(str(path)), *conditionings)
    if with_lora:  # it is baked in, and rounded with the weights
        assert sqnr(expected, again) > HIGH
    else:
        assert torch.equal(again, expected)
    if layers == "linear only":
        stock = comfy.sd.load_diffusion_model(str(path))
        assert_as_stock(again, sample(stock, *conditionings))
    else:
        with pytest.raises(RuntimeError, match="detect model type"):
            comfy.sd.load_diffusion_model(str(path))


# ---- how ComfyUI runs it


def test_partial_loading(both, plain, conditionings):
    """As --lowvram does: part of the weights is moved for each call."""
    comfy.model_management.unload_all_models()  # what lies loaded may be patched
    model = both[1].clone()
    model.load("cpu", lowvram_model_memory=1_000_000, force_patch_weights=False)
    moved = [
        m for m in model.model.diffusion_model.modules() if getattr(m, "comfy_cast_weights", 0)
    ]
    assert moved
    assert torch.equal(sample(model, *conditionings), plain[0][1])


def test_multi_gpu_clone(both, plain, conditionings):
    node = next(
        getattr(nodes_multigpu, name)
        for name in dir(nodes_multigpu)
        if getattr(getattr(nodes_multigpu, name), "__module__", "") == nodes_multigpu.__name__
        and "MultiGPU" in name
        and hasattr(getattr(nodes_multigpu, name), "execute")
    )
    model = result(node.execute(both[1], 2))
    assert torch.equal(sample(model, *conditionings), plain[0][1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_torch_compile(both, plain, conditionings, monkeypatch, tmp_path, backend):
    """With PyTorch's attention, as on GPUs: the graph has no break. Inductor sums in another order,
    and what is rounded afterwards moves by whole steps: it is held against the original MODEL."""
    if backend == "inductor" and shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on a CPU")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    attention = comfy.ldm.modules.attention
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wanted = sample(both[1], *conditionings)
    if backend == "inductor":
        model = result(nodes_torch_compile.TorchCompileModel.execute(both[1], backend))
    else:
        model = both[1].clone()
        set_torch_compile_wrapper(model=model, backend=backend)
    output = sample(model, *conditionings)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    if backend == "inductor":
        assert sqnr(plain[0][0], output) > plain[1] - LOW
    else:
        assert sqnr(wanted, output) > 40
    torch._dynamo.reset()


@pytest.mark.parametrize("with_lora", [False, True])
def test_moved_inside_and_outside_of_inference_mode(quantized, loras, conditionings, with_lora):
    """ComfyUI's nodes run inside, its "Unload Models" outside, and quantizing calibrates outside."""
    made = quantized(RECIPE)
    with torch.inference_mode():
        model = loader.load(made.checkpoint)
        with torch.inference_mode(False):
            engine.measure(made, model)
        comfy.model_management.unload_all_models()
        if with_lora:
            model = comfy.sd.load_lora_for_models(model, None, loras[0], 0.5, 0)[0]
        expected = sample(model, *conditionings, sampling=(3, 1, 1.5, "euler", "normal"))
        for inside in (False, True, True):
            with torch.inference_mode(inside), torch.no_grad():
                comfy.model_management.unload_all_models()
            assert torch.equal(
                sample(model, *conditionings, sampling=(3, 1, 1.5, "euler", "normal")), expected
            )
    comfy.model_management.unload_all_models()
