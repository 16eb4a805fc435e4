"""How much quantizing one layer changes the UNet's output, estimated from one backward pass a call.

For a random v ~ N(0, 1) in the output's shape and the gradient g of <v, output> with respect to what
a layer puts out, E[sum g² d²] is the squared error that a change d of the layer's output makes in the
model's, to first order and for independent d. ModelOpt's `auto_quantize` (method "gradient") scores
layers by the same sum, there with the gradient of a loss. Taking the channels of a position together,
E[sum <g, d>²], is nearer to what is measured, but so much noisier that it ranks layers worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from . import local, quality

# UNet calls that are looked at
CALLS = 8
# of the gradient, the first that leaves it finite
SCALES = (256.0, 1.0, 1 / 256)
# part of the name of the classes of modules whose inside is computed anew in the backward pass
BLOCK = "Block"


def checkpointed(unet: torch.nn.Module) -> None:
    """Lets a copy of a UNet keep of its blocks only what goes in (gradient checkpointing)."""
    for child in unet.children():
        if BLOCK in type(child).__name__:
            child.forward = _anew(child.forward)
        else:
            checkpointed(child)


def ordinary(unet: torch.nn.Module) -> None:
    """Gives a copy of a UNet parameters and buffers that a backward pass can use: ComfyUI loads in
    inference mode, whose tensors cannot be. Must run outside of it."""
    for module in unet.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_inference():
                own = torch.nn.Parameter(parameter.data.clone(), requires_grad=False)
                module._parameters[name] = own
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()


def _anew(forward: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def listen(
    unet: torch.nn.Module,
    layers: Sequence[str],
    records: Sequence,
    device: torch.device,
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
    after_each: Callable[[], None],
) -> tuple[dict[str, list[local.Sample]], float]:
    """Samples of each layer with gradients, none of a layer that no call reaches, and the sum of
    squares of the outputs; of as many of the records as `local.LIMIT` bytes allow.

    unet: a copy, whose blocks are changed. options: transformer options of each call. Raises
    ValueError where gradients are not finite.
    """
    modules = {name: unet.get_submodule(name) for name in layers}
    ordinary(unet)
    checkpointed(unet)
    itemsize = (dtype or torch.float32).itemsize + 4  # gradients are kept in float32
    calls, positions = local.budget(modules, itemsize, min(len(records), CALLS))
    samples: dict[str, list[local.Sample]] = {name: [] for name in layers}
    signal = 0.0
    for number, record in enumerate(quality.pick(records, calls)):
        call = record.arguments(device, dtype, options)
        found, output = _one_call(unet, modules, positions, number, call)
        signal += output.double().square().sum().item()
        for name, those in found.items():
            samples[name] += those
        after_each()
    return samples, signal


def _one_call(unet, modules: Mapping, positions: int, number: int, call: tuple):
    """Samples of one call, and its output. In float16 the gradient is scaled, so that small ones do
    not vanish, by as much as is finite."""
    for scale in SCALES:
        listener = local.Listener(modules, positions, gradients=True, number=number)
        listener.next_call()
        with torch.enable_grad(), listener.listening():
            # of everything, so that layers which see the prompt alone have a gradient too
            output = unet(*_differentiated(call[0]), **_differentiated(call[1]))
            generator = torch.Generator().manual_seed(number)
            v = scale * torch.randn(output.shape, generator=generator)
            output.backward(v.to(output))
        if _finite(listener.samples):
            return {name: _scaled(those, scale) for name, those in listener.samples.items()}, output
    raise ValueError(
        f"gradients of the UNet's output must be finite, they are not on recorded call {number + 1} "
        "even when scaled down: start ComfyUI with --bf16-unet or --force-fp32, or record with other "
        "settings"
    )


def _finite(samples: Mapping[str, Sequence[local.Sample]]) -> bool:
    return all(
        bool(torch.isfinite(one.gradient).all()) for those in samples.values() for one in those
    )


def _scaled(samples: Sequence[local.Sample], scale: float) -> list[local.Sample]:
    return [replace(one, gradient=one.gradient / scale) for one in samples]


def _differentiated(value: Any) -> Any:
    """Tensors as leaves that have a gradient, in tables and lists of them too."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    if isinstance(value, Mapping):
        return {name: _differentiated(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_differentiated, value))
    return value


def costs(
    samples: Mapping[str, Sequence[local.Sample]],
    unet: torch.nn.Module,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    after_each: Callable[[], None],
) -> dict[str, float]:
    """Layer -> what its counterpart in `unet` adds to the output's sum of squared errors. Raises
    ValueError for a layer that does not give finite numbers."""
    found = {}
    for name in names:
        module = unet.get_submodule(name)
        found[name] = sum(sample.cost(module, device, dtype) for sample in samples[name])
        if not math.isfinite(found[name]):
            raise ValueError(
                f"a quantized layer must give finite numbers, {name} does not on what it was "
                f"recorded with: skip that layer with the pattern {name}"
            )
        after_each()
    return found
