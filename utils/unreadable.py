"""Readers that failed: files that the system does not give, which says nothing of what they hold, and
what was found in the others, in a line."""

from __future__ import annotations

import errno
import pickle
import zipfile
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


def holds_code(error: Exception) -> bool:
    """Whether torch did not open a file because opening it would run something."""
    return isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)


def found(error: Exception) -> str:
    """What a reader found, in one line. Of torch's advice to run what a file holds (weights_only=False)
    nothing is left."""
    text = str(error).partition("Check the documentation of torch.load")[0]
    if isinstance(error, pickle.UnpicklingError):
        text = text.rpartition("WeightsUnpickler error:")[2].partition("Please use")[0]
        text = ([""] + [line for line in text.splitlines() if line.strip()])[-1]
    text = " ".join(text.split())
    bare = isinstance(error, LookupError) or not text  # a key alone says nothing
    return brief(f"{type(error).__name__}: {text}".rstrip(": ") if bare else text)


def _met(error: Exception) -> BaseException:
    """What a reader met that tells it by an error of its own. ComfyUI's `load_torch_file` looks for words
    in an error's first argument, which of an OSError is a number: a TypeError; `zipfile` calls it no zip."""
    behind, hides = error.__context__, isinstance(error, TypeError | zipfile.BadZipFile)
    return behind if hides and isinstance(behind, OSError) else error
