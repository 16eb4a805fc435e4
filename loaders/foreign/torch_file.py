"""Files that torch.save wrote, read as data: nothing in them is executed."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from ...utils.text import DEEPEST, brief
from ...utils.unreadable import found, raise_unless_damage

PIECE = 2**22
# bytes of the pickle that names the tensors, and values in it, each counted as often as it is referred to:
# many times what ModelOpt writes of a UNet, little enough to be read and shown
LONGEST_PICKLE, MOST_VALUES = 2**22, 10**6


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
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"a checkpoint must be in torch.save's zip form, {path} is not: it is damaged, or "
            "written by an old torch; save it again with mto.save"
        )
    _check_members(path)
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
    if not _is_limited(found_in):
        raise ValueError(
            f"a checkpoint must hold at most {MOST_VALUES} values beside its tensors, nested at most "
            f"{DEEPEST} deep, {path} holds more: do not use this file unless you know who made it"
        )
    return found_in


def _is_limited(value: object) -> bool:
    """Whether going through it ends soon: a short pickle can refer to one list many times, or to itself."""
    count, stack = 0, [(value, 0)]
    while stack:
        one, depth = stack.pop()
        if isinstance(one, Mapping):
            inner = [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            inner = one
        else:
            continue
        count += len(inner)
        if count > MOST_VALUES or depth >= DEEPEST:
            return False
        stack += [(x, depth + 1) for x in inner]
    return True


def _check_members(path: Path) -> None:
    """That the zip's members are as torch writes them: stored as they are, no larger than the file, and
    with the checksums it has of them. torch itself unpacks what is packed, however large it gets, and
    looks at no checksum of what it maps into memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
            large = sum(m.file_size for m in members) > path.stat().st_size
            long = [m for m in members if m.filename.endswith("data.pkl")]
            longest = max((m.file_size for m in long), default=0)
            # torch.serialization.set_crc32_options(False) leaves them all 0
            summed = any(m.CRC for m in members) and not packed and not large
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
    if longest > LONGEST_PICKLE:
        raise ValueError(
            f"a checkpoint must name its tensors in at most {LONGEST_PICKLE} bytes, {path} has {longest}: "
            "do not use this file unless you know who made it"
        )
    if packed or large:
        raise ValueError(
            "a checkpoint must hold its data as it is, as torch.save writes it, "
            f"{brief(packed[0] if packed else 'the data')} in {path} unpacks to more than the file "
            "holds: do not use this file unless you know who made it"
        )
