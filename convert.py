#!/usr/bin/env python3
"""Many checkpoints, one quantized file each, without a browser: `python convert.py --help`.

Needs a ComfyUI installation and its Python, no server. The work is in `conversion/`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).absolute().parent
PACKAGE = "comfyui_modelopt"


def load_pack() -> None:
    """Makes this folder importable as the package `comfyui_modelopt`."""
    # a script's folder stands first on sys.path, where our `nodes` and `utils` would hide ComfyUI's
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT.resolve()]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status, see --help. argv: the arguments, those of the command line where None."""
    if PACKAGE not in sys.modules:
        load_pack()
    try:
        import torch  # noqa: F401
    except ImportError as error:
        sys.stderr.write(
            f"convert.py: it must run with the Python of ComfyUI, {sys.executable} has no torch "
            f"({error}): use the one that starts ComfyUI\n"
        )
        return 2
    from comfyui_modelopt.conversion.main import main as run

    return run(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before `conversion` catches signals
        sys.exit(130)
