"""Damage to a safetensors file: to its bytes, to its header, to its tensors; sealed anew or not."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from typing import Any

SEALS = "modelopt_crc32"
HOSTILE = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**40, 1e308, -0.5, "", "x", "\0", "../../etc/passwd"),
    *("<script>alert(1)</script>", "a" * 5000, [], {}, [[]], {"a": {}}, [None], ["x"] * 1000),
    *([1, 2, 3], float("nan"), float("inf"), "٣", "9" * 5000, "\ud800", {"": ""}),
)
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "I32", "I8", "U8")
DTYPES += ("BOOL", "U16", "C64", "F4", "X9", "")


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


def _flipped(rng: random.Random, data: bytes, begin: int, end: int) -> tuple[bytes, str]:
    made = bytearray(data)
    places = sorted(rng.randrange(8 * begin, 8 * end) for _ in range(rng.choice((1, 1, 1, 2, 9))))
    for place in places:
        made[place // 8] ^= 1 << place % 8
    return bytes(made), f"bits {places} flipped"


def flipped_length(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    return _flipped(rng, data, 0, 8)


def flipped_header(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    return _flipped(rng, data, 8, Parts(data).start)


def flipped_data(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    return _flipped(rng, data, Parts(data).start, len(data))


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


# --- a header that lies ---


def lying(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    parts = Parts(data)
    content = data[parts.start :]
    header = {"__metadata__": parts.metadata, **parts.header}
    kind = rng.choice([*LIES])
    made = LIES[kind](rng, header, content)
    return made, f"the header lies: {kind}"


def _entry(change: Callable[[random.Random, dict, int], None]):
    def lie(rng, header, content):
        name = rng.choice([name for name in header if name != "__metadata__"])
        one = {**header[name], "data_offsets": [*header[name]["data_offsets"]]}
        change(rng, one, len(content))
        return joined({**header, name: one}, content)

    return lie


def _beyond(rng, one, size):
    one["data_offsets"][rng.randrange(2)] += rng.choice((1, size, 2**31, 2**62, -1, -size))


def _overlapping(rng, one, size):
    one["data_offsets"] = [0, one["data_offsets"][1] - one["data_offsets"][0]]


def _shape(rng, one, size):
    one["shape"] = rng.choice(
        ([2**40, 2**40], [0], [], [-1, 2], one["shape"][::-1], [*one["shape"], 1], [2**63, 2])
    )


def _dtype(rng, one, size):
    one["dtype"] = rng.choice(DTYPES)


def _value(rng, one, size):
    one[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(HOSTILE)


def _missing(rng, one, size):
    del one[rng.choice([*one])]


def _huge(rng, header, content):
    whole = joined(header, content)
    length = rng.choice((2**20, 2**30, 2**40, 2**63, 2**64 - 1, len(whole), len(whole) - 8))
    return length.to_bytes(8, "little") + whole[8:]


def _deep(rng, header, content):
    deep = rng.choice((200, 5000, 200000))
    text = json.dumps(header)[:-1] + ', "x": ' + "[" * deep + "]" * deep + "}"
    return joined(text, content)


def _deep_metadata(rng, header, content):
    deep = rng.choice((200, 5000, 200000))
    name = rng.choice([*header["__metadata__"]])
    metadata = header["__metadata__"] | {name: '{"a":' * deep + "1" + "}" * deep}
    return joined({**header, "__metadata__": metadata}, content)


def _long(rng, header, content):
    metadata = header["__metadata__"] | {"more": "x" * rng.choice((2**20, 2**24, 2**25))}
    return joined({**header, "__metadata__": metadata}, content)


def _many(rng, header, content):
    end = len(content)
    more = {
        f"e{i}": {"dtype": "U8", "shape": [0], "data_offsets": [end, end]} for i in range(30000)
    }
    return joined({**header, **more}, content)


def _duplicate(rng, header, content):
    name = rng.choice([*header])
    other = rng.choice([n for n in header if n != "__metadata__"])
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}"
    return joined(text, content)


def _duplicate_in_ours(rng, header, content):
    name = rng.choice([n for n in header["__metadata__"] if header["__metadata__"][n][:1] == "{"])
    text = header["__metadata__"][name]
    key = rng.choice([*json.loads(text)])
    made = text[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(HOSTILE))}}}"
    return joined({**header, "__metadata__": header["__metadata__"] | {name: made}}, content)


def _not_utf8(rng, header, content):
    text = json.dumps(header).encode()
    place = text.index(b'"') + 1 + rng.randrange(20)
    return joined(text[:place] + rng.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80")) + text[place:],
                  content)  # fmt: skip


def _no_object(rng, header, content):
    return joined(rng.choice(("", "[]", "null", "1", '"x"', "{", "{}", " " * 100)), content)


def _metadata(rng, header, content):
    return joined({**header, "__metadata__": rng.choice(HOSTILE)}, content)


LIES = {
    "offsets beyond the file": _entry(_beyond),
    "tensors overlap": _entry(_overlapping),
    "another shape": _entry(_shape),
    "another dtype": _entry(_dtype),
    "a value of another kind": _entry(_value),
    "an entry lacks a part": _entry(_missing),
    "its length is huge": _huge,
    "deeply nested": _deep,
    "a text in it is deeply nested": _deep_metadata,
    "it is long": _long,
    "30,000 empty tensors": _many,
    "a name twice": _duplicate,
    "a name twice in one of its texts": _duplicate_in_ours,
    "not UTF-8": _not_utf8,
    "no object": _no_object,
    "metadata of another kind": _metadata,
}


# --- tensors ---


def tensors(rng: random.Random, data: bytes, sealed: bool = False) -> tuple[bytes, str]:
    """Swapped, missing, added, renamed, of another dtype or shape; sealed: with right checksums."""
    parts = Parts(data)
    names = [*parts.header]
    name, other = rng.choice(names), rng.choice(names)
    kind = rng.choice(("swapped", "missing", "added", "renamed", "dtype", "shape", "resized"))
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


# --- JSON ---


def changed_json(rng: random.Random, text: str) -> tuple[str, str]:
    """One value, anywhere in it, is another, is missing, or stands twice."""
    root = json.loads(text)
    path, holder = [], root
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            break
        key = rng.choice(keys)
        path.append(key)
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            break
        holder = inner
    place = "/".join(map(str, path))[:100]
    if not path:
        return json.dumps(rng.choice(HOSTILE)), "all of it replaced"
    if rng.random() < 0.2:
        del holder[path[-1]]
        return json.dumps(root), f"without {place}"
    if rng.random() < 0.1 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "9" * 5000, "<b>", "weight"))] = holder.pop(path[-1])
        return json.dumps(root), f"{place} renamed"
    value = rng.choice(HOSTILE)
    holder[path[-1]] = value
    return json.dumps(root), f"{place} is {repr(value)[:60]}"


def broken_json(rng: random.Random, text: str) -> tuple[bytes, str]:
    """Text that is no JSON, or JSON without an end, or of another kind."""
    kind = rng.choice(
        ("cut", "flip", "deep", "long number", "not UTF-8", "BOM", "another kind", "NUL")
    )
    data = text.encode()
    if kind == "cut":
        return data[: rng.randrange(len(data))], "cut off"
    if kind == "flip":
        return _flipped(rng, data, 0, len(data))
    deep = rng.choice((1000, 100_000))
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
    made = {
        "deep": (opened * deep + "1" + closed * deep).encode(),
        "long number": b'{"format_version": ' + b"9" * 10000 + b"}",
        "not UTF-8": data[:9] + b"\xff\xfe" + data[9:],
        "BOM": b"\xef\xbb\xbf" + data,
        "another kind": json.dumps(rng.choice(HOSTILE)).encode(),
        "NUL": data[:9] + b"\0" + data[9:],
    }
    return made[kind], kind
