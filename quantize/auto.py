"""Automatic mixed precision: the format of each layer, from measured sensitivity, under a budget."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..formats import FORMATS
from ..formats.checkpoint import PER_TOKEN, SIXTEEN, STATIC
from ..utils.progress import progress
from . import assign, engine, quality, sensitivity
from .layers import LINEAR_ONLY
from .mixed import Mixed
from .recipe import AWQ_LITE, MAX, MSE, SMOOTHQUANT, Recipe
from .space import Measured, Space

log = logging.getLogger(__name__)
SIZE, BITS, QUALITY = "size", "bits", "quality"
# format of the node -> recipes that are tried for it. Not AWQ_FULL, which is too slow to try
CANDIDATES: dict[str, tuple[dict, ...]] = {
    "int8": (
        {"algorithm": MSE},
        {"algorithm": SMOOTHQUANT},
    ),
    "int8_weights": ({"format": "int8", "algorithm": MSE, "activations": SIXTEEN},),
    "fp8": ({"algorithm": MSE}, {"algorithm": MSE, "activations": PER_TOKEN}),
    "mxfp8": ({"algorithm": MAX},),
    "nvfp4": ({"algorithm": MAX}, {"algorithm": AWQ_LITE}),
    "int4": ({"algorithm": MSE}, {"algorithm": AWQ_LITE}),
    "w4a8": ({"algorithm": AWQ_LITE},),
}
# how often a target of quality is corrected by what was measured
ROUNDS = 4
# dB above a target of quality that are not worth another round
NEAR = 0.5


@dataclass(frozen=True)
class Goal:
    """kind: SIZE (value: bytes of the file), BITS (a weight, of the layers that may be quantized,
    scales included) or QUALITY (SQNR in dB on recorded UNet calls, at least)."""

    kind: str
    value: float

    def describe(self) -> dict:
        """JSON-able."""
        return {"kind": self.kind, "value": self.value}


@dataclass
class Auto:
    """made: the result. recipe: as chosen. predicted, measured: SQNR in dB, on the calls that were
    looked at, in low-precision arithmetic. uniform: recipe -> file size and SQNR of it alone.
    all_layers: those that could be quantized.
    """

    made: engine.Quantized
    recipe: Mixed
    predicted: float
    measured: float
    uniform: list[tuple[Recipe, int, float]]
    all_layers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# calibration -> (model, patches, recipe, layers) -> what was measured of it
_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def auto_quantize(
    model,
    calibration,
    formats: Sequence[str],
    goal: Goal,
    layers: str,
    skip: tuple[str, ...],
    load: Callable,
    sixteen: bool = True,
    tell: Callable[[str], None] = log.info,
) -> Auto:
    """Quantizes a MODEL with the best mix of `formats` for the goal; the MODEL is not changed.

    formats: keys of CANDIDATES; sixteen: layers may also stay in 16 bits. load: quantized
    checkpoint -> MODEL that runs it in low-precision arithmetic. tell: is given a sentence on what
    is being done, from time to time. What was measured of a recipe is
    kept while the calibration lives, so that another goal costs one quantization. Raises ValueError
    (rule, value, where, remedy) where the goal cannot be met, and ComfyUI's
    InterruptProcessingException on cancel.
    """
    names, candidates = _candidates(model, formats, layers, skip)
    measured = _measure(model, calibration, names, candidates, load, tell)
    choices = tuple(one.recipe for one in measured)
    space = Space(model, names, measured, sixteen)
    uniform = []
    for index, one in enumerate(measured):
        recipe = Mixed(choices, dict.fromkeys(one.costs, index), goal.describe())
        uniform.append((one.recipe, space.file_size(recipe, calibration), one.sqnr))
    if goal.kind == QUALITY:
        found = _for_quality(model, calibration, space, goal, load, tell)
    else:
        tell("Quantizing with the best mix")
        found = _for_budget(model, calibration, space, goal, load)
        _not_worse(found, model, calibration, space, goal, uniform, load)
    found.uniform, found.all_layers = uniform, list(names)
    return found


def quantize_with(model, recipe: Mixed, calibration, load: Callable) -> tuple:
    """The quantization by a mixed recipe, and its SQNR in dB in low-precision arithmetic."""
    from .bridge import unet as bridge

    made = engine.quantize_model(model, recipe, calibration)
    if not made.records:
        return made, math.nan
    with torch.inference_mode(False), torch.no_grad():
        outputs = bridge.run_loaded(load(made.checkpoint), made.records, lambda: None)
    return made, _decibel(made.references, outputs)


def _decibel(references: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
    return sum(map(quality.Energy.of, references, outputs), quality.Energy()).db


def words(recipe: Recipe) -> str:
    """A recipe in a few words."""
    rest = "" if recipe.activations == STATIC else f", activations {recipe.activations}"
    return f"{recipe.format} {recipe.algorithm}{rest}"


# ---- what there is to choose from


def _candidates(model, formats, layers: str, skip) -> tuple[dict[str, str], list[Recipe]]:
    """Layers that may be quantized -> kinds, and the recipes to try on them."""
    if not formats:
        raise ValueError("at least one format must be allowed, none is: allow one in the node")
    settled, plans, _ = engine.prepared(
        model.model.diffusion_model, Recipe("int8", MAX, layers=layers, skip=skip)
    )
    found = []
    for name in formats:
        for options in CANDIDATES[name]:
            options = {"format": name, **options}
            if options["algorithm"] == SMOOTHQUANT and settled.layers == LINEAR_ONLY:
                continue  # would keep the file out of stock ComfyUI
            if options.get("activations") == PER_TOKEN and settled.layers == LINEAR_ONLY:
                continue
            found.append(Recipe(**options, layers=settled.layers, skip=settled.skip))
    return {name: one.kind for name, one in plans.items()}, found


def _fitting(model, recipe: Recipe, names: Mapping[str, str]) -> list[str]:
    """The layers that have room for the recipe's format. Convolutions have a second format."""
    unet, numerics = model.model.diffusion_model, FORMATS[recipe.format]
    return [
        name
        for name, kind in names.items()
        if kind != "linear"
        or numerics.why_not(tuple(unet.get_submodule(name).weight.shape)) is None
    ]


