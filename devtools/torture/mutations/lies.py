"""A safetensors header that lies: about sizes, offsets, names, or its own length."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from .safetensors import Parts, joined
from .texts import HOSTILE

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "I32", "I8", "U8")
DTYPES += ("BOOL", "U16", "C64", "F4", "X9", "")


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


def _lists(rng, header, content):
    name = rng.choice([*header["__metadata__"]])
    metadata = header["__metadata__"] | {name: '{"x": [' + "[]," * 2**22 + "1]}"}
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
    ours = [n for n in header["__metadata__"] if header["__metadata__"][n][:1] == "{"]
    if not ours:
        return _duplicate(rng, header, content)
    name = rng.choice(ours)
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
    "a text in it is of 4 million lists": _lists,
    "it is long": _long,
    "30,000 empty tensors": _many,
    "a name twice": _duplicate,
    "a name twice in one of its texts": _duplicate_in_ours,
    "not UTF-8": _not_utf8,
    "no object": _no_object,
    "metadata of another kind": _metadata,
}
