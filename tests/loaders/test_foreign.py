"""Checkpoints that ModelOpt itself wrote run here as they run there."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from comfyui_modelopt.formats import FORMATS, files
from comfyui_modelopt.loaders import foreign, info
from comfyui_modelopt.loaders import unet as loader
from safetensors.torch import load_file, save_file

from .. import diffusers_unets as unets

mtq = pytest.importorskip("modelopt.torch.quantization")
import modelopt.torch.opt as mto  # noqa: E402

SEED = 5


def rows(config: dict, name: str, bits) -> dict:
    """A preset with the activations of Linears scaled per token."""
    config = copy.deepcopy(config)
    dynamic = {"num_bits": bits, "type": "dynamic", "block_sizes": {-1: None}}
    config["quant_cfg"].append({"quantizer_name": name, "cfg": dynamic})
    return config


def percentile_convolutions(unet) -> None:
    """What NVIDIA's example does with its own calibrator: convolutions clip their activations."""
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d) and module.input_quantizer.is_enabled:
            module.input_quantizer.amax = module.input_quantizer.amax * 0.6


RECIPES = {
    "int8": mtq.INT8_DEFAULT_CFG,
    "int8-smoothquant": mtq.INT8_SMOOTHQUANT_CFG,
    "int8-per-token": rows(mtq.INT8_DEFAULT_CFG, "*to_q.input_quantizer", 8),
    "int8-weight-only": mtq.INT8_WEIGHT_ONLY_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8-per-token": rows(mtq.FP8_DEFAULT_CFG, "*to_q.input_quantizer", (4, 3)),
    "int4-awq": mtq.INT4_AWQ_CFG,
    "w4a8-awq": mtq.W4A8_AWQ_BETA_CFG,
}
CASES = [("sd15", name) for name in RECIPES] + [("sdxl", "int8-smoothquant"), ("sdxl", "fp8")]
CASES += [("sd2", "fp8"), ("inpainting", "int8"), ("unclip", "int8-smoothquant")]


def quantize(kind: str, name: str) -> torch.nn.Module:
    unet = unets.make(kind)
    with torch.no_grad():
        mtq.quantize(unet, RECIPES[name], lambda u: unets.run_diffusers(u, kind, 0))
    if name == "int8-smoothquant":
        percentile_convolutions(unet)
    return unet


@pytest.fixture(scope="module")
def saved(folders):
    """(kind, recipe) -> path of a file that mto.save wrote, each made once."""
    folder = folders.mktemp("modelopt")

    def make(kind: str, name: str) -> str:
        path = folder / f"{kind}-{name}.pt"
        if not path.exists():
            mto.save(quantize(kind, name), path)
        return str(path)

    return make