def _measure(model, calibration, names, candidates: list[Recipe], load, tell) -> list[Measured]:
    """Costs and quality of every candidate; of those that are known already, as they are known."""
    cache = _known.setdefault(calibration, {})
    who = (weakref.ref(model.model), model.patches_uuid, tuple(names))
    missing = [one for one in candidates if (*who, one) not in cache]
    if missing:
        tell(f"Sensitivity: gradients of {len(names)} layers")
        samples, signal = _listen(model, calibration, list(names))
    for number, recipe in enumerate(missing, start=1):
        tell(f"Sensitivity: {words(recipe)}, {number} of {len(missing)}")
        fitting = _fitting(model, recipe, names)
        if not fitting:
            cache[(*who, recipe)] = None
            continue
        whole = Mixed((recipe,), dict.fromkeys(fitting, 0))
        cache[(*who, recipe)] = _measure_one(model, calibration, whole, samples, signal, load)
    found = [cache[(*who, one)] for one in candidates]
    if not any(found):
        raise ValueError(
            f"an allowed format must fit a layer, {', '.join(o.format for o in candidates)} fit none "
            f"of {len(names)}: allow int8 or fp8"
        )
    return [one for one in found if one is not None]


def _listen(model, calibration, names: list[str]) -> tuple[dict, float]:
    from .bridge import sampling
    from .bridge import unet as bridge

    engine.modelopt.require()
    if calibration is None:
        raise ValueError("sensitivity is measured on recorded UNet calls, got no CALIBRATION")
    calibration.check_matches(sampling.signature(model))
    records = quality.pick(list(calibration), sensitivity.CALLS)
    try:
        with torch.inference_mode(False), torch.no_grad(), bridge.memory_explained(model):
            modules = sum(1 for _ in model.model.diffusion_model.modules())
            step = progress(modules + engine.CALL * len(records))
            twin = bridge.copy_unet(model, step)
            return sensitivity.listen(
                twin,
                names,
                records,
                model.load_device,
                model.model.get_dtype_inference(),
                bridge.differentiable_attention(),
                lambda: step(engine.CALL),
            )
    finally:
        twin = None
        bridge.release_memory()


def _measure_one(model, calibration, whole: Mixed, samples, signal, load) -> Measured:
    from .bridge import unet as bridge

    made = engine.quantize_model(model, whole, calibration)
    layers = [name for name in made.checkpoint.layers if samples.get(name)]
    step = progress(engine.CALL * len(made.records) + len(layers))
    try:
        with torch.inference_mode(False), torch.no_grad():
            quantized = load(made.checkpoint, takes=True)
            outputs = bridge.run_loaded(quantized, made.records, lambda: step(engine.CALL))
            unet, device, dtype = bridge.load(quantized, made.records)
            costs = sensitivity.costs(samples, unet, layers, device, dtype, step)
    finally:
        quantized = unet = None
        bridge.release_memory()
    sqnr = _decibel(made.references, outputs)
    return Measured(whole.choices[0], costs, signal, sqnr)


