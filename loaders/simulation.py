"""ModelOpt's own simulation of a layer in float32, to verify a whole UNet against ModelOpt."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..formats import int8
from ..formats.checkpoint import Layer
from ..kernels import fp8 as fp8_kernels
from ..kernels import int8 as int8_kernels

SIMULATED = frozenset((name, kind) for name in ("int8", "fp8") for kind in ("linear", "conv2d"))


def of(layer: Layer) -> Callable:
    """run(x, input_scale, weight, bias, *geometry) of a layer that is in SIMULATED."""
    amax = torch.tensor(layer.input_amax or 0.0)

    def weight_amax(scale):
        found = int8.amax_of(scale)
        for channel, value in layer.amax_exceptions.items():
            found[int(channel)] = value
        return found

    def int8_linear(x, input_scale, weight, bias):
        w_amax = weight_amax(weight._params.scale)
        return int8_kernels.linear_fake(x, weight._qdata, w_amax, bias)

    def int8_conv2d(x, input_scale, weight, bias, *geometry):
        w_amax = weight_amax(weight._params.scale)
        x_amax = amax.to(x.device)
        return int8_kernels.conv2d_fake(x, x_amax, weight._qdata, w_amax, bias, *geometry)

    def fp8_linear(x, input_scale, weight, bias):
        scale = weight._params.scale
        x_amax = x.abs().amax(dim=-1, keepdim=True) if layer.dynamic else amax.to(x.device)
        return fp8_kernels.linear_fake(x, x_amax, weight._qdata, scale, bias)

    def fp8_conv2d(x, input_scale, weight, bias, *geometry):
        scale = weight._params.scale
        return fp8_kernels.conv2d_fake(x, amax.to(x.device), weight._qdata, scale, bias, *geometry)

    table = {
        ("int8", "linear"): int8_linear,
        ("int8", "conv2d"): int8_conv2d,
        ("fp8", "linear"): fp8_linear,
        ("fp8", "conv2d"): fp8_conv2d,
    }
    return table[(layer.format, layer.kind)]
