"""Writing a safetensors file so that a reader never meets half of it, and nothing is overwritten."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from . import checksums

# bytes written between two looks at the user's cancel
PIECE = 2**25
# https://github.com/huggingface/safetensors, the format's names
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class NameTaken(FileExistsError):
    """A file of that name exists."""


def save_safetensors(
    tensors: dict[str, torch.Tensor],
    path: Path | str,
    metadata: dict[str, str],
    step: Callable[[int], None] = lambda size: None,
    reserved: int = 0,
) -> None:
    """Writes beside `path`, flushes to disk, then gives the file its name.

    reserved: bytes that the header takes at least, the rest of them spaces. Tensors are copied to the
    CPU one at a time. `step` is called with the bytes of each piece written; what it raises ends the
    saving. The same tensors and metadata give the same bytes. The header gets the checksums of all
    of it (`checksums`).
    Raises NameTaken if `path` exists, OSError (with what was needed and what was found) if the
    folder cannot be written or is full. On any error nothing is left behind.
    """
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with whole_file(path, needed) as file:
        _write(tensors, metadata, file, step, reserved)


@contextlib.contextmanager
def whole_file(path: Path | str, needed: int) -> Iterator[BinaryIO]:
    """A file to write of about `needed` bytes, which gets its name once it is whole.

    Errors as in `save_safetensors`.
    """
    path = Path(path)
    _refuse_existing(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        if not path.parent.is_dir():
            os.makedirs(path.parent)
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError("not enough space")
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename_new(partial, path)
    except NameTaken:
        raise
    except OSError as error:
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


def header_text(
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    names: Mapping[torch.dtype, str] = DTYPES,
    found: Mapping[str, int] | None = None,
) -> bytes:
    """The header's JSON, without the spaces after it. Tensors may be meta ones. names: of dtypes.
    found: the tensors' checksums, once they are known; the text is as long without."""
    sums = checksums.entry(metadata, found or dict.fromkeys(tensors, 0))
    header: dict = {"__metadata__": dict(sorted({**metadata, checksums.ENTRY: sums}.items()))}
    end = 0
    for name in _order(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


def whole_header(length: int) -> int:
    """Bytes that a header of so many takes in a file: a multiple of 8, so that tensors are aligned,
    and its length before it."""
    return 8 + -(-length // 8) * 8


def _order(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Wide dtypes first, as in the library's own files, so that every tensor is aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def _write(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], file, step, reserved
) -> None:
    """The safetensors format: length of the header, header (JSON, padded to 8), tensors end to end.

    The library's own `save_file` shows no progress, cannot be cancelled, wants every tensor on the
    CPU at once and writes the metadata in a random order.
    """
    text = header_text(tensors, metadata)
    length = whole_header(max(len(text), reserved)) - 8
    file.write(length.to_bytes(8, "little") + text.ljust(length))
    found = {}
    for name in _order(tensors):
        tensor = tensors[name]
        found[name] = checksums.start_of_tensor(name, DTYPES[tensor.dtype], tensor.shape)
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            found[name] = zlib.crc32(piece, found[name])
            step(file.write(piece))
    file.seek(8)
    file.write(header_text(tensors, metadata, found=found))


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
