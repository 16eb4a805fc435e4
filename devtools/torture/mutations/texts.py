"""Damage to JSON, and values that no JSON of ours holds."""

from __future__ import annotations

import json
import random

HOSTILE = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**40, 1e308, -0.5, "", "x", "\0", "../../etc/passwd"),
    *("<script>alert(1)</script>", "a" * 5000, [], {}, [[]], {"a": {}}, [None], ["x"] * 1000),
    *([1, 2, 3], float("nan"), float("inf"), "٣", "9" * 5000, "\ud800", {"": ""}),
)


def flipped(rng: random.Random, data: bytes, begin: int, end: int) -> tuple[bytes, str]:
    made = bytearray(data)
    places = sorted(rng.randrange(8 * begin, 8 * end) for _ in range(rng.choice((1, 1, 1, 2, 9))))
    for place in places:
        made[place // 8] ^= 1 << place % 8
    return bytes(made), f"bits {places} flipped"


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
        ("cut", "flip", "deep", "long number", "not UTF-8", "BOM", "another kind", "NUL", "lists")
    )
    data = text.encode()
    if kind == "cut":
        return data[: rng.randrange(len(data))], "cut off"
    if kind == "flip":
        return flipped(rng, data, 0, len(data))
    deep = rng.choice((1000, 100_000))
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
    made = {
        "deep": (opened * deep + "1" + closed * deep).encode(),
        "long number": b'{"format_version": ' + b"9" * 10000 + b"}",
        "not UTF-8": data[:9] + b"\xff\xfe" + data[9:],
        "BOM": b"\xef\xbb\xbf" + data,
        "another kind": json.dumps(rng.choice(HOSTILE)).encode(),
        "lists": b"[" + b"[]," * 2**22 + b"1]",
        "NUL": data[:9] + b"\0" + data[9:],
    }
    return made[kind], kind