@pytest.mark.parametrize(("kind", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_runs_as_modelopt_runs_it(saved, tmp_path, kind, name):
    path = saved(kind, name)
    theirs = unets.run_diffusers(mto.restore(unets.make(kind), path), kind, SEED)
    plain = unets.run_diffusers(unets.make(kind), kind, SEED)
    checkpoint = foreign.read(path)
    ours = unets.output(checkpoint, kind, SEED)
    assert unets.distance(ours, theirs) < 1e-5
    assert unets.distance(theirs, plain) > 1e-3  # quantization is not nothing
    again = tmp_path / "again.safetensors"
    files.write(checkpoint, again)
    assert torch.equal(unets.run_comfyui(loader.load_file(str(again)), kind, SEED), ours)


def by_packing(inputs, block_size, amax, bias, num_bits, scale_bits, *rest):
    """ModelOpt's fake quantization in dynamic blocks, whose kernels run on CUDA only, through its
    own packed tensors, which run anywhere and give the same values."""
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    width = inputs.shape[-1]
    flat = inputs.float().reshape(-1, width)
    flat = torch.nn.functional.pad(flat, (0, -width % block_size))
    if scale_bits == (4, 3):
        tensor, scale, double = NVFP4QTensor.quantize(
            flat, 16, weights_scaling_factor_2=amax.float().amax() / (6 * 448)
        )
        scales = {"scale": scale, "double_scale": double}
    else:
        tensor, scale = MXFP8QTensor.quantize(flat)
        scales = {"scale": scale}
    made = tensor.dequantize(dtype=torch.float32, block_sizes={-1: block_size}, **scales)
    return made[:, :width].reshape(inputs.shape).to(inputs.dtype)


WHOLE = {
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "int8-rows": rows(mtq.INT8_DEFAULT_CFG, "*input_quantizer", 8),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("sd15", "nvfp4"), ("sd15", "mxfp8"), ("sd15", "int8-rows"), ("sdxl", "nvfp4")],
)
def test_whole_presets_with_block_formats(monkeypatch, tmp_path, kind, name):
    """Their LayerNorms and convolutions are rounded in blocks too, along the last axis."""
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    monkeypatch.setattr(tensor_quantizer, "dynamic_block_quant", by_packing)
    unet, path = unets.make(kind), tmp_path / "x.pt"
    with torch.no_grad():
        mtq.quantize(unet, copy.deepcopy(WHOLE[name]), lambda u: unets.run_diffusers(u, kind, 0))
    mto.save(unet, path)
    theirs = unets.run_diffusers(mto.restore(unets.make(kind), path), kind, SEED)
    plain = unets.run_diffusers(unets.make(kind), kind, SEED)
    checkpoint = foreign.read(path)
    ours = unets.output(checkpoint, kind, SEED)
    assert unets.distance(ours, theirs) < 1e-5
    assert unets.distance(theirs, plain) > 1e-3
    form = name.partition("-")[0]
    assert {layer.format for layer in checkpoint.layers.values()} == {form}
    assert {one.format for one in checkpoint.inputs.values()} == {form}
    assert len([note for note in checkpoint.header["imported"]["notes"] if "LayerNorms" in note])
    files.write(checkpoint, tmp_path / "again.safetensors")
    again = loader.read(str(tmp_path / "again.safetensors"))
    assert again.inputs == checkpoint.inputs and again.layers == checkpoint.layers


def packable(kind: str, name: str) -> torch.nn.Module:
    """A quantized UNet for mtq.compress, which cannot pack INT4 of a 3x3 kernel."""
    config = copy.deepcopy(RECIPES[name])
    unet = unets.make(kind)
    if name.startswith(("int4", "w4a8")):
        config["quant_cfg"].append(
            {"parent_class": "nn.Conv2d", "quantizer_name": "*", "enable": False}
        )
        config["quant_cfg"] += [
            {"quantizer_name": f"{module}.*", "enable": False}
            for module, one in unet.named_modules()
            if isinstance(one, torch.nn.Linear) and one.in_features % 128
        ]
    with torch.no_grad():
        mtq.quantize(unet, config, lambda u: unets.run_diffusers(u, kind, 0))
    return unet


def worst_layer(theirs: torch.nn.Module, checkpoint, kind: str) -> tuple[str, float]:
    """The layer whose output, given ModelOpt's input, is farthest from ModelOpt's."""
    model = loader.load(checkpoint)
    unets.run_comfyui(model, kind, SEED)  # loads it
    ours, modules = model.model.diffusion_model, foreign.of_model(model)
    worst = {}

    def compare(module):
        def hook(_, given, output):
            mine = ours.get_submodule(modules[module])(given[0])
            worst[module] = unets.distance(mine, output)

        return hook

    for module, one in theirs.named_modules():
        if hasattr(one, "input_quantizer") and module in modules:
            one.register_forward_hook(compare(module))
    unets.run_diffusers(theirs, kind, SEED)
    assert len(worst) > 50
    return max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("name", ["int8", "int8-smoothquant", "fp8", "int4-awq"])
def test_compressed_weights_run_as_modelopt_runs_them(tmp_path, name):
    unet = packable("sd15", name)
    mtq.compress(unet)
    path = tmp_path / "compressed.pt"
    mto.save(unet, path)
    theirs = unets.run_diffusers(unet, "sd15", SEED)
    checkpoint = foreign.read(path)
    assert worst_layer(unet, checkpoint, "sd15")[1] < 1e-5
    if not name.startswith("int8"):  # its products are of integers: other last places
        assert unets.distance(unets.output(checkpoint, "sd15", SEED), theirs) < 1e-4
    kinds = {layer.kind for layer in checkpoint.layers.values()}
    assert kinds == ({"linear"} if name.endswith("awq") else {"linear", "conv2d"})


def test_compressed_w4a8_holds_the_same_weights():
    """ModelOpt itself cannot run these on a CPU. Its packing rounds a few ties the other way."""
    unet = packable("sd15", "w4a8-awq")
    before = foreign.from_module(unet)
    mtq.compress(unet)
    after = foreign.from_module(unet)
    assert after.layers == before.layers and len(after.layers) > 10
    for name, layer in after.layers.items():
        found, expected = (
            FORMATS["w4a8"].dequantize(
                {
                    key: one.tensors[f"{name}.{key}"]
                    for key in layer.scales + ("weight",)
                    if f"{name}.{key}" in one.tensors
                },
                layer.shape,
            )
            for one in (after, before)
        )
        assert unets.distance(found, expected) < 1e-3, name


@pytest.mark.parametrize(("kind", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_every_layer_agrees_whatever_the_attention(saved, kind, name):
    """Given ModelOpt's input, each layer gives ModelOpt's output."""
    path = saved(kind, name)
    theirs = mto.restore(unets.make(kind), path)
    name, distance = worst_layer(theirs, foreign.read(path), kind)
    assert distance < 1e-5, name


def test_an_attention_that_a_node_has_chosen_stays(saved):
    model = loader.load(foreign.read(saved("sd15", "int8")))
    called = []

    def chosen(attention, *args, **kwargs):
        called.append(attention)
        return attention(*args, **kwargs)

    options = {"optimized_attention_override": chosen}
    unets.run_comfyui(model, "sd15", SEED, transformer_options=options)
    assert len(called) > 4


def test_a_module_in_this_process(saved):
    path = saved("sd15", "fp8")
    restored = mto.restore(unets.make("sd15"), path)
    before = {name: tensor.clone() for name, tensor in restored.state_dict().items()}
    ours, theirs = foreign.from_module(restored), foreign.read(path)
    assert ours.layers == theirs.layers and ours.inputs == theirs.inputs
    for name, tensor in ours.tensors.items():
        assert torch.equal(tensor.float(), theirs.tensors[name].float()), name
    for name, tensor in restored.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_module_with_other_heads_is_refused():
    from diffusers import UNet2DConditionModel

    other = {**unets.SD15, "attention_head_dim": 5, "sample_size": 8}
    unet = UNet2DConditionModel(**other)
    with torch.no_grad():
        mtq.quantize(unet, mtq.FP8_DEFAULT_CFG, lambda u: unets.run_diffusers(u, "sd15", 0))
    with pytest.raises(ValueError, match=r"must be \[8\] in ComfyUI's UNet .* says \[5\]"):
        foreign.from_module(unet)


def edited(path: str, folder, change) -> str:
    objects = torch.load(path, weights_only=True)
    change(objects, objects["modelopt_state"]["modelopt_state_dict"][-1][1]["metadata"])
    target = folder / "edited.pt"
    torch.save(objects, target)
    return str(target)


@pytest.fixture
def attention_products():
    """ModelOpt's quantizers in diffusers' attention, as ModelOpt's own plugin puts them there where
    the package onnx is installed."""
    from diffusers.models.attention_processor import Attention
    from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer
    from modelopt.torch.quantization.plugins.custom import _QuantFunctionalMixin

    def attend(self, query, key, value, *args, **kwargs):
        q, k = self.q_bmm_quantizer(query), self.k_bmm_quantizer(key)
        return torch._C._nn.scaled_dot_product_attention(
            q, k, self.v_bmm_quantizer(value), *args, **kwargs
        )

    class Quantized(_QuantFunctionalMixin):
        @property
        def functionals_to_replace(self):
            function = functools.partial(attend, self)
            yield torch.nn.functional, "scaled_dot_product_attention", function

        def _setup(self):
            for name in ("q_bmm", "k_bmm", "v_bmm", "softmax", "bmm2_output"):
                setattr(self, f"{name}_quantizer", TensorQuantizer())

    known = Attention in QuantModuleRegistry
    if not known:
        QuantModuleRegistry.register({Attention: "Attention"})(Quantized)
    yield
    if not known:
        QuantModuleRegistry.unregister(Attention)


def test_attention_products_are_left_out_and_told(attention_products, tmp_path):
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"] += [
        {"quantizer_name": name, "cfg": {"num_bits": (4, 3)}}
        for name in ("*[qkv]_bmm_quantizer", "*softmax_quantizer")
    ]
    unet, path = unets.make("sd15"), tmp_path / "x.pt"
    with torch.no_grad():
        mtq.quantize(unet, config, lambda u: unets.run_diffusers(u, "sd15", 0))
    mto.save(unet, path)
    checkpoint = foreign.read(path)
    (note,) = [n for n in checkpoint.header["imported"]["notes"] if n.startswith("Left out")]
    assert note == "Left out: the quantization of attention's own products, in 8 layers."
    assert note in info.describe(loader.load(checkpoint))
    ours = unets.output(checkpoint, "sd15", SEED)
    assert unets.distance(unets.run_diffusers(unet, "sd15", SEED), ours) > 1e-3
    mtq.disable_quantizer(unet, "*_bmm_quantizer")
    mtq.disable_quantizer(unet, "*softmax_quantizer")
    assert unets.distance(ours, unets.run_diffusers(unet, "sd15", SEED)) < 1e-5


def test_layers_without_a_format_keep_modelopts_rounding_and_are_named(saved):
    """INT4 blocks of a convolution run over three values of its kernel in ModelOpt's presets."""
    checkpoint = foreign.read(saved("sd15", "w4a8-awq"))
    (note,) = [n for n in checkpoint.header["imported"]["notes"] if "floating point" in n]
    assert "blocks run over the kernel's last axis" in note
    assert "input_blocks.1.0.in_layers.2" in note
    assert "input_blocks.1.0.in_layers.2" in checkpoint.inputs
    assert "input_blocks.1.0.in_layers.2" not in checkpoint.layers


def without(*names):
    def change(objects, metadata):
        for name in names:
            del objects["model_state_dict"][name]

    return change


def rename(objects, metadata):
    state = objects["model_state_dict"]
    state["transformer.block.weight"] = state.pop("down_blocks.0.resnets.0.conv1.weight")


FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DAMAGE = {
    "no quantizers": (
        lambda o, m: o["modelopt_state"].update(modelopt_state_dict=[]),
        "must be quan",
    ),
    "a state of another form": (
        lambda o, m: o["modelopt_state"].update(modelopt_state_dict=[("quantize", 3)]),
        "list of modes",
    ),
    "no weights": (lambda o, m: o.pop("model_state_dict"), "save the quantized UNet with mto.save"),
    "weights of another form": (lambda o, m: o.update(model_state_dict=[1]), "tensors only"),
    "an amax gone": (without(f"{FIRST}.weight_quantizer._amax"), f"{'to_q'} in"),
    "an activation amax gone": (without(f"{FIRST}.input_quantizer._amax"), "for its activations"),
    "a weight gone": (without(f"{FIRST}.weight"), "attn1.to_q"),
    "another architecture": (rename, "cannot be imported"),
    "no UNet": (
        lambda o, m: o.update(model_state_dict={"blocks.0.weight": torch.ones(2)}),
        "must be of a UNet",
    ),
    "an amax of another size": (
        lambda o, m: o["model_state_dict"].update(
            {f"{FIRST}.weight_quantizer._amax": torch.ones(3)}
        ),
        "must have",
    ),
    "a weight NaN": (
        lambda o, m: o["model_state_dict"][f"{FIRST}.weight"].fill_(torch.nan),
        "weights must be finite",
    ),
    "a branch with one side": (
        lambda o, m: o["model_state_dict"].update(
            {f"{FIRST}.weight_quantizer.svdquant_lora_b": torch.ones(3, 2)}
        ),
        "two sides",
    ),
    "a smoothing scale of another size": (
        lambda o, m: o["model_state_dict"].update(
            {f"{FIRST}.input_quantizer._pre_quant_scale": torch.ones(3)}
        ),
        "pre_quant_scale",
    ),
    "a million million quantizers": (
        lambda o, m: m["quantizer_state"].update(
            {
                f"{FIRST}.weight_quantizer": {
                    "is_sequential_quantizer": True,
                    "num_quantizers": 10**12,
                }
            }
        ),
        "another form",
    ),
    "bits that are no number": (
        lambda o, m: m["quantizer_state"][f"{FIRST}.weight_quantizer"].update(_num_bits={}),
        "another form",
    ),
    "packed weights without a scale": (
        lambda o, m: o["model_state_dict"].update(
            {f"{FIRST}.weight": torch.zeros(320, 320, dtype=torch.float8_e4m3fn)}
        ),
        "must have scale beside it",
    ),
    "packed weights of another kind": (
        lambda o, m: o["model_state_dict"].update(
            {
                f"{FIRST}.weight": torch.zeros(320, 320, dtype=torch.int8),
                f"{FIRST}.weight_quantizer._scale": torch.ones(320, 1),
            }
        ),
        "a compressed fp8 weight must be",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(saved, tmp_path, name):
    change, message = DAMAGE[name]
    path = edited(saved("sd15", "fp8"), tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        loader.load(foreign.read(path), where=path)
    assert path in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(saved, tmp_path, share):
    data = open(saved("sd15", "fp8"), "rb").read()  # noqa: SIM115
    path = tmp_path / "short.pt"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="short.pt is not"):
        foreign.read(path)


# ---- pickles that would do something


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def as_zip(value, path):
    torch.save(value, path)


def as_legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def as_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


def as_tar(value, path):
    inner = path.with_name("pickle")
    inner.write_bytes(pickle.dumps(value))
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.add(inner, name)


def as_plain_zip(value, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value))
        archive.writestr("archive/version", "3\n")


def as_nested(value, path):
    """Deep inside what is otherwise a checkpoint."""
    state = {"modelopt_state_dict": [("quantize", {"config": value, "metadata": {}})]}
    torch.save({"modelopt_state": state, "model_state_dict": {}}, path)


FORMS = (as_zip, as_legacy, as_pickle, as_tar, as_plain_zip, as_nested)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_a_pickle_that_does_something_is_refused(tmp_path, form, name):
    path, trace = tmp_path / name, tmp_path / "trace"
    form(Payload(trace), path)
    with pytest.raises(ValueError, match=name):
        foreign.read(path)
    assert not trace.exists()


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_also_in_a_folder(folder_of, tmp_path, form):
    path, trace = tmp_path / "copy", tmp_path / "trace"
    shutil.copytree(folder_of("fp8"), path)
    form(Payload(trace), path / "modelopt_state.pth")
    with pytest.raises(ValueError, match="modelopt_state.pth"):
        foreign.read(path)
    assert not trace.exists()


# ---- folders


@pytest.fixture(scope="module")
def folder_of(folders, saved):
    """recipe -> a folder of save_pretrained, with ModelOpt's state in it."""
    made = folders.mktemp("folders")

    def make(name: str):
        mto.enable_huggingface_checkpointing()
        path = made / name
        if not path.exists():
            unet = mto.restore(unets.make("sd15"), saved("sd15", name))
            unet.save_pretrained(path, max_shard_size="20MB")
        return path

    return make


@pytest.mark.parametrize("name", ["fp8", "int8-smoothquant"])
def test_a_folder_of_save_pretrained(folder_of, saved, tmp_path, name):
    ours, theirs = foreign.read(folder_of(name)), foreign.read(saved("sd15", name))
    assert ours.layers == theirs.layers and ours.inputs == theirs.inputs
    for key, tensor in ours.tensors.items():
        assert torch.equal(tensor.float(), theirs.tensors[key].float()), key
    assert len(list(folder_of(name).glob("*.safetensors"))) > 1  # it is in shards
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folder_of(name), pipeline / "unet")
    assert foreign.read(pipeline).layers == theirs.layers


UNIFIED = {
    "fp8": (mtq.FP8_DEFAULT_CFG, "fp8"),
    "int8-smoothquant": (mtq.INT8_SMOOTHQUANT_CFG, "int8"),
    "int4-awq": (mtq.INT4_AWQ_CFG, "int4"),
    "w4a8-awq": (mtq.W4A8_AWQ_BETA_CFG, "w4a8"),
    "nvfp4": (mtq.NVFP4_DEFAULT_CFG, "nvfp4"),
    "mxfp8": (mtq.MXFP8_DEFAULT_CFG, "mxfp8"),
}
CUDA_ONLY = ("nvfp4", "mxfp8")  # ModelOpt cannot run these on a CPU, but it can export them


@pytest.fixture(scope="module")
def exported(folders):
    """recipe -> (folder of export_hf_checkpoint, what ModelOpt's weights are there), made once."""
    from modelopt.torch.export import export_hf_checkpoint

    made = {}

    def make(name: str):
        if name not in made:
            unet = unets.make("sd15")
            config = copy.deepcopy(UNIFIED[name][0])
            # ModelOpt's export packs no convolution, and cannot write one in blocks, nor a
            # shorter block at the end of a row
            left_out = [{"parent_class": "nn.Conv2d", "quantizer_name": "*"}]
            if UNIFIED[name][1] in ("int4", "w4a8"):
                left_out += [
                    {"quantizer_name": f"{module}.*"}
                    for module, one in unet.named_modules()
                    if isinstance(one, torch.nn.Linear) and one.in_features % 128
                ]
            config["quant_cfg"] += [{**entry, "enable": False} for entry in left_out]
            given = None if name in CUDA_ONLY else lambda u: unets.run_diffusers(u, "sd15", 0)
            with torch.no_grad():
                mtq.quantize(unet, config, given)
                path = folders.mktemp("exports") / name
                export_hf_checkpoint(unet, export_dir=path)
            made[name] = path
        return made[name]

    return make


@pytest.mark.parametrize("name", UNIFIED)
def test_a_unified_export(exported, name):
    from modelopt.torch.export.quant_utils import from_quantized_weight

    path = exported(name)
    checkpoint = foreign.read(path)
    form = UNIFIED[name][1]
    assert {layer.format for layer in checkpoint.layers.values()} == {form}
    assert {layer.kind for layer in checkpoint.layers.values()} == {"linear"}
    stored = load_file(path / "diffusion_pytorch_model.safetensors")
    modules = {b: a for a, b in foreign.of_model(loader.load(checkpoint)).items()}
    known = {"fp8": "fp8", "int8": "int8_sq"}.get(form)
    for ours, layer in checkpoint.layers.items():
        own = {k: checkpoint.tensors[f"{ours}.{k}"] for k in ("weight", *layer.scales)}
        shape = layer.shape or tuple(own["weight"].shape)
        mine = FORMATS[form].dequantize(own, shape)
        weight, scale = (stored[f"{modules[ours]}.{k}"] for k in ("weight", "weight_scale"))
        if known is not None:
            theirs = from_quantized_weight(weight, scale, known, torch.float32)
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
        else:
            theirs = UNPACK[form](weight, scale, stored.get(f"{modules[ours]}.weight_scale_2"))
            torch.testing.assert_close(mine, theirs, rtol=2.0**-10, atol=1e-6)
        if layer.static:
            assert torch.equal(own["input_scale"], stored[f"{modules[ours]}.input_scale"].float())
    with pytest.raises(ValueError, match="import the folder"):
        foreign.read(path / "diffusion_pytorch_model.safetensors")
    assert all(layer.activations in ("", "static") for layer in checkpoint.layers.values())
    output = unets.output(checkpoint, "sd15", SEED)
    plain = unets.run_diffusers(unets.make("sd15"), "sd15", SEED)
    assert 1e-4 < unets.distance(output, plain) < 0.5


def unpack_int4(weight, scale, _):
    low, high = (weight & 15).to(torch.int8), (weight >> 4).to(torch.int8)
    values = torch.stack((low, high), 1).reshape(-1, weight.shape[1])
    values = torch.where(values > 7, values - 16, values).float()
    return values * scale.repeat_interleave(128, 1)[:, : weight.shape[1]]


def unpack_w4a8(weight, scale, scale_2):
    dense = unpack_int4(weight, scale, None)
    return (dense / scale_2).to(torch.float8_e4m3fn).float() * scale_2


def unpack_nvfp4(weight, scale, scale_2):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    shape = torch.Size((weight.shape[0], 2 * weight.shape[1]))
    tensor = NVFP4QTensor(shape, torch.float32, weight)
    return tensor.dequantize(
        dtype=torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16}
    )


def unpack_mxfp8(weight, scale, _):
    return weight.float() * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)


