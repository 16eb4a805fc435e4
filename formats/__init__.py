"""Numeric formats, one module each, and the table every other room reads them from."""

from __future__ import annotations

from types import ModuleType

from ..utils.text import brief_repr
from . import fp8, fp8_e5m2, int4, int8, mxfp8, nvfp4, w4a8

# the first one is the default: it measures best with `linear + conv` (benchmarks/results)
FORMATS: dict[str, ModuleType] = {
    module.NAME: module for module in (fp8, int8, mxfp8, nvfp4, int4, w4a8, fp8_e5m2)
}


def get(name: str) -> ModuleType:
    """The module of a format. Raises ValueError for a name that is not in the table."""
    if name not in FORMATS:
        raise ValueError(
            f"format must be one of {', '.join(FORMATS)}, got {brief_repr(name)}: "
            "update the pack if the file was written by a newer one"
        )
    return FORMATS[name]
