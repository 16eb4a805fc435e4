"""A recipe: format, algorithm and its options, layers; and what that means for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..formats import FORMATS, get
from ..formats.checkpoint import PER_TOKEN, SIXTEEN, STATIC, Layer
from ..formats.groups import sharing
from ..utils.text import brief_repr
from . import branch
from .layers import DEFAULT_SKIP, LINEAR_AND_CONV, LINEAR_ONLY, parse_patterns

MAX, MSE, PERCENTILE, SMOOTHQUANT = "max", "mse", "percentile", "smoothquant"
AWQ_LITE, AWQ_FULL, SVDQUANT = "awq_lite", "awq_full", "svdquant"
# format -> its algorithms, the default first (see also `default_algorithm`): on learned weights
# (benchmarks/results/quality_sd15.md) no other whose file is as small, and which computes no branch
# beside, is better in PSNR or SQNR without being worse in the other
ALGORITHMS = {
    "fp8": (MSE, MAX),
    "int8": (SMOOTHQUANT, MAX, PERCENTILE, MSE),
    "mxfp8": (MAX,),
    "nvfp4": (AWQ_LITE, SVDQUANT, MAX),
    "int4": (AWQ_LITE, AWQ_FULL, SVDQUANT, MSE, MAX),
    "w4a8": (AWQ_LITE, AWQ_FULL, MAX),
    "fp8_e5m2": (MAX,),
}
# algorithms that search a smoothing scale for each Linear in ModelOpt's AWQ
AWQ = (AWQ_LITE, AWQ_FULL, SVDQUANT)
# what a format does with activations, where it has the choice: STATIC is its own way, PER_TOKEN is
# for Linears, SIXTEEN quantizes weights alone
ACTIVATIONS = {"fp8": (STATIC, PER_TOKEN), "int8": (STATIC, SIXTEEN)}
# the other kind of weights of fp8, and the format that it is
WEIGHTS = {"fp8": ("e4m3", "e5m2")}
# what the nodes offer
CHOICES = [name for name in FORMATS if name != "fp8_e5m2"]  # an option of fp8
CONVOLUTIONS = (MAX, PERCENTILE)
# algorithm -> its own options
OPTIONS = {SMOOTHQUANT: ("alpha", "convolutions"), PERCENTILE: ("percentile",), SVDQUANT: ("rank",)}
# option -> what it is where it is not given
DEFAULTS = {"alpha": 0.5, "convolutions": MAX, "percentile": 1.0, "rank": 0}
# those whose default stands for what is right for the model
BY_THE_MODEL = ("rank",)
# option -> its smallest and its largest value
LIMITS = {"alpha": (0.0, 1.0), "percentile": (0.01, 1.0), "rank": (0, 256)}


def default_algorithm(format: str, layers: str = LINEAR_AND_CONV, activations: str = STATIC) -> str:
    """A format's default. `linear only` files are for stock ComfyUI, which knows no smoothing of int8,
    and activations that are not rounded need none."""
    first = ALGORITHMS[format][0]
    plain = layers == LINEAR_ONLY or activations == SIXTEEN
    return MAX if first == SMOOTHQUANT and plain else first


@dataclass(frozen=True)
class Recipe:
    """format: a name of FORMATS; algorithm: one of ALGORITHMS[format], "" for `default_algorithm`.

    alpha: SmoothQuant's, 0 to 1; convolutions: how their activations are calibrated beside it, MAX
    or PERCENTILE; percentile: share of the steps that convolutions' activation
    scales are taken from, above 0 to 1; rank: SVDQuant's, 0 for the largest that the format's
    bits leave room for (branch.py); activations: one of ACTIVATIONS[format]; layers: a mode of
    quantize.layers; skip: patterns of layer names.
    """

    format: str
    algorithm: str = ""
    alpha: float = DEFAULTS["alpha"]
    convolutions: str = DEFAULTS["convolutions"]
    percentile: float = DEFAULTS["percentile"]
    rank: int = DEFAULTS["rank"]
    activations: str = STATIC
    layers: str = LINEAR_AND_CONV
    skip: tuple[str, ...] = DEFAULT_SKIP

    def __post_init__(self) -> None:
        get(self.format)
        known = ALGORITHMS[self.format]
        if not self.algorithm:
            own = default_algorithm(self.format, self.layers, self.activations)
            object.__setattr__(self, "algorithm", own)
        if self.algorithm not in known:
            raise ValueError(
                f"algorithm of {self.format} must be one of {', '.join(known)}, "
                f"got {brief_repr(self.algorithm)}: choose one of them or another format"
            )
        if self.convolutions not in CONVOLUTIONS:
            raise ValueError(
                f"convolutions must be {MAX} or {PERCENTILE}, got {brief_repr(self.convolutions)}: "
                "correct it"
            )
        if self.activations not in ACTIVATIONS.get(self.format, (STATIC,)):
            raise ValueError(
                f"activations of {self.format} must be "
                f"{' or '.join(ACTIVATIONS.get(self.format, (STATIC,)))}, got "
                f"{brief_repr(self.activations)}: choose one of them"
            )
        if self.activations == SIXTEEN and self.algorithm not in (MAX, MSE):
            raise ValueError(
                f"activations in 16 bits go with {MAX} or {MSE}, got algorithm {self.algorithm!r}: "
                "choose one of them"
            )
        clips = PERCENTILE in (self.algorithm, self.convolutions)
        if clips and self.layers == LINEAR_ONLY:
            raise ValueError(
                f"{PERCENTILE} is for convolutions, got it with layers {LINEAR_ONLY!r}: choose "
                f"{LINEAR_AND_CONV!r}, or {MAX} instead of {PERCENTILE}"
            )
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(
                    f"{name} must be from {low:g} to {high:g}, got {brief_repr(value)}: correct it"
                )
        for name, default in DEFAULTS.items():
            value = getattr(self, name)
            if value != default and not self._applies(name):
                owner = next(algorithm for algorithm, own in OPTIONS.items() if name in own)
                raise ValueError(
                    f"{name} goes with the algorithm {owner}, got {brief_repr(value)} with {self.algorithm}: "
                    "leave it out or choose that algorithm"
                )

    def _applies(self, option: str) -> bool:
        """Whether an option of DEFAULTS changes anything."""
        beside = self.algorithm == SMOOTHQUANT and self.convolutions == PERCENTILE
        return option in OPTIONS.get(self.algorithm, ()) or (option == PERCENTILE and beside)

    def describe(self) -> dict:
        """JSON-able, for the file header; only what applies."""
        facts = asdict(self)
        facts["skip"] = list(self.skip)
        for name, default in DEFAULTS.items():
            own = name in OPTIONS.get(self.algorithm, ()) and name not in BY_THE_MODEL
            if not (own or (self._applies(name) and facts[name] != default)):
                del facts[name]
        if self.format != "fp8" and self.activations == STATIC:
            del facts["activations"]
        return facts


def recipe_of(format: Mapping[str, Any], layers: str, skip: str) -> Recipe:
    """The Quantize node's inputs as a recipe. Raises ValueError for options that do not go together.

    An option that is not given, or not known yet while ComfyUI validates, is None.
    """
    algorithm = {name: value for name, value in format["algorithm"].items() if value is not None}
    name = format["format"]
    if format.get("weights") == "e5m2":
        name = "fp8_e5m2"
    if format.get("activations") is not None:
        algorithm["activations"] = format["activations"]
    return Recipe(name, **algorithm, layers=layers, skip=tuple(parse_patterns(skip)))


@dataclass(frozen=True)
class LayerPlan:
    """What is done to one layer.

    algorithm: MAX where the recipe's does not apply to it. activations: see `Layer`. rank: of its
    branch, where the algorithm is SVDQUANT. The rest are the algorithm's options, see `Recipe`.
    """

    kind: str
    format: str
    algorithm: str
    activations: str = ""
    alpha: float = 0.5
    percentile: float = 1.0
    rank: int = 0

    @property
    def smooths(self) -> bool:
        """Whether the layer gets a smoothing scale."""
        return self.algorithm == SMOOTHQUANT or self.algorithm in AWQ

    @property
    def static(self) -> bool:
        """Whether the layer's activations have a calibrated scale."""
        return Layer(self.format, self.kind, activations=self.activations).static

    @property
    def calibrates(self) -> bool:
        """Whether the layer cannot be quantized without recorded activations."""
        return self.static or self.smooths