UNPACK = {"int4": unpack_int4, "w4a8": unpack_w4a8, "nvfp4": unpack_nvfp4, "mxfp8": unpack_mxfp8}


def attention_and_feed_forward(attention: dict, feed_forward: dict) -> list[dict]:
    """Entries for weights and inputs of Linears in two formats; everything else in 16 bits."""
    found = [{"quantizer_name": "*", "enable": False}]
    for part, own in (("attn", attention), ("ff", feed_forward)):
        for side, config in own.items():
            found.append({"quantizer_name": f"*{part}*{side}_quantizer", "cfg": config})
    return found


STATIC_FP8 = {side: {"num_bits": (4, 3), "axis": None} for side in ("weight", "input")}
ROWS_FP8 = {"weight": STATIC_FP8["weight"]}
ROWS_FP8["input"] = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}
ROWS_INT8 = {"weight": {"num_bits": 8, "axis": 0}, "input": ROWS_FP8["input"] | {"num_bits": 8}}
WEIGHTS_INT8 = {"weight": ROWS_INT8["weight"]}
MIXES = {
    "int8 per token alone": (ROWS_INT8, ROWS_INT8),
    "fp8 and int8 per token": (STATIC_FP8, ROWS_INT8),
    "int8 per token and of weights only": (ROWS_INT8, WEIGHTS_INT8),
    "fp8 and weights only": (STATIC_FP8, WEIGHTS_INT8),
}


