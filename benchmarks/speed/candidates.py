"""What can run a layer: one row a candidate. A new kernel is one row of `CANDIDATES`.

`takes` "float": x in 16 bits, quantizing it is part of the time. `takes` "quantized": x's quantized
values, as a producer that quantizes on its way out hands them over. `gives` "output" or, for bare
products, "int32" (in any dtype); these do not count as a way to run the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...formats.checkpoint import PER_TOKEN, SIXTEEN, STATIC
from ...kernels import choices, fp8, int8
from . import own
from .problem import Problem

FLOAT, QUANTIZED = "float", "quantized"


@dataclass(frozen=True)
class Candidate:
    """prepare(problem) -> the call to time, whose result is compared with the exact one.

    why_not(problem): the reason it cannot run there, or None. ran(problem): what did the work, where
    a library chooses by itself. way: which way of kernels/choices it is, "" for none.
    """

    name: str
    kind: str
    format: str
    prepare: Callable[[Problem], Callable[[], torch.Tensor]]
    activations: str = ""
    takes: str = FLOAT
    gives: str = "output"
    why_not: Callable[[Problem], str | None] = lambda problem: None
    ran: Callable[[Problem], str] | None = None
    way: str = ""


# --- 16 bits ---


def _f_linear(p: Problem):
    return lambda: F.linear(p.x, p.weight, p.bias)


def _f_conv2d(memory_format: torch.memory_format):
    def prepare(p: Problem):
        x = p.x.contiguous(memory_format=memory_format)
        weight = p.weight.contiguous(memory_format=memory_format)
        stride, padding, dilation = p.geometry
        return lambda: F.conv2d(x, weight, p.bias, stride, padding, dilation)

    return prepare


# --- the exact references of kernels/ ---


def _int8_linear_reference(p: Problem):
    w = p.stored["int8"]
    return lambda: int8.linear_reference(p.x, w["weight"], w["weight_scale"], p.bias)


def _fp8_linear_reference(p: Problem):
    w, scale = p.stored["fp8"], p.static_scale("fp8")
    return lambda: fp8.linear_reference(p.x, scale, w["weight"], w["weight_scale"], p.bias)


def _conv2d_reference(form: str):
    def prepare(p: Problem):
        module, w, scale = {"int8": int8, "fp8": fp8}[form], p.stored[form], p.static_scale(form)
        return lambda: module.conv2d_reference(
            p.x, scale, w["weight"], w["weight_scale"], p.bias, *p.geometry
        )

    return prepare


# --- libraries ---


def _kitchen_arguments(p: Problem) -> tuple:
    from ...loaders.native import DTYPE_CODE

    w = p.stored["int8"]
    return (p.x, w["weight"], w["weight_scale"], p.bias, DTYPE_CODE[p.dtype], False, 256)


def _kitchen_int8(p: Problem):
    arguments = _kitchen_arguments(p)
    return lambda: torch.ops.comfy_kitchen.int8_linear(*arguments)


def kitchen_backend(x, weight, weight_scale, bias, dtype: torch.dtype) -> str:
    """Which backend of comfy-kitchen takes an int8_linear with these arguments."""
    from comfy_kitchen.registry import registry

    named = {"x": x, "weight": weight, "weight_scale": weight_scale, "bias": bias}
    named |= {"out_dtype": dtype, "convrot": False, "convrot_groupsize": 256, "input_act": None}
    return f"comfy-kitchen's {registry.get_capable_backend('int8_linear', kwargs=named)} backend"


def _kitchen_ran(p: Problem) -> str:
    return kitchen_backend(*_kitchen_arguments(p)[:4], p.dtype)


def _scaled_mm_layer(activations: str):
    def prepare(p: Problem):
        from ...loaders import native

        w = p.stored["fp8"]
        scale = p.static_scale("fp8") if activations == STATIC else None
        return lambda: native.fp8_product(p.x, scale, w["weight"], w["weight_scale"], p.bias)

    return prepare


def _scaled_mm_product(p: Problem):
    from comfy_kitchen.scaled_mm_v2 import scaled_mm_v2

    w, (q, scale) = p.stored["fp8"], p.quantized("fp8", STATIC)
    q = q.to(torch.float8_e4m3fn)
    named = {"scale_a": scale, "scale_b": w["weight_scale"], "bias": p.bias, "out_dtype": p.dtype}
    return lambda: scaled_mm_v2(q, w["weight"].t(), **named)


def _scaled_mm_why_not(p: Problem) -> str | None:
    from ...loaders import native

    if p.device.type != "cuda":
        return "no CUDA device"
    if torch.cuda.get_device_capability(p.device) < (8, 9):
        return "FP8 tensor cores need compute capability 8.9"
    return native.why_not("fp8", (p.shape.n, p.shape.k), p.dtype)


def _int_mm_product(p: Problem):
    q, weight = p.quantized("int8", PER_TOKEN)[0].to(torch.int8), p.stored["int8"]["weight"]
    return lambda: torch._int_mm(q, weight.t())


def _int_mm_why_not(p: Problem) -> str | None:
    if p.device.type != "cuda":
        return None
    if p.shape.m <= 16:
        return f"torch._int_mm needs more than 16 rows on CUDA, got {p.shape.m}"
    if p.shape.n % 8 or p.shape.k % 8:
        return "torch._int_mm needs multiples of 8 on CUDA"
    return None


# --- the rows ---


def ours(kind: str, form: str, activations: str) -> tuple[Candidate, ...]:
    """Our kernel with x in 16 bits, and in 8 bits from a producer."""
    name, why_not = f"Triton {form}, {activations}", own.why_not(form, activations)
    return (
        Candidate(
            name,
            kind,
            form,
            own.layer(form, activations),
            activations,
            why_not=why_not,
            way=choices.OURS,
        ),
        Candidate(
            f"{name}, x quantized before",
            kind,
            form,
            own.product(form, activations),
            activations,
            QUANTIZED,
            why_not=why_not,
            way=choices.HANDED,
        ),
    )


def ours_sums(kind: str, activations: str) -> Candidate:
    """int8's sums, to be compared bit for bit."""
    return Candidate(
        "Triton int8 sums",
        kind,
        "int8",
        own.product("int8", activations, sums=True),
        activations,
        QUANTIZED,
        "int32",
        why_not=own.why_not("int8", activations),
    )


