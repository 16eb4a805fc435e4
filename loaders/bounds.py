"""What a stranger's state dict must keep to before ComfyUI reads an architecture off it."""

from __future__ import annotations

from collections.abc import Iterable

from ..utils.text import brief

# of one kind in a row; ComfyUI counts them by looking through all names for each
MOST_BLOCKS = 512


def check(names: Iterable[str], where: object) -> None:
    """Raises ValueError where an architecture has too many blocks. names: of all tensors."""
    rows: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts[:-1]):
            if part.isdecimal():
                rows.setdefault(".".join(parts[:place]), set()).add(part)
    row, found = max(rows.items(), key=lambda one: len(one[1]), default=("", ()))
    if len(found) > MOST_BLOCKS:
        raise ValueError(
            f"a model must have at most {MOST_BLOCKS} blocks in a row, {where} has {len(found)} in "
            f"{brief(row)}: no architecture that ComfyUI knows has so many, get the file again"
        )


def check_sizes(shapes: Iterable[tuple[str, tuple[int, ...]]], where: object) -> None:
    """Raises ValueError for a matrix or kernel without values: with it, a width of any size is said in no
    bytes, and ComfyUI divides by the other."""
    for name, shape in shapes:
        if len(shape) > 1 and 0 in shape:
            raise ValueError(
                f"weights must have values, {brief(name)} in {where} is of shape {brief(list(shape))}: the "
                "file is damaged or incomplete, get it again"
            )