@pytest.mark.parametrize("name", [*MIXES, "fp8 per token"])
def test_a_unified_export_of_several_ways(tmp_path, name):
    """Each layer's own, as ModelOpt's saved state has it."""
    from modelopt.torch.export import export_hf_checkpoint

    unet = unets.make("sd15")
    entries = attention_and_feed_forward(*MIXES.get(name, (STATIC_FP8, ROWS_FP8)))
    with torch.no_grad():
        mtq.quantize(
            unet,
            {"quant_cfg": entries, "algorithm": "max"},
            lambda u: unets.run_diffusers(u, "sd15", 0),
        )
        expected = foreign.from_module(unet).layers
        export_hf_checkpoint(unet, export_dir=tmp_path / "x")
    checkpoint = foreign.read(tmp_path / "x")
    assert checkpoint.layers.keys() == expected.keys()
    notes = checkpoint.header["imported"]["notes"]
    for layer, own in expected.items():
        found = checkpoint.layers[layer]
        if name not in MIXES and ".ff." in layer:  # nothing in the export tells it from weight-only
            assert found.activations == "16 bits" and layer in notes[0]
        else:
            assert (found.format, found.activations) == (own.format, own.activations), layer
    assert bool(notes) == (name not in MIXES)


def drop_shard(path):
    next(iter(sorted(path.glob("*.safetensors")))).unlink()


