"""QuantizedCheckpoint -> a checkpoint of the diffusers UNet that `mto.restore` accepts.

A diffusers UNet of the same architecture is built, ModelOpt puts its quantizers into it, and they
get the scales of the checkpoint. Weights are stored dequantized, as ModelOpt keeps them: rounding
them again with the same scales gives the same values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ..formats import FORMATS, fp8, int8
from ..formats.checkpoint import PER_TOKEN, Input, Layer, QuantizedCheckpoint
from ..utils import out_of_memory
from ..utils.whole_file import whole_file
from . import diffusers_unet
from .modelopt import E4M3, INT4_BLOCKS, OFF, PER_TENSOR, failure_explained, quiet, require

NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
MXFP8 = {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
WEIGHTS = {
    "int8": {"num_bits": 8, "axis": 0},
    "fp8": E4M3,
    "int4": INT4_BLOCKS,
    "w4a8": [INT4_BLOCKS, E4M3],
    "nvfp4": NVFP4,
    "mxfp8": MXFP8,
}
# what ComfyUI reads the kind of prediction from: no weights
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
ROWS = {"type": "dynamic", "block_sizes": {-1: None}}


@out_of_memory.explained("exporting", out_of_memory.FREE)
def save(unet: torch.nn.Module, path: Path | str) -> None:
    """Writes what `quantized_unet` made, whole or not at all. Errors as of `whole_file`."""
    import modelopt.torch.opt as mto

    needed = sum(tensor.nbytes for tensor in unet.state_dict().values())
    with whole_file(path, needed) as file, disk_errors():
        mto.save(unet, file)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raises what the file system said where `torch.save` hides it behind an error of its own."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


@out_of_memory.explained("exporting", out_of_memory.FREE)
def quantized_unet(
    checkpoint: QuantizedCheckpoint,
    unet_config: Mapping[str, object],
    names: Mapping[str, str],
    step: Callable[[], None] = lambda: None,
) -> tuple[torch.nn.Module, list[str]]:
    """The diffusers UNet with ModelOpt's quantizers, as `mto.restore` would give it, and notes."""
    mtq = require()
    branches = [name for name, layer in checkpoint.layers.items() if layer.rank]
    if branches:
        raise ValueError(
            f"SVDQuant's branches cannot be exported yet, {len(branches)} layers have one, the "
            f"first {branches[0]}: quantize with another algorithm"
        )
    e5m2 = [name for name, layer in checkpoint.layers.items() if layer.format not in WEIGHTS]
    if e5m2:
        raise ValueError(
            f"ModelOpt must have the format, it has no {checkpoint.layers[e5m2[0]].format}, which "
            f"{len(e5m2)} layers are in, the first {e5m2[0]}: quantize with another format"
        )
    unet = diffusers_unet.build(unet_config, "class_embedding.linear_1" in names)
    state, kept, dropped = _weights(checkpoint, names, step)
    missing, unexpected = unet.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(
            "the UNet must be one that diffusers knows, its modules differ: "
            f"{(missing or unexpected)[0]} {'has no weights' if missing else 'is not in diffusers'}"
        )
    entries = [OFF]
    for module, layer in kept.items():
        entries.append(
            {"quantizer_name": f"{module}.weight_quantizer", "cfg": WEIGHTS[layer.format]}
        )
        given = _activations(layer)
        if given is not None:
            entries.append({"quantizer_name": f"{module}.input_quantizer", "cfg": given})
    inputs = {
        theirs: checkpoint.inputs[ours]
        for theirs, ours in names.items()
        if ours in checkpoint.inputs
    }
    for module, one in inputs.items():
        config = {"int8": PER_TENSOR, "fp8": E4M3, "nvfp4": NVFP4, "mxfp8": MXFP8}[one.format]
        if one.format in ("int8", "fp8") and one.amax is None:
            config = {"num_bits": config["num_bits"], **ROWS}
        entries.append({"quantizer_name": f"{module}.input_quantizer", "cfg": config})
    doing = f"it was given {len(kept)} layers to export"
    with failure_explained(doing), quiet(), torch.no_grad():
        mtq.quantize(unet, {"quant_cfg": entries, "algorithm": "max"}, None)
    for module, layer in kept.items():
        _set_scales(unet.get_submodule(module), layer, _own(checkpoint, names[module]))
    for module, one in inputs.items():
        _set_input(unet.get_submodule(module), one)
    notes = []
    if dropped:
        notes.append(
            f"{len(dropped)} layers are in 16 bits in the export, because ModelOpt's blocks do not "
            f"run over input channels of a convolution: {', '.join(dropped)}."
        )
    return unet, notes


