"""What the campaigns do to a real server: kill it, cancel it, take its disk and its memory away."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import common, inprocess, synthetic
from ..server import ComfyServer, Result
from . import graphs
from .outcome import Effort, Row, not_here
from .points import chosen

TIMEOUT = 900


@contextlib.contextmanager
def folder_with_checkpoint() -> Iterator[Path]:
    """A temporary folder with sd15.safetensors, and ComfyUI importable."""
    inprocess.load()
    with tempfile.TemporaryDirectory(prefix="modelopt_torture_") as name:
        synthetic.sd15(Path(name, "sd15.safetensors"))
        yield Path(name)


def made(
    folder: Path,
    name: str = "server",
    models: Path | None = None,
    env: dict[str, str] | None = None,
) -> ComfyServer:
    """A server, not started, with the checkpoint. models: another server's, to share."""
    server = ComfyServer(inprocess.load(), folder / name, env=env)
    server.base.mkdir()
    if models is not None:
        server.models.symlink_to(models, target_is_directory=True)
    else:
        (server.models / "checkpoints").mkdir(parents=True)
        (server.models / "checkpoints" / "sd15.safetensors").symlink_to(folder / "sd15.safetensors")
    return server


def unets(server: ComfyServer) -> dict[str, bytes]:
    """Everything in models/diffusion_models, hidden files too."""
    folder = server.models / "diffusion_models"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def works(server: ComfyServer, graph: graphs.Graph) -> list[str]:
    """What is wrong with the server's next prompt."""
    result = server.run(graph, timeout=TIMEOUT)
    if result.error is None and not result.interrupted:
        return []
    return [f"the next prompt fails: {(result.error or {}).get('exception_message', 'cancelled')}"]


def at_progress(
    server: ComfyServer, graph: graphs.Graph, node: str, number: int, act: Callable[[], Any]
) -> tuple[Result | None, bool]:
    """Runs a prompt and acts at the `number`-th progress of a node (from 0). -> the result, None where
    the server died, and whether it was acted."""
    acted, seen = threading.Event(), [0]

    def on_message(event: dict[str, Any]) -> None:
        if event["type"] == "progress" and (event.get("data") or {}).get("node") == node:
            if seen[0] == number:
                acted.set()
                act()
            seen[0] += 1

    try:
        return server.run(graph, timeout=TIMEOUT, on_message=on_message), acted.is_set()
    except (RuntimeError, OSError):
        if server.alive:
            raise
        return None, acted.is_set()


# --- kills ---


def kills(effort: Effort, wanted: int) -> Row:
    """A server killed while its Save node runs, and started again."""
    row = Row("kills", "server, at the progress of its Save node")
    with folder_with_checkpoint() as folder:
        server = made(folder)
        with server:
            server.run(graphs.saved(), timeout=TIMEOUT)
        (whole,) = unets(server).values()
        for number in range(wanted):
            if effort.over:
                break
            server.start()
            result, _ = at_progress(
                server,
                graphs.saved(),
                "save",
                number,
                server.kill,
            )
            server.stop()
            found = kills_left(server, whole)
            with server:
                found += works(server, graphs.saved())
            found += kills_left(server, whole, hidden=False)
            if found:
                row.findings.append(f"at progress {number}: {'; '.join(found)}")
            else:
                what = "killed" if result is None else "was faster"
                row.outcomes[f"{what}; every file whole, the next start and saving clean up"] += 1
            _empty(server)
    return row


def kills_left(server: ComfyServer, whole: bytes, hidden: bool = True) -> list[str]:
    """What is not a whole file. hidden: hidden ones are right too."""
    return [
        f"{name} has {len(data)} bytes of {len(whole)}"
        for name, data in unets(server).items()
        if not (hidden and Path(name).name.startswith(".")) and data != whole
    ]


def _empty(server: ComfyServer) -> None:
    shutil.rmtree(server.models / "diffusion_models")


# --- cancels ---

CANCELLED = {
    "record": (graphs.recorded, "record"),
    "quantize": (graphs.quantized, "quantize"),
    "auto-quantize": (graphs.auto, "auto"),
    "compare": (graphs.compared, "compare"),
    "save": (graphs.saved, "save"),
    "save calibration": (graphs.recording_saved, "save"),
}
CANCELLED_WELL = "cancelled"
# seconds after a cancel in which a job that does not look any more may end
SOON = 1.0


def shown(graph: graphs.Graph) -> graphs.Graph:
    """With a node that wants the last one's output, where none is an output."""
    ends = {"record": 1, "quantize": 1, "load": 1}
    last = [name for name in ends if name in graph][-1]
    if not {"save", "show", "compare", "keep"} & set(graph):
        kind = "PreviewAny" if last != "record" else "SaveLatent"
        source = {"source": [last, 1]} if last != "record" else {
            "samples": ["record", 0], "filename_prefix": "latents/recorded"}  # fmt: skip
        graph |= {"show": {"class_type": kind, "inputs": source}}
    return graph


def cancelled(result: Result, answered: float) -> tuple[str, list[str]]:
    """How a prompt ended that was cancelled, and what is wrong with that. answered: when the server had
    taken the cancel (time.time()); a small file may be saved by then."""
    if result.interrupted:
        return CANCELLED_WELL, []
    if result.error is not None:
        return "", [f"an error in place of the cancel: {result.error['exception_message'][:200]}"]
    seconds = result.of_type("execution_success")[0]["timestamp"] / 1000 - answered
    return "was faster", [] if seconds < SOON else [f"it went on for {seconds:.1f} s to its end"]