def may_calibrate(recipe: Recipe) -> bool:
    """Whether there are models of which it cannot quantize every layer without recorded activations."""
    kinds = ("linear",) if recipe.layers == LINEAR_ONLY else ("linear", "conv2d")
    second = FORMATS[recipe.format].SECOND
    for kind in kinds:
        activations = recipe.activations if recipe.activations != STATIC else ""
        if activations == PER_TOKEN and kind != "linear":
            activations = ""
        one = LayerPlan(kind, recipe.format, _algorithm(recipe, kind), activations)
        if one.calibrates or (
            second and kind != "linear" and LayerPlan(kind, second, MAX).calibrates
        ):
            return True
    return False


def plan(
    unet: torch.nn.Module,
    recipe: Recipe,
    layers: Mapping[str, str],
    shaping: Set[str] = frozenset(),
) -> tuple[dict[str, LayerPlan], list[str]]:
    """Layer name -> its plan, and sentences on layers that get another format than the recipe's, and
    on branches that the format's bits leave no room for.

    shaping: names of layers whose stored width must be that of their weight. Layers that share an
    input get one format. Raises ValueError for a Linear whose shape does not fit the format.
    """
    plans, moved = {}, {}
    reasons = {
        name: _why_second(name, unet.get_submodule(name).weight, recipe, name in shaping)
        for name in layers
    }
    for group in sharing(layers):
        first = next((name for name in group if reasons[name] is not None), None)
        for name in group:
            if first is not None and reasons[name] is None:
                reasons[name] = f"one input serves it and {first}"
    for name, kind in layers.items():
        form, algorithm = recipe.format, _algorithm(recipe, kind)
        reason = reasons[name]
        if reason is not None:
            form, algorithm = FORMATS[recipe.format].SECOND, MAX
            moved.setdefault((form, reason), []).append(name)
        activations = ""
        if form == recipe.format and recipe.activations in (PER_TOKEN, SIXTEEN):
            activations = recipe.activations
        if activations == PER_TOKEN and kind != "linear":
            activations = ""
        options = (recipe.alpha, recipe.percentile, recipe.rank if algorithm == SVDQUANT else 0)
        plans[name] = LayerPlan(kind, form, algorithm, activations, *options)
    over = []
    if not recipe.rank and any(one.algorithm == SVDQUANT for one in plans.values()):
        plans, over = _with_rank(unet, plans, recipe.format)
    notes = [
        f"{len(names)} layers in {form} instead of {recipe.format}, because {reason}: "
        + ", ".join(names)
        for (form, reason), names in moved.items()
    ]
    return plans, notes + over


