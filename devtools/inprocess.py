"""ComfyUI and this pack in the running Python, without a server: for benchmarks and scripts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from .comfyui import pinned_comfyui, user_comfyui
from .common import ROOT, UserError, say

PACKAGE = "comfyui_modelopt"


def load() -> Path:
    """Make `comfy` and `comfyui_modelopt` importable; on the CPU where torch finds no GPU.

    Call it before anything of ComfyUI is imported. Returns ComfyUI's folder; raises UserError
    where there is none.
    """
    comfyui = user_comfyui() or pinned_comfyui()
    if comfyui is None:
        raise UserError(
            "there is no ComfyUI: run `python dev.py paths` once, which gets one, or set "
            "COMFYUI_PATH to the folder of ComfyUI's main.py"
        )
    sys.path.insert(0, str(comfyui))  # first: `nodes` and `utils` are ComfyUI's own names
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = module
        spec.loader.exec_module(module)
    return comfyui


def load_or_exit() -> None:
    """`load`, for a script's main: what is wrong is printed, and the script ends with status 1."""
    try:
        load()
    except UserError as error:
        say(str(error), file=sys.stderr)
        raise SystemExit(1) from error
