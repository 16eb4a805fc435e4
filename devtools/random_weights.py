"""Seeded random tensors that look like trained weights, and a writer that never holds them all.

Fan-in scaled Gaussians with a few outlier channels in norm gains and weight inputs: plain Gaussians
quantize too easily. Every tensor depends on the seed and its own name only.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# name -> (shape, a function of a seeded generator that gives the fp32 values)
Specs = dict[str, tuple[tuple[int, ...], Callable[["torch.Generator"], "torch.Tensor"]]]


def normal(shape: Iterable[int], std: float = 1.0, mean: float = 0.0) -> Callable:
    import torch

    return lambda g: torch.randn(tuple(shape), generator=g).mul_(std).add_(mean)


def zeros(shape: Iterable[int]) -> Callable:
    import torch

    return lambda g: torch.zeros(tuple(shape))


def norm_gain(shape: tuple[int, ...]) -> Callable:
    """Norm gains about 1; one channel in 64 is 5 to 10 times that."""
    import torch

    def values(g: torch.Generator) -> torch.Tensor:
        gain = torch.randn(shape, generator=g).mul_(0.15).add_(1.0)
        outliers = torch.rand(shape, generator=g) < 1 / 64
        return torch.where(outliers, 5 + 5 * torch.rand(shape, generator=g), gain)

    return values


def fan_in(shape: tuple[int, ...], gain: float) -> Callable:
    """Fan-in scaled; one input channel in 64 is 4 times the rest."""
    import torch

    def values(g: torch.Generator) -> torch.Tensor:
        weight = torch.randn(shape, generator=g).mul_(gain / math.sqrt(math.prod(shape[1:])))
        outliers = (torch.rand(shape[1], generator=g) < 1 / 64).float().mul_(3).add_(1)
        return weight.mul_(outliers.reshape(-1, *[1] * (len(shape) - 2)))

    return values


def module_specs(model: torch.nn.Module, prefix: str, gains: dict[str, float]) -> Specs:
    """Specs of every parameter of a module that lies on the meta device, by kind of module."""
    import torch

    specs: Specs = {}
    for name, module in model.named_modules():
        norm = isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm)
        for leaf, parameter in module.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            if leaf == "bias":
                values = normal(shape, 0.05)
            elif norm:
                values = norm_gain(shape)
            else:
                gain = next((v for end, v in gains.items() if name.endswith(end)), 1.0)
                values = fan_in(shape, gain)
            specs[f"{prefix}{name}.{leaf}"] = (shape, values)
    return specs


def values_of(specs: Specs, name: str, seed: int) -> torch.Tensor:
    """One tensor, fp32."""
    import torch

    return specs[name][1](torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode())))


def state_dict(specs: Specs, seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors in fp16, in memory, without `prefix`."""
    return {k.removeprefix(prefix): values_of(specs, k, seed).half() for k in specs}


def write(path: Path, specs: Specs, seed: int = 0) -> Path:
    """Write specs as an fp16 safetensors, one tensor at a time, to a temporary file first.

    Zero tensors become holes in the file where the file system has them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": {"modelopt.synthetic": f"seed {seed}"}}
    offset = 0
    for name, (shape, _) in specs.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in specs:
                tensor = values_of(specs, name, seed).half()
                if tensor.any():
                    file.write(tensor.numpy().tobytes())
                else:
                    file.seek(2 * tensor.numel(), os.SEEK_CUR)
            file.truncate(8 + len(text) + offset)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
