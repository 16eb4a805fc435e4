"""Quantize, save, load, sample, unload, again and again in one server: its memory, that of its GPU, and
what it has open."""

from __future__ import annotations

import os
import time
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
# bytes more on a GPU at the end than after the first cycle: of all programs on it, of torch's tensors
ROOM = {"vram": 64 * 2**20, "torch_vram": 8 * 2**20}
# seconds between two looks at it, how often to look at most, and how many must be alike
LOOK = 0.5
LOOKS = 40
ALIKE = 4


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


def on_gpus(server: ComfyServer) -> dict[str, int]:
    """Bytes in use on each GPU once the server was told to free all: "cuda:0 vram", as the driver counts
    them, less what torch keeps for later, and "cuda:0 torch_vram", of tensors. Nothing without a GPU."""
    free(server)
    looks = [_in_use(server)]
    while looks[-1] and len(looks) < LOOKS:  # it frees between prompts, after it has answered
        if len(looks) >= ALIKE and looks[-ALIKE:].count(looks[-1]) == ALIKE:
            break
        time.sleep(LOOK)
        looks.append(_in_use(server))
    return looks[-1]


def _in_use(server: ComfyServer) -> dict[str, int]:
    return {
        f"{one['type']}:{one['index'] or 0} {kind}": one[f"{kind}_total"] - one[f"{kind}_free"]
        for one in server.get("/system_stats")["devices"]
        if one["type"] != "cpu"
        for kind in ROOM
    }


def free(server: ComfyServer) -> None:
    server.request("/free", {"unload_models": True, "free_memory": True})


def cycle(server: ComfyServer, number: int) -> list[str]:
    """Quantize and save with a recording of its own, load, sample, unload, remove."""
    wrong = servers.works(server, graphs.saved(number, "soak"))
    names = [name for name in servers.unets(server) if not name.startswith(".")]
    for name in names:
        wrong += servers.works(server, graphs.loaded(name, number))
    free(server)
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
        on_gpu: dict[str, int] = {}
        for number in range(1, cycles + 1):
            if effort.over and number > LEAST:
                break
            wrong.append(cycle(server, number))
            memory.append(resident(server))
            if number == 1:  # what is made once, such as the libraries' own memory, is there
                on_gpu = on_gpus(server)
            if number == SETTLED:
                before = opened(server)
            say(f"cycle {number}: {memory[-1] / 1e6:.0f} MB")
        left = [f"still open: {name}" for name in opened(server) if name not in before]
        left += kept(on_gpu, on_gpus(server))
    judge(row, memory, wrong, left)
    return [row]


def kept(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What of `on_gpus` did not come back to what it was after the first cycle."""
    return [
        f"still in use: {after.get(name, 0) / 1e6:.0f} MB of {name}, {held / 1e6:.0f} MB after cycle 1"
        for name, held in before.items()
        if after.get(name, 0) - held > ROOM[name.split()[1]]
    ]


def judge(row: Row, memory: list[int], wrong: list[list[str]], left: list[str]) -> None:
    """Fills the row. Of each cycle: the memory held after it, and what went wrong. left: what is wrong at
    the end."""
    settled, last = min(memory[SETTLED - 1 :][:WINDOW]), min(memory[-WINDOW:])
    text = (
        f"{settled / 1e6:.0f} MB after cycle {SETTLED}, {last / 1e6:.0f} MB after cycle "
        f"{len(memory)} ({last / settled - 1:+.1%})"
    )
    row.findings += [one for those in wrong for one in those]
    row.findings += left
    if last > settled * (1 + GROWTH):
        row.findings.append(text)
    if right := wrong.count([]):
        row.outcomes[f"right; {text}"] += right