def drop_index(path):
    next(iter(path.glob("*.index.json"))).unlink()


def leave_folder(path):
    (index,) = path.glob("*.index.json")
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = "../x.safetensors"
    index.write_text(json.dumps(content))


def drop_state(path):
    (path / "modelopt_state.pth").unlink()


def write(name: str, text: str):
    return lambda path: (path / name).write_text(text)


def config_says(**changed):
    def change(path):
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(content | changed))

    return change


FOLDER_DAMAGE = {
    "the config of another UNet": (
        config_says(cross_attention_dim=1024),
        "cross_attention_dim must be 768 in ComfyUI's UNet",
    ),
    "the config of other widths": (
        config_says(block_out_channels=[320, 640]),
        r"block_out_channels must be \[320\]",
    ),
    "the config of another model": (
        config_says(_class_name="FluxTransformer2DModel"),
        "must be a UNet2DConditionModel",
    ),
    # ComfyUI's UNets have 8 heads where these have 5: the same weights, another output
    "other attention heads": (config_says(attention_head_dim=5), r"must be \[8\] in ComfyUI's"),
    "another activation function": (config_says(act_fn="gelu"), "act_fn must be silu"),
    "heads that are no number": (config_says(attention_head_dim={}, num_attention_heads="x"), "x"),
    "levels that are no list": (config_says(down_block_types=3, norm_eps="x"), "norm_eps must be"),
    "no config": (lambda p: (p / "config.json").unlink(), "must hold config.json"),
    "config no JSON": (write("config.json", "{"), "must be JSON"),
    "config a list": (write("config.json", "[]"), "must be a JSON object, found list"),
    "a shard gone": (drop_shard, "is missing"),
    "the index gone": (drop_index, "one .safetensors file or an index"),
    "an index that leaves the folder": (leave_folder, "of its folder"),
    "the state gone": (drop_state, "must hold modelopt_state.pth"),
}


