"""Writing a safetensors file so that a reader never meets half of it, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

import torch


class NameTaken(FileExistsError):
    """A file of that name exists."""


def save_safetensors(
    tensors: dict[str, torch.Tensor], path: Path | str, metadata: dict[str, str]
) -> None:
    """Writes beside `path`, flushes to disk, then gives the file its name.

    The same tensors and metadata give the same bytes. Raises NameTaken if `path` exists,
    OSError (with what was needed and what was found) if the folder cannot be written or is full.
    On any error nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    _refuse_existing(path)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        if not path.parent.is_dir():
            os.makedirs(path.parent)
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError("not enough space")
        save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata)
        with open(partial, "rb+") as file:
            _sort_header(file)
            file.flush()
            os.fsync(file.fileno())
        _rename_new(partial, path)
    except NameTaken:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"saving needs a folder that can be written and {needed / 1e6:,.0f} MB of free space, "
            f"got {error} in {path.parent} ({_free(path.parent)}): free some space, correct the "
            "folder's permissions or save to another folder"
        ) from error
    finally:
        if partial.exists():
            partial.unlink()


def _free(folder: Path) -> str:
    if not folder.is_dir():
        return "not a folder"
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB free"


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise NameTaken(f"a file is never overwritten, {path} exists: choose another name")


def _sort_header(file) -> None:
    """Puts the header's metadata in order, in place: safetensors writes it in a random one."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) <= size:
        file.seek(8)
        file.write(text.ljust(size))


def _rename_new(partial: Path, path: Path) -> None:
    """Renames without overwriting: a hard link fails where the name is taken, a rename does not."""
    if os.name == "nt":
        os.rename(partial, path)  # refuses an existing name here, replaces it elsewhere
        return
    try:
        os.link(partial, path)
    except FileExistsError:
        _refuse_existing(path)
    except OSError:  # a file system without hard links: take the name first
        _take_name(path)
        try:
            os.replace(partial, path)
        except OSError:
            path.unlink()
            raise


def _take_name(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        _refuse_existing(path)
