"""The choice table: what `dev.py bench` measured on a GPU, and which way a layer is run by it.

One JSON a GPU in this folder, `<slug>.json` as shipped with the pack, or `<slug>.local.json` as
measured here, which goes first:
`version` (VERSION), `gpu` (its name as torch says it), `made` (versions and date), and `rows`, one
for each layer shape: `format`, `kind` ("linear", "conv2d"), `activations` ("static", "per token"),
`weight` (the shape), `m` (rows of x, or pixels of the output), `ms` (a way below -> milliseconds).
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)
FOLDER = Path(__file__).resolve().parent
# a table of another version is not used: raised when kernels change so that its times mislead
VERSION = 1
# our kernel, which quantizes x first; the same on an x that a fused block has quantized; a
# library's kernel, quantizing included; dequantizing the weight, then F.linear or F.conv2d; those
# with a weight in 16 bits
OURS, HANDED, LIBRARY = "ours", "ours, x quantized before", "library"
DEQUANTIZED, SIXTEEN = "dequantized", "16 bits"
WAYS = (OURS, HANDED, LIBRARY, DEQUANTIZED, SIXTEEN)
KEYS = ("format", "kind", "activations")
# what was measured of one weight's shape: M, and way -> milliseconds; convolutions of two strides
# may share an M
Measured = Sequence[tuple[int, Mapping[str, float]]]
# (format, kind, activations, shape of the weight) -> all that was measured of it
Rows = Mapping[tuple, Measured]


@dataclass(frozen=True)
class Answer:
    """way: of WAYS; why: in words, with the times that decided."""

    way: str
    why: str


def slug(name: str) -> str:
    """A machine's name as part of a file's: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parse(text: str, gpu: str) -> Rows:
    """The rows of a table. Raises ValueError where it is damaged, of another version or GPU."""
    table = json.loads(text)  # JSONDecodeError is a ValueError
    if not isinstance(table, dict) or table.get("version") != VERSION:
        found = table.get("version") if isinstance(table, dict) else type(table).__name__
        raise ValueError(f"a choice table must have version {VERSION}, found {found}")
    if table.get("gpu") != gpu:
        raise ValueError(f"a choice table must be of this GPU, {gpu}, found {table.get('gpu')}")
    rows: dict[tuple, list] = {}
    if not isinstance(table.get("rows"), list):
        raise ValueError("a choice table must have a list `rows`")
    for row in table["rows"]:
        rows.setdefault(_key(row), []).append((row["m"], row["ms"]))
    return rows


def _key(row: object) -> tuple:
    """What a row is found by. Raises ValueError where anything in it is not as it must be."""
    if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in KEYS)):
        raise ValueError(f"a choice table's row must name {', '.join(KEYS)}, found {row}")
    weight, m, ms = row.get("weight"), row.get("m"), row.get("ms")
    if not (isinstance(weight, list) and all(type(n) is int for n in [*weight, m])):
        raise ValueError(f"`weight` must be a list of integers and `m` one, found {row}")
    if not (isinstance(ms, dict) and set(ms) <= set(WAYS)):
        raise ValueError(f"`ms` must be of {', '.join(WAYS)}, found {row}")
    if not all(type(x) in (int, float) and x > 0 for x in ms.values()):
        raise ValueError(f"milliseconds must be above 0, found {row}")
    return (*(row[key] for key in KEYS), tuple(weight))


@functools.cache
def table(gpu: str, folder: Path) -> Rows | None:
    """The table of a GPU, read once; None where there is none, or none that can be used, which is
    logged."""
    names = [f"{slug(gpu)}.local.json", f"{slug(gpu)}.json"]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        log.info(
            "ModelOpt: %s was not measured, its 8-bit layers run as on any GPU of its kind: "
            "`python dev.py bench` measures",
            gpu,
        )
        return None
    try:
        return parse(path.read_text(encoding="utf-8"), gpu)
    except (OSError, ValueError) as error:
        log.warning("ModelOpt: %s is not used: %s", path, error)
        return None


def ask(
    gpu: str, form: str, kind: str, activations: str, weight: tuple[int, ...], ways: Sequence[str]
) -> Answer | None:
    """What to run instead of `ways[0]`, the usual way, on this GPU, or None to leave it at that.

    ways: those that this layer can take here; DEQUANTIZED it always can. Another way is taken only
    where it was faster at every M that was measured for a weight of this shape.
    """
    rows = (table(gpu, FOLDER) or {}).get((form, kind, activations, tuple(weight)))
    if rows is None:
        return None
    where = f"on {gpu} for {' x '.join(map(str, weight))} weights"
    times = _faster(rows, DEQUANTIZED, ways)
    if times:
        return Answer(DEQUANTIZED, f"16 bits, dequantizing included, was faster {where}: {times}")
    for way in ways[1:]:
        times = _faster(rows, way, ways[:1])
        if times:
            return Answer(way, f"it was faster {where}: {times}")
    return None


def _faster(rows: Measured, way: str, ways: Sequence[str]) -> str | None:
    """The times in words, where `way` was faster at every M than each of `ways` that was measured
    there, of which the first must be; else None."""
    times = []
    for m, ms in sorted(rows, key=lambda row: row[0]):
        best = min((ms[other] for other in ways if other in ms), default=0.0)
        if way not in ms or ways[0] not in ms or ms[way] >= best:
            return None
        times.append(f"{ms[way]:.3g} against {best:.3g} ms at M = {m}")
    return ", ".join(times)
