"""The inputs that make a recipe, for the nodes that quantize and the one that plans."""

from __future__ import annotations

from comfy_api.latest import io

from ..formats import FORMATS
from ..loaders import device
from ..quantize import layers as layer_choice
from ..quantize import words
from ..quantize.recipe import (
    ACTIVATIONS,
    ALGORITHMS,
    CHOICES,
    CONVOLUTIONS,
    LIMITS,
    OPTIONS,
    WEIGHTS,
    Recipe,
    recipe_of,
)
from ..utils import capability, packages


def _told(name: str) -> dict[str, object]:
    low, high = LIMITS[name]
    told = {"default": getattr(Recipe, name), "min": low, "max": high}
    return told | {"tooltip": words.RECIPE[name]}


def _options() -> dict[str, io.Input]:
    return {
        "alpha": io.Float.Input("alpha", step=0.05, **_told("alpha")),
        "convolutions": io.Combo.Input(
            "convolutions",
            options=list(CONVOLUTIONS),
            default=Recipe.convolutions,
            optional=True,
            tooltip=words.RECIPE["convolutions"],
        ),
        "percentile": io.Float.Input("percentile", step=0.01, **_told("percentile")),
        "rank": io.Int.Input("rank", **_told("rank")),
    }


def _algorithm_option(name: str) -> io.DynamicCombo.Option:
    inputs = _options()
    return io.DynamicCombo.Option(name, [inputs[option] for option in OPTIONS.get(name, ())])


def _format_option(name: str) -> io.DynamicCombo.Option:
    algorithms = ALGORITHMS[name]
    algorithm = io.DynamicCombo.Input(
        "algorithm",
        options=[_algorithm_option(a) for a in algorithms],
        tooltip=" ".join(words.ALGORITHMS[a] for a in algorithms),
    )
    weights = io.Combo.Input(
        "weights",
        options=list(WEIGHTS["fp8"]),
        default=WEIGHTS["fp8"][0],
        optional=True,
        tooltip=words.RECIPE["weights"],
    )
    activations = io.Combo.Input(
        "activations",
        options=list(ACTIVATIONS["fp8"]),
        default=Recipe.activations,
        optional=True,
        tooltip=words.RECIPE["activations"],
    )
    inputs = [algorithm, weights, activations] if name == "fp8" else [algorithm]
    return io.DynamicCombo.Option(name, inputs)


def recipe_inputs() -> list[io.Input]:
    """Inputs format (with its options), layers, skip."""
    return [
        io.DynamicCombo.Input(
            "format",
            options=[_format_option(name) for name in CHOICES],
            tooltip="; ".join(f"{name}: {FORMATS[name].TITLE}" for name in CHOICES),
        ),
        io.Combo.Input(
            "layers",
            options=list(layer_choice.MODES),
            default=layer_choice.LINEAR_AND_CONV,
            tooltip=words.RECIPE["layers"],
        ),
        io.String.Input(
            "skip",
            multiline=True,
            default="\n".join(layer_choice.DEFAULT_SKIP),
            tooltip="Layers to leave in 16 bits: names with * and ?, one a line. Unchanged, "
            "FLUX, SD3, Qwen-Image and WAN get the list of their family.",
        ),
    ]


def why_not(format) -> str | None:
    """Why ComfyUI's value of the input `format`, before the run, cannot be quantized to, or None."""
    if (missing := packages.why_missing(packages.MODELOPT)) is not None:
        return missing
    if format is None:  # ComfyUI leaves out a format or algorithm that the schema does not have
        return f"format must be one of {', '.join(CHOICES)}: choose one in the node"
    if not isinstance(format, dict):
        return None
    if not format.get("algorithm"):
        known = ", ".join(ALGORITHMS[format["format"]])
        return f"algorithm of {format['format']} must be one of {known}: choose one"
    try:
        recipe = recipe_of(format, layer_choice.LINEAR_AND_CONV, "")
    except ValueError as error:
        return str(error)
    # while a workflow is checked, the server answers nobody: no kernels are compiled here
    found = capability.support(recipe.format, "linear", device.current(kinds=()))
    if found.level == capability.REFUSED:
        return f"{found.why}: choose another format"
    return None
