"""Packages that some of the pack needs: whether they are there, and the command that gets them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
MODELOPT, DIFFUSERS = "modelopt", "diffusers"
# module -> package, and pip's arguments for it
_PIP = {
    MODELOPT: ("nvidia-modelopt", f'-r "{REQUIREMENTS}"'),
    DIFFUSERS: ("diffusers", "diffusers"),
}


def why_missing(module: str, what: str) -> str | None:
    """Why `what` (a word such as "quantizing") cannot be done without the module, or None where it
    is installed. Imports nothing."""
    if importlib.util.find_spec(module) is not None:
        return None
    package, arguments = _PIP[module]
    return (
        f"{what} needs the package {package}, it is not installed in ComfyUI's Python: run "
        f'`"{sys.executable}" -m pip install {arguments}` and restart ComfyUI; with --dry-run at '
        "its end the command only tells whether it would replace your PyTorch, which it must not"
    )


def require(module: str, what: str) -> None:
    """Raises ValueError where the module is not installed."""
    if (reason := why_missing(module, what)) is not None:
        raise ValueError(reason)
