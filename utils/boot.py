"""Which start of which system this is: what locks and process numbers are good within."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def boot_id() -> str | None:
    """Random, the same until the next start, in containers too. None where the system tells none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
