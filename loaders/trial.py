"""What a call of a quantized layer takes in memory, before it is there: one of its shape is made,
without values, and called with as much as a recorded call gave it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..formats.checkpoint import QuantizedCheckpoint
from ..utils.memory import peak_of
from . import ops, reading
from .dispatch import Kernel
from .expected import compute_dtype


@dataclass(frozen=True)
class Tried:
    """Calls of quantized layers. working: layer name -> bytes of tensors that a call takes on a CPU,
    its output included, beside its weight and its input. last: names of those that answer in
    `torch.channels_last`."""

    working: Mapping[str, int]
    last: frozenset[str]


def calls(
    checkpoint: QuantizedCheckpoint,
    model,
    chosen: Mapping[str, Kernel],
    inputs: Mapping[str, tuple[int, ...]],
) -> Tried:
    """What a call of each quantized layer takes and gives on a CPU.

    checkpoint, model: as of `expected.kernels`, which gave `chosen`. inputs: shape of what a layer is
    given; without it a layer is left out. Layers that are alike are tried once.
    """
    compute, source = compute_dtype(model), model.model.diffusion_model
    tried: dict[tuple, tuple[bool, int]] = {}
    found = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, entry in checkpoint.layers.items():
            if name not in inputs:
                continue
            module = source.get_submodule(name)
            shape, bias = tuple(module.weight.shape), module.bias is not None
            alike = (entry, chosen[name], shape, bias, _geometry(module), inputs[name])
            if alike not in tried:
                reading.unless_cancelled(0)
                layer = _made(name, checkpoint, module, chosen[name], compute)
                given = torch.ones(inputs[name], dtype=compute)
                answer, took = peak_of(lambda layer=layer, given=given: layer(given), given.device)
                tried[alike] = _channels_last(answer), took
            found[name] = tried[alike]
    return Tried(
        {name: took for name, (_, took) in found.items()},
        frozenset(name for name, (last, _) in found.items() if last),
    )


def _channels_last(answer: torch.Tensor) -> bool:
    return answer.ndim == 4 and answer.is_contiguous(memory_format=torch.channels_last)


def _geometry(module: torch.nn.Module) -> tuple:
    """What a convolution is made with, between its shape and its bias; () of a Linear."""
    if not isinstance(module, torch.nn.Conv2d):
        return ()
    return module.kernel_size, module.stride, module.padding, module.dilation


def _made(
    name: str, checkpoint: QuantizedCheckpoint, module: torch.nn.Module, kernel: Kernel, compute
) -> torch.nn.Module:
    """A layer as `unet.load` makes it, its weight all zeros, its scales all ones."""
    operations = ops.quantized_ops(
        compute, {name: checkpoint.layers[name]}, {}, lambda *_: kernel, takes=True
    )
    geometry, bias = _geometry(module), module.bias is not None
    if geometry:
        size = (module.in_channels, module.out_channels, *geometry)
        layer = operations.Conv2d(*size, bias=bias, device="meta")
    else:
        size = (module.in_features, module.out_features)
        layer = operations.Linear(*size, bias=bias, device="meta")
    tensors = {}
    for part in (*checkpoint.layers[name].scales, "weight", "bias"):
        if (like := checkpoint.tensors.get(f"{name}.{part}")) is not None:
            fill = torch.zeros if part == "weight" else torch.ones
            tensors[f"{name}.{part}"] = fill(like.shape, dtype=like.dtype)
    layer._load_from_state_dict(tensors, f"{name}.", {}, True, [], [], [])
    return layer
