"""A run's layers -> the choice table that loading reads (kernels/choices)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ...formats.checkpoint import PER_TOKEN, STATIC
from ...kernels import choices
from . import layers, shapes

MADE = ("date", "torch", "cuda", "triton", "comfy-kitchen")
# the ways in which activations are quantized
EIGHT_BIT = (choices.OURS, choices.HANDED, choices.LIBRARY)


def of(result: dict) -> dict | None:
    """The table; None of a run that is quick or interrupted, or has no GPU or no layers."""
    if result["quick"] or result.get("interrupted") or result["machine"]["gpu"] is None:
        return None
    measured = {}
    for family in result["families"].values():
        for layer in family["layers"]:
            measured.setdefault(layer["key"], layer)
    rows = [row for layer in measured.values() for row in _rows(layer)]
    if not rows:
        return None
    where = result["machine"]
    made = {name: where[name] for name in MADE}
    return {"version": choices.VERSION, "gpu": where["gpu"], "made": made, "rows": rows}


def _rows(layer: dict) -> Iterable[dict]:
    """One for each format and way to quantize activations that our kernel or a library's ran in."""
    shape = shapes.of_dict(layer["shape"])
    usable = [row for row in layer["rows"] if layers.usable(row) and row["way"]]
    for form in ("int8", "fp8"):
        for activations in (PER_TOKEN, STATIC):
            ms: dict[str, float] = {}
            for row in usable:
                way = row["way"]
                takes = row["activations"] if way in EIGHT_BIT else activations
                own = row["format"] == form or way == choices.SIXTEEN
                if own and takes == activations:
                    ms[way] = min(ms.get(way, row["median_ms"]), row["median_ms"])
            if any(way in ms for way in EIGHT_BIT):
                yield {
                    "format": form,
                    "kind": shape.kind,
                    "activations": activations,
                    "weight": list(shape.weight),
                    "m": shape.rows,
                    "ms": {way: ms[way] for way in choices.WAYS if way in ms},
                }


def text(table: dict) -> str:
    """The file: a row a line."""
    rows = ",\n".join("  " + json.dumps(row) for row in table["rows"])
    head = json.dumps({name: value for name, value in table.items() if name != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def write(result: dict, beside: Path, install: bool) -> str | None:
    """Writes the table where loading finds it, or beside the results where it is not to be installed
    or that folder cannot be written; what to say of it, None where the run gives no table."""
    table = of(result)
    if table is None:
        return None
    name = f"{choices.slug(table['gpu'])}.local.json"
    found = choices.FOLDER / name
    if install:
        try:
            _write(found, table)
        except OSError as error:
            problem = f" ({error})"
        else:
            return (
                f"Choice table: {found}. Loading goes by it from the next start of ComfyUI; "
                "delete it to go without."
            )
    else:
        problem = ""
    path = beside / f"choices_{name}"
    _write(path, table)
    return f"Choice table: {path}. To have loading go by it, copy it to {found}{problem}"


def _write(path: Path, table: dict) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text(table), encoding="utf-8")
    partial.replace(path)
