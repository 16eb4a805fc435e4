"""A browser for the tests of the page: one that is there, or one that this machine lets us install.

Standard library only. Without one those tests skip, and say why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .browser import VARIABLE, WHY_NOT, find
from .common import ROOT, STDERR, say

# of Playwright's own download: goes when .venv goes
DOWNLOADS = ROOT / ".venv" / "browsers"
FOLDER = "browser"  # of the tests that need one
SECONDS = 600
ASK_PLAYWRIGHT = """
from playwright.sync_api import sync_playwright
with sync_playwright() as p:
    print(p.chromium.executable_path)
"""


def wanted(arguments: Sequence[str]) -> bool:
    """Whether pytest, run with these arguments, comes to the tests of the page."""
    places = [a for a in arguments if Path(a.split("::")[0]).exists()]
    return not places or any(FOLDER in a or Path(a) in (Path("tests"), ROOT) for a in places)


def environment(python: Path) -> dict[str, str]:
    """The variables that tell the tests of the browser, or why there is none."""
    path = find() or _downloaded(python)
    if path is None:
        say("No browser here: installing Chromium for the tests of the page", file=sys.stderr)
        path = _by_apt() or _by_playwright(python)
    if path:
        return {VARIABLE: path}
    return {
        WHY_NOT: "no Chromium or Chrome is installed, and neither the system's packages nor "
        f"Playwright's download could be had: install one, or name it in {VARIABLE}"
    }


def _run(command: Sequence[str], env: dict[str, str] | None = None) -> bool:
    try:
        done = subprocess.run(
            command, stdout=STDERR, stderr=STDERR, env=os.environ | (env or {}), timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _by_apt() -> str | None:
    """Debian's own, where we are root anyway, as in a container."""
    apt = shutil.which("apt-get")
    if apt is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    install = [apt, "install", "-y", "-qq", "--no-install-recommends", "chromium"]
    if not _run(install, quiet):  # lists of packages may be old or missing
        _run([apt, "update", "-qq"], quiet)
        _run(install, quiet)
    return find()


def _by_playwright(python: Path) -> str | None:
    _run(
        [str(python), "-m", "playwright", "install", "chromium"],
        {"PLAYWRIGHT_BROWSERS_PATH": str(DOWNLOADS)},
    )
    return _downloaded(python)


def _downloaded(python: Path) -> str | None:
    env = os.environ | {"PLAYWRIGHT_BROWSERS_PATH": str(DOWNLOADS)}
    if not DOWNLOADS.is_dir():
        return None
    answer = subprocess.run(
        [str(python), "-c", ASK_PLAYWRIGHT], capture_output=True, text=True, env=env
    )
    path = answer.stdout.strip()
    return path if path and os.path.exists(path) else None
