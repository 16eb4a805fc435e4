"""Opening a safetensors file through ComfyUI's own reader, which maps it into memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch

from ..formats import files
from ..utils import checksums
from ..utils.unreadable import raise_unless_damage


def unless_cancelled(size: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def tensors_of(
    path: Path | str, step: Callable[[int], None] = unless_cancelled
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata. step: as of `checksums.check`. Raises ValueError in house form for a file
    that is not whole, or not as its checksums say."""
    files.check_readable(path)
    checksums.check(path, step)
    try:
        tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    except Exception as error:  # a file that changed since it was checked meets any kind of error
        raise_unless_damage(path, error)
        raise ValueError(
            f"a quantized checkpoint must be a whole safetensors file named .safetensors, {path} is "
            f"not ({' '.join(str(error).split())[:200]}): rename it or get it again"
        ) from error
    return tensors, metadata or {}
