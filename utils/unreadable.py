"""Files that the system does not give, which says nothing of what they hold."""

from __future__ import annotations

import errno
from pathlib import Path

from . import out_of_memory
from .text import brief


def raise_unless_damage(path: Path | str, error: Exception) -> None:
    """To call where a reader failed, before its error is told as damage: raises what says nothing of the
    file, memory that ran out as it is, and a system that did not give the file as ValueError."""
    cause = _met(error)
    if out_of_memory.ran_out(cause):
        raise cause from None
    # a reader of a damaged file may seek a place that cannot be: EINVAL, not the system's fault
    if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL):
        why = brief(cause.strerror or str(cause))
        raise ValueError(
            f"{path} must be a file that can be read, got {why}: check its name, its permissions and the "
            "disk"
        ) from cause


def _met(error: Exception) -> BaseException:
    """What a reader of ComfyUI's met: `load_torch_file` looks for words in an error's first argument,
    which of an OSError is a number, and so fails with a TypeError of its own."""
    behind = error.__context__
    return behind if isinstance(error, TypeError) and isinstance(behind, OSError) else error
