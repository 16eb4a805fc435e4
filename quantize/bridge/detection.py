"""What ComfyUI's detection of a model reads from its weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from comfy.model_detection import detect_unet_config


def shaping(model: torch.nn.Module, layers: Iterable[str]) -> set[str]:
    """Those of the Linears named, from whose weights' widths ComfyUI detects the architecture.

    Found by halving widths (as packing two values a byte does) and asking ComfyUI.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = [name for name in layers if len(shapes[f"{name}.weight"]) == 2]
    truth = _detected(shapes, ())

    def among(some: list[str]) -> set[str]:
        if _detected(shapes, some) == truth:
            return set()
        if len(some) == 1:
            return set(some)
        half = len(some) // 2
        return among(some[:half]) | among(some[half:])

    return among(names)


def _detected(shapes: dict[str, tuple[int, ...]], halved: Iterable[str]) -> dict | None:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    for name in halved:
        rows, columns = shapes[f"{name}.weight"]
        tensors[f"{name}.weight"] = torch.empty(rows, columns // 2, device="meta")
    return detect_unet_config(tensors, "")
