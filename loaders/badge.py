"""What the page shows of a file, and of a choice of formats, before anything is loaded or run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from ..formats import files
from ..formats.checkpoint import Layer
from ..utils import badge, out_of_memory
from ..utils.report import megabytes, recipe_line
from ..utils.text import brief
from . import device, stock

# how a MODEL whose layers compute in 16 bits runs on any device
LONGEST = 2000  # characters of how a file was made
WEIGHTS_ONLY = "weights in few bits, computed in 16: saves memory, not time"


@out_of_memory.explained("reading a file", out_of_memory.FREE)
def of_file(path: str) -> tuple[list[dict[str, str]], str]:
    """Chips of a file for Load Quantized UNet: format, layers, size, how it runs here; and in a line
    how it was made, for workflows that name it ("" where its header does not say). Reads the header
    only. Raises ValueError for a damaged file."""
    size = badge.chip(megabytes(os.path.getsize(path)))
    found = files.read_header(path)
    if found is None:
        return [_foreign(path), size], ""
    header, layers = found
    recipe = header["recipe"]
    words = [brief(recipe[key]) for key in ("format", "layers") if recipe.get(key)]
    source = (header.get("source") or {}).get("name")
    made_by = (f"{brief(source)}: " if source else "") + brief(recipe_line(recipe), LONGEST)
    return [*(badge.chip(word) for word in words), size, *_of_layers(layers)], made_by


def _foreign(path: str) -> dict[str, str]:
    if stock.is_stock(path):
        why = "quantized elsewhere; stock ComfyUI's operations run it"
        return badge.chip("stock form", badge.PLAIN, why)
    why = 'not quantized by this pack: "Load Diffusion Model" opens it'
    return badge.chip("not quantized", badge.WARNING, why)


def of_formats(asked: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Chips that say how this device runs layers of these (format, kind)."""
    # the page asks at any time, during a run too: no kernels are compiled for it
    return badge.verdicts(asked, device.current(kinds=()))


def _of_layers(layers: Mapping[str, Layer]) -> list[dict[str, str]]:
    computed = [(one.format, one.kind) for one in layers.values() if not one.weight_only]
    chips = of_formats(sorted(set(computed)))
    names = sorted({one.format for one in layers.values() if one.weight_only})
    return [*chips, *(memory_only(name) for name in names)]


def memory_only(name: str) -> dict[str, str]:
    """The chip of a format of which weights alone are held in few bits."""
    return badge.chip(f"{name}: {badge.MEMORY_ONLY}", badge.PLAIN, WEIGHTS_ONLY)
