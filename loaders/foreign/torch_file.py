"""Files that torch.save wrote, read as data: nothing in them is executed."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from ...utils.text import brief
from ...utils.unreadable import found, raise_unless_damage
from . import pickled, zipped

PIECE = 2**22
# bytes of the pickle that names the tensors
LONGEST_PICKLE = 2**24


class QTensor:
    """Stands in for ModelOpt's classes of packed weights, whose names its files hold."""


_QTENSORS = [
    (QTensor, f"modelopt.torch.quantization.qtensor.{kind.lower()}_tensor.{kind}QTensor")
    for kind in ("INT4", "INT8", "FP8", "NF4", "NVFP4", "MXFP4", "MXFP8")
]


def load(path: Path) -> object:
    """What the file holds, tensors memory-mapped on the CPU. Raises ValueError in house form.

    Only torch's zip form, which torch.save writes since 1.6; read with `weights_only`. Beside
    plain data ModelOpt's files hold slices and, of compressed weights, names of classes, for which
    an empty class stands in.
    """
    check_zip(path)
    try:
        # leaving the context takes away what it allowed, even where it was allowed before
        known = slice in torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals(_QTENSORS + ([] if known else [slice])):
            found_in = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"a checkpoint must hold data only, {path} holds something else and was not opened "
            f"({found(error)}): do not use this file unless you know who made it and why"
        ) from error
    except Exception as error:  # torch's reader meets damage with nearly every kind of error
        raise_unless_damage(path, error)
        raise ValueError(
            f"a checkpoint must be a whole file of torch.save, {path} is not ({found(error)}): "
            "get it again"
        ) from error
    if _holds_itself(found_in):
        raise _too_much(path, f"values nested more than {pickled.DEEPEST} deep")
    return found_in


def _too_much(path: Path, found: str) -> ValueError:
    return ValueError(
        f"a checkpoint must hold little beside its tensors, {path} has {found}: do not use this file unless "
        "you know who made it"
    )


def _why_not(path: Path, pickles: list[zipfile.ZipInfo]) -> str | None:
    """Why no pickle of these should be opened, or None."""
    for one in pickles:
        if one.file_size > LONGEST_PICKLE:
            return f"a pickle of {one.file_size} bytes"
        if reason := pickled.why_not(_stored(path, one)):
            return reason
    return None


def _stored(path: Path, member: zipfile.ZipInfo) -> bytes:
    """A member that is not packed, whatever checksum it has: torch can write none."""
    with path.open("rb") as file:
        file.seek(
            member.header_offset + 26
        )  # of its own header: lengths of the name and of what follows
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        return file.read(member.file_size)


def _holds_itself(value: object) -> bool:
    """Whether going through it has no end. `pickled` has seen that it is small else."""
    stack = [(value, 0)]
    while stack:
        one, depth = stack.pop()
        if depth > pickled.DEEPEST:
            return True
        if isinstance(one, Mapping):
            stack += [(x, depth + 1) for x in one.values()]
        elif isinstance(one, list | tuple):
            stack += [(x, depth + 1) for x in one]
    return False


def check_zip(path: Path, sums: bool = True) -> None:
    """That a file is a zip as torch.save writes it, which torch can open without harm. Raises ValueError.

    sums: whether the checksums of its members are looked at too, all of the file is read for that.
    """
    try:
        begins = zipped.begins(path)
    except OSError as error:
        raise_unless_damage(path, error)
        raise
    if not begins:
        raise ValueError(
            f"a checkpoint must be in torch.save's zip form, {path} is not: it is damaged, or "
            "written by an old torch; save it again with mto.save"
        )
    _check_members(path, sums)


def _check_members(path: Path, sums: bool) -> None:
    """That the zip's members are as torch writes them: stored as they are, no larger than the file, and
    with the checksums it has of them. torch itself unpacks what is packed, however large it gets, and
    looks at no checksum of what it maps into memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = zipped.members(archive)
            packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
            large = sum(m.file_size for m in members) > path.stat().st_size
            pickles = [m for m in members if m.filename.casefold().endswith("data.pkl")]
            reason = None if packed or large else _why_not(path, pickles)
            # torch.serialization.set_crc32_options(False) leaves them all 0
            summed = sums and any(m.CRC for m in members) and not packed and not large
            for member in members if summed else ():
                with archive.open(member) as data:
                    while data.read(PIECE):
                        pass
    except Exception as error:  # a damaged directory meets nearly every kind of error, too
        raise_unless_damage(path, error)
        raise ValueError(
            f"a checkpoint must be a whole file of torch.save, {path} is not "
            f"({brief(str(error))}): get it again"
        ) from error
    if reason is not None:
        raise _too_much(path, reason)
    if packed or large:
        raise ValueError(
            "a checkpoint must hold its data as it is, as torch.save writes it, "
            f"{brief(packed[0] if packed else 'the data')} in {path} unpacks to more than the file "
            "holds: do not use this file unless you know who made it"
        )
