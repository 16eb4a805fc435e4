"""Packages that some of the pack needs: whether they are there, and the command that gets them. And
the pack's own version."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS, PYPROJECT = ROOT / "requirements.txt", ROOT / "pyproject.toml"
MODELOPT, DIFFUSERS = "modelopt", "diffusers"
# module -> what is missing without it, and pip's arguments for it
_MISSING = {
    MODELOPT: (
        "quantizing needs the package nvidia-modelopt, it is not installed in ComfyUI's Python",
        f'-r "{REQUIREMENTS}"',
    ),
    DIFFUSERS: (
        "exporting needs the package diffusers, it is not installed in ComfyUI's Python",
        "diffusers",
    ),
}


def why_missing(module: str) -> str | None:
    """What cannot be done without the module and how to get it, None where it is installed. Imports
    nothing."""
    if importlib.util.find_spec(module) is not None:
        return None
    what, arguments = _MISSING[module]
    return (
        f'{what}: run `"{sys.executable}" -m pip install {arguments}` and restart ComfyUI; with '
        "--dry-run at its end the command only tells whether it would replace your PyTorch, which it "
        "must not"
    )


def require(module: str) -> None:
    """Raises ValueError where the module is not installed."""
    if (reason := why_missing(module)) is not None:
        raise ValueError(reason)


def own_version() -> str:
    """This pack's version by its pyproject.toml, "unknown" without one. By a regex, as Python 3.10 has
    no tomllib."""
    text = PYPROJECT.read_text(encoding="utf-8") if PYPROJECT.is_file() else ""
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"
