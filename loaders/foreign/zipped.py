"""The zip that torch.save writes, held so strictly that every reader sees the same members in it.

Python's reader finds the directory from the end of the file, torch's goes where the end says, and takes
names for the same in any case: what one has looked at, the other need not open.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

BEGIN = b"PK\3\4"
# https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.14 to 4.3.16: end of the directory, and
# before it, for large files, a longer one and where that is
_END = struct.Struct("<4s4H2LH")
_FAR = struct.Struct("<4sLQL")
_LONG = struct.Struct("<4sQ2H2L4Q")
# what the end says where the longer one says it
_ELSEWHERE = (0xFFFF, 0xFFFFFFFF)


def begins(path: Path) -> bool:
    """Whether the file begins as a zip. (`zipfile.is_zipfile` takes a disk that fails for a no.)"""
    with path.open("rb") as file:
        return file.read(len(BEGIN)) == BEGIN


def members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """What it holds. Raises BadZipFile where another reader could find something else."""
    file, found = archive.fp, archive.infolist()
    size = file.seek(0, os.SEEK_END)
    end = _read(file, _END, size - _END.size)
    count, length, start, comment = end[4:]
    top = size - _END.size
    if size >= _END.size + _FAR.size + _LONG.size:
        far = _read(file, _FAR, top - _FAR.size)
        if far[0] == b"PK\6\7":
            top -= _FAR.size + _LONG.size
            long = _read(file, _LONG, top)
            if far[2] != top or long[0] != b"PK\6\6" or long[1] != _LONG.size - 12:
                raise zipfile.BadZipFile("an end of its directory that is not where it says")
            said = (count, length, start)
            count, length, start = long[7:]
            if any(a != b and a not in _ELSEWHERE for a, b in zip(said, long[7:], strict=True)):
                raise zipfile.BadZipFile("two ends of its directory that differ")
    if end[0] != b"PK\5\6" or comment or start + length != top or count != len(found):
        raise zipfile.BadZipFile("a directory that is not where it says")
    names = [one.orig_filename for one in found]
    if len({name.casefold() for name in names}) != len(names):
        raise zipfile.BadZipFile("two members of one name")
    if any(mark in name for name in names for mark in "\0\\"):
        raise zipfile.BadZipFile("a member whose name not all read alike")
    return found


def _read(file, form: struct.Struct, place: int) -> tuple:
    file.seek(place)
    return form.unpack(file.read(form.size))
