"""Which kernel runs a quantized layer on this device: decided once at load, told in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from ..formats import FORMATS
from ..formats.checkpoint import PER_TOKEN, SIXTEEN_BITS, STATIC, Layer
from ..kernels import backends, choices
from ..kernels import blocks as block_kernels
from ..kernels import fp8 as fp8_kernels
from ..kernels import int8 as int8_kernels
from ..kernels import library as library_kernels
from ..kernels.backends import Backend
from ..kernels.producers import MAX_ROW
from ..utils import capability
from ..utils.capability import EMULATED, GPU, NATIVE, REFUSED
from . import native, simulation
from .eight_bit import KINDS, EightBit

AUTO, INTEGER, FAKE, LIBRARY = "auto", "integer", "fake", "library"
DEQUANTIZED, WEIGHT_ONLY = "dequantized", "weight-only"
LEFT_OUT = dict.fromkeys(("int8", "fp8"), "left out, as asked")


@dataclass(frozen=True)
class Kernel:
    """What runs a layer.

    level: "native", "emulated" (low-precision arithmetic, computed exactly with wider numbers),
    "dequantized" (weights in 16 or 32 bits), "weight-only" (so by the format's definition) or
    "simulated" (ModelOpt's own, to verify). `why` is shown to the user. run(x, input_scale, weight,
    bias, *geometry) with the weight as a QuantizedTensor; None where it must come in floating point.
    eight_bit: the two halves of `run`, where it has them (see fused.py).
    """

    name: str
    level: str
    why: str
    run: Callable | None = field(default=None, compare=False)
    eight_bit: EightBit | None = field(default=None, compare=False)

    @property
    def dequantizes(self) -> bool:
        """Weights are used in floating point."""
        return self.level in (DEQUANTIZED, WEIGHT_ONLY)


def _int8_linear(x, input_scale, weight, bias):
    return int8_kernels.linear_reference(x, weight._qdata, weight._params.scale, bias, input_scale)


def _int8_conv2d(x, input_scale, weight, bias, *geometry):
    return int8_kernels.conv2d_reference(
        x, input_scale, weight._qdata, weight._params.scale, bias, *geometry
    )


def _fp8(function, x, input_scale, weight, bias, *geometry):
    return function(x, input_scale, weight._qdata, weight._params.scale, bias, *geometry)


def _w4a8(function, x, input_scale, weight, bias, *geometry):
    stored = weight.layout_cls.stored(weight._qdata, weight._params)
    values, scale = FORMATS["w4a8"].to_fp8(stored, weight._params.orig_shape)
    return function(x, input_scale, values, scale, bias, *geometry)


def _smoothed_in_floating_point(x, input_scale, weight, bias):
    """x, smoothed, times the weight in the smoothed basis, as stock ComfyUI does: in the original
    basis the products would be rounded otherwise."""
    plain = weight.layout_cls.plain(weight._qdata, weight._params)
    return F.linear(x, plain.to(weight._params.orig_dtype).to(x.dtype), bias)


def _blocks(function, quantize, x, input_scale, weight, bias, *geometry):
    plain = weight.layout_cls.plain(weight._qdata, weight._params)
    return function(quantize, x, input_scale, plain, bias, *geometry)


NVFP4, MXFP8 = block_kernels.quantize_nvfp4, block_kernels.quantize_mxfp8
REFERENCE = {
    ("int8", "linear"): _int8_linear,
    ("int8", "conv2d"): _int8_conv2d,
    ("fp8", "linear"): partial(_fp8, fp8_kernels.linear_reference),
    ("fp8", "conv2d"): partial(_fp8, fp8_kernels.conv2d_reference),
    ("w4a8", "linear"): partial(_w4a8, fp8_kernels.linear_reference),
    ("w4a8", "conv2d"): partial(_w4a8, fp8_kernels.conv2d_reference),
    ("nvfp4", "linear"): partial(_blocks, block_kernels.linear_reference, NVFP4),
    ("nvfp4", "conv2d"): partial(_blocks, block_kernels.conv2d_reference, NVFP4),
    ("mxfp8", "linear"): partial(_blocks, block_kernels.linear_reference, MXFP8),
    ("mxfp8", "conv2d"): partial(_blocks, block_kernels.conv2d_reference, MXFP8),
}
NATIVE_KERNELS = {
    ("int8", "linear"): native.int8_linear,
    ("fp8", "linear"): native.fp8_linear,
    ("w4a8", "linear"): partial(_w4a8, native.fp8_product),
    ("nvfp4", "linear"): native.nvfp4_linear,
    ("mxfp8", "linear"): native.mxfp8_linear,
}


def choose(
    layer: Layer,
    gpu: GPU,
    as_stock: bool,
    arithmetic: str = AUTO,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float16,
    backend: Backend | None = None,
    handed: bool = False,
) -> Kernel:
    """The kernel for a layer on a device. Raises ValueError where the format cannot run there.

    as_stock: the file opens in stock ComfyUI, whose result on a device without the format's units
    is the dequantized one; such a file gives the same picture here and there. arithmetic: AUTO;
    INTEGER computes in low precision also such a file, and whatever is faster; FAKE runs ModelOpt's
    float32 simulation where there is one, to verify against ModelOpt; LIBRARY is AUTO with no kernels
    but those of libraries, whatever is faster. shape: of the weight; dtype: that is computed in.
    backend: computes the 8-bit layers, whatever the device (tests, benchmarks). handed: the input
    comes in 8 bits from a fused block, which counts where kernels/choices says what is faster.
    """
    shape = shape or layer.shape or (0, 0)
    rest = (layer, as_stock, arithmetic, shape, dtype, backend)
    others = dataclasses.replace(gpu, no_triton=LEFT_OUT)
    if arithmetic == LIBRARY:
        return _usual(others, *rest)
    usual = _usual(gpu, *rest)
    if arithmetic != AUTO or backend is not None or dtype not in SIXTEEN_BITS:
        return usual
    if usual.level != NATIVE or layer.format not in KINDS:
        return usual
    ways = {choices.LIBRARY: usual}
    if usual.eight_bit is not None:
        ways = {choices.HANDED if handed else choices.OURS: usual}
        library = _usual(others, *rest)
        if library.level == NATIVE:
            ways[choices.LIBRARY] = library
    return _measured(layer, gpu, shape, ways) or usual


def _measured(layer: Layer, gpu: GPU, shape, ways: dict[str, Kernel]) -> Kernel | None:
    """What was measured to be faster on this GPU than the first of `ways`, or None."""
    activations = STATIC if layer.static else PER_TOKEN
    found = choices.ask(gpu.name, layer.format, layer.kind, activations, shape, tuple(ways))
    if found is None:
        return None
    if found.way == choices.DEQUANTIZED:
        return Kernel(f"{layer.format} {layer.kind}: dequantized", DEQUANTIZED, found.why)
    return dataclasses.replace(ways[found.way], why=found.why)


def _usual(
    gpu: GPU,
    layer: Layer,
    as_stock: bool,
    arithmetic: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: Backend | None,
) -> Kernel:
    """The kernel where nothing was measured; arguments as in `choose`."""
    key = (layer.format, layer.kind)
    what = f"{layer.format} {layer.kind}"
    found = capability.support(layer.format, layer.kind, gpu)
    if found.level == REFUSED:
        raise ValueError(f"{found.why}: load the file on another device or quantize to int8")
    if layer.weight_only:
        return Kernel(f"{what}: weights in {FORMATS[layer.format].BITS} bits", WEIGHT_ONLY, "")
    if arithmetic == FAKE and key in simulation.SIMULATED:
        run = simulation.of(layer)
        return Kernel(f"{what}: ModelOpt's simulation", "simulated", found.why, run)
    own = _own_kernel(layer, gpu, shape, dtype, backend)
    if own is not None:
        return own
    reason = native.why_not(layer.format, shape, dtype)
    as_stock_does = _smoothed_in_floating_point if as_stock and layer.smoothed else None
    if found.level == NATIVE and layer.format == "int8" and layer.activations == STATIC:
        why = "comfy-kitchen's INT8 scales activations per token only"
        return Kernel(f"{what}: exact reference", EMULATED, why, REFERENCE[key])
    if found.level == NATIVE and key in NATIVE_KERNELS and reason is not None:
        return Kernel(f"{what}: dequantized", DEQUANTIZED, reason, as_stock_does)
    if found.level == NATIVE and key in NATIVE_KERNELS:
        return Kernel(f"{what}: comfy-kitchen", NATIVE, found.why, NATIVE_KERNELS[key])
    if arithmetic in (AUTO, LIBRARY) and _dequantizes(layer, gpu, as_stock):
        why = found.why
        if gpu.device == "cpu":
            why += "; stock ComfyUI computes this file the same way"
        return Kernel(f"{what}: dequantized", DEQUANTIZED, why, as_stock_does)
    return Kernel(f"{what}: exact reference", EMULATED, found.why, REFERENCE[key])


def _own_kernel(
    layer: Layer, gpu: GPU, shape: tuple[int, ...], dtype: torch.dtype, backend: Backend | None
) -> Kernel | None:
    """Our Triton kernel (or what `backend` says) where it can run the layer."""
    if layer.format not in KINDS or (backend is None and not gpu.runs(layer.format)):
        return None
    if not layer.static and shape[1] > MAX_ROW:
        return None  # a token's scale is found by one program
    chosen = EightBit(layer.format, backend or backends.triton())
    run = chosen.linear if layer.kind == "linear" else chosen.conv2d
    name = f"{layer.format} {layer.kind}: {chosen.backend.name}"
    if backend is not None:
        return Kernel(name, EMULATED, "", run, chosen)
    alone = chosen.kind == "fp8" and layer.kind == "linear" and layer.static
    alone = alone and dtype in SIXTEEN_BITS and library_kernels.fits(gpu.capability, *shape)
    return Kernel(name, NATIVE, library_kernels.WHY if alone else "", run, chosen)


def _dequantizes(layer: Layer, gpu: GPU, as_stock: bool) -> bool:
    """A GPU too old for a format gets speed, a file that stock opens gets stock's result."""
    needed = capability.NEEDS[layer.format]
    if gpu.capability is not None:
        return gpu.capability < needed or capability.support(layer.format, "linear", gpu).level == (
            EMULATED
        )
    return as_stock and layer.format != "int8"
