"""A layer of each kind is packed, to know what packing takes in memory and time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..formats import FORMATS, blocks
from ..utils.memory import COUNTED, peak_of
from ..utils.progress import detail
from ..utils.timing import synchronize
from . import modelopt, whose
from .recipe import AWQ, AWQ_FULL, MSE, SMOOTHQUANT, SVDQUANT, LayerPlan

# weights of the layer that is tried, of those with the largest kernel: the largest of at most so many,
# or where packing takes long (SLOW) the smallest of at least so many
LARGEST, SMALLEST = 2**22, 2**17
SLOW = (MSE, SVDQUANT)
# format, algorithm, kind of layer, whether its rows are padded
Key = tuple[str, str, str, bool]


@dataclass(frozen=True)
class Trial:
    """A layer that was packed. seconds: for each unit of its `work`; rounding: for each weight, to
    round it alone. packing, searching, reading: bytes of memory a weight while it is packed (without
    `factors`), while AWQ tries a scale (0 for other algorithms), and while its values are used
    dequantized; 0 where torch does not count them."""

    seconds: float
    rounding: float
    packing: float
    searching: float
    reading: float


def key(one: LayerPlan, shape: tuple[int, ...]) -> Key:
    """Layers of one key are packed alike; a weight whose rows are no whole blocks is padded first."""
    block = FORMATS[one.format].BLOCK
    padded = block is not None and math.prod(shape[1:]) % block != 0
    return one.format, one.algorithm, one.kind, padded


def keys(source: torch.nn.Module, plans: Mapping[str, LayerPlan]) -> dict[str, Key]:
    """Layer name -> its key."""
    return {
        name: key(one, tuple(source.get_submodule(name).weight.shape))
        for name, one in plans.items()
    }


def work(shape: tuple[int, ...], one: LayerPlan) -> float:
    """What the time to pack a weight grows with: its size; of SVDQuant, the flops of the SVD."""
    return math.prod(shape) * (min(shape[:2]) if one.algorithm == SVDQUANT else 1)


def factors(shape: tuple[int, ...], one: LayerPlan) -> int:
    """Bytes of what SVDQuant's SVD splits a weight [N, K] into, in float64; 0 of other algorithms."""
    return 8 * min(shape) * sum(shape) if one.algorithm == SVDQUANT else 0


def layers(
    source: torch.nn.Module,
    plans: Mapping[str, LayerPlan],
    device: torch.device,
    step: Callable[[], None] = lambda: None,
) -> dict[Key, Trial]:
    """Packs a small layer of each key, without its patches; the model is not changed."""
    groups: dict[Key, list[str]] = {}
    for name, which in keys(source, plans).items():
        groups.setdefault(which, []).append(name)
    found = {}
    # AWQ's search is tried on the CPU, which needs none
    searched = {name: one for name, one in plans.items() if one.algorithm == MSE}
    if asked := whose.kernels_needed(searched, device):
        modelopt.build_kernels(asked)
        detail("Packing a layer of each kind")
    with torch.inference_mode(False), torch.no_grad():
        for which, names in groups.items():
            weights = {name: source.get_submodule(name).weight for name in names}
            name = _chosen(weights, plans[names[0]].algorithm in SLOW)
            weight = source.get_submodule(name).weight.data.to(device, copy=True)
            found[which] = _try(weight, plans[name], device)
            step()
    return found


def _chosen(weights: Mapping[str, torch.Tensor], slow: bool) -> str:
    """The layer to try. A convolution of one position is packed without a copy in another order."""
    kernel = max(weight.shape[2:].numel() for weight in weights.values())
    sizes = {
        name: weight.numel()
        for name, weight in weights.items()
        if weight.shape[2:].numel() == kernel
    }
    if slow:
        fitting = [name for name in sizes if sizes[name] >= SMALLEST]
        return min(fitting, key=sizes.get) if fitting else max(sizes, key=sizes.get)
    fitting = [name for name in sizes if sizes[name] <= LARGEST]
    return max(fitting, key=sizes.get) if fitting else min(sizes, key=sizes.get)


def _try(weight: torch.Tensor, one: LayerPlan, device: torch.device) -> Trial:
    shape = tuple(weight.shape)
    (stored, _), packing = peak_of(lambda: _pack(weight, one), device)
    started = time.perf_counter()
    _, (rest, amax) = _pack(weight, one)
    synchronize(device)
    seconds = time.perf_counter() - started
    numerics = FORMATS[one.format]
    started = time.perf_counter()
    numerics.quantize(rest, amax)
    synchronize(device)
    rounding = time.perf_counter() - started
    _, reading = peak_of(lambda: numerics.dequantize(stored, shape).to(weight.dtype), device)
    searching = None
    if one.algorithm in AWQ and device.type in COUNTED:
        search = modelopt.searching(weight, one.format)
        _, searching = peak_of(search, torch.device("cpu"))
    count = weight.numel()
    return Trial(
        seconds / work(shape, one),
        rounding / count,
        max((packing or 0) - factors(shape, one), 0) / count,
        (searching or 0) / count,
        (reading or 0) / count,
    )


def _pack(weight: torch.Tensor, one: LayerPlan):
    """The operations of `pack` on a weight whose recording is not there: smoothing by ones. What is
    stored, and what the format's `quantize` took."""
    if one.algorithm in AWQ or one.algorithm == SMOOTHQUANT:
        ones = torch.ones(weight.shape[1], device=weight.device)
        weight = (weight * ones[None, :]).to(weight.dtype)
    if one.algorithm == SVDQUANT:
        *_, weight = modelopt.svd(weight, one.rank)
    plain = LayerPlan(one.kind, one.format, "max") if one.algorithm == AWQ_FULL else one
    amax = modelopt.weight_amax(blocks.flatten(weight), plain)
    return FORMATS[one.format].quantize(weight, amax), (weight, amax)
