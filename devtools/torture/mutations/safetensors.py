"""Damage to a safetensors file: to its bytes, its tensors, its texts; sealed anew or not."""

from __future__ import annotations

import json
import random
import zlib
from typing import Any

from .texts import changed_json, flipped

SEALS = "modelopt_crc32"


class Parts:
    """A file taken apart: the header's object, and each tensor's bytes."""

    def __init__(self, data: bytes):
        length = int.from_bytes(data[:8], "little")
        self.header: dict[str, Any] = json.loads(data[8 : 8 + length])
        self.metadata: dict[str, str] = self.header.pop("__metadata__", {})
        self.start = 8 + length
        self.tensors = {
            name: data[self.start + one["data_offsets"][0] : self.start + one["data_offsets"][1]]
            for name, one in self.header.items()
        }

    def whole(self, sealed: bool) -> bytes:
        """The file again, offsets made to fit; sealed: with checksums of what it now holds."""
        header, data = {}, []
        end = 0
        for name, content in self.tensors.items():
            header[name] = {**self.header[name], "data_offsets": [end, end + len(content)]}
            data.append(content)
            end += len(content)
        if sealed and SEALS in self.metadata:
            texts = {name: text for name, text in self.metadata.items() if name != SEALS}
            found = {
                "metadata": {n: f"{zlib.crc32(t.encode()):08x}" for n, t in texts.items()},
                "tensors": "".join(_sum(n, header[n], self.tensors[n]) for n in sorted(header)),
            }
            self.metadata[SEALS] = json.dumps(found)
        return joined({"__metadata__": self.metadata, **header}, b"".join(data))


def _sum(name: str, one: dict, content: bytes) -> str:
    start = zlib.crc32(f"{one['dtype']} {one['shape']} {name}\n".encode())
    return f"{zlib.crc32(content, start):08x}"


def joined(header: dict | str | bytes, data: bytes) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return len(text).to_bytes(8, "little") + text + data


# --- bytes ---


