"""This pack's own ways to run a layer, as candidates: prepare(problem) -> the call to time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...formats.checkpoint import PER_TOKEN, STATIC
from ...kernels import backends, check
from ...kernels.producers import DTYPES, MAX_ROW
from ...loaders.eight_bit import EightBit
from .problem import Problem


def dequantized(form: str):
    """8-bit weights, x in 16 bits, as loaders/ops.py runs it; convolutions between blocks that hold
    their pixels channels-last."""

    def prepare(p: Problem):
        held, x = p.held(form), p.x
        if p.shape.kind == "conv2d":
            x = x.contiguous(memory_format=torch.channels_last)
            stride, padding, dilation = p.geometry

        def call() -> torch.Tensor:
            weight = held.to(dtype=x.dtype).dequantize()
            if p.shape.kind == "linear":
                return F.linear(x, weight, p.bias)
            return F.conv2d(x, weight, p.bias, stride, padding, dilation)

        return call

    return prepare


def layer(form: str, activations: str):
    """Our kernels as loaders/eight_bit.py runs a layer by itself."""

    def prepare(p: Problem):
        ours, scale = EightBit(form, backends.triton()), None
        if activations == STATIC:
            scale = p.static_scale(form)
        if p.shape.kind == "linear":
            held = p.held(form)
            return lambda: ours.linear(p.x, scale, held, p.bias)
        held, x = p.held(form, True), p.x.contiguous(memory_format=torch.channels_last)
        return lambda: ours.conv2d(x, scale, held, p.bias, *p.geometry)

    return prepare


def product(form: str, activations: str, sums: bool = False):
    """Our product alone, of an x quantized before; sums: scales of 1, no bias, float32 out."""

    def prepare(p: Problem):
        q, scale = p.quantized(form, activations)
        weight_scale, bias, dtype = p.stored[form]["weight_scale"], p.bias, p.dtype
        if sums:
            scale = weight_scale = torch.ones((), device=p.device)
            bias, dtype = None, torch.float32
        q, backend, conv = q.to(DTYPES[form]), backends.triton(), p.shape.kind == "conv2d"
        values = p.held(form, conv)._qdata
        if not conv:
            return lambda: backend.scaled_mm(q, values, scale, weight_scale, bias, dtype=dtype)
        q = q.contiguous(memory_format=torch.channels_last)
        rest = (scale, weight_scale, bias, *p.geometry)
        return lambda: backend.conv2d(q, values, *rest, dtype=dtype)

    return prepare


def why_not(form: str, activations: str):
    """Why the two above cannot run a problem, or None."""

    def reason(p: Problem) -> str | None:
        width = p.weight.shape[1]
        if activations == PER_TOKEN and width > MAX_ROW:
            return f"a token's scale is found in rows of at most {MAX_ROW} values, got {width}"
        return check.why_not(p.device, form)

    return reason
