"""Real full and read-only disks: small file systems that only a copy of this process sees (Linux)."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path

from .outcome import Effort, Row, not_here
from .points import heard, one_thread
from .subject import Subject, pack

# linux/sched.h, linux/mount.h
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18
SIZES = (0.001, 0.1, 0.5, 0.99)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def own_mounts() -> None:
    """Gives this process file systems of its own; as root of its own where it is not root."""
    user, group = os.getuid(), os.getgid()
    _call("unshare", NEW_MOUNTS | (0 if user == 0 else NEW_USER))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", b"none", b"/", None, RECURSIVE | PRIVATE, None)


def small(folder: Path, size: int) -> None:
    """A file system of `size` bytes at a folder, in memory."""
    options = f"size={size}".encode()
    _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options)


def read_only(folder: Path) -> None:
    place = os.fsencode(folder)
    _call("mount", place, place, None, BIND, None)
    _call("mount", None, place, None, BIND | REMOUNT | READ_ONLY, None)


def apart(function: Callable[[], list[str]]) -> list[str]:
    """What a function finds in a copy of this process with file systems of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return heard(pid, read)
    os.close(read)
    try:
        own_mounts()
        with one_thread():
            found = function()
    except BaseException as error:
        found = [f"{type(error).__name__}: {error}"]
    os.write(write, json.dumps(found).encode())
    os._exit(0)


def why_not() -> str | None:
    """The reason this system does not let us make such file systems, or None."""
    if not hasattr(os, "fork") or not os.path.exists("/proc/self/ns"):
        return "a file system of a process's own is Linux's"
    return "; ".join(apart(list)) or None


def _refused(its: Subject, job: str, make: Callable[[Path], None], hide: bool) -> list[str]:
    """Saves onto such a disk. hide: the disk seems to have room, as where another program fills it."""
    make(its.out)
    before = sorted(os.listdir(its.out))
    if hide:
        real = pack("utils.whole_file").shutil.disk_usage
        pack("utils.whole_file").shutil.disk_usage = lambda folder: real("/")
    try:
        its.run(job)
        found = ["it went on to its end"]
    except OSError as error:
        found = [] if "saving needs a folder" in str(error) else [f"it says: {error}"]
    left = sorted(os.listdir(its.out))
    return found + ([f"left: {left}"] if left != before else [])


def rows(its: Subject, effort: Effort) -> list[Row]:
    kinds = "disk really full", "folder really read-only"
    if (why := why_not()) is not None:
        return [not_here("faults", why, kind) for kind in kinds]
    written = {"save": its.file, "save calibration": its.recording, "export": its.exported}
    sizes = {job: path.stat().st_size for job, path in written.items()}
    full, locked = (Row("faults", kind) for kind in kinds)
    for job, size in sizes.items():
        for share in SIZES[: effort.count(len(SIZES))]:
            for hide in (False, True):
                room = int(share * size)
                found = apart(lambda: _refused(its, job, lambda at: small(at, room), hide))  # noqa: B023
                _note(full, f"{job}, {room} bytes", found)
        _note(locked, job, apart(lambda: _refused(its, job, read_only, False)))  # noqa: B023
    return [full, locked]


def _note(row: Row, case: str, found: list[str]) -> None:
    if found:
        row.findings.append(f"{case}: {'; '.join(found)}")
    else:
        row.outcomes["error that says what is missing; nothing left"] += 1
