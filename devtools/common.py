"""What every developer tool shares. Standard library only: runs before there is a venv."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
STDERR = 2  # a file descriptor: where a child's chatter goes, so that our stdout stays clean
PACK_NAME = "comfyui-modelopt"
# for a child on glibc: each tensor is memory of its own, and is given back when it is freed
NO_HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


class UserError(Exception):
    """Something the user can put right: printed without a traceback, exit status 1."""


def say(text: str = "", *, file: TextIO | None = None) -> None:
    """The one place that writes to the terminal: results to stdout, all other talk to stderr."""
    file = file or sys.stdout
    file.write(f"{text}\n")
    file.flush()


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def has_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU that this process may use. Does not import torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU " in listing.stdout


def same_place(a: Path, b: Path) -> bool:
    try:
        return a.resolve() == b.resolve()
    except OSError:
        return False


def is_link(path: Path) -> bool:
    """A symlink, or a junction on Windows (which Python < 3.12 does not call a link)."""
    if path.is_symlink():
        return True
    if os.name != "nt":
        return False
    try:
        return bool(os.readlink(path))
    except (OSError, ValueError):
        return False


def remove_link(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        os.rmdir(path)  # a junction or directory link: removes the link, not what it points to
    else:
        path.unlink()


def make_link(link: Path, target: Path) -> None:
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def link_pack(custom_nodes: Path, pack: Path = ROOT) -> Path:
    """Make `pack` a custom node of the ComfyUI whose custom_nodes folder is given.

    Nothing is done where it already lies or is linked there under any name. A link of our name
    that points elsewhere is replaced; a real file or folder of that name is a UserError.
    """
    custom_nodes.mkdir(parents=True, exist_ok=True)
    for entry in sorted(custom_nodes.iterdir()):
        if same_place(entry, pack):
            return entry
    link = custom_nodes / PACK_NAME
    if is_link(link):
        say(f"{link} pointed to {os.readlink(link)}; it now points to {pack}", file=sys.stderr)
        remove_link(link)
    elif link.exists():
        raise UserError(
            f"{link} is another copy of the pack, not a link to {pack}: "
            "two copies cannot run at once. Move it away, then run this again."
        )
    make_link(link, pack)
    return link
