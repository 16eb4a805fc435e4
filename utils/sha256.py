"""SHA-256 of a model file, as model sites list it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

PIECE = 2**24
# in the place of a digest that is not known yet
NONE = 64 * "0"
_known: dict[tuple, str] = {}


def _key(path: Path) -> tuple:
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def pieces(path: Path | None) -> int:
    """How often `of` will call its `step`: once a piece, 0 for no file or one hashed before."""
    if path is None or _key(path) in _known:
        return 0
    return -(-path.stat().st_size // PIECE)


def of(path: Path, step: Callable[[], None] = lambda: None) -> str:
    """The digest in hexadecimal; remembered while the file does not change. `step` may raise."""
    key = _key(path)
    if key not in _known:
        digest = hashlib.sha256()
        with _readable(path):
            file = path.open("rb")
        with file:
            while piece := _read(file, path):
                digest.update(piece)
                step()
        _known[key] = digest.hexdigest()
    return _known[key]


def _read(file: BinaryIO, path: Path) -> bytes:
    with _readable(path):
        return file.read(PIECE)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the file that a model is loaded from must be readable, for its hash, got "
            f"{error.strerror or error} in "
            f"{path}: check the disk, or get the file again"
        ) from error


def combined(digests: list[str]) -> str:
    """One digest for several files: of their digests, one a line."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
