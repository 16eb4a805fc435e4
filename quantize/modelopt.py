"""The only place that runs ModelOpt: calibration of ComfyUI's own UNet modules, in place."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
from collections.abc import Callable

import torch

from .recipe import SMOOTHQUANT, Recipe, modelopt_config


def require():
    """The module `modelopt.torch.quantization`. Raises ValueError naming what to install."""
    if importlib.util.find_spec("modelopt") is None:
        raise ValueError(
            "quantizing needs the package nvidia-modelopt, it is not installed in ComfyUI's "
            'Python: run "pip install nvidia-modelopt" there and restart ComfyUI '
            "(loading quantized files works without it)"
        )
    import modelopt.torch.quantization as mtq

    return mtq


def version() -> str:
    """ModelOpt's version, for the file header."""
    return importlib.metadata.version("nvidia-modelopt")


def register(unet: torch.nn.Module, layers: dict[str, str]) -> list[str]:
    """Tells ModelOpt of the UNet's layer classes; returns the names of all layers it will convert.

    ModelOpt matches exact types: ComfyUI's `comfy.ops.*.Linear` and `Conv2d` would get no
    quantizer otherwise.
    """
    require()
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.nn.modules.quant_conv import _QuantConv2d
    from modelopt.torch.quantization.nn.modules.quant_linear import _QuantLinear

    modules = dict(unet.named_modules())
    wrappers = {"linear": _QuantLinear, "conv2d": _QuantConv2d}
    for name, kind in layers.items():
        cls = type(modules[name])
        if cls not in QuantModuleRegistry:
            QuantModuleRegistry.register({cls: f"{cls.__module__}.{cls.__qualname__}"})(
                wrappers[kind]
            )
    return [name for name, module in modules.items() if type(module) in QuantModuleRegistry]


def calibrate(
    unet: torch.nn.Module,
    recipe: Recipe,
    layers: dict[str, str],
    forward_loop: Callable[[torch.nn.Module], None] | None,
) -> None:
    """Puts quantizers into `unet` (in place) and calibrates them; weights are not written to.

    SmoothQuant's rescaling is not done here but layer by layer in `smooth`, so that at no time
    more than one layer's weight exists twice.
    """
    mtq = require()
    everything = register(unet, layers)
    mtq.quantize(unet, modelopt_config(recipe, layers, everything), forward_loop)


def smooth(module: torch.nn.Module, alpha: float) -> None:
    """SmoothQuant on one calibrated Linear, by ModelOpt itself. Gives it a weight of its own.

    Afterwards `module.weight` is rescaled and `module.input_quantizer.pre_quant_scale` [in] set.
    ModelOpt collects activation maxima in a forward loop; the ones collected by `calibrate` are
    given to it as one token, [1, …, in] as collected.
    """
    mtq = require()
    amax = module.input_quantizer.amax.detach().clone()
    weight = module._parameters["weight"].data
    if weight.device != amax.device:  # a UNet too large for the device, streamed
        module.weight_quantizer.to(amax.device)
        module.weight_quantizer._calibrator.reset()
    module._parameters["weight"] = torch.nn.Parameter(
        weight.to(amax.device, copy=True), requires_grad=False
    )
    holder = torch.nn.ModuleDict({"layer": module})
    with contextlib.redirect_stdout(io.StringIO()):  # "Smoothed 1 modules", once a layer
        mtq.calibrate(
            holder,
            {"method": SMOOTHQUANT, "alpha": alpha},
            forward_loop=lambda _: module.input_quantizer(amax),
        )
