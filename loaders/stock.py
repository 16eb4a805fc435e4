"""Quantized files that stock ComfyUI or others wrote in ComfyUI's own form: opened by stock code."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import comfy.model_management as management
import comfy.sd
from safetensors import safe_open

from ..formats import files
from ..utils import out_of_memory
from ..utils.report import megabytes
from ..utils.text import brief, read_json
from ..utils.unreadable import raise_unless_damage
from . import bounds

MARKER = ".comfy_quant"
# bytes; ComfyUI's have a few dozen
LONGEST_MARKER = 2**12
# of the form before the markers
OLD = "scaled_fp8"


@out_of_memory.explained("loading", out_of_memory.FREE)
def is_stock(path: str) -> bool:
    """Whether a file is quantized in ComfyUI's form and was not saved by this pack.

    Raises ValueError for a damaged file.
    """
    metadata, keys = files.metadata_of(path)
    if files.HEADER in metadata:
        return False
    if any(key.rpartition(".")[2] == files.HEADER_TENSOR for key in keys):
        return False  # saved by ComfyUI's own node from a MODEL of this pack
    return files.COMFY_HEADER in metadata or any(
        key.endswith(MARKER) or key.rpartition(".")[2] == OLD for key in keys
    )


@out_of_memory.explained("loading", out_of_memory.FREE)
def load(path: str):
    """File -> MODEL, exactly as "Load Diffusion Model" gives it. Raises ValueError in house form."""
    metadata, names = files.metadata_of(path)
    try:
        read_json(metadata.get(files.COMFY_HEADER, "null"))
    except ValueError as error:  # else ComfyUI would read it, whatever it takes
        raise ValueError(
            f"{files.COMFY_HEADER} of the header must be JSON, {path} has {brief(str(error))}: get it again"
        ) from error
    bounds.check(names, path)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = [(name, tuple(file.get_slice(name).get_shape())) for name in names]
        bounds.check_sizes(shapes, path)
        for name, shape in shapes:
            if name.endswith(MARKER) and math.prod(shape) > LONGEST_MARKER:
                raise ValueError(f"{brief(name)} of {math.prod(shape)} bytes")
        return comfy.sd.load_diffusion_model(path)
    except (management.InterruptProcessingException, ImportError):
        raise
    except Exception as error:  # detection of what it does not expect ends in any kind of error
        raise_unless_damage(path, error)
        raise ValueError(
            f"a quantized file without this pack's header must be one that stock ComfyUI opens, "
            f"{path} is not ({brief(str(error))}): get it again, or ask its author what it is for"
        ) from error


def describe(model, path: str) -> str:
    """The info text of such a MODEL."""
    modules = model.model.diffusion_model.modules()
    found = Counter(getattr(module, "quant_format", None) for module in modules)
    found.pop(None, None)
    return "\n".join(
        [
            f"Quantized elsewhere, in stock ComfyUI's form: {Path(path).name}",
            *(f"{count} layers in {name}" for name, count in found.most_common()),
            f"Size {megabytes(model.model_size())}",
            f"Model: {type(model.model.model_config).__name__}",
            "Runs with stock ComfyUI's operations; Save and Export of this pack do not apply.",
        ]
    )