def _own(checkpoint: QuantizedCheckpoint, name: str) -> dict[str, torch.Tensor]:
    layer = checkpoint.layers[name]
    return {key: checkpoint.tensors[f"{name}.{key}"] for key in ("weight", *layer.scales)}


def _weights(checkpoint: QuantizedCheckpoint, names: Mapping[str, str], step):
    """State dict in diffusers' names, modules that stay quantized, and those that do not."""
    theirs = {ours: name for name, ours in names.items()}
    state, kept, dropped = {}, {}, []
    strange = [name for name in (*checkpoint.layers, *checkpoint.inputs) if name not in theirs]
    if strange:
        raise ValueError(
            f"the UNet must be one that diffusers knows, {strange[0]} is not in diffusers: export "
            "an SD1.5 or SDXL UNet"
        )
    for name, layer in checkpoint.layers.items():
        own = _own(checkpoint, name)
        shape = layer.shape or tuple(own["weight"].shape)
        weight = FORMATS[layer.format].dequantize(own, shape)
        if layer.kind == "conv2d" and layer.shape is not None:
            dropped.append(name)
        else:
            kept[theirs[name]] = layer
        state[f"{theirs[name]}.weight"] = _narrow(weight)
        step()
    scales = {f"{n}.{key}" for n, x in checkpoint.layers.items() for key in ("weight", *x.scales)}
    for key, tensor in checkpoint.tensors.items():
        module, _, leaf = key.rpartition(".")
        if key in scales:
            continue
        if module in theirs:
            state[f"{theirs[module]}.{leaf}"] = tensor
        elif key not in MARKERS:
            raise ValueError(
                f"the UNet must be one that diffusers knows, its {module} is not in diffusers: "
                "export an SD1.5 or SDXL UNet"
            )
    return state, kept, dropped


def _narrow(weight: torch.Tensor) -> torch.Tensor:
    """In float16, unless that changes more than the last place of it."""
    half = weight.to(torch.float16)
    near = (half.float() - weight).abs() <= 2.0**-10 * weight.abs()
    return half if bool(near.all()) else weight


def _activations(layer: Layer) -> dict | None:
    """ModelOpt's attributes of a layer's input quantizer, or None for none."""
    if layer.weight_only:
        return None
    if layer.format in ("nvfp4", "mxfp8"):
        return WEIGHTS[layer.format]
    bits = {"num_bits": 8} if layer.format == "int8" else {"num_bits": (4, 3)}
    per_token = layer.activations == PER_TOKEN or (layer.format == "int8" and not layer.static)
    return bits | (ROWS if per_token else {"axis": None})


def _set_scales(module: torch.nn.Module, layer: Layer, own: dict[str, torch.Tensor]) -> None:
    """Gives ModelOpt's quantizers of one layer the scales of the checkpoint."""
    weights, inputs = module.weight_quantizer, module.input_quantizer
    if layer.format == "int8":
        amax = int8.amax_of(own["weight_scale"])
        for channel, value in layer.amax_exceptions.items():
            amax[int(channel)] = value
        _fill(weights, amax)
    elif layer.format == "fp8":
        _fill(weights, fp8.amax_of(own["weight_scale"]))
    elif layer.format == "nvfp4":
        _fill(weights, own["weight_scale_2"] * (6.0 * 448.0))
    elif layer.format in ("int4", "w4a8"):
        first = weights[0] if layer.format == "w4a8" else weights
        _fill(first, own["weight_amax"].float())
        if layer.format == "w4a8":
            _fill(weights[1], own["weight_amax_2"])
    if layer.smoothed:
        inputs.pre_quant_scale = own["pre_quant_scale"].float()
    if layer.input_amax:
        inputs.amax = torch.tensor(layer.input_amax)


def _set_input(module: torch.nn.Module, one: Input) -> None:
    if one.amax is not None:
        module.input_quantizer.amax = torch.tensor(one.amax)


def _fill(quantizer, amax: torch.Tensor) -> None:
    """The same shape as ModelOpt's own calibration gave."""
    quantizer._amax = amax.float().reshape(quantizer._amax.shape).clone()
