"""A quantized MODEL's header in words: what it was made from, how, on what and with what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from .report import choice_words, layer_lines, opens_line, quality_line, recipe_line
from .text import ENTRIES, brief

SHOWN = 3  # entries of a list on the node
LONGEST = 90  # letters of an entry on the node
WHOLE = 10**5  # of an entry in the whole text
# what has lines of its own; anything else in a header follows under its own name
TOLD = ("recipe", "source", "calibration", "quality", "versions", "baked_patches", "imported")
TOLD += ("model", "opens_in", "opens_in_stock", "unet_config", "format_version")


def provenance(
    header: Mapping[str, object], layers: Mapping[str, object], full: bool = False
) -> list[str]:
    """Lines on everything the header says. full: whole lists; else their beginning and a count."""
    lines = [
        *_source(header),
        *_recipe(header.get("recipe"), full),
        "Layers quantized:",
        *(f"  {line}" for line in layer_lines(layers)),
        *_calibration(header.get("calibration"), full),
        quality_line(header.get("quality")),
        *_facts("Made with", header.get("versions"), full),
        *_imported(header.get("imported"), full),
    ]
    others = [x for x in sorted(header.items()) if x[0] not in TOLD and x[1] is not None]
    shown = _first(others, ENTRIES, full)
    for name, value in shown:
        facts = value if isinstance(value, Mapping) else {name: value}
        lines += _facts(brief(name), facts, full, SHOWN)  # a newer pack's, or another maker's
    if len(shown) < len(others):
        lines.append(f"and {len(others) - len(shown)} more entries of the header")
    if full:
        lines += _facts("Architecture", header.get("unet_config"), full)
        if header.get("format_version") is not None:  # it was in a file
            lines.append(f"Format version of the file: {header['format_version']}")
    return [*lines, opens_line(bool(header.get("opens_in_stock")), header.get("recipe"))]


def _source(header: Mapping) -> list[str]:
    source, baked = header.get("source"), header.get("baked_patches") or 0
    return [
        f"Made from: {brief(source['name']) if source else 'a file that ComfyUI did not name'}",
        *([f"  SHA-256 {brief(source['sha256'])}"] if source else []),
        f"  model {brief(header.get('model', 'unknown'))}",
        f"  weights with baked-in patches (LoRA): {baked}",
    ]


def _recipe(recipe: Mapping | None, full: bool) -> list[str]:
    """A mixed recipe names every layer: in full only."""
    if not recipe or recipe.get("format") != "mixed":
        return _facts("Recipe", recipe, full)
    lines = [f"Recipe: {recipe_line(recipe)}"]
    assignment = recipe.get("assignment") or {}
    for index, choice in enumerate(recipe.get("choices") or () if full else ()):
        names = ", ".join(assignment.get(str(index), ()))
        lines.append(f"  {choice_words(choice)}: {brief(names, WHOLE)}")
    return lines


def _calibration(summary: Mapping | None, full: bool) -> list[str]:
    if not summary:
        return ["Calibration: none"]
    return _facts("Calibration", summary, full)


def _imported(found: Mapping | None, full: bool) -> list[str]:
    if not found:
        return []
    notes = _listed([str(note) for note in found["notes"]], full)
    rest = {name: value for name, value in found.items() if name not in ("kind", "notes")}
    lines = [f"Imported from: {brief(found['kind'])}", *(f"  {note}" for note in notes)]
    return [*lines, *(_facts("Import", rest, full) if rest else [])]


def _facts(title: str, facts: Mapping | None, full: bool, most: int = ENTRIES) -> list[str]:
    """A title, and a line for each fact; a list's entries stand on lines of their own where long."""
    if not facts:
        return [f"{title}: unknown"]
    lines = [f"{title}:"]
    shown = _first(list(facts.items()), most, full)
    for name, value in shown:
        name = brief(name)
        if isinstance(value, Mapping):
            value = [f"{key}: {_text(entry)}" for key, entry in value.items()]
        if not isinstance(value, list | tuple):
            lines.append(f"  {name}: {_cut(_text(value), full)}")
            continue
        entries = _listed([_text(entry) for entry in value], full)
        in_a_row = ", ".join(entries)
        if len(in_a_row) <= LONGEST:
            lines.append(f"  {name}: {in_a_row or 'none'}")
        else:
            lines += [f"  {name} ({len(value)}):", *(f"    {entry}" for entry in entries)]
    rest = len(facts) - len(shown)
    return [*lines, f"  and {rest} more"] if rest else lines


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _first(entries: Sequence, most: int, full: bool) -> Sequence:
    """All, or the first ones where more than one would be left out."""
    return entries if full or len(entries) <= most + 1 else entries[:most]


def _cut(text: str, full: bool) -> str:
    text = brief(text, WHOLE)
    return text if full or len(text) <= LONGEST else text[: LONGEST - 1].rstrip() + "…"


def _listed(entries: Sequence[str], full: bool) -> list[str]:
    """The entries, or the first ones and how many more there are."""
    shown = _first(entries, SHOWN, full)
    cut, rest = [_cut(entry, full) for entry in shown], len(entries) - len(shown)
    return [*cut, f"and {rest} more"] if rest else cut