@pytest.mark.parametrize("names", [("fp8", "int8-smoothquant"), ("int8-smoothquant", "fp8")])
@pytest.mark.parametrize("what", ["the state", "a shard"])
def test_parts_of_two_checkpoints(folder_of, tmp_path, names, what):
    path, other = tmp_path / "mixed", folder_of(names[1])
    shutil.copytree(folder_of(names[0]), path)
    first = sorted(f.name for f in path.glob("*.safetensors"))[0]
    part = {"the state": "modelopt_state.pth", "a shard": first}[what]
    theirs = sorted(other.glob("*.safetensors"))[0].name if what == "a shard" else part
    shutil.copy(other / theirs, path / part)
    with pytest.raises(ValueError, match="two checkpoints|every tensor of the index") as caught:
        foreign.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", FOLDER_DAMAGE)
def test_a_damaged_folder_is_named(folder_of, tmp_path, name):
    path = tmp_path / "copy"
    shutil.copytree(folder_of("fp8"), path)
    change, message = FOLDER_DAMAGE[name]
    change(path)
    with pytest.raises(ValueError, match=message) as caught:
        foreign.read(path)
    assert str(path) in str(caught.value)


EXPORT_DAMAGE = {
    "scale of another shape": (
        lambda t, k: t.update({f"{k}.weight_scale": torch.ones(3)}),
        "must be in a format of",
    ),
    "weight gone": (lambda t, k: t.pop(f"{k}.weight"), "scales must belong to a weight"),
    "scale NaN": (
        lambda t, k: t.update({f"{k}.weight_scale": torch.tensor(torch.nan)}),
        "positive and finite",
    ),
    "another UNet": (
        lambda t, k: t.update({"down_blocks.7.x.weight": torch.ones(1)}),
        "cannot be imported",
    ),
}


