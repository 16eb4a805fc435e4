"""Which process makes which file: claims beside it, in the folder that all processes share.

A claim is a small file that appears whole (a hard link), so that one process alone can make it, on
NFS too. A claim whose owner is dead is never removed by others, who could meet a newer one there: it
gets a successor, named by its random token, which again one process alone can make. The chain's end
is the owner. Where an owner was taken for dead and was not, two processes make the same bytes and
one of them finds the file there: work is lost, the file is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import stat
import threading
import time
from dataclasses import asdict, astuple, dataclass, replace
from functools import cache
from pathlib import Path

from ..utils.boot import boot_id
from ..utils.text import brief

# seconds between two signs of life, and after which a silent owner on another machine is dead
HEARTBEAT = 15.0
PATIENCE = 600.0
# seconds between two tries to make a claim
RETRY = 0.02
# bytes of a claim: a few names and numbers
LONGEST = 4096


@dataclass(frozen=True)
class Owner:
    """place: the machine's name, boot and process namespace, within which `pid` and its start `born`
    name a process; "" where the claim cannot be read. since: seconds since 1970."""

    host: str
    place: str
    pid: int
    born: str
    since: float
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {brief(self.host)}" if self.place else "an unknown process"


@cache
def place() -> str:
    """Names what process numbers are counted in: they say nothing to another machine or container."""
    parts = [socket.gethostname(), boot_id() or ""]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(filter(None, parts))


def born(pid: int) -> str | None:
    """When a process of this machine started, in the system's own words: a number that is used again
    starts another time. None where none runs, "" where it may not be known."""
    if os.path.exists("/proc/self/stat"):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return _signalled(pid)
        return None if fields[0] in "ZX" else fields[19]
    import psutil  # ComfyUI needs it

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return ""


def _signalled(pid: int) -> str | None:
    """Of a process that /proc does not show, which for another user's can be."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return None  # ours, and gone or going


def _paths(output: Path) -> tuple[Path, str]:
    """The first claim of a chain, and how the names of all others begin."""
    return output.with_name(f".{output.name}.claim"), f".{output.name}.claim."


def _read(path: Path) -> Owner:
    """Raises FileNotFoundError, and ValueError for what is no file. What is no claim (half written,
    where there are no hard links) is that of an unknown process, named by its time."""
    state = path.lstat()
    unknown = _unknown(state.st_mtime_ns)
    if not stat.S_ISREG(state.st_mode):  # a pipe would be read without an end
        raise ValueError(
            f"a claim must be a file, {path} is a folder, a link or something else: remove it"
        )
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            return unknown
        found = Owner(**json.loads(text.decode()))
    except (ValueError, TypeError, RecursionError):
        return unknown
    kinds = (str, str, int, str, float, str)
    whole = all(type(x) is kind for x, kind in zip(astuple(found), kinds, strict=True))
    usable = whole and 0 < found.pid < 2**31 and re.fullmatch("[0-9a-f]{16}", found.token)
    return found if usable else unknown


def _unknown(modified: int) -> Owner:
    """The owner of what is no claim. modified: nanoseconds since 1970."""
    return Owner("", "", 0, "", modified / 1e9, f"{modified:x}")


def _chain(output: Path) -> list[tuple[Path, Owner]]:
    """The claims from the first to the one that counts. Raises ValueError for what is none."""
    root, start = _paths(output)
    while True:
        chain: list[tuple[Path, Owner]] = []
        path = root
        try:
            while os.path.lexists(path):  # of a link too, whatever is at its end
                owner = _read(path)
                if any(start + owner.token == known.name for known in (path, *dict(chain))):
                    # no claim names one before it; the number differs from those of all before
                    owner = replace(owner, place="", token=f"{owner.token}-{len(chain)}")
                chain.append((path, owner))
                path = output.with_name(start + owner.token)
            return chain
        except FileNotFoundError:
            continue  # given up just now: look again


