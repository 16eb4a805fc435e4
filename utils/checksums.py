"""CRC-32 of what a safetensors file holds, in its own header: a flipped bit is found at loading.

The header's entry `modelopt_crc32` is JSON: `metadata`, entry -> CRC of its text in UTF-8, and
`tensors`, the CRCs of all tensors one after the other, in the order of their names. A tensor's is that
of `dtype shape name`, a line end and its bytes. A CRC finds accidents, not forgery.
"""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from .text import brief, brief_repr, read_json
from .unreadable import raise_unless_damage

ENTRY = "modelopt_crc32"
DIGITS = 8
PIECE = 2**22
MOST_THREADS = 4
WORTH_A_THREAD = 2**24  # bytes
TICK = 0.1  # seconds from one call of `step` to the next
# seconds for which a file that was written may be written again without another time of change
UNSETTLED = 3.0
# a header of 100,000 tensors is smaller; each has a table, two lists and up to ten values
LONGEST_HEADER = 2**24
MOST_LISTS, MOST_VALUES = 2**19, 2**21
REMEDY = "the file is damaged or incomplete, get it again"
# file as it was checked -> whether it has checksums
_checked: dict[tuple, bool] = {}


def of_text(text: str) -> str:
    return _hex(zlib.crc32(text.encode()))


def start_of_tensor(name: str, dtype: str, shape: Iterable[int]) -> int:
    """The CRC to go on from with a tensor's bytes. dtype: the format's name."""
    return zlib.crc32(f"{dtype} {list(shape)} {name}\n".encode())


def entry(metadata: Mapping[str, str], tensors: Mapping[str, int]) -> str:
    """The entry's text, as long for any CRCs. tensors: name -> CRC."""
    texts = {name: of_text(text) for name, text in metadata.items()}
    found = "".join(_hex(tensors[name]) for name in sorted(tensors))
    return json.dumps({"metadata": texts, "tensors": found}, sort_keys=True)


def check_metadata(metadata: Mapping[str, str], where: object) -> None:
    """Raises ValueError where the header's texts are not those that were saved. Files without
    checksums pass, and texts that were added later."""
    _, texts = _read(metadata, where)
    for name, wanted in texts.items():
        if name not in metadata:
            raise ValueError(
                f"the header must hold what was saved, {brief(name)} is missing in {where}: {REMEDY}"
            )
        if of_text(metadata[name]) != wanted:
            raise ValueError(
                f"{brief(name)} of the header must be as it was saved, with checksum {brief_repr(wanted)}, found "
                f"{of_text(metadata[name])} in {where}: {REMEDY}"
            )


