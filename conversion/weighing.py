"""Checkpoints and LoRAs of torch.save: what their pickles would make, before ComfyUI opens them."""

from __future__ import annotations

import io
import pickletools
from pathlib import Path

from ..loaders.foreign import pickled, torch_file, zipped
from ..utils import float8
from ..utils.unreadable import raise_unless_damage

# of torch.save before its zip form: number, version, system, weights, their names
OLD_PICKLES = 5
OLD = b"\x80\x02"


def check(file: Path) -> None:
    """Raises ValueError for a file of torch.save that no reader should open. Of what is none
    nothing is said, opening it does."""
    if file.suffix.lower() in float8.SUFFIXES:
        return
    try:
        is_zip = zipped.begins(file)
        with file.open("rb") as opened:
            begins = opened.read(len(OLD))
            head = (
                begins + opened.read(OLD_PICKLES * torch_file.LONGEST_PICKLE)
                if begins == OLD
                else b""
            )
    except OSError as error:
        raise_unless_damage(file, error)
        raise
    if is_zip:
        torch_file.check_zip(file, sums=False)  # no tensor of it is mapped
    elif reason := _why_not(io.BytesIO(head)):
        raise ValueError(
            f"a checkpoint must hold little beside its tensors, {file} has {reason}: do not use "
            "this file unless you know who made it, or get it as .safetensors"
        )


def _why_not(head: io.BytesIO) -> str | None:
    """Why a file in torch's old form should not be opened, or None."""
    for _ in range(OLD_PICKLES):
        start = head.tell()
        data = head.read(torch_file.LONGEST_PICKLE)
        if reason := pickled.why_not(data):
            return reason
        one = io.BytesIO(data)
        try:
            for _ in pickletools.genops(one):  # to its end
                pass
        except ValueError:
            long = len(data) == torch_file.LONGEST_PICKLE == one.tell()
            return f"a pickle of more than {len(data)} bytes" if long else None
        head.seek(start + one.tell())
    return None