@pytest.mark.parametrize("name", EXPORT_DAMAGE)
def test_a_damaged_export_is_named(exported, tmp_path, name):
    path = tmp_path / "copy"
    shutil.copytree(exported("fp8"), path)
    file = path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change, message = EXPORT_DAMAGE[name]
    change(tensors, FIRST)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message) as caught:
        foreign.read(path)
    assert str(path) in str(caught.value)


def test_an_ordinary_folder_is_told_apart(tmp_path):
    unets.make("sd15").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="must hold a quantized UNet"):
        foreign.read(tmp_path / "plain")


# ---- dev.py import


def test_the_command(saved, tmp_path, capsys):
    from comfyui_modelopt.devtools import importing

    out = tmp_path / "mine.safetensors"
    out.write_bytes(b"mine")
    assert importing.main(Path(saved("sd15", "fp8")), out) == 0
    assert out.read_bytes() == b"mine"
    again = loader.read(str(tmp_path / "mine-2.safetensors"))
    assert again.layers == foreign.read(saved("sd15", "fp8")).layers
    assert "mine-2.safetensors" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(tmp_path):
    from comfyui_modelopt.devtools import importing
    from comfyui_modelopt.devtools.common import UserError

    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match="there is no"):
        importing.check(path, None)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="must end in .safetensors"):
        importing.check(path, tmp_path / "x.bin")
    with pytest.raises(UserError, match="zip form"):
        importing.main(path, tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()
