"""`dev.py import`: a checkpoint that ModelOpt wrote elsewhere -> one file for the Load node."""

from __future__ import annotations

from pathlib import Path

from . import inprocess
from .common import UserError, say
from .demo import free_name


def check(source: Path, out: Path | None) -> None:
    """Raises UserError for what is wrong with the arguments."""
    if not source.exists():
        raise UserError(f"{source}: there is no such file")
    if out is not None and out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, got {out}")


def main(source: Path, out: Path | None) -> int:
    """Reads, checks that ComfyUI can load it, writes; prints what it is."""
    inprocess.load()
    from comfyui_modelopt.formats import files
    from comfyui_modelopt.loaders import foreign, info
    from comfyui_modelopt.loaders import unet as loader

    path = free_name((out or Path(f"{source.stem}.safetensors")).resolve())
    try:
        checkpoint = foreign.read(source)
        model = loader.load(checkpoint, where=str(source))
        files.write(checkpoint, path)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    say(info.describe(model))
    say(f"Written to {path}: put it into ComfyUI's models/diffusion_models")
    return 0
