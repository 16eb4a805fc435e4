"""Undamaged files to damage: every format, every way to write one, small where the pack allows it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .safetensors import without_ours

NAMES = "input_blocks.0.0", "input_blocks.1.0.in_layers.2", "input_blocks.1.1.proj_in", "out.2"
CONFIG = {"_class_name": "UNet2DConditionModel"}


def make_all(folder: Path) -> None:
    """Every sample, once; takes some seconds and needs ComfyUI and ModelOpt."""
    make_small(folder)
    _whole(folder)
    _with_state(folder / "folder-state")
    _exported(folder / "folder-export")


def make_small(folder: Path) -> None:
    """Those of a few kilobytes."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    _quantized(folder)
    _calibration(folder / "calibration.safetensors")
    _saved(folder)
    for name, text in zip(("recipe.json", "recipe-plain.json"), _recipes(), strict=True):
        (folder / name).write_text(text, encoding="utf-8")


# --- our own files ---


def _layer(form: str, kind: str, **options):
    """-> tensors by their own names, and what the header says."""
    from comfyui_modelopt.formats import FORMATS
    from comfyui_modelopt.formats.checkpoint import Layer

    module = FORMATS[form]
    weight = torch.randn((16, 64) if kind == "linear" else (16, 32, 3, 3))
    tensors = module.quantize(weight, module.weight_amax(weight))
    tensors["bias"] = torch.randn(16).half()
    shape = tuple(weight.shape) if module.BLOCK is not None else None
    layer = Layer(form, kind, shape=shape, **options)
    if "input_scale" in layer.scales:
        layer = Layer(form, kind, shape=shape, input_amax=2.5, **options)
        tensors["input_scale"] = module.input_scale(torch.tensor(2.5))
    if layer.smoothed:
        tensors["pre_quant_scale"] = torch.rand(64) + 0.5
    if layer.rank:
        tensors["svd_up"] = torch.randn(16, layer.rank).half()
        tensors["svd_down"] = torch.randn(layer.rank, 64).half()
    return tensors, layer


def _checkpoint(layers: dict, header: dict, inputs=None):
    from comfyui_modelopt.formats.checkpoint import QuantizedCheckpoint

    tensors = {"time_embed.0.weight": torch.randn(8, 8).half()}
    for name, (own, _) in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    return QuantizedCheckpoint(
        tensors, {n: x for n, (_, x) in layers.items()}, header, inputs or {}
    )


def header(recipe: dict) -> dict:
    """As Quantize makes it, with everything in it."""
    return {
        "recipe": recipe,
        "source": {"name": "mine.safetensors", "sha256": 64 * "a"},
        "calibration": {
            "source": "mine",
            "runs": 2,
            "records": 8,
            "calls": 40,
            "prompts": ["a cat", "a dog"],
            "steps": [20],
            "cfg": [7.0],
            "samplers": ["euler/normal"],
            "resolutions": ["512x512"],
        },
        "quality": {"sqnr_db": 31.5, "worst_sqnr_db": 25.25, "records": 8},
        "versions": {"modelopt": "0.47.0", "torch": "2.14.1"},
        "unet_config": {"model_channels": 320, "channel_mult": [1, 2]},
        "baked_patches": 3,
    }


