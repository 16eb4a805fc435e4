"""Which kernel runs a quantized layer on this device: decided once at load, told in words."""

from __future__ import annotations

from dataclasses import dataclass

import comfy_kitchen
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..formats import FORMATS, int8
from ..formats.checkpoint import Layer
from ..kernels import fp8 as fp8_kernels
from ..kernels import int8 as int8_kernels

DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Kernel:
    """`name` and `why` are shown to the user. `dequantizes`: weights are used in floating point."""

    name: str
    why: str
    dequantizes: bool = False
    linear: object = None
    conv2d: object = None


def _kitchen_int8_linear(x, input_scale, weight, weight_scale, bias):
    return torch.ops.comfy_kitchen.int8_linear(
        x.contiguous(), weight, weight_scale, bias, DTYPE_CODE[x.dtype], False, 256
    )


def _kitchen_fp8_linear(x, input_scale, weight, weight_scale, bias):
    from comfy.quant_ops import TensorCoreFP8E4M3Layout as Layout

    name = "TensorCoreFP8E4M3Layout"
    flat = x.reshape(-1, x.shape[-1])
    q = QuantizedTensor.from_float(flat, name, scale=input_scale)
    params = Layout.Params(scale=weight_scale, orig_dtype=x.dtype, orig_shape=tuple(weight.shape))
    out = torch.nn.functional.linear(q, QuantizedTensor(weight, name, params), bias)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _reference_int8_linear(x, input_scale, weight, weight_scale, bias):
    return int8_kernels.linear_reference(x, weight, weight_scale, bias)


REFERENCE = {
    ("int8", "linear"): {"linear": _reference_int8_linear},
    ("int8", "conv2d"): {"conv2d": int8_kernels.conv2d_reference},
    ("fp8", "linear"): {"linear": fp8_kernels.linear_reference},
    ("fp8", "conv2d"): {"conv2d": fp8_kernels.conv2d_reference},
}
KITCHEN = {
    ("int8", "linear"): {"linear": _kitchen_int8_linear},
    ("fp8", "linear"): {"linear": _kitchen_fp8_linear},
}


AUTO, INTEGER, FAKE = "auto", "integer", "fake"


def _fake(layer: Layer) -> Kernel:
    """ModelOpt's own simulation in float32."""
    amax = torch.tensor(layer.input_amax or 0.0)

    def weight_amax(scale):
        found = int8.amax_of(scale)
        for channel, value in layer.amax_exceptions.items():
            found[int(channel)] = value
        return found

    def int8_linear(x, input_scale, weight, weight_scale, bias):
        return int8_kernels.linear_fake(x, weight, weight_amax(weight_scale), bias)

    def int8_conv2d(x, input_scale, weight, weight_scale, bias, *geometry):
        w_amax = weight_amax(weight_scale)
        return int8_kernels.conv2d_fake(x, amax.to(x.device), weight, w_amax, bias, *geometry)

    def fp8_linear(x, input_scale, weight, weight_scale, bias):
        return fp8_kernels.linear_fake(x, amax.to(x.device), weight, weight_scale, bias)

    def fp8_conv2d(x, input_scale, weight, weight_scale, bias, *geometry):
        return fp8_kernels.conv2d_fake(x, amax.to(x.device), weight, weight_scale, bias, *geometry)

    table = {
        ("int8", "linear"): {"linear": int8_linear},
        ("int8", "conv2d"): {"conv2d": int8_conv2d},
        ("fp8", "linear"): {"linear": fp8_linear},
        ("fp8", "conv2d"): {"conv2d": fp8_conv2d},
    }
    name = f"{layer.format} {layer.kind}: ModelOpt's simulation"
    return Kernel(name, "asked for", **table[(layer.format, layer.kind)])


def choose(layer: Layer, device: torch.device, as_stock: bool, arithmetic: str = AUTO) -> Kernel:
    """The kernel for a layer on a device.

    as_stock: the file opens in stock ComfyUI, whose result on a device without FP8 units is the
    dequantized one; such a file gives the same picture here and there. arithmetic: AUTO; INTEGER
    emulates the low-precision units also for such a file; FAKE runs ModelOpt's float32 simulation,
    to verify against ModelOpt.
    """
    if arithmetic == FAKE:
        return _fake(layer)
    as_stock = as_stock and arithmetic == AUTO
    key = (layer.format, layer.kind)
    needed = FORMATS[layer.format].CAPABILITY
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < needed:
            return Kernel(
                f"{layer.format} {layer.kind}: dequantized",
                f"{layer.format} needs compute capability {_dotted(needed)}, "
                f"this GPU has {_dotted(found)}",
                dequantizes=True,
            )
        if key in KITCHEN:
            why = "" if layer.format == "fp8" else _why_not_kitchen_cuda()
            return Kernel(f"{layer.format} {layer.kind}: comfy-kitchen", why, **KITCHEN[key])
        return Kernel(
            f"{layer.format} {layer.kind}: exact reference",
            "there is no low-precision kernel for it yet",
            **REFERENCE[key],
        )
    if as_stock and layer.format == "fp8":
        return Kernel(
            f"{layer.format} {layer.kind}: dequantized",
            f"no FP8 units on {device.type}; stock ComfyUI computes this file the same way",
            dequantizes=True,
        )
    return Kernel(
        f"{layer.format} {layer.kind}: exact reference",
        f"no low-precision units on {device.type}",
        **REFERENCE[key],
    )


def _why_not_kitchen_cuda() -> str:
    """Why comfy-kitchen's CUDA kernels do not run, or "" if they do. FP8 Linears use torch's own."""
    cuda = comfy_kitchen.list_backends()["cuda"]
    if cuda["available"] and not cuda["disabled"]:
        return ""
    return (
        "slow, comfy-kitchen's CUDA kernels are off here: ComfyUI enables them with a CUDA 13 build "
        f"of torch only, this one is built for CUDA {torch.version.cuda}"
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(str(part) for part in capability)
