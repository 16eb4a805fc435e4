"""Auto Quantize's way through: search, loader, measurement, report."""

from __future__ import annotations

import math

from ..loaders import device, dispatch
from ..loaders import unet as loader
from ..quantize import auto, candidates, mixed
from ..quantize.candidates import CANDIDATES
from ..quantize.layers import parse_patterns
from ..quantize.recipe import Recipe
from ..utils import auto_report, capability, progress
from .planning import sizes
from .quantize_and_load import loaded_and_told, quantize_and_load


def low_precision(checkpoint, takes: bool = False):
    """A MODEL that computes in low precision also where this device gains nothing by it, so that
    what is measured does not depend on the device."""
    return loader.load(checkpoint, arithmetic=dispatch.INTEGER, takes=takes)


def goal_of(target: dict) -> auto.Goal:
    """The target's inputs as a goal. Raises ValueError for one that cannot be meant."""
    units = {auto.SIZE: ("megabytes", 1e6), auto.BITS: ("bits", 1), auto.QUALITY: ("sqnr_db", 1)}
    kind = target["target"]
    if kind not in units:
        raise ValueError(f"target must be one of {', '.join(units)}, got {kind!r}: choose one")
    name, unit = units[kind]
    value = float(target[name]) * unit
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be above 0, got {target[name]}: correct it")
    return auto.Goal(kind, value)


def auto_and_load(model, calibration, target: dict, allowed, sixteen, layers, skip):
    """-> quantized MODEL, report text, recipe as JSON, figures (JSON-able)."""
    if target["target"] == "recipe":
        recipe = mixed.read(target["recipe"], "the recipe on the node")
        _check_formats({one.format: "take another recipe" for one in mixed.used(recipe)})
        planned = sizes(model, recipe, calibration)
        progress.tell(planned.line())
        quantized, report, figures = quantize_and_load(model, recipe, calibration, planned)
        return quantized, report, mixed.write(recipe), figures
    goal = goal_of(target)
    formats = {
        one.get("format", name): name for name in allowed for one in CANDIDATES[name].recipes
    }
    _check_formats({form: f"switch {name} off" for form, name in formats.items()})
    found = auto.auto_quantize(
        model,
        calibration,
        allowed,
        goal,
        layers,
        tuple(parse_patterns(skip)),
        low_precision,
        sixteen,
    )
    planned = sizes(model, found.recipe, calibration)
    quantized, report, figures = loaded_and_told(found.made, found.recipe, planned)
    uniform = [(candidates.words(recipe), size, sqnr) for recipe, size, sqnr in found.uniform]
    taken = found.made.checkpoint.layers
    text = auto_report.text(
        goal.describe(),
        _by_choice(found.recipe, taken),
        planned.file,
        found.predicted,
        found.measured,
        uniform,
        [name for name in found.all_layers if name not in taken],
        found.notes,
        sum(layer.weight_only for layer in taken.values()),
    )
    figures |= {
        "predicted_sqnr_db": auto_report.plain(found.predicted),
        "low_precision_sqnr_db": auto_report.plain(found.measured),
        "uniform": [[name, size, auto_report.plain(sqnr)] for name, size, sqnr in uniform],
    }
    return quantized, f"{text[0]}\n{report}\n{text[1]}", mixed.write(found.recipe), figures


def _check_formats(remedies: dict[str, str]) -> None:
    """Raises ValueError for a format that cannot run on this machine, before anything is tried.
    remedies: format -> what to do."""
    for name, remedy in remedies.items():
        found = capability.support(name, "linear", device.current(kinds=()))
        if found.level == capability.REFUSED:
            raise ValueError(f"{found.why}: {remedy}")


def _by_choice(recipe: Recipe | mixed.Mixed, taken) -> dict[str, list[str]]:
    """Recipe in words -> the layers that it quantized."""
    if isinstance(recipe, Recipe):
        return {candidates.words(recipe): list(taken)}
    found: dict[str, list[str]] = {candidates.words(one): [] for one in recipe.choices}
    for name, index in recipe.assignment.items():
        found[candidates.words(recipe.choices[index])].append(name)
    return found
