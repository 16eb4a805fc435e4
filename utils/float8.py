"""Whether a file's UNet was brought to 8 bits before: ComfyUI widens such weights where it does not
compute in float8, and a MODEL does not say so."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

SUFFIXES = (".safetensors", ".sft")
UNET = "model.diffusion_model."


def weight_of(file: Path) -> str | None:
    """The first weight of a file's UNet that is stored in float8, by its name, or None. Reads the
    header alone; files of other kinds than safetensors are not looked into."""
    if file.suffix.lower() not in SUFFIXES:
        return None
    # not as torch's: that maps the whole file as a tensor
    with safe_open(file, framework="np") as opened:
        names = list(opened.keys())
        parts = [name for name in names if name.startswith(UNET)] or names
        for name in parts:
            found = opened.get_slice(name)
            if found.get_dtype().startswith("F8_E") and len(found.get_shape()) > 1:
                return name
    return None