CANDIDATES = (
    Candidate("torch F.linear", "linear", SIXTEEN, _f_linear, way=choices.SIXTEEN),
    *(
        Candidate(
            f"torch F.conv2d {name}",
            "conv2d",
            SIXTEEN,
            _f_conv2d(memory_format),
            way=choices.SIXTEEN,
        )
        for name, memory_format in (
            ("NCHW", torch.contiguous_format),
            ("channels_last", torch.channels_last),
        )
    ),
    *(
        Candidate(
            f"{form} dequantized, {call}",
            kind,
            form,
            own.dequantized(form),
            SIXTEEN,
            way=choices.DEQUANTIZED,
        )
        for kind, call in (("linear", "F.linear"), ("conv2d", "F.conv2d channels_last"))
        for form in ("int8", "fp8")
    ),
    *(
        candidate
        for form in ("int8", "fp8")
        for activations in (PER_TOKEN, STATIC)
        for candidate in ours("linear", form, activations)
    ),
    *(candidate for form in ("int8", "fp8") for candidate in ours("conv2d", form, STATIC)),
    ours_sums("linear", PER_TOKEN),
    ours_sums("conv2d", STATIC),
    Candidate(
        "comfy-kitchen int8_linear",
        "linear",
        "int8",
        _kitchen_int8,
        PER_TOKEN,
        ran=_kitchen_ran,
        way=choices.LIBRARY,
    ),
    Candidate(
        "torch._int_mm",
        "linear",
        "int8",
        _int_mm_product,
        PER_TOKEN,
        QUANTIZED,
        "int32",
        why_not=_int_mm_why_not,
    ),
    Candidate("int8 exact reference", "linear", "int8", _int8_linear_reference, PER_TOKEN),
    Candidate(
        "scaled_mm fp8, static scale",
        "linear",
        "fp8",
        _scaled_mm_layer(STATIC),
        STATIC,
        why_not=_scaled_mm_why_not,
        way=choices.LIBRARY,
    ),
    Candidate(
        "scaled_mm fp8, per token",
        "linear",
        "fp8",
        _scaled_mm_layer(PER_TOKEN),
        PER_TOKEN,
        why_not=_scaled_mm_why_not,
        way=choices.LIBRARY,
    ),
    Candidate(
        "scaled_mm fp8, x quantized before",
        "linear",
        "fp8",
        _scaled_mm_product,
        STATIC,
        QUANTIZED,
        why_not=_scaled_mm_why_not,
    ),
    Candidate("fp8 exact reference", "linear", "fp8", _fp8_linear_reference, STATIC),
    Candidate("int8 exact reference", "conv2d", "int8", _conv2d_reference("int8"), STATIC),
    Candidate("fp8 exact reference", "conv2d", "fp8", _conv2d_reference("fp8"), STATIC),
)
