"""The inputs that make a recipe, for the nodes that quantize and the one that plans."""

from __future__ import annotations

from comfy_api.latest import io

from ..formats import FORMATS
from ..loaders import device
from ..quantize import layers as layer_choice
from ..quantize.recipe import ALGORITHMS, OPTIONS, PER_TOKEN, STATIC
from ..utils import capability, packages
from .quantize_and_load import recipe_of

CHOICES = [name for name in FORMATS if name != "fp8_e5m2"]  # an option of fp8
ALGORITHM_TOOLTIP = {
    "max": "max: scales from the largest values seen.",
    "mse": "mse: weight scales of least squared error.",
    "percentile": "percentile: max, but convolutions clip their activations to what the steps share.",
    "smoothquant": "smoothquant: moves outliers of the activations into the weights first.",
    "awq_lite": "awq_lite: searches a scale for every input channel, so that those that matter "
    "are rounded less.",
    "awq_full": "awq_full: awq_lite, and a search for where to clip each block. Slow.",
    "svdquant": "svdquant: awq_lite, and a low-rank branch in 16 bits takes what is hard to round.",
}


def _options() -> dict[str, io.Input]:
    return {
        "alpha": io.Float.Input(
            "alpha",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="How much of the activations' outliers moves into the weights: 0 none, 1 all.",
        ),
        "convolutions": io.Combo.Input(
            "convolutions",
            options=["max", "percentile"],
            default="max",
            optional=True,
            tooltip="How the activations of convolutions, which smoothing does not reach, are "
            "calibrated: to the largest value, or clipped to what the steps share. percentile can "
            "be better or much worse: compare the report's SQNR.",
        ),
        "percentile": io.Float.Input(
            "percentile",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="The share of the sampling steps, from the first one on, whose smallest range "
            "convolutions are clipped to: lower clips less.",
        ),
        "rank": io.Int.Input(
            "rank",
            default=32,
            min=1,
            max=256,
            tooltip="Rank of the 16-bit branch: higher is nearer to the original, larger, slower.",
        ),
    }


def _algorithm_option(name: str) -> io.DynamicCombo.Option:
    inputs = _options()
    return io.DynamicCombo.Option(name, [inputs[option] for option in OPTIONS.get(name, ())])


def _format_option(name: str) -> io.DynamicCombo.Option:
    algorithms = ALGORITHMS[name]
    algorithm = io.DynamicCombo.Input(
        "algorithm",
        options=[_algorithm_option(a) for a in algorithms],
        tooltip=" ".join(ALGORITHM_TOOLTIP[a] for a in algorithms),
    )
    weights = io.Combo.Input(
        "weights",
        options=["e4m3", "e5m2"],
        default="e4m3",
        optional=True,
        tooltip="e4m3: more digits, FP8 arithmetic. e5m2: more range, activations stay in 16 bits.",
    )
    activations = io.Combo.Input(
        "activations",
        options=[STATIC, PER_TOKEN],
        default=STATIC,
        optional=True,
        tooltip="Linear layers: one calibrated scale, or one for each token while the model runs "
        "(nearer to the original, a little slower, does not open in stock ComfyUI).",
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
            tooltip="linear + conv: the smallest file, opens with this pack only. "
            "linear only: fp8, int8, mxfp8 and nvfp4 open in stock ComfyUI too (int8 not "
            "with smoothquant, nvfp4 not with svdquant).",
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
    if (missing := packages.why_missing(packages.MODELOPT, "quantizing")) is not None:
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
