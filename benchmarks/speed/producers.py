"""What comes before a layer and quantizes its input on the way out, against PyTorch doing the same.

"16 bits": the producer in PyTorch as a UNet in 16 bits runs it, which hands over 16 bits.
"unfused": that, and then quantizing in PyTorch, operation by operation. "fused": our kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ...formats.checkpoint import PER_TOKEN, STATIC
from ...kernels import backends, check, producers
from ...utils import timing
from .settings import Plan
from .shapes import Count, Shape

ROWS, LAYER_NORM, GROUP_NORM, GEGLU = "quantize_rows", "layer_norm", "group_norm", "geglu"
NAMES = (ROWS, LAYER_NORM, GROUP_NORM, GEGLU)
GROUPS, EPS = 32, 1e-5
# kind -> how activations are quantized where a token's largest value is at hand; elsewhere static
WAYS = {"int8": PER_TOKEN, "fp8": STATIC}
FUSED, UNFUSED, SIXTEEN = "fused", "unfused", "16 bits"


def of(counts: Mapping[Shape, Count]) -> list[dict]:
    """The inputs of a UNet's quantized layers: `kind` (of NAMES) and `x`, each once."""
    found = []
    for shape, count in counts.items():
        if not count.quantized:
            continue
        if shape.kind == "conv2d":
            if shape.r == 3 and shape.stride == 1 and shape.c % GROUPS == 0:
                found.append((GROUP_NORM, (shape.batch, shape.c, shape.h, shape.w)))
            continue
        found.append((ROWS, (shape.m, shape.k)))
        if shape.n == 8 * shape.k:  # into GEGLU, behind a LayerNorm
            found += [(LAYER_NORM, (shape.m, shape.k)), (GEGLU, (shape.m, shape.n))]
    order = sorted(dict.fromkeys(found), key=lambda one: NAMES.index(one[0]))
    return [{"kind": name, "x": list(x)} for name, x in order]


def measure(asked: dict, device: torch.device, dtype: torch.dtype, plan: Plan) -> list[dict]:
    """One row for int8 and one for fp8: `ms` by way, `gb_s` of the fused one (x read, 8 bits
    written), `error` of its values relative to the reference's; or `why_not` of the fused one."""
    name, size = asked["kind"], asked["x"]
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(size, generator=generator, device=device).to(dtype)
    channels = size[1]
    gain = torch.randn(channels, generator=generator, device=device).to(dtype)
    if name == GROUP_NORM:
        x = x.contiguous(memory_format=torch.channels_last)
    rows = []
    for kind, way in WAYS.items():
        activations = way if name in (ROWS, LAYER_NORM) else STATIC
        top = {"int8": 127, "fp8": 448}[kind]
        scale = torch.tensor(6.0 / top, device=device) if activations == STATIC else None
        plain, tail = _plain(name, x, gain), (kind, scale)
        calls = {
            SIXTEEN: plain,
            UNFUSED: lambda plain=plain, tail=tail: _quantized(name, plain(), *tail),
        }
        if name == ROWS:
            del calls[SIXTEEN]
        row = {"quantized": kind, "activations": activations}
        reason = check.why_not(device, kind)
        if reason is None:
            calls[FUSED] = _call(name, backends.triton(), x, gain, tail)
            wanted = _call(name, backends.REFERENCE, x, gain, tail)()[0].float()
            found = calls[FUSED]()[0].float()
            row["error"] = ((found - wanted).norm() / wanted.norm()).item()
        else:
            row["why_not"] = reason
        times = timing.take_turns(calls, device, plan.warm_up, plan.rounds, plan.repeats)
        row["ms"] = {way: timing.summarize(found).median for way, found in times.items()}
        if FUSED in calls:
            out = x.numel() // (2 if name == GEGLU else 1)
            row["gb_s"] = (x.nbytes + out) / row["ms"][FUSED] / 1e6
        rows.append(row)
    return rows


def _call(name: str, backend: backends.Backend, x, gain, tail: tuple):
    """One of a backend's producers."""
    return {
        ROWS: lambda: backend.quantize_rows(x, *tail),
        LAYER_NORM: lambda: backend.layer_norm_quantize(x, gain, gain, EPS, *tail),
        GROUP_NORM: lambda: backend.group_norm_quantize(x, GROUPS, gain, gain, EPS, True, *tail),
        GEGLU: lambda: backend.geglu_quantize(x, *tail),
    }[name]


def _plain(name: str, x: torch.Tensor, gain: torch.Tensor):
    """What a UNet in 16 bits does there."""

    def geglu() -> torch.Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    return {
        ROWS: lambda: x,
        LAYER_NORM: lambda: F.layer_norm(x, x.shape[-1:], gain, gain, EPS),
        GROUP_NORM: lambda: F.silu(F.group_norm(x, GROUPS, gain, gain, EPS)),
        GEGLU: geglu,
    }[name]


def _quantized(name: str, y: torch.Tensor, kind: str, scale: torch.Tensor | None) -> tuple:
    if name == GROUP_NORM:
        y = y.permute(0, 2, 3, 1)
    return producers.quantize_reference(y, kind, scale)
