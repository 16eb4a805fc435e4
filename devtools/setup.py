"""The working environment: .venv, ComfyUI, and the pack linked into it.

Standard library only. A stamp in .venv says what was installed; while it matches nothing is done,
otherwise pip runs again, and a .venv that cannot be repaired is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import comfyui as comfy
from .common import ROOT, STDERR, UserError, link_pack, say, venv_python

VENV = ROOT / ".venv"
STAMP = "modelopt-setup.json"
PYTHONS = ((3, 10), (3, 13))  # oldest and newest that the pack supports
TORCH = ["torch==2.14.1", "torchvision", "torchaudio"]
TOOLS = ["nvidia-modelopt==0.47.0", "diffusers", "pytest", "pytest-xdist", "playwright", "ruff"]
PROBED = ["torch", "torchvision", "aiohttp", "nvidia-modelopt", "diffusers", "pytest",
          "pytest-xdist", "playwright", "ruff"]  # fmt: skip
NEEDED_BYTES = 9 << 30


@dataclass(frozen=True)
class Environment:
    """What `dev.py paths` prints."""

    python: Path
    comfyui: Path


def set_up() -> Environment:
    """Make or repair what is missing and return where it is. Talks on stderr only."""
    own = comfy.user_comfyui()
    python = venv_python(VENV)
    comfyui = own or comfy.pinned_comfyui()
    if comfyui is None or read_stamp(VENV) != wanted_stamp(comfyui) or probe(VENV):
        with lock(ROOT / ".comfyui" / "setup.lock"):
            make_venv(VENV)
            comfyui = own or comfy.pinned_comfyui() or comfy.fetch(python)
            stamp = wanted_stamp(comfyui)
            # another dev.py may have done it while we waited
            if read_stamp(VENV) != stamp or probe(VENV):
                install(VENV, comfyui, stamp)
    link_pack(comfyui / "custom_nodes")
    return Environment(python, comfyui)


# --- what is there, what is wanted ---


def wanted_stamp(comfyui: Path) -> str:
    """A hash of everything that decides what pip installs."""
    parts = [*TORCH, *TOOLS]
    for file in (comfyui / "requirements.txt", ROOT / "requirements.txt"):
        parts.append(file.read_text(encoding="utf-8"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_stamp(venv: Path) -> str | None:
    try:
        return json.loads((venv / STAMP).read_text(encoding="utf-8"))["installed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_python(python: Path, code: str) -> subprocess.CompletedProcess[str] | None:
    """Run a line of Python in isolation. None if it cannot be started."""
    command = [str(python), "-I", "-c", code]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None


def probe(venv: Path) -> str | None:
    """The reason why the venv cannot be used as it is, or None. Imports nothing heavy."""
    code = f"import importlib.metadata as m; [m.version(n) for n in {PROBED!r}]"
    answer = run_python(venv_python(venv), code)
    if answer is None:
        return "its Python does not start"
    return answer.stderr.strip().splitlines()[-1] if answer.returncode else None


def broken(venv: Path) -> str | None:
    """The reason why pip cannot repair the venv, or None."""
    python = venv_python(venv)
    if not python.exists():
        return f"it has no {python.relative_to(venv)}"
    answer = run_python(python, "import sys; print(*sys.version_info[:2], sys.prefix)")
    if answer is None or answer.returncode:
        return "its Python does not start"
    major, minor, prefix = answer.stdout.strip().split(" ", 2)
    if not PYTHONS[0] <= (int(major), int(minor)) <= PYTHONS[1]:
        return f"its Python is {major}.{minor}, supported are 3.10 to 3.13"
    if Path(prefix).resolve() != venv.resolve():
        return f"its Python is that of {prefix}"
    answer = run_python(python, "import pip._internal.cli.main")
    if answer is None or answer.returncode:
        return "it has no working pip"
    return None


# --- making it ---


def make_venv(venv: Path) -> None:
    """Make the venv unless there is one that pip can work with."""
    if venv.exists() or venv.is_symlink():
        reason = broken(venv)
        if reason is None:
            return
        say(f"{venv} is broken ({reason}): making it anew", file=sys.stderr)
        if venv.is_symlink():
            raise UserError(f"{venv} is a link: remove it, then run this again.")
        shutil.rmtree(venv) if venv.is_dir() else venv.unlink()
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        found = ".".join(map(str, sys.version_info[:2]))
        raise UserError(f"this is Python {found}: start dev.py with Python 3.10 to 3.13.")
    free = shutil.disk_usage(venv.parent).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"{venv.parent} has {free / 1e9:.1f} GB free, the environment needs "
            f"{NEEDED_BYTES / 1e9:.0f} GB: make room, then run this again."
        )
    say(f"Making {venv}", file=sys.stderr)
    base = getattr(sys, "_base_executable", None) or sys.executable  # not a venv's own Python
    if subprocess.run([base, "-m", "venv", str(venv)], stdout=STDERR).returncode:
        raise UserError(
            f"{base} -m venv failed (its words are above). On Debian and Ubuntu, install the "
            "package python3-venv; then run this again."
        )


def install(venv: Path, comfyui: Path, stamp: str) -> None:
    """Install everything with pip and write the stamp last: an interrupted run leaves none."""
    (venv / STAMP).unlink(missing_ok=True)
    ours = ["-r", str(ROOT / "requirements.txt")]
    pip(venv, "torch (about 3 GB; some minutes)", TORCH)
    pip(venv, "ComfyUI's packages", [TORCH[0], "-r", str(comfyui / "requirements.txt")])
    pip(venv, "ModelOpt and the test tools", [TORCH[0], *TOOLS, *ours])
    reason = probe(venv)
    if reason:
        raise UserError(f"{venv} is incomplete after the installation: {reason}")
    partial = venv / f"{STAMP}.part"
    partial.write_text(json.dumps({"installed": stamp}), encoding="utf-8")
    os.replace(partial, venv / STAMP)


def pip(venv: Path, what: str, arguments: list[str]) -> None:
    say(f"Installing {what}", file=sys.stderr)
    command = [str(venv_python(venv)), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--no-input"] if sys.stderr.isatty() else ["--no-input", "--quiet"]
    if subprocess.run(command + arguments, stdout=STDERR).returncode:
        raise UserError(
            f"pip could not install {what} into {venv} (its words are above): check the network, "
            "pip's index and the free space, then run this again; it goes on where it stopped."
        )


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two set-ups wait for each other. The system frees it on a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if not _try_lock(file.fileno(), wait=False):
            say("Waiting for another dev.py that is setting up", file=sys.stderr)
            while not _try_lock(file.fileno(), wait=True):
                pass
        yield


def _try_lock(descriptor: int, wait: bool) -> bool:
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, 0, os.SEEK_SET)
        try:  # LK_LOCK tries for 10 s
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
