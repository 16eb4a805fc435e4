"""Auto Quantize's way through: search, loader, measurement, report."""

from __future__ import annotations

from ..loaders import dispatch
from ..loaders import unet as loader
from ..quantize import auto, mixed
from ..quantize.layers import parse_patterns
from ..utils import auto_report
from .planning import sizes
from .quantize_and_load import loaded_and_told, quantize_and_load

SIXTEEN = "16 bits"


def low_precision(checkpoint, takes: bool = False):
    """A MODEL that computes in low precision also where this device gains nothing by it, so that
    what is measured does not depend on the device."""
    return loader.load(checkpoint, arithmetic=dispatch.INTEGER, takes=takes)


def goal_of(target: dict) -> auto.Goal:
    """The target's inputs as a goal. Raises ValueError for one that cannot be meant."""
    kind = target["target"]
    value = {
        auto.SIZE: lambda: target["megabytes"] * 1e6,
        auto.BITS: lambda: target["bits"],
        auto.QUALITY: lambda: target["sqnr_db"],
    }[kind]()
    return auto.Goal(kind, float(value))


def auto_and_load(model, calibration, target: dict, allowed: list[str], layers, skip, tell):
    """-> quantized MODEL, report text, recipe as JSON, figures (JSON-able)."""
    if target["target"] == "recipe":
        recipe = mixed.read(target["recipe"], "the recipe on the node")
        quantized, report, figures = quantize_and_load(
            model, recipe, calibration, sizes(model, recipe, calibration)
        )
        return quantized, report, mixed.write(recipe), figures
    found = auto.auto_quantize(
        model,
        calibration,
        [name for name in allowed if name != SIXTEEN],
        goal_of(target),
        layers,
        tuple(parse_patterns(skip)),
        low_precision,
        SIXTEEN in allowed,
        tell,
    )
    planned = sizes(model, found.recipe, calibration)
    quantized, report, figures = loaded_and_told(found.made, found.recipe, planned)
    uniform = [(auto.words(recipe), size, sqnr) for recipe, size, sqnr in found.uniform]
    text = auto_report.text(
        found.recipe.describe(),
        planned.file,
        found.predicted,
        found.measured,
        uniform,
        sorted(set(found.all_layers) - set(found.recipe.assignment)),
        found.notes,
        sum(layer.weight_only for layer in found.made.checkpoint.layers.values()),
    )
    figures |= {
        "predicted_sqnr_db": auto_report.plain(found.predicted),
        "low_precision_sqnr_db": auto_report.plain(found.measured),
        "uniform": [[name, size, auto_report.plain(sqnr)] for name, size, sqnr in uniform],
    }
    return quantized, f"{text[0]}\n{report}\n{text[1]}", mixed.write(found.recipe), figures
