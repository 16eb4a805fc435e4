"""Quantize, save, load, sample, unload, again and again in one server: its memory and what it has open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..common import UserError
from ..server import ComfyServer
from . import graphs, servers
from .outcome import Effort, Row

NAME = "soak"
FULL = 100
# cycles before memory is taken for settled, and how much more it may be at the end
SETTLED = 10
GROWTH = 0.05


def resident(server: ComfyServer) -> int:
    """Bytes of the server's anonymous memory: not of files mapped into it, which the system takes
    back when it likes."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    found = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(found["RssAnon"].split()[0]) * 1024


def opened(server: ComfyServer) -> list[str]:
    """Files that the server has open; no sockets and pipes, which its connections are."""
    folder, found = Path(f"/proc/{server.process.pid}/fd"), []
    for name in folder.iterdir():
        try:
            found.append(os.readlink(name))
        except FileNotFoundError:  # closed meanwhile
            continue
    return sorted(one for one in found if one.startswith("/") and not one.startswith("/proc"))


def cycle(server: ComfyServer, number: int) -> list[str]:
    """Quantize and save with a recording of its own, load, sample, unload, remove."""
    wrong = servers.works(server, graphs.saved(number, "soak"))
    names = [name for name in servers.unets(server) if not name.startswith(".")]
    for name in names:
        wrong += servers.works(server, graphs.loaded(name, number))
    server.request("/free", {"unload_models": True, "free_memory": True})
    if len(names) != 1 or len(servers.unets(server)) != 1:
        wrong.append(f"files: {sorted(servers.unets(server))}")
    for path in (server.models / "diffusion_models").iterdir():
        path.unlink()
    return [f"cycle {number}: {one}" for one in wrong]


def run(effort: Effort, say: Callable[[str], None]) -> list[Row]:
    if not Path("/proc/self/status").exists():
        raise UserError("the soak reads /proc, which is Linux's: run it there")
    row = Row(NAME, "cycles of quantize, save, load, sample, unload")
    cycles = max(effort.count(FULL), SETTLED + 1)
    memory: list[int] = []
    with servers.folder_with_checkpoint() as folder:
        server = servers.made(folder)
        # the C library's own heap keeps what is freed, in pieces: one arena, and large pieces mapped
        server.env = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        with server:
            before: list[str] = []
            for number in range(1, cycles + 1):
                if effort.over and number > SETTLED:
                    break
                row.findings += cycle(server, number)
                memory.append(resident(server))
                if number == SETTLED:
                    before = opened(server)
                say(f"cycle {number}: {memory[-1] / 1e6:.0f} MB")
            left = [name for name in opened(server) if name not in before]
    row.findings += [f"still open: {name}" for name in left]
    settled, last = min(memory[SETTLED - 1 : SETTLED + 2]), min(memory[-3:])
    text = (
        f"{settled / 1e6:.0f} MB after cycle {SETTLED}, {last / 1e6:.0f} MB after cycle "
        f"{len(memory)} ({last / settled - 1:+.1%})"
    )
    if last > settled * (1 + GROWTH):
        row.findings.append(text)
    row.outcomes[f"right; {text}, nothing left open"] += len(memory) - len(row.findings)
    return [row]
