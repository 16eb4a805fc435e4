"""A new file that is there whole or not at all: written beside its name, flushed, then named.

Where the process is killed, what it wrote stays under a name of its own (`.NAME.….partial`), and the
next saving in that folder removes it. While a file is written it is locked; the system gives up the
lock with the process, so that what somebody else is writing now is told from what a killed one left.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from . import out_of_memory
from .boot import boot_id

WINDOWS = os.name == "nt"
if not WINDOWS:
    import fcntl

log = logging.getLogger(__name__)
# `.NAME.MACHINE.RANDOM.partial`; earlier versions named no machine and locked nothing
PARTIAL = re.compile(r"\..+?(?:\.([0-9a-f]{8}))?\.[0-9a-f]{8}\.partial", re.DOTALL)
# bytes of a file's name that go into that of its partial: names end at 255
NAME_BYTES = 200
# seconds without a write after which a file is given up where locks do not tell
GIVEN_UP = 3600
# on Windows, where a virus scanner may hold a new file: times a rename is tried, seconds between
RENAMES = 50
BETWEEN = 0.1


class NameTaken(FileExistsError):
    """A file of that name exists."""


@contextlib.contextmanager
def whole_file(path: Path | str, needed: int) -> Iterator[BinaryIO]:
    """A file to write of about `needed` bytes, which gets its name once it is whole.

    Raises NameTaken if `path` exists, OSError (with what was needed and what was found) if the
    folder cannot be written or is full. On any error nothing is left behind; of a killed process,
    what `remove_left` removes, which is called first.
    """
    path = Path(path)
    _refuse_existing(path)
    partial = None
    try:
        os.makedirs(path.parent, exist_ok=True)
        remove_left(path.parent)
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError("not enough space")
        partial, file = _begun(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not WINDOWS:  # locked until it has its name
                _give_name(partial, path)
        if WINDOWS:  # an open file cannot be renamed
            _give_name(partial, path)
    except NameTaken:
        raise
    except OSError as error:
        if out_of_memory.ran_out(error):  # not the folder's fault
            raise
        raise OSError(
            f"saving needs a folder that can be written and {needed / 1e6:,.0f} MB of free space, "
            f"got {error} in {path.parent} ({_free(path.parent)}): free some space, correct the "
            "folder's permissions or save to another folder"
        ) from error
    finally:
        if partial is not None:
            _remove(partial)


def remove_left(folder: Path) -> None:
    """Removes what savings that were killed left in a folder, and nothing that is being written."""
    with os.scandir(folder) as entries:
        found = [(entry.name, match[1]) for entry in entries
                 if (match := PARTIAL.fullmatch(entry.name))]  # fmt: skip
    for name, machine in found:
        path = folder / name
        try:
            removed = _remove_given_up(path, machine == _machine())
        except OSError as error:  # gone meanwhile, or another user's
            log.debug("ModelOpt: %s stays: %s", path, error)
            continue
        if removed:
            log.info("ModelOpt: removed %s, which a killed saving left", path)


def remove_left_below(root: Path | str) -> None:
    """The same in a folder and all folders in it."""
    for place, _, names in os.walk(root):
        if any(map(PARTIAL.fullmatch, names)):
            try:
                remove_left(Path(place))
            except OSError as error:  # the folder is gone meanwhile
                log.debug("ModelOpt: %s stays as it is: %s", place, error)


def _remove_given_up(path: Path, own: bool) -> bool:
    """Whether a partial was removed, as nobody writes it. own: as of `_given_up`."""
    if WINDOWS:  # not opened, or its writer could not rename it; not removed while its writer lives
        old = time.time() - os.stat(path, follow_symlinks=False).st_mtime > GIVEN_UP
        return old and _remove(path)
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        return _given_up(handle, own) and _remove(path)  # with the lock
    finally:
        os.close(handle)


def _given_up(handle: int, own: bool) -> bool:
    """Whether nobody writes an open partial. own: it was begun on this machine, whose locks tell;
    those of another machine may not reach this one."""
    old = time.time() - os.fstat(handle).st_mtime > GIVEN_UP
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return old
    return own or old


@functools.cache
def _machine() -> str:
    """Who shares our locks: this start of this kernel, containers included."""
    text = boot_id() or socket.gethostname()
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _begun(path: Path) -> tuple[Path, BinaryIO]:
    """A partial of `path`, locked where the file system has locks."""
    name = path.name.encode()[:NAME_BYTES].decode(errors="ignore")
    while True:
        partial = path.with_name(f".{name}.{_machine()}.{secrets.token_hex(4)}.partial")
        file = open(partial, "xb")  # noqa: SIM115 closed by the caller
        if WINDOWS:
            return partial, file
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return partial, file
        file.close()  # another saving took it for given up before it was locked


def _remove(partial: Path) -> bool:
    """Whether it is gone now."""
    try:
        partial.unlink(missing_ok=True)
    except OSError as error:
        log.warning("ModelOpt: %s cannot be removed (%s): remove it by hand", partial, error)
        return False
    return True


def _free(folder: Path) -> str:
    if not folder.is_dir():
        return "not a folder"
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB free"


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise NameTaken(f"a file is never overwritten, {path} exists: choose another name")


def _give_name(partial: Path, path: Path) -> None:
    """Renames without overwriting: a hard link fails where the name is taken, a rename does not."""
    if WINDOWS:
        _rename_on_windows(partial, path)
        return
    try:
        os.link(partial, path)
    except FileExistsError:
        _refuse_existing(path)
        raise
    except OSError:  # a file system without hard links
        _rename_alone(partial, path)
    _flush_folder(path.parent)


def _rename_on_windows(partial: Path, path: Path) -> None:
    """Its rename refuses an existing name, and a file that somebody else has open."""
    for left in reversed(range(RENAMES)):
        try:
            os.rename(partial, path)
            return
        except FileExistsError:
            _refuse_existing(path)
            raise
        except PermissionError:
            if not left:
                raise
            time.sleep(BETWEEN)


def _rename_alone(partial: Path, path: Path) -> None:
    """Looks and renames while no other saving does so in this folder."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        _refuse_existing(path)
        os.rename(partial, path)
    finally:
        os.close(folder)


def _flush_folder(folder: Path) -> None:
    """The name to the disk too, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
