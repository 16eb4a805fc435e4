"""Calibrated UNet -> tensors of a quantized checkpoint, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..formats import FORMATS, blocks
from ..formats.checkpoint import SIXTEEN_BITS, Layer
from ..formats.groups import sharing
from . import modelopt
from .recipe import AWQ, AWQ_FULL, SMOOTHQUANT, SVDQUANT, LayerPlan


def pack(
    unet: torch.nn.Module, plans: Mapping[str, LayerPlan], step: Callable[[], None]
) -> tuple[dict[str, torch.Tensor], dict[str, Layer]]:
    """Calibrated UNet -> its tensors on the CPU, quantized layers packed, and their table.

    Each layer's weight and quantizers are given up as soon as it is packed, so that patched or moved
    weights and their packed form never exist all at once.
    """
    tensors: dict[str, torch.Tensor] = {}
    table: dict[str, Layer] = {}
    beside = _beside(unet, plans)
    for name, one in plans.items():
        module = unet.get_submodule(name)
        with modelopt.failure_explained(f"{name} was packed as {one.format}"):
            stored, table[name] = _pack_layer(name, module, one, beside.get(name))
        tensors |= {f"{name}.{key}": value.cpu().contiguous() for key, value in stored.items()}
        modelopt.give_up(module)
        step()
    taken = set(plans)
    kept = unet.state_dict().keys()  # without what a model computes for itself
    for name, parameter in [*unet.named_parameters(), *unet.named_buffers()]:
        if name not in kept:
            continue
        parts = name.split(".")
        if any(".".join(parts[:i]) in taken for i in range(len(parts))):
            continue
        if any(part.endswith("_quantizer") for part in parts):
            continue
        tensors[name] = sixteen_bits(parameter.data).cpu()
    return tensors, table


def _beside(unet: torch.nn.Module, plans: Mapping[str, LayerPlan]) -> dict[str, torch.Tensor]:
    """Layers that SmoothQuant smooths -> what `modelopt.smooth` takes of the others of their input.
    Smoothed alike, all of them can be fused (loaders/fused.py); where one is left out, has another
    algorithm or alpha, or was given another input, each stands alone."""
    found = {}
    for group in sharing(name for name, _ in unet.named_modules()):
        chosen = [plans.get(name) for name in group]
        if len(group) < 2 or not all(one and one.algorithm == SMOOTHQUANT for one in chosen):
            continue
        modules = [unet.get_submodule(name) for name in group]
        first, *others = (module.input_quantizer.amax for module in modules)
        one_input = all(torch.equal(first, amax) for amax in others)
        if not one_input or len({one.alpha for one in chosen}) > 1:
            continue
        columns = [module._parameters["weight"].data.abs().amax(0) for module in modules]
        for index, name in enumerate(group):
            found[name] = torch.stack(columns[:index] + columns[index + 1 :])
    return found


def _pack_layer(
    name: str, module: torch.nn.Module, one: LayerPlan, beside: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], Layer]:
    """One calibrated layer -> its tensors by their names in the file, and what the file says of it.

    beside: see `modelopt.smooth`.
    """
    numerics = FORMATS[one.format]
    extra: dict[str, torch.Tensor] = {}
    if one.algorithm == SMOOTHQUANT:
        _live(name, module.input_quantizer.amax.float().amax().item())
        modelopt.smooth(module, one.alpha, beside)
    weight = module._parameters["weight"].data
    if one.algorithm in AWQ:
        if modelopt.input_config(one) is None:  # else its amax tells
            _live(name, module.awq_lite.largest_input)
        weight = modelopt.awq_weight(module, one)
    if one.smooths:
        scale = module.input_quantizer.pre_quant_scale.reshape(-1)
        extra["pre_quant_scale"] = scale if scale.dtype in SIXTEEN_BITS else scale.float()
    if one.algorithm == SVDQUANT:
        extra["svd_up"], extra["svd_down"], weight = modelopt.svd(weight, one.rank)
        extra = {k: sixteen_bits(t) if k.startswith("svd") else t for k, t in extra.items()}
    amax = _weight_amax(module, weight, one)
    stored = numerics.quantize(weight, amax) | extra
    input_amax = None
    if one.static or modelopt.input_config(one) is not None and one.format == "nvfp4":
        found = modelopt.input_amax(module, one)
        if found is not None:
            input_amax = _live(name, found.float().amax().item())
            stored["input_scale"] = numerics.input_scale(torch.tensor(input_amax))
    if module.bias is not None:
        stored["bias"] = sixteen_bits(module.bias.data)
    exceptions = {}
    if one.format == "int8":
        exceptions = numerics.amax_exceptions(stored["weight_scale"], amax)
    layer = Layer(
        one.format,
        one.kind,
        smoothed=one.smooths,
        shape=tuple(weight.shape) if numerics.BLOCK is not None else None,
        rank=stored["svd_down"].shape[0] if "svd_down" in stored else 0,
        activations=one.activations,
        input_amax=input_amax,
        amax_exceptions=exceptions,
    )
    return stored, layer


def _weight_amax(module: torch.nn.Module, weight: torch.Tensor, one: LayerPlan):
    """What the format's `quantize` takes: AWQ_FULL's clipped values, else ModelOpt's calibration."""
    if one.algorithm != AWQ_FULL:
        return modelopt.weight_amax(blocks.flatten(weight), one)
    clipped = module.weight_quantizer.amax
    return (clipped, clipped.amax()) if one.format == "w4a8" else clipped


def _live(name: str, amax: float) -> float:
    if amax > 0:
        return amax
    raise ValueError(
        f"recorded activations must not all be zero, they are in {name}: the layer is dead in this "
        f"model, or the recording is too short; skip that layer with the pattern {name} or record "
        "other prompts"
    )


def sixteen_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Float tensors in 16 bits: float16, or bfloat16 where the source is or float16 overflows."""
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    half = tensor.to(torch.float16)
    return half if bool(torch.isfinite(half).all()) else tensor.to(torch.bfloat16)