# ---- the search


def _for_budget(model, calibration, space: Space, goal: Goal, load) -> Auto:
    chosen, recipe = _within(space, goal, calibration)
    made, sqnr = quantize_with(model, recipe, calibration, load)
    predicted = space.decibel(assign.total(space.options, chosen).noise)
    return Auto(made, recipe, predicted, sqnr, [])


def _within(space: Space, goal: Goal, calibration) -> tuple[list[int], Mixed]:
    """The choice of least noise within a size or a number of bits."""
    smallest = [min(range(len(o)), key=lambda i: o[i].size) for o in space.options]
    if goal.kind == BITS:
        chosen = assign.least_noise(space.options, goal.value * space.weights / 8)
        if chosen is None:
            least = 8 * assign.total(space.options, smallest).size / space.weights
            raise ValueError(
                f"{goal.value:g} bits a weight cannot be reached, the allowed formats need "
                f"{least:.3f} or more: raise it or allow a smaller format"
            )
        return chosen, space.recipe(chosen, goal)
    # what is not in the layers' sizes depends a little on the choice: the header names it
    least = space.file_size(space.recipe(smallest, goal), calibration)
    beside = least - assign.total(space.options, smallest).size
    for _ in range(8):
        chosen = assign.least_noise(space.options, goal.value - beside)
        if chosen is None:
            break
        recipe = space.recipe(chosen, goal)
        size = space.file_size(recipe, calibration)
        if size <= goal.value:
            return chosen, recipe
        beside = size - assign.total(space.options, chosen).size
    if least <= goal.value:
        return smallest, space.recipe(smallest, goal)
    raise ValueError(
        f"a file of {goal.value / 1e6:.2f} MB cannot be reached, the allowed formats need "
        f"{least / 1e6:.2f} MB or more: raise it or allow a smaller format"
    )


def _not_worse(found: Auto, model, calibration, space, goal: Goal, uniform, load) -> None:
    """One recipe for all layers takes the place of the mix where it fits and measured better."""

    def fits(index: int, size: int) -> bool:
        one = space.measured[index]
        if goal.kind == SIZE:
            return size <= goal.value
        rest = [n for group in space.groups for n in group if n not in one.costs]
        sixteen = sum(2 * space.weight(name).numel() for name in rest)
        return 8 * (sum(space.sizes(one).values()) + sixteen) / space.weights <= goal.value

    better = [
        (sqnr, index)
        for index, (_, size, sqnr) in enumerate(uniform)
        if sqnr > found.measured and fits(index, size)
    ]
    if not better:
        return
    sqnr, index = max(better)
    one = space.measured[index]
    found.notes.append(
        f"One recipe for all layers, {words(one.recipe)}: it measured "
        f"{sqnr:.2f} dB, the mix {found.measured:.2f} dB."
    )
    found.recipe = Mixed((one.recipe,), dict.fromkeys(one.costs, 0), goal.describe())
    found.made, found.measured = quantize_with(model, found.recipe, calibration, load)
    found.predicted = space.decibel(sum(one.costs.values()))


def _for_quality(model, calibration, space: Space, goal: Goal, load, tell) -> Auto:
    """The smallest mix that measures the SQNR, corrected by what earlier ones measured."""
    correction, best = 0.0, None
    tried: list[str] = []
    for number in range(1, ROUNDS + 1):
        tell(f"Quantizing with a mix of {goal.value:g} dB, round {number}")
        noise = space.signal * 10 ** (-(goal.value + correction) / 10)
        chosen = assign.least_size(space.options, noise)
        if chosen is None:
            break
        recipe = space.recipe(chosen, goal)
        predicted = space.decibel(assign.total(space.options, chosen).noise)
        made, sqnr = quantize_with(model, recipe, calibration, load)
        tried.append(f"{sqnr:.2f} dB")
        met = sqnr >= goal.value
        if met and (best is None or made.checkpoint.nbytes() < best.made.checkpoint.nbytes()):
            best = Auto(made, recipe, predicted, sqnr, [])
        if met and sqnr <= goal.value + NEAR:
            break
        correction += goal.value - sqnr + (0.1 if not met else 0.0)
    if best is None:
        raise ValueError(
            f"an SQNR of {goal.value:g} dB was not reached with the allowed formats (measured: "
            f"{', '.join(tried) or 'none, no mix is predicted to'}): lower it, or allow formats of "
            "more bits"
        )
    return best
