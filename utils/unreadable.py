"""Files that the system does not give, which says nothing of what they hold."""

from __future__ import annotations

import errno
from pathlib import Path

from .text import brief


def by_system(error: BaseException) -> bool:
    """Whether the system refused to read a file. A reader of a damaged file may seek a place that
    cannot be, which is not the system's fault."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def met(error: Exception) -> BaseException:
    """What a reader of ComfyUI's met: `load_torch_file` looks for words in an error's first argument,
    which of an OSError is a number, and so fails with a TypeError of its own."""
    behind = error.__context__
    return behind if isinstance(error, TypeError) and isinstance(behind, OSError) else error


def unreadable(path: Path | str, error: OSError) -> ValueError:
    """To raise for an error of `by_system`."""
    why = brief(error.strerror or str(error))
    return ValueError(
        f"{path} must be a file that can be read, got {why}: check its name, its permissions and the disk"
    )
