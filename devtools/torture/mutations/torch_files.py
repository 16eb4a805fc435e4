"""Damage to a file of torch.save, which is a zip with a pickle in it; hostile pickles; zip bombs."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

from .safetensors import cut_out, overwritten
from .texts import HOSTILE
from .texts import flipped as _flipped

__all__ = ["bombs", "cut_out", "edited", "flipped", "hostile", "overwritten", "parts", "truncated"]

# of the end of a zip's directory
_END = struct.Struct("<4s4H2LH")


def truncated(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """At the start of a member, of its data, of the directory, or anywhere."""
    places = [0, 4, len(data) - 22, len(data) - 1]
    for mark in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"):
        place = data.find(mark)
        while place >= 0:
            places += [place, place + 30]
            place = data.find(mark, place + 1)
    place = rng.choice((rng.choice(places), rng.randrange(len(data))))
    place = min(max(place, 0), len(data) - 1)
    return data[:place], f"cut off after byte {place}"


def flipped(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    return _flipped(rng, data, 0, len(data))


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(members: dict[str, bytes], packed: bool = False) -> bytes:
    """Members one by one, their data aligned as torch does it."""
    made = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(made, "w", kind) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = kind
            if not packed:
                fill = -(archive.fp.tell() + 30 + len(name.encode()) + 4) % 64
                info.extra = struct.pack("<HH", 0x4246, fill) + b"Z" * fill
            archive.writestr(info, content)
    return made.getvalue()


def parts(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Members swapped, missing, renamed, twice, empty; a directory that lies about sizes."""
    members = _members(data)
    names = list(members)
    name, other = rng.choice(names), rng.choice(names)
    kind = rng.choice(("swapped", "missing", "renamed", "empty", "short", "long", "directory"))
    if kind == "swapped":
        members[name], members[other] = members[other], members[name]
        name += f" and {other}"
    elif kind == "missing":
        del members[name]
    elif kind == "renamed":
        new = rng.choice(
            ("../../x", "/etc/passwd", "x" * 1000, "", name.upper(), "archive/data.pkl")
        )
        members[new] = members.pop(name)
    elif kind in ("empty", "short", "long"):
        size = {"empty": 0, "short": len(members[name]) // 2, "long": 2 * len(members[name])}[kind]
        members[name] = (members[name] * 2)[:size]
    made = _zipped(members)
    if kind == "directory":
        place = made.find(b"PK\x01\x02")
        for _ in range(rng.randrange(len(names))):
            place = made.find(b"PK\x01\x02", place + 1)
        field, size = rng.choice(((16, 4), (20, 4), (24, 4), (42, 4), (10, 2), (8, 2)))
        value = rng.choice((0, 1, 2**31, 2**32 - 1, len(made), len(made) // 2)) % 256**size
        packed = value.to_bytes(size, "little")
        made = made[: place + field] + packed + made[place + field + size :]
        name = f"field {field} is {value}"
    return made, f"{kind}: {name[:80]}"


def bombs(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """What unpacks, or is read, to much more than the file holds."""
    members = _members(data)
    pickled = next(name for name in members if name.endswith("data.pkl"))
    kinds = ("packed data", "packed pickle", "huge member", "expanded", "many expanded")
    kinds += ("one list again and again", "empty lists", "in capitals", "two directories")
    kind = rng.choice(kinds)
    if kind == "packed data":
        name = rng.choice([n for n in members if "/data/" in n] or list(members))
        members[name] = bytes(2**28)
        return _zipped(members, packed=True), "a tensor's data that unpacks to 256 MB"
    if kind == "packed pickle":
        members[pickled] = members[pickled][:-1] + b"N0" * 2**27 + b"."
        return _zipped(members, packed=True), "a pickle that unpacks to 256 MB"
    if kind == "huge member":
        members["archive/more"] = bytes(2**28)
        return _zipped(members, packed=True), "a member that unpacks to 256 MB"
    lists = b"\x80\x02" + b"]" * 2**24 + b"."
    if kind == "empty lists":
        return _zipped(members | {pickled: lists}), "a pickle of 16 million empty lists"
    if kind == "in capitals":  # for torch the same name
        capitals = pickled.replace("data.pkl", "DATA.PKL")
        del members[pickled]
        return _zipped({capitals: lists} | members), "16 million empty lists in DATA.PKL"
    if kind == "two directories":
        size = max(len(members[pickled]), len(lists))
        bad, good = (members | {pickled: one.ljust(size)} for one in (lists, members[pickled]))
        return two_directories(bad, good), "16 million empty lists where the second directory says"
    objects = _own(data)
    if kind == "one list again and again":
        made: list = [0] * 10
        for _ in range(30):
            made = [made] * 10
        holder = rng.choice((objects["modelopt_state"], objects["model_state_dict"]))
        holder[rng.choice(list(holder))] = made
        return _saved(objects), "lists of 10 to the power of 31 values"
    import torch

    state = objects["model_state_dict"]
    for key in list(state) if kind == "many expanded" else [rng.choice(list(state))]:
        shape = (2**14, 2**14, *state[key].shape[2:]) if state[key].ndim > 1 else (2**30,)
        state[key] = torch.ones(1, dtype=state[key].dtype).expand(shape)
    return _saved(objects), "tensors of one value stretched over gigabytes"


def two_directories(bad: dict[str, bytes], good: dict[str, bytes]) -> bytes:
    """Python's reader finds `good`, before the end of the file, torch's `bad`, where the end says. Members
    are of the same names and sizes."""
    halves = []
    for members in (bad, good):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        data = file.getvalue()
        halves.append(data[: -_END.size])
        count, length, start = _END.unpack(data[-_END.size :])[4:7]
    return b"".join([*halves, _END.pack(b"PK\5\6", 0, 0, count, count, length, start, 0)])


def _own(data: bytes) -> Any:
    """What an undamaged sample holds; it is our own."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def _saved(objects: Any) -> bytes:
    import torch

    made = io.BytesIO()
    torch.save(objects, made)
    return made.getvalue()


class _Call:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def _write(path: str) -> None:
    Path(path).write_text("executed")


def hostile(rng: random.Random, data: bytes, canary: Path) -> tuple[bytes, str]:
    """Pickles that would make the file `canary`: none of it may happen."""
    import os
    import subprocess
    import sys

    import torch

    touch = f"open({str(canary)!r}, 'w').close()"
    payloads = {
        "os.system": _Call(os.system, f"{sys.executable} -c {touch!r}"),
        "eval": _Call(eval, touch.replace("open", "__import__('io').open")),
        "exec": _Call(exec, touch),
        "open": _Call(open, str(canary), "w"),
        "subprocess": _Call(subprocess.Popen, [sys.executable, "-c", touch]),
        "Path.touch": _Call(Path.touch, canary),
        "torch.save": _Call(torch.save, 1, str(canary)),
        "torch.hub": _Call(torch.hub.download_url_to_file, canary.as_uri(), str(canary) + "2"),
        "torch.load": _Call(torch.load, str(canary), None, None),
        "UntypedStorage.from_file": _Call(torch.UntypedStorage.from_file, str(canary), True, 8),
        "numpy": _Call(__import__("numpy").save, str(canary), 1),
        "__import__": _Call(__import__, "webbrowser"),
    }
    name = rng.choice(list(payloads))
    form = rng.choice(("zip", "bare", "legacy", "nested", "key", "in the zip's data.pkl"))
    payload = payloads[name]
    if form == "bare":
        return pickle.dumps(payload, rng.choice((0, 2, 4))), f"{name}, a bare pickle"
    if form == "in the zip's data.pkl":
        members = _members(data)
        pickled = next(n for n in members if n.endswith("data.pkl"))
        members[pickled] = pickle.dumps(payload, 2)
        return _zipped(members), f"{name}, as data.pkl"
    value = payload
    if form in ("nested", "key"):
        value = _own(data)
        if form == "key":
            value["model_state_dict"]["x.weight"] = payload
        else:
            value["modelopt_state"]["modelopt_state_dict"].append(("quantize", payload))
    made = io.BytesIO()
    torch.save(value, made, _use_new_zipfile_serialization=form != "legacy")
    return made.getvalue(), f"{name}, {form}"


def edited(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One value in the pickle is another: of ModelOpt's state, or a tensor."""
    import torch

    objects = _own(data)
    if rng.random() < 0.5:
        state = objects["model_state_dict"]
        name = rng.choice(list(state))
        one = state[name]
        choices = {
            "gone": None,
            "no tensor": rng.choice(HOSTILE[:20]),
            "zeros": torch.zeros_like(one),
            "negative": -one.abs() if one.is_floating_point() else one,
            "NaN": torch.full_like(one, torch.nan) if one.is_floating_point() else one,
            "infinite": torch.full_like(one, torch.inf) if one.is_floating_point() else one,
            "empty": one[:0] if one.ndim else one,
            "flat": one.reshape(-1),
            "float64": one.double(),
            "int64": one.to(torch.int64),
            "bool": one.bool(),
            "complex": one.to(torch.complex64),
            "sparse": one.to_sparse() if one.ndim else one,
            "meta": one.to("meta"),
            "float8": one.to(torch.float8_e4m3fn),
            "half the rows": one[: max(1, len(one) // 2)] if one.ndim else one,
        }
        kind = rng.choice(list(choices))
        state[name] = choices[kind]
        if kind == "gone":
            del state[name]
        return _saved(objects), f"{name}: {kind}"
    path, holder = [], objects["modelopt_state"]
    while isinstance(holder, dict | list | tuple) and holder:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        path.append(rng.choice(keys))
        inner = holder[path[-1]]
        if not isinstance(inner, dict | list | tuple) or not inner or rng.random() < 0.15:
            break
        holder = inner
    value = rng.choice([x for x in HOSTILE if x != "\ud800"])
    objects["modelopt_state"] = _replaced(objects["modelopt_state"], path, value)
    return _saved(objects), f"{'/'.join(map(str, path))[-100:]} is {repr(value)[:60]}"


def _replaced(holder: Any, path: list, value: Any) -> Any:
    """A copy with another value at the end of the path; tuples cannot be written to."""
    if not path:
        return value
    inner = _replaced(holder[path[0]], path[1:], value)
    if isinstance(holder, dict):
        return {**holder, path[0]: inner}
    made = [*holder]
    made[path[0]] = inner
    return type(holder)(made)