def _dead(path: Path, owner: Owner, output: Path, patience: float) -> bool:
    started = born(owner.pid) if owner.place == place() else ""
    if started is None or (started and started != owner.born):
        return True
    return not started and _now(output) - path.stat().st_mtime > patience


def _now(output: Path) -> float:
    """The file system's own time, which may not be this machine's."""
    clock = output.with_name(f"{_paths(output)[1]}new-{secrets.token_hex(8)}")
    try:
        clock.write_text("", encoding="utf-8")
        return clock.stat().st_mtime
    finally:
        clock.unlink(missing_ok=True)


class Claim:
    """The right to make a file, with signs of life until `release`."""

    def __init__(self, output: Path, path: Path, owner: Owner) -> None:
        self.output, self.path, self.owner = output, path, owner
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._beats, daemon=True, name="claim")
        self._beat.start()

    def _beats(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with contextlib.suppress(
                OSError
            ):  # removed, or the network is away: the next one tells
                os.utime(self.path)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def release(self) -> None:
        """Removes the claim, those it followed and what dead processes left of others. Nothing where
        another process has taken over."""
        self._ended.set()
        chain = _chain(self.output)
        if not chain or chain[-1][1].token != self.owner.token:
            return
        own = [path for path, _ in chain]
        # the first of the chain before the rest: without it, no one reads the others
        for path in [*(set(litter(self.output)) - set(own)), *own]:
            _remove(path)


def _remove(path: Path) -> None:
    """Windows does not remove a file while another process reads it: a moment later it does."""
    for _ in range(50):
        try:
            path.unlink(missing_ok=True)
            return
        except PermissionError:
            time.sleep(RETRY)
    path.unlink(missing_ok=True)


def litter(output: Path) -> list[Path]:
    """Claims that lie beside a file, dead or alive; nothing but files."""
    root, start = _paths(output)
    if not output.parent.is_dir():
        return []
    with os.scandir(output.parent) as entries:
        names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    return [output.with_name(x) for x in names if x == root.name or x.startswith(start)]


def holder(output: Path, patience: float = PATIENCE) -> Owner | None:
    """Who is at a file, if anyone is that lives. Raises ValueError as `take` does."""
    chain = _chain(output)
    try:
        return None if not chain or _dead(*chain[-1], output, patience) else chain[-1][1]
    except FileNotFoundError:  # given up just now
        return None


def take(output: Path, patience: float = PATIENCE) -> Claim | Owner:
    """The claim to make `output`, or who has it. Raises OSError where the folder cannot be written,
    ValueError for what is no file in a claim's place.

    patience: seconds without a sign of life after which an owner on another machine is dead.
    """
    root, start = _paths(output)
    token = secrets.token_hex(8)
    me = os.getpid()
    owner = Owner(socket.gethostname(), place(), me, born(me) or "", round(time.time(), 3), token)
    new = output.with_name(f"{start}new-{token}")
    while True:
        # anew each time: whoever ends a claim removes what lies about
        new.write_text(json.dumps(asdict(owner)), encoding="utf-8")
        try:
            chain = _chain(output)
            if chain and not _dead(*chain[-1], output, patience):
                return chain[-1][1]
            path = output.with_name(start + chain[-1][1].token) if chain else root
            if not _made(new, path):
                time.sleep(RETRY)  # NFS shows a folder as it was, for a while
                continue
            chain = _chain(output)
            if chain and chain[-1][1].token == token:
                return Claim(output, path, owner)
            path.unlink(missing_ok=True)  # the chain was given up in between
        except FileNotFoundError:
            continue
        finally:
            new.unlink(missing_ok=True)


def _made(new: Path, path: Path) -> bool:
    """Gives `new` the name `path` too, where that is free."""
    try:
        os.link(new, path)
        return True
    except FileExistsError:
        return (
            new.stat().st_nlink == 2
        )  # NFS says so too of a link it made and whose answer was lost
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(new.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
        return True
