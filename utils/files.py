"""Writing a safetensors file so that a reader never meets half of it, and nothing is overwritten."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from . import checksums
from .whole_file import whole_file

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
    of it (`checksums`). Errors as of `whole_file`.
    """
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with whole_file(path, needed) as file:
        _write(tensors, metadata, file, step, reserved)


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
