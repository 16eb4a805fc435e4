"""What a recorded UNet call takes on this device, in memory and time: it is made, and watched."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ..utils.memory import Watched, watched
from ..utils.timing import synchronize
from . import quality
from .layers import kind_of
from .records import Record


@dataclass(frozen=True)
class Call:
    """One recorded UNet call of the MODEL in 16 or 32 bits. memory: of it and each of its layers.
    shape: of the latent; inputs: shapes of what each layer was given; dtype: of that."""

    seconds: float
    memory: Watched
    shape: tuple[int, ...]
    inputs: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of a number that a layer was given."""
        return self.dtype.itemsize

    @property
    def peak(self) -> int | None:
        """Bytes at the highest, None where torch does not count them."""
        return self.memory.peak


def largest(records: Iterable[Record]) -> Record:
    """The record whose call takes the most memory, of at least one."""
    return max(records, key=_size)


def share(records: Collection[Record], record: Record) -> float:
    """What their calls take of the time of one, on average, by their latents' sizes."""
    return sum(one.x.numel() for one in records) / (len(records) * record.x.numel())


def _size(record: Record) -> tuple[int, int]:
    return record.x.numel(), 0 if record.context is None else record.context.numel()


def try_call(model, record, step: Callable[[], None] = lambda: None) -> Call:
    """Two calls of the MODEL's UNet with a recorded input, loaded as a sampler does, patches and all:
    the first one's memory, the second one's time."""
    inputs: dict[str, tuple[int, ...]] = {}
    with _loaded(model, record) as (layers, device, dtype, call):
        with _noted(layers, inputs):
            _, memory = watched(call, device, layers)
        step()
        started = time.perf_counter()
        call()
        synchronize(device)
    seconds, shape = time.perf_counter() - started, tuple(record.x.shape)
    return Call(seconds, memory, shape, inputs, dtype)


def laid_out(model, record, call: Call, last: Collection[str]) -> Call:
    """`call`, its memory as it is when the layers of `last` answer in `torch.channels_last`: a
    convolution in floating point that is given it takes a copy of its weight in that order. The
    MODEL's UNet is called a third time where that could be more than is there outside of layers.

    call: on a CPU. last: names of quantized layers.
    """
    unet, outside = model.model.diffusion_model, call.memory.outside
    if not last or all(
        inside + unet.get_submodule(name).weight.numel() * call.itemsize <= outside
        for name, inside in call.memory.inside.items()
        if kind_of(unet.get_submodule(name)) == "conv2d" and name not in last
    ):
        return call
    with _loaded(model, record) as (layers, device, _, again):
        hooks = [layers[name].register_forward_hook(_in_channels_last) for name in last]
        try:
            _, memory = watched(again, device, layers)
        finally:
            for hook in hooks:
                hook.remove()
    return replace(call, memory=memory)


def _in_channels_last(_module, _given, answer: torch.Tensor) -> torch.Tensor:
    return answer.contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def _loaded(model, record) -> Iterator[tuple]:
    """The UNet's layers by name, the device, the dtype of its input, and a function that calls it."""
    from .bridge import unet as bridge

    with torch.inference_mode(False), torch.no_grad():
        unet, device, dtype = bridge.load(model, [record])
        layers = {name: m for name, m in unet.named_modules() if kind_of(m) is not None}

        def call() -> None:
            quality.outputs(unet, [record], device, dtype, lambda: None)

        yield layers, device, dtype, call


@contextlib.contextmanager
def _noted(
    layers: Mapping[str, torch.nn.Module], inputs: dict[str, tuple[int, ...]]
) -> Iterator[None]:
    """While it lasts, `inputs` gets the shape of the largest that each layer is given."""

    def note(name: str, x: torch.Tensor) -> None:
        inputs[name] = max(inputs.get(name, (0,)), tuple(x.shape), key=math.prod)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