def truncated(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """At a boundary (of the length, the header, a tensor), a byte beside one, or anywhere."""
    parts = Parts(data)
    places = [0, 7, 8, parts.start, len(data)]
    places += [parts.start + n for one in parts.header.values() for n in one["data_offsets"]]
    place = rng.choice([rng.choice(places) + rng.choice((-1, 0, 1)), rng.randrange(len(data))])
    place = min(max(place, 0), len(data) - 1)
    return data[:place], f"cut off after byte {place}"


def extended(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    more = rng.choice((1, 8, 4096))
    return data + rng.randbytes(more), f"{more} bytes more at the end"


def flipped_length(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    return flipped(rng, data, 0, 8)


def flipped_header(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    return flipped(rng, data, 8, Parts(data).start)


def flipped_data(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    return flipped(rng, data, Parts(data).start, len(data))


def overwritten(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A stretch of zeros, of another place of the file, or of noise: a bad sector, a bad download."""
    size = min(rng.choice((1, 16, 512, 4096)), len(data))
    begin = rng.randrange(len(data) - size + 1)
    source = rng.randrange(len(data) - size + 1)
    kind = rng.choice(("zeros", "noise", "other bytes of the file"))
    fill = {"zeros": bytes(size), "noise": rng.randbytes(size)}.get(kind, data[source:][:size])
    return data[:begin] + fill + data[begin + size :], f"{size} bytes from {begin} are {kind}"


def cut_out(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A stretch missing or twice: a resumed download that went wrong."""
    begin, size = rng.randrange(len(data)), rng.choice((1, 8, 64, 4096))
    if rng.random() < 0.5:
        return data[:begin] + data[begin + size :], f"{size} bytes from {begin} are missing"
    return data[: begin + size] + data[begin:], f"{size} bytes from {begin} are twice"


# --- tensors ---


def tensors(rng: random.Random, data: bytes, sealed: bool = False) -> tuple[bytes, str]:
    """Swapped, missing, added, renamed, of another dtype or shape; sealed: with right checksums."""
    parts = Parts(data)
    names = [*parts.header]
    name, other = rng.choice(names), rng.choice(names)
    kinds = ("swapped", "missing", "added", "renamed", "dtype", "shape", "resized", "no values")
    kind = rng.choice((*kinds, "many blocks") if rng.random() < 0.2 else kinds)
    one = parts.header[name]
    if kind == "swapped":
        alike = [n for n in names if n != name and parts.header[n]["dtype"] == one["dtype"]
                 and parts.header[n]["shape"] == one["shape"]]  # fmt: skip
        other = rng.choice(alike or names)
        for table in (parts.header, parts.tensors):
            table[name], table[other] = table[other], table[name]
        name = f"{name} and {other}"
    elif kind == "missing":
        del parts.header[name], parts.tensors[name]
    elif kind == "added":
        leaf = rng.choice(("weight_scale", "weight_scale_2", "svd_up", "weight", "comfy_quant"))
        added = rng.choice((f"{name.rpartition('.')[0]}.{leaf}", "stray", f"modelopt.{name}"))
        if added not in parts.header:
            parts.header[added], parts.tensors[added] = one, parts.tensors[name]
            name = added
    elif kind == "renamed":
        new = rng.choice((other.rpartition(".")[0] + ".weight", name + "x", "", "x" * 5000, "\n",
                          "../../x.weight", "<script>", name.upper(), "modelopt_header"))  # fmt: skip
        parts.header[new], parts.tensors[new] = parts.header.pop(name), parts.tensors.pop(name)
    elif kind == "dtype":
        alike = {"F16": "BF16", "BF16": "F16", "I8": "U8", "U8": "F8_E4M3", "F8_E4M3": "I8"}
        alike |= {"F32": "I32"}
        one["dtype"] = alike.get(one["dtype"], "U8")
    elif kind == "no values":
        one["shape"] = rng.choice(
            ([0, *one["shape"][1:]], [*one["shape"][:1], 0, 3, 3], [2**40, 0])
        )
        parts.tensors[name] = b""
    elif kind == "many blocks":
        name = rng.choice(("input_blocks", "middle_block.1.transformer_blocks", "blocks"))
        new = [f"{name}.{i}.x" for i in range(12_000)]
        parts.header |= {key: {"dtype": "F16", "shape": [1]} for key in new}
        parts.tensors |= dict.fromkeys(new, bytes(2))
    elif kind == "shape":
        shape = one["shape"]
        one["shape"] = rng.choice((shape[::-1], [1, *shape], [*shape, 1], [_count(shape)]))
    else:
        rows = one["shape"][0] if one["shape"] else 0
        if rows > 1:
            keep = rng.randrange(rows)
            size = len(parts.tensors[name]) // rows
            one["shape"] = [keep, *one["shape"][1:]]
            parts.tensors[name] = parts.tensors[name][: keep * size]
    seal = ", sealed anew" if sealed else ""
    return parts.whole(sealed), f"{kind}: {name[:80]!r}{seal}"


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def sealed_tensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    return tensors(rng, data, sealed=True)


def sealed_values(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Scales and weights that are 0, negative, NaN, infinite or noise, with right checksums."""
    parts = Parts(data)
    small = [n for n in parts.header if n.rpartition(".")[2] not in ("weight", "bias")]
    name = rng.choice(small if small and rng.random() < 0.8 else [*parts.header])
    kind, size = parts.header[name]["dtype"], len(parts.tensors[name])
    patterns = {
        "F32": ("00000000", "00000080", "000080bf", "0000c07f", "0000807f", "000080ff", "01000000"),
        "F16": ("0000", "0080", "00bc", "007e", "007c", "00fc", "ff7b"),
        "BF16": ("0000", "0080", "80bf", "c07f", "807f", "80ff", "7f7f"),
    }.get(kind, ("00", "80", "ff", "7f", "7e", "fe"))
    pattern = bytes.fromhex(rng.choice(patterns))
    made = bytearray(parts.tensors[name])
    if size >= len(pattern):
        if rng.random() < 0.5:
            made = bytearray((pattern * size)[:size])
        else:
            place = rng.randrange(size // len(pattern)) * len(pattern)
            made[place : place + len(pattern)] = pattern
    parts.tensors[name] = bytes(made)
    return parts.whole(True), f"{pattern.hex()} in {name}, sealed anew"


def sealed_texts(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One value in the JSON of the header's texts is of another kind, with right checksums."""
    parts = Parts(data)
    entries = [n for n, t in parts.metadata.items() if n != SEALS and t[:1] == "{"]
    own = [name for name in entries if name.startswith("modelopt")]
    name = rng.choice(own if rng.random() < 0.9 else entries)
    text, words = changed_json(rng, parts.metadata[name])
    parts.metadata[name] = text
    try:
        return parts.whole(True), f"{name}: {words}, sealed anew"
    except UnicodeEncodeError:
        return parts.whole(False), f"{name}: {words}"


def without_ours(data: bytes) -> bytes:
    """The same file as stock ComfyUI's users have it: without the pack's texts."""
    parts = Parts(data)
    parts.metadata = {n: t for n, t in parts.metadata.items() if not n.startswith("modelopt")}
    return parts.whole(False)


def unsealed(data: bytes) -> bytes:
    """The same file as a version of the pack without checksums wrote it."""
    parts = Parts(data)
    parts.metadata.pop(SEALS, None)
    return parts.whole(False)