def without_effect(recipe: Recipe, plans: Mapping[str, LayerPlan]) -> list[str]:
    """Sentences on what of the recipe none of its layers gets."""
    found = []
    algorithms = {one.algorithm for one in plans.values()}
    if recipe.algorithm not in algorithms:
        found.append(f"algorithm {recipe.algorithm}")
    if recipe.convolutions != MAX and recipe.convolutions not in algorithms:
        found.append(f"convolutions {recipe.convolutions}")
    if recipe.activations not in ("", STATIC, *(one.activations for one in plans.values())):
        found.append(f"activations {recipe.activations}")
    used = " and ".join(sorted(algorithms))
    return [f"Without effect, as no layer left to quantize takes it: {x} ({used})." for x in found]


def _with_rank(
    unet: torch.nn.Module, plans: Mapping[str, LayerPlan], form: str
) -> tuple[dict[str, LayerPlan], list[str]]:
    """The plans with the rank that the bits of the format `form` leave room for, and a sentence where
    they leave none."""
    weights = {name: unet.get_submodule(name).weight for name in plans}
    branched = [weights[name] for name, one in plans.items() if one.algorithm == SVDQUANT]
    others = [(x.format, weights[name]) for name, x in plans.items() if x.algorithm != SVDQUANT]
    rank, bits = branch.largest_rank(form, branched, others, LIMITS["rank"][1])
    most = branch.WITHIN[form]
    over = (
        f"Branches of rank {rank}, the smallest: these layers take about {bits:.2f} bits a weight with "
        f"them, over the {most:g} of {form}; awq_lite has no branches"
    )
    found = {
        name: replace(one, rank=rank) if one.algorithm == SVDQUANT else one
        for name, one in plans.items()
    }
    return found, [over] if bits > most else []


def _algorithm(recipe: Recipe, kind: str) -> str:
    if kind == "conv2d" and recipe.algorithm == SMOOTHQUANT:
        return recipe.convolutions
    if kind == "conv2d":
        return recipe.algorithm if recipe.algorithm in (MSE, PERCENTILE) else MAX
    return MAX if recipe.algorithm == PERCENTILE else recipe.algorithm


def _why_second(name: str, weight: torch.Tensor, recipe: Recipe, shaping: bool) -> str | None:
    """Why a layer gets the format's second one, or None. Raises where it must not."""
    module = FORMATS[recipe.format]
    reason = module.why_not(tuple(weight.shape))
    if reason is not None and weight.ndim == 2:
        raise ValueError(f"{reason} in {name}: skip that layer or use {module.SECOND}")
    if reason is None and shaping and module.BITS == 4 and module.SECOND is not None:
        return "ComfyUI reads the architecture from its width"
    return reason
