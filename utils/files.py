"""Writing a safetensors file so that a reader never meets half of it, and nothing is overwritten."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import torch


def save_safetensors(
    tensors: dict[str, torch.Tensor], path: Path | str, metadata: dict[str, str]
) -> None:
    """Writes beside `path`, flushes to disk, then gives the file its name.

    Raises FileExistsError if `path` exists, OSError (with what was needed and what was found) if
    the folder cannot be written or is full. On any error nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if path.exists():
        raise FileExistsError(f"a file is never overwritten, {path} exists: choose another name")
    needed = sum(tensor.nbytes for tensor in tensors.values())
    temporary = _temporary_beside(path)
    try:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError("not enough space")
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _rename_new(temporary, path)
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"saving needs {needed / 1e6:,.0f} MB of free space and a folder that can be "
            f"written, {path.parent} has {free / 1e6:,.0f} MB free ({error}): "
            "free some space or save to another folder"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _temporary_beside(path: Path) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    except OSError as error:
        raise OSError(
            f"saving needs a folder that can be written, {path.parent} cannot ({error}): "
            "correct its permissions or save to another folder"
        ) from error
    os.close(handle)
    return name


def _rename_new(temporary: str, path: Path) -> None:
    """Renames without overwriting: a hard link fails where the name is taken, a rename does not."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(
                f"a file is never overwritten, {path} exists: choose another name"
            ) from None
        os.rename(temporary, path)