def _quantized(folder: Path) -> None:
    """Files that the loader reads; too few layers for a model."""
    from comfyui_modelopt.formats import FORMATS, files
    from comfyui_modelopt.formats.checkpoint import PER_TOKEN, Input

    plain = header({"format": "fp8", "algorithm": "max", "layers": "linear + conv", "alpha": 0.5})
    mixed = header({
        "format": "mixed",
        "algorithm": "auto",
        "choices": [{"format": "int8", "algorithm": "max"}, {"format": "int4", "algorithm": "max"}],
        "assignment": {"0": ["a"], "1": ["b", "c"]},
        "goal": {"kind": "bits", "value": 6.0},
    })  # fmt: skip
    for form in FORMATS:
        layers = {"a": _layer(form, "linear"), "b.0": _layer(form, "conv2d")}
        files.write(_checkpoint(layers, plain), folder / f"quantized-{form}.safetensors")
    several = {
        "a": _layer("int8", "linear", smoothed=True),
        "b": _layer("fp8", "linear", activations=PER_TOKEN),
        "c": _layer("nvfp4", "linear", rank=4, smoothed=True),
        "d": _layer("int4", "linear", smoothed=True),
        "e": _layer("w4a8", "conv2d"),
        "f": _layer("int8", "linear", activations="static"),
    }
    inputs = {"g": Input("int8", 1.5), "h": Input("mxfp8")}
    files.write(_checkpoint(several, mixed, inputs), folder / "quantized-mixed.safetensors")
    stock = {"a": _layer("fp8", "linear"), "b": _layer("nvfp4", "linear")}
    files.write(_checkpoint(stock, plain), folder / "quantized-stock.safetensors")


def _whole(folder: Path) -> None:
    """Files that become a MODEL: the smallest UNet that ComfyUI knows."""
    import comfy.sd
    from comfyui_modelopt.formats import files
    from comfyui_modelopt.quantize import engine
    from comfyui_modelopt.quantize.recipe import Recipe

    from ...synthetic import unet_state_dict

    model = comfy.sd.load_diffusion_model_state_dict(unet_state_dict("sd15"))
    for name, recipe in {
        "stock": Recipe("int8", "max", layers="linear only"),
        "packed": Recipe("int4", "max"),
        "blocks": Recipe("mxfp8"),
    }.items():
        made = engine.quantize_model(model, recipe).checkpoint
        files.write(made, folder / f"whole-{name}.safetensors")
    ours = (folder / "whole-stock.safetensors").read_bytes()
    (folder / "stock-form.safetensors").write_bytes(without_ours(ours))


def _calibration(path: Path) -> None:
    from comfyui_modelopt.quantize.calibration import Calibration, Record, Run, save

    context = torch.randn(1, 7, 16)
    records = [
        Record(
            torch.randn(1, 4, 8, 8),
            torch.tensor([900.0 - i]),
            context,
            torch.randn(1, 12),
            control={"input": [torch.randn(1, 4, 2, 2), None], "middle": [], "output": [None]},
            kwargs={"ref": torch.randn(1, 3), "all": [torch.randn(2), torch.randn(3)]},
            plain={"flag": True, "sizes": [1, 2]},
            index=i,
            kind=i % 2,
        )
        for i in range(4)
    ]
    facts = {"calls": 4, "prompt": "a cat", "steps": 4, "cfg": 7.0, "sampler": "euler"}
    run = Run(tuple(records), **facts, scheduler="normal", width=64, height=64)
    signature = {"in_channels": 4, "context_dim": 16, "adm_in_channels": 12, "model_channels": 320}
    save(Calibration((run, run), signature, "mine"), path)


def _recipes() -> tuple[str, str]:
    """Of a mix, and of one recipe for all layers."""
    from comfyui_modelopt.quantize import mixed
    from comfyui_modelopt.quantize.recipe import Recipe

    choices = (Recipe("int8", "smoothquant", alpha=0.5), Recipe("int4", "awq_lite"), Recipe("fp8"))
    layers = {f"input_blocks.{i}.1.proj_in": i % 3 for i in range(6)}
    mix = mixed.Mixed(choices, layers, {"kind": "bits", "value": 6.0})
    plain = Recipe("nvfp4", "svdquant", rank=8, skip=("*.ff.*", "input_blocks.0.0"))
    return mixed.write(mix), mixed.write(plain)


# --- ModelOpt's own ---


def _module(shapes: dict[str, torch.Size], values=None) -> torch.nn.Module:
    """Linears and convolutions under these names (of their weights), and bare modules for others."""
    root = torch.nn.Module()
    for key, shape in shapes.items():
        *parents, name, leaf = key.split(".")
        place = root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, torch.nn.Module())
            place = place._modules[parent]
        if name not in place._modules:
            place.add_module(name, _leaf(shape if leaf == "weight" else ()))
        module = place._modules[name]
        value = torch.randn(shape) / 8 if values is None else values[key]
        module._parameters[leaf] = torch.nn.Parameter(value.float(), requires_grad=False)
    return root


