"""`dev.py locales`: the nodes' names and tooltips as ComfyUI's page looks them up, in English.

The page finds the text of an input as nodeDefs.<node>.inputs.<name>.{name, tooltip}, with `_` for
the dots of an option's name (`format.algorithm`), and that of an output by its number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from .common import ROOT, say

LOCALES = ROOT / "locales"


def inputs_of(schema) -> Iterator[tuple[str, object]]:
    """Dotted name and input of everything a node's schema takes, options of options included; a name
    that several options have comes once for each."""
    for one in schema.inputs or ():
        yield from _with_options(one, one.id)


def _with_options(one, name: str) -> Iterator[tuple[str, object]]:
    yield name, one
    for option in getattr(one, "options", None) or ():
        for inner in getattr(option, "inputs", ()):  # a plain combo's options are strings
            yield from _with_options(inner, f"{name}.{inner.id}")


def node_defs(nodes) -> dict[str, dict]:
    """The content of nodeDefs.json for these node classes, as their schemas have it."""
    found = {}
    for node in nodes:
        schema = node.define_schema()
        texts: dict[str, dict[str, list[str]]] = {}
        for name, one in inputs_of(schema):
            entry = texts.setdefault(name.replace(".", "_"), {"name": [], "tooltip": []})
            entry["name"].append(one.display_name or one.id)
            entry["tooltip"].append(one.tooltip or "")
        found[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {
                name: {key: merged(values) for key, values in entry.items()}
                for name, entry in texts.items()
            },
            "outputs": {
                str(number): output_text(output)
                for number, output in enumerate(schema.outputs or ())
            },
        }
    return found


def merged(texts: list[str]) -> str:
    """One text for the same input of several options: every sentence of theirs, once."""
    if len(set(texts)) == 1:
        return texts[0]
    return " ".join(dict.fromkeys(part for text in texts for part in _entries(text)))


def _entries(text: str) -> list[str]:
    """`max: … mse: …` by what is explained."""
    return re.split(r"(?<=\.) (?=\w+: )", text)


def output_text(output) -> dict[str, str]:
    """An output named like its type is named by the page, in the user's language."""
    named = {} if output.display_name == output.get_io_type() else {"name": output.display_name}
    return {**named, "tooltip": output.tooltip or ""}


def main_texts(nodes) -> dict[str, dict]:
    """The content of main.json: the names of the nodes' categories."""
    categories = {part for node in nodes for part in node.define_schema().category.split("/")}
    return {"nodeCategories": {name: name for name in sorted(categories)}}


def written(texts: dict) -> str:
    """As it stands in a file of locales/."""
    return json.dumps(texts, ensure_ascii=False, indent=2) + "\n"


def main() -> int:
    """Writes locales/en from the nodes; says what it wrote."""
    from . import inprocess

    inprocess.load()
    from comfyui_modelopt.nodes import NODES

    for name, texts in (("nodeDefs", node_defs(NODES)), ("main", main_texts(NODES))):
        path = Path(LOCALES, "en", f"{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written(texts), encoding="utf-8")
        say(str(path.relative_to(ROOT)))
    return 0
