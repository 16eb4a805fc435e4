"""What a node sends to the page beside its outputs."""

from __future__ import annotations

from ..loaders import info


def shown(text: str, model=None, figures: dict | None = None) -> dict[str, list]:
    """The `ui` of a node: the text on it; of a quantized MODEL the chart of its blocks (name, bits a
    weight, MB); figures for programs."""
    ui: dict[str, list] = {"text": [text]}
    if figures is not None:
        ui["modelopt"] = [figures]
    if model is not None:
        blocks = info.blocks(model)
        ui["modelopt_blocks"] = [[name, round(bits, 3), mb] for name, (bits, mb) in blocks.items()]
    return ui