def cancels(effort: Effort, say: Callable[[str], None]) -> list[Row]:
    """POST /interrupt at each progress message of each node, or at as many as the effort allows."""
    rows, seed = [], effort.seed + 10
    with folder_with_checkpoint() as folder, made(folder) as server:
        for job, (graph, node) in CANCELLED.items():
            row = Row("cancels", f"{job}, on a server")
            rows.append(row)
            result = server.run(shown(graph(seed)), timeout=TIMEOUT)
            messages = [m for m in result.of_type("progress") if m.get("node") == node]
            for number in chosen(len(messages), effort):
                if effort.over:
                    break
                seed += 1
                before = unets(server).keys()
                answered: list[float] = []

                def cancel(answered: list[float] = answered) -> None:
                    server.interrupt()
                    answered.append(time.time())

                result, acted = at_progress(server, shown(graph(seed)), node, number, cancel)
                if not acted:  # fewer messages this time: ComfyUI sends ten a second at most
                    continue
                if result is None:
                    row.findings.append(f"message {number}: the server died")
                    server.stop()
                    server.start()
                    continue
                what, found = cancelled(result, answered[0])
                if (
                    what == CANCELLED_WELL
                    and job.startswith("save")
                    and unets(server).keys() != before
                ):
                    found.append(f"files left: {sorted(unets(server).keys() - before)}")
                found += works(server, shown(graphs.recorded(seed)))
                _note(row, f"message {number}", found, f"{what}; the server serves the next prompt")
            say(f"{row.kind}: {row.tried} of {len(messages)} messages")
    return rows


# --- faults ---

# megabytes that a server may take more: to quantize the checkpoint takes about 40
SHORT = (3, 6, 10, 20, 30, 40)
ENOUGH = "had enough"
TOLD = "error that says what it needs"


def faults(effort: Effort) -> list[Row]:
    """A server whose disk is full for a while (a limit on file sizes), and whose memory is short (a
    limit on its address space). Linux only."""
    kinds = "server, no space", "server, memory runs out"
    if not sys.platform.startswith("linux"):
        return [not_here("faults", "limits of another process are Linux's", kind) for kind in kinds]
    import resource

    rows = [Row("faults", kind) for kind in kinds]
    with folder_with_checkpoint() as folder, made(folder, env=common.NO_HEAP) as server:
        server.run(graphs.saved(1), timeout=TIMEOUT)
        pid, seed = server.process.pid, effort.seed + 1
        none = resource.RLIM_INFINITY
        for size in (8_000_000, 20_000_000, 40_000_000)[: effort.count(3)]:
            seed += 1
            before = unets(server).keys()
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, none))
            result = server.run(graphs.saved(1, f"full{size}"), timeout=TIMEOUT)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (none, none))
            said = (result.error or {}).get("exception_message", "no error")
            found = [] if "saving needs a folder" in said else [f"it says: {said[:200]}"]
            if unets(server).keys() != before:
                found.append(f"files left: {sorted(unets(server).keys() - before)}")
            found += works(server, graphs.saved(1, f"full{size}"))
            _note(rows[0], f"{size} bytes", found, "error in the house's form; the next save works")
        bit = False
        for megabytes in [SHORT[i] for i in chosen(len(SHORT), effort)]:
            seed += 1
            said, found = short_of_memory(server, megabytes * 10**6, graphs.saved(seed))
            bit = bit or said != ENOUGH
            found += works(server, graphs.saved(seed + 1000))
            _note(rows[1], f"{megabytes} MB", found, f"{said}; the server serves the next prompt")
        if not bit:
            rows[1].findings.append(f"no prompt ran out of memory, down to {SHORT[0]} MB")
    return rows


def short_of_memory(server: ComfyServer, size: int, graph: graphs.Graph) -> tuple[str, list[str]]:
    """How a prompt ends where the server may take `size` more bytes, and what is wrong with that."""
    import resource

    pid, none = server.process.pid, resource.RLIM_INFINITY
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    held = pages * os.sysconf("SC_PAGESIZE")
    resource.prlimit(pid, resource.RLIMIT_AS, (held + size, none))
    try:
        error = server.run(graph, timeout=TIMEOUT).error
    except TimeoutError as hung:
        return "", [f"it hung: {hung}"[:300]]
    except (RuntimeError, OSError) as broke:
        if not server.alive:
            server.stop()
            server.start()
            return "", [f"the server died: {broke}"[:300]]
        return "its connection broke", []  # ComfyUI's own needs memory too
    finally:
        if server.alive and server.process.pid == pid:
            resource.prlimit(pid, resource.RLIMIT_AS, (none, none))
    if error is None:
        return ENOUGH, []
    said, ours = error["exception_message"], error["node_type"].startswith("ModelOpt")
    if not ours:  # ComfyUI's own nodes say it in torch's words
        return f"error of {error['node_type']}", []
    right = all(word in said for word in ("needs", "memory", "nothing was changed"))
    return TOLD, [] if right else [f"it says: {said[:200]}"]


def _note(row: Row, case: str, found: list[str], right: str) -> None:
    if found:
        row.findings.append(f"{case}: {'; '.join(found)}")
    else:
        row.outcomes[right] += 1
