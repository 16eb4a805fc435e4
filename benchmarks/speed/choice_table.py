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
    """The table, or None where a run does not give one: quick, interrupted, without a GPU or layers."""
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
    """One for each format and way to quantize activations in which our kernel or a library's ran."""
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


def write(result: dict, out: Path | None) -> str | None:
    """Writes the table where loading finds it or, where a run has a folder `out` of its own, there;
    what to say of it, None where the run gives no table."""
    table = of(result)
    if table is None:
        return None
    name = f"{choices.slug(table['gpu'])}.local.json"
    path = choices.FOLDER / name if out is None else out / f"choices_{name}"
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text(table), encoding="utf-8")
    partial.replace(path)
    if out is None:
        return (
            f"Choice table: {path}. Loading goes by it from the next start of ComfyUI; "
            "delete it to go without."
        )
    return f"Choice table: {path}. To have loading go by it, copy it to {choices.FOLDER / name}"
