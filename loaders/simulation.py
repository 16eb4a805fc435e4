"""ModelOpt's own simulation of a layer in float32, to verify a whole UNet against ModelOpt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch

from .. import formats
from ..formats.checkpoint import Input, Layer
from ..kernels import fp8 as fp8_kernels
from ..kernels import int8 as int8_kernels
from .rounding import rounded

SIMULATED = frozenset(
    (name, kind) for name in ("int8", "fp8", "w4a8") for kind in ("linear", "conv2d")
) | {("nvfp4", "linear"), ("mxfp8", "linear")}


def of(layer: Layer) -> Callable:
    """run(x, input_scale, weight, bias, *geometry) of a layer that is in SIMULATED."""

    def input_amax(x, input_scale):
        if layer.static and layer.input_amax is None:
            return input_scale * formats.FORMATS[layer.format].QMAX
        if layer.static:
            return torch.tensor(layer.input_amax, device=x.device)
        return x.float().abs().amax(dim=-1, keepdim=True)

    def int8(function, x, input_scale, weight, bias, *geometry):
        amax = _weight_amax(layer, weight._params.scale)
        return function(x, input_amax(x, input_scale), weight._qdata, amax, bias, *geometry)

    def fp8(function, x, input_scale, weight, bias, *geometry):
        scale = weight._params.scale
        return function(x, input_amax(x, input_scale), weight._qdata, scale, bias, *geometry)

    def w4a8(function, x, input_scale, weight, bias, *geometry):
        stored = weight.layout_cls.stored(weight._qdata, weight._params)
        values, scale = formats.w4a8.to_fp8(stored, weight._params.orig_shape)
        return function(x, input_amax(x, input_scale), values, scale, bias, *geometry)

    def in_blocks(x, input_scale, weight, bias):
        plain = weight.layout_cls.plain(weight._qdata, weight._params)
        q = rounded(x.float(), Input(layer.format, layer.input_amax))
        return F.linear(q, plain, None if bias is None else bias.float()).to(x.dtype)

    if layer.format in ("nvfp4", "mxfp8"):
        return in_blocks
    run = {"int8": int8, "fp8": fp8, "w4a8": w4a8}[layer.format]
    kernels = int8_kernels if layer.format == "int8" else fp8_kernels
    return partial(run, kernels.linear_fake if layer.kind == "linear" else kernels.conv2d_fake)


def _weight_amax(layer: Layer, scale: torch.Tensor) -> torch.Tensor:
    """The amax that the scales were made from; a weight patched since then has others."""
    found = formats.int8.amax_of(scale)
    for channel, value in layer.amax_exceptions.items():
        index = int(channel)
        kept = torch.tensor(value, device=scale.device)
        found[index] = torch.where(kept / formats.int8.QMAX == scale[index], kept, found[index])
    return found


def attend_as_diffusers(unet: torch.nn.Module) -> None:
    """Gives a UNet PyTorch's own attention, which is what diffusers' UNets have.

    Another attention differs in the last place, and what is rounded afterwards by whole steps.
    An attention that another node has chosen stays.
    """

    def own(attention: Callable, *args, **kwargs) -> torch.Tensor:
        return attention_pytorch(*args, **kwargs)

    def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = kwargs.get("transformer_options") or {}
        options = {"optimized_attention_override": own, **given}
        return args, kwargs | {"transformer_options": options}

    unet.register_forward_pre_hook(before, with_kwargs=True)
