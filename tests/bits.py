"""Bits that a file takes for each weight of its quantized layers, from the safetensors header alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

# at most, on layers as wide as those of SD1.5 and SDXL; of SVDQuant, where no rank is asked for
LIMITS = {
    "int8": 8.05,
    "fp8": 8.05,
    "fp8_e5m2": 8.05,
    "mxfp8": 8.3,
    "nvfp4": 4.6,
    "int4": 4.2,
    "w4a8": 4.2,
}
# what a layer has beside its weight in any format, and ComfyUI's marker
BESIDE = ("bias", "comfy_quant")
BRANCH = ("svd_up", "svd_down")


def bytes_in_file(path: Path) -> dict[str, int]:
    """Tensor name -> its bytes, without the prefix of files that are not for stock ComfyUI."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        values = path.stat().st_size - file.tell()
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name.removeprefix("modelopt.")] = end - begin
    assert sum(found.values()) == values
    return found


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The same of tensors, such as those on the meta device that a plan gives."""
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def per_weight(
    sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], without: tuple[str, ...] = ()
) -> float:
    """Bits for each weight of the layers of `shapes`, scales and smoothing among them. without: of
    which of their tensors the bytes do not count."""
    counted = 0
    for name, size in sizes.items():
        layer, _, leaf = name.rpartition(".")
        if layer in shapes and leaf not in (*BESIDE, *without):
            counted += size
    return 8 * counted / sum(math.prod(shape) for shape in shapes.values())


def branches(shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int]) -> float:
    """Bits for each weight of the layers of `shapes` that 16-bit branches of these ranks take."""
    numbers = sum(rank * sum(shapes[name][:2]) for name, rank in ranks.items())
    return 16 * numbers / sum(math.prod(shape) for shape in shapes.values())