def check(path: Path | str, step: Callable[[int], None] = lambda size: None) -> bool:
    """Whether the file has checksums. Raises ValueError where it is not as it was saved, or cannot be
    read. Remembered while the file does not change.

    step: is called from time to time, in this thread, with the bytes read since; may raise.

    It is read from the disk, not through a memory map: a file that is cut off meanwhile gives a short
    read, where touching a map would end the process.
    """
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            key = (str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
            if key not in _checked:
                began = time.time()
                found = _check(file, path, step)
                if began - max(state.st_mtime, state.st_ctime) < UNSETTLED:
                    return found
                _checked[key] = found
    except OSError as error:
        raise_unless_damage(path, error)
        raise
    return _checked[key]


def _check(file, path: Path | str, step: Callable[[int], None]) -> bool:
    header, start = _header(file, path)
    metadata = header.pop("__metadata__", {})
    check_metadata(metadata, path)
    wanted, _ = _read(metadata, path)
    if wanted is None:
        return False
    if len(wanted) != DIGITS * len(header):
        raise ValueError(
            f"a file must hold the {len(wanted) // DIGITS} tensors that were saved, found "
            f"{len(header)} in {path}: {REMEDY}"
        )
    size = sum(_size(one) for one in header.values())
    groups = _groups(header, min(MOST_THREADS, os.cpu_count() or 1, 1 + size // WORTH_A_THREAD))
    found = _in_threads(path, header, groups, start, step)
    for index, name in enumerate(sorted(header)):
        saved, there = wanted[DIGITS * index : DIGITS * (index + 1)], _hex(found[name])
        if saved != there:
            raise ValueError(
                f"the bytes of {brief(name)} must be those that were saved, with checksum {saved}, found "
                f"{there} in {path}: {REMEDY}"
            )
    return True


def _in_threads(
    path: Path | str,
    header: Mapping[str, Any],
    groups: list[list[str]],
    start: int,
    step: Callable[[int], None],
) -> dict[str, int]:
    """The CRC of each tensor, a thread for a group of them."""
    read = [0] * len(groups)  # each is counted by one thread
    stop = threading.Event()

    def counts(index: int) -> Callable[[int], bool]:
        def count(size: int) -> bool:
            read[index] += size
            return stop.is_set()

        return count

    with ThreadPoolExecutor(len(groups)) as pool:
        parts = [
            pool.submit(_of_tensors, path, header, names, start, counts(index))
            for index, names in enumerate(groups)
        ]
        told, left = 0, set(parts)
        try:
            while left:
                done, left = wait(parts, TICK, FIRST_EXCEPTION)
                now = sum(read)
                step(now - told)
                told = now
                if any(one.exception() is not None for one in done):
                    break
        finally:
            stop.set()
    return {name: value for one in parts for name, value in one.result().items()}


def _hex(value: int) -> str:
    return f"{value:0{DIGITS}x}"


def _read(metadata: Mapping[str, str], where: object) -> tuple[str | None, dict[str, str]]:
    """The tensors' CRCs and the texts'; None and nothing where the file has no checksums."""
    if ENTRY not in metadata:
        return None, {}
    try:
        found = read_json(metadata[ENTRY])
        tensors, texts = found["tensors"], found["metadata"]
        good = isinstance(tensors, str) and isinstance(texts, dict)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(
            f"{ENTRY} of the header must list checksums, found "
            f"{metadata[ENTRY][:40]!r} in {where}: {REMEDY}"
        )
    return tensors, texts


def _header(file, path: Path | str) -> tuple[dict[str, Any], int]:
    """A safetensors header, checked by the library before, and where the data starts."""
    length = int.from_bytes(file.read(8), "little")
    try:
        text = file.read(length) if length <= LONGEST_HEADER else b""
        header = read_json(text, MOST_LISTS, MOST_VALUES)
    except ValueError:
        header = None
    if not isinstance(header, dict) or not all(
        _is_text(one) if name == "__metadata__" else _is_tensor(one) for name, one in header.items()
    ):
        raise ValueError(f"a safetensors file must have its header, {path} has another: {REMEDY}")
    return header, 8 + length


def _is_text(found: object) -> bool:
    return isinstance(found, dict) and all(isinstance(one, str) for one in found.values())


def _is_tensor(found: object) -> bool:
    """Whether this is what the format says of a tensor; its size is the library's to check."""
    try:
        begin, end = found["data_offsets"]
        numbers = [begin, end, *found["shape"]]
        return all(type(n) is int and n >= 0 for n in numbers) and isinstance(found["dtype"], str)
    except (KeyError, TypeError, ValueError):
        return False


def _groups(header: Mapping[str, Any], count: int) -> list[list[str]]:
    """Tensors that lie one after the other, about as many bytes in each group."""
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    share = max(1, -(-sum(_size(header[name]) for name in names) // count))
    groups: list[list[str]] = [[]]
    held = 0
    for name in names:
        if held >= share:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += _size(header[name])
    return groups


def _size(tensor: Mapping[str, Any]) -> int:
    begin, end = tensor["data_offsets"]
    return end - begin


def _of_tensors(
    path: Path | str,
    header: Mapping[str, Any],
    names: list[str],
    start: int,
    count: Callable[[int], bool],
) -> dict[str, int]:
    """count: is given the bytes of each piece; true ends the work, whose result nobody wants."""
    found = {}
    with open(path, "rb", buffering=0) as file:
        for name in names:
            one = header[name]
            file.seek(start + one["data_offsets"][0])
            found[name] = start_of_tensor(name, one["dtype"], one["shape"])
            left = _size(one)
            while left:
                piece = file.read(min(PIECE, left))
                if not piece:
                    raise ValueError(
                        f"a file must stay as it is while it is read, {left} bytes of {brief(name)} are "
                        f"missing at the end of {path}: {REMEDY}"
                    )
                found[name] = zlib.crc32(piece, found[name])
                left -= len(piece)
                if count(len(piece)):
                    return found
    return found
