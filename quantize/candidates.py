"""What automatic mixed precision tries: recipes, and what each costs in every layer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..formats import FORMATS
from ..formats.checkpoint import PER_TOKEN, SIXTEEN
from ..utils.progress import progress
from ..utils.report import choice_words
from . import engine, quality, sensitivity
from .layers import LINEAR_ONLY
from .mixed import Mixed
from .recipe import AWQ_LITE, MAX, MSE, SMOOTHQUANT, Recipe
from .space import Measured


@dataclass(frozen=True)
class Candidate:
    """A format that may be allowed. recipes: options of those that are tried for it. default:
    whether it is allowed where nothing is said. text: for the user."""

    recipes: tuple[dict, ...]
    default: bool
    text: str


# not AWQ_FULL, which is too slow to try, nor percentile, whose rare clipped values samples miss
CANDIDATES = {
    "int8": Candidate(
        ({"algorithm": MSE}, {"algorithm": SMOOTHQUANT}), True, "8 bits, computed in 8 bits."
    ),
    "fp8": Candidate(
        ({"algorithm": MSE}, {"algorithm": MSE, "activations": PER_TOKEN}),
        True,
        "8 bits, computed in 8 bits.",
    ),
    "int4": Candidate(
        ({"algorithm": MSE}, {"algorithm": AWQ_LITE}),
        True,
        "4 bits, computed in 16: saves memory, not time.",
    ),
    "int8_weights": Candidate(
        ({"format": "int8", "algorithm": MSE, "activations": SIXTEEN},),
        True,
        "8-bit weights, computed in 16: near to the original, saves memory, not time. Switch this "
        "and int4 off for a model that is faster.",
    ),
    "mxfp8": Candidate(
        ({"algorithm": MAX},), False, "8 bits in blocks; computed so on RTX 50 and B200 only."
    ),
    "nvfp4": Candidate(
        ({"algorithm": MAX}, {"algorithm": AWQ_LITE}),
        False,
        "4 bits in blocks; computed so on RTX 50 and B200 only.",
    ),
    "w4a8": Candidate(({"algorithm": AWQ_LITE},), False, "4-bit weights, computed in FP8."),
}

# calibration -> (model, patches, recipe, layers) -> what was measured of it
_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def words(recipe: Recipe) -> str:
    """A recipe in a few words, as reports have it."""
    return choice_words(recipe.describe())


def candidates(model, formats, layers: str, skip) -> tuple[dict[str, str], list[Recipe]]:
    """Layers that may be quantized -> kinds, and the recipes to try on them."""
    if not formats:
        raise ValueError("at least one format must be allowed, none is: allow one in the node")
    settled, plans, _ = engine.prepared(
        model.model.diffusion_model, Recipe("int8", MAX, layers=layers, skip=skip)
    )
    found = []
    for name in formats:
        for options in CANDIDATES[name].recipes:
            options = {"format": name, **options}
            recipe = Recipe(**options, layers=settled.layers, skip=settled.skip)
            # these would keep a file of Linears out of stock ComfyUI
            ours = recipe.algorithm == SMOOTHQUANT or recipe.activations == PER_TOKEN
            if settled.layers != LINEAR_ONLY or not ours:
                found.append(recipe)
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


def unmeasured(model, names: Mapping[str, str], recipes: list[Recipe]) -> list[Measured]:
    """The recipes that fit a layer, with the layers that they fit: enough to know sizes by."""
    fitting = [(recipe, _fitting(model, recipe, names)) for recipe in recipes]
    return [Measured(one, dict.fromkeys(fits, 0.0), 1.0, 0.0) for one, fits in fitting if fits]


def measure(model, calibration, names, recipes: list[Recipe], load, tell) -> list[Measured]:
    """Costs and quality of every candidate; of those that are known already, as they are known."""
    cache = _known.setdefault(calibration, {})
    who = (weakref.ref(model.model), model.patches_uuid, tuple(names))
    missing = [one for one in recipes if (*who, one) not in cache]
    if missing:
        tell(f"Sensitivity: gradients of {len(names)} layers")
        samples, signal = _listen(model, calibration, list(names))
        names = {name: kind for name, kind in names.items() if samples[name]}
    for number, recipe in enumerate(missing, start=1):
        tell(f"Sensitivity: {words(recipe)}, {number} of {len(missing)}")
        fitting = _fitting(model, recipe, names)
        if not fitting:
            cache[(*who, recipe)] = None
            continue
        whole = Mixed((recipe,), dict.fromkeys(fitting, 0))
        cache[(*who, recipe)] = _measure_one(model, calibration, whole, samples, signal, load)
    found = [cache[(*who, one)] for one in recipes]
    if not any(found):
        raise ValueError(
            f"an allowed format must fit a layer, {', '.join(o.format for o in recipes)} fit none "
            f"of {len(names)}: allow int8 or fp8"
        )
    return [one for one in found if one is not None]


def _listen(model, calibration, names: list[str]) -> tuple[dict, float]:
    from .bridge import unet as bridge

    records = quality.pick(list(calibration), sensitivity.CALLS)
    try:
        with torch.inference_mode(False), torch.no_grad():
            modules = sum(1 for _ in model.model.diffusion_model.modules())
            step = progress(modules + engine.CALL * len(records))
            twin = bridge.copy_unet(model, step)
            bridge.check_resident(
                twin,
                model.load_device,
                "the sensitivity's backward pass",
                "choose one format in Quantize UNet",
            )
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
    sqnr = quality.decibel(made.references, outputs)
    return Measured(whole.choices[0], costs, signal, sqnr)
