"""Loads ComfyUI (CPU where there is no GPU) and this repository as the package `comfyui_modelopt`."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "comfyui_modelopt"
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui" / "ComfyUI")


def _load_comfyui() -> None:
    sys.path.insert(0, str(COMFYUI))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


def _load_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


_load_comfyui()
_load_pack()


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI folder under test."""
    return COMFYUI