def _leaf(shape) -> torch.nn.Module:
    if len(shape) == 2:
        return torch.nn.Linear(shape[1], shape[0])
    if len(shape) == 4:
        return torch.nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2)
    return torch.nn.Module()


def _presets() -> dict:
    import copy

    import modelopt.torch.quantization as mtq

    rows = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}
    fp8 = copy.deepcopy({**mtq.FP8_DEFAULT_CFG, "algorithm": "max"})
    fp8["quant_cfg"].append({"quantizer_name": "*input_quantizer", "cfg": rows})
    return {
        "int8": copy.deepcopy(mtq.INT8_WEIGHT_ONLY_CFG),
        "int4": copy.deepcopy({**mtq.INT4_AWQ_CFG, "algorithm": "max"}),
        "fp8": fp8,
    }


def _quantize(module: torch.nn.Module, preset: dict) -> None:
    import modelopt.torch.quantization as mtq
    from comfyui_modelopt.quantize.modelopt import quiet

    with quiet(), torch.no_grad():
        mtq.quantize(module, preset, None)


def _saved(folder: Path) -> None:
    """`mto.save` of a few layers under ComfyUI's names."""
    import modelopt.torch.opt as mto

    shapes = {f"{NAMES[0]}.weight": (16, 4, 3, 3), f"{NAMES[0]}.bias": (16,)}
    shapes |= {f"{NAMES[1]}.weight": (16, 16, 3, 3), f"{NAMES[2]}.weight": (16, 128)}
    shapes |= {f"{NAMES[2]}.bias": (16,), f"{NAMES[3]}.weight": (4, 16, 3, 3)}
    shapes |= {"out.0.weight": (16,), "out.0.bias": (16,)}
    for name, preset in _presets().items():
        module = _module(shapes)
        _quantize(module, preset)
        mto.save(module, folder / f"saved-{name}.pt")


def _with_state(place: Path) -> None:
    """A folder of a whole UNet with ModelOpt's state."""
    import modelopt.torch.opt as mto
    from safetensors.torch import save_file

    from ...synthetic import unet_state_dict

    state = unet_state_dict("sd15")
    module = _module({key: tensor.shape for key, tensor in state.items()}, state)
    _quantize(module, _presets()["int8"])
    place.mkdir()
    _write_json(place / "config.json", CONFIG)
    torch.save(mto.modelopt_state(module), place / "modelopt_state.pth")
    made = {k: t.half() if "quantizer" not in k else t for k, t in module.state_dict().items()}
    save_file(made, place / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def _exported(place: Path) -> None:
    """A unified export in two shards, its activations scaled per token."""
    from safetensors.torch import save_file

    from ...synthetic import unet_state_dict

    tensors = {}
    for key, weight in unet_state_dict("sd15").items():
        tensors[key] = weight
        if weight.ndim == 2 and ".transformer_blocks." in key:
            scale = weight.float().abs().amax() / 448
            tensors[key] = (weight.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale"] = scale
    place.mkdir()
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "config_groups": {
            "group_0": {
                "input_activations": {"dynamic": True, "num_bits": 8, "type": "float"},
                "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
                "targets": ["Linear"],
            }
        },
    }
    config = {**CONFIG, "in_channels": 4, "cross_attention_dim": 768, "act_fn": "silu"}
    config |= {"attention_head_dim": 8, "down_block_types": ["CrossAttnDownBlock2D"]}
    _write_json(place / "config.json", {**config, "quantization_config": quantization})
    names = sorted(tensors)
    half, table = len(names) // 2, {}
    for number, own in enumerate((names[:half], names[half:]), start=1):
        file = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({n: tensors[n].contiguous() for n in own}, place / file, {"format": "pt"})
        table |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
    index["weight_map"] = table
    _write_json(place / "diffusion_pytorch_model.safetensors.index.json", index)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
