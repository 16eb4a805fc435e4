"""Finds a ComfyUI installation and makes it importable, without its server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .paths import UsageError

ROOT = Path(__file__).parent.parent
WANTED = ("main.py", "comfy", "comfyui_version.py", "folder_paths.py")


def find(named: Path | None) -> Path:
    """The folder of ComfyUI's main.py: `named`, else COMFYUI_PATH, else that in whose custom_nodes the
    pack lies, else the one that `dev.py` got. Raises UsageError."""
    for source, value in (("--comfyui", named), ("COMFYUI_PATH", os.environ.get("COMFYUI_PATH"))):
        if value:
            folder = Path(value).expanduser().absolute()
            if missing := _missing(folder):
                raise UsageError(
                    f"{source} must name the folder of ComfyUI's main.py, {folder} has no "
                    f"{', '.join(missing)}: correct it"
                )
            return folder
    for here in dict.fromkeys((ROOT.absolute(), ROOT.resolve())):
        for folder in (here.parent.parent, here / ".comfyui" / "ComfyUI"):
            if not _missing(folder):
                return folder
    raise UsageError(
        f"convert.py runs inside a ComfyUI installation, there is none around {ROOT.absolute()}: "
        "name the folder of its main.py with --comfyui or in COMFYUI_PATH"
    )


def _missing(folder: Path) -> list[str]:
    return [name for name in WANTED if not (folder / name).exists()]


def load(named: Path | None, device: str | None) -> None:
    """Makes `comfy` importable, on that device. Call it before anything of ComfyUI is imported.
    Raises UsageError."""
    folder = find(named)
    choose(device)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # first: `nodes` and `utils` are ComfyUI's own names
    try:
        import torch
        from comfy.cli_args import args

        if device not in (None, "cpu"):
            _check_alone(device, torch.accelerator.device_count())
        args.cpu = device == "cpu" or not torch.accelerator.is_available()
        import comfy.sd  # noqa: F401

        import nodes  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"convert.py must run with the Python of ComfyUI, {sys.executable} cannot import it "
            f"({error}): use the one that starts {folder}"
        ) from error


def _check_alone(device: str, count: int) -> None:
    """count: of the GPUs that torch finds once `choose` has left one."""
    if count == 0:
        raise UsageError(
            f"--device must be a GPU that is there, torch finds none of the number {device}: correct "
            "it, install a torch for that GPU, or use --device cpu"
        )
    if count > 1:
        raise UsageError(
            "--device chooses among the GPUs of NVIDIA and AMD, got it where torch finds "
            f"{count} others: leave it out, or leave one visible in the way of their driver"
        )


def choose(device: str | None) -> None:
    """Leaves one GPU visible, before torch looks for them. Raises UsageError for what is no number."""
    if device is None or device == "cpu":
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name for name in visible.split(",") if name.strip()]
    if not device.isdecimal() or (names is not None and int(device) >= len(names)):
        known = "from 0 on" if names is None else f"below {len(names)} (CUDA_VISIBLE_DEVICES)"
        raise UsageError(f"--device must be cpu or a number {known}, got {device!r}: correct it")
    chosen = device if names is None else names[int(device)]
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        os.environ[name] = chosen
