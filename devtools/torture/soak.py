"""Quantize, save, load, sample, unload, again and again in one server: its memory and what it has open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .. import common
from ..server import ComfyServer
from . import graphs, servers
from .outcome import Effort, NotHere, Row

NAME = "soak"
FULL = 100
# cycles before memory is taken for settled, and how much more it may be at the end
SETTLED = 10
GROWTH = 0.05
# of so many cycles the least is what is held, as each ends a little higher or lower
WINDOW = 3
LEAST = SETTLED + 2 * WINDOW


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
        raise NotHere("the soak reads /proc, which is Linux's: run it there")
    row = Row(NAME, "cycles of quantize, save, load, sample, unload")
    cycles = max(effort.count(FULL), LEAST)
    memory: list[int] = []
    wrong: list[list[str]] = []
    # the C library's own heap keeps what is freed, in pieces
    with (
        servers.folder_with_checkpoint() as folder,
        servers.made(folder, env=common.NO_HEAP) as server,
    ):
        before: list[str] = []
        for number in range(1, cycles + 1):
            if effort.over and number > LEAST:
                break
            wrong.append(cycle(server, number))
            memory.append(resident(server))
            if number == SETTLED:
                before = opened(server)
            say(f"cycle {number}: {memory[-1] / 1e6:.0f} MB")
        left = [name for name in opened(server) if name not in before]
    judge(row, memory, wrong, left)
    return [row]


def judge(row: Row, memory: list[int], wrong: list[list[str]], left: list[str]) -> None:
    """Fills the row. Of each cycle: the memory held after it, and what went wrong. left: still open."""
    settled, last = min(memory[SETTLED - 1 :][:WINDOW]), min(memory[-WINDOW:])
    text = (
        f"{settled / 1e6:.0f} MB after cycle {SETTLED}, {last / 1e6:.0f} MB after cycle "
        f"{len(memory)} ({last / settled - 1:+.1%})"
    )
    row.findings += [one for those in wrong for one in those]
    row.findings += [f"still open: {name}" for name in left]
    if last > settled * (1 + GROWTH):
        row.findings.append(text)
    if right := wrong.count([]):
        row.outcomes[f"right; {text}"] += right
