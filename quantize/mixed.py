"""A mixed recipe: which of several recipes quantizes each layer. As JSON it goes to another machine, as
does one recipe for all layers, where Auto Quantize finds no mix that is better."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from ..utils.text import brief, brief_repr, read_json
from .layers import MODES, kind_of
from .recipe import AWQ, AWQ_FULL, LayerPlan, Recipe, plan

FORMAT_VERSION = 1
KIND = "comfyui-modelopt mixed recipe"
REMEDY = "take the text or file that Auto Quantize wrote, whole"
# of a Recipe, what a choice of a mixed one does not have: its layers are named one by one
OF_ALL_LAYERS = ("layers", "skip")


@dataclass(frozen=True)
class Mixed:
    """choices: the recipes, whose `layers` and `skip` do not count. assignment: layer name -> index
    of its choice; a layer that is not named stays in 16 bits. goal: what it was chosen for,
    JSON-able."""

    choices: tuple[Recipe, ...]
    assignment: Mapping[str, int]
    goal: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        used = sorted(set(self.assignment.values()))
        if not used:
            raise ValueError(
                f"a mixed recipe must quantize at least one layer, this one names none: {REMEDY}"
            )
        if used[0] < 0 or used[-1] >= len(self.choices):
            raise ValueError(
                f"a layer's choice must be one of {len(self.choices)}, found {used[-1]}: {REMEDY}"
            )

        searched = {self.choices[index].algorithm for index in used} & set(AWQ)
        if AWQ_FULL in searched and len(searched) > 1:
            raise ValueError(
                f"ModelOpt searches with {AWQ_FULL} or with another AWQ, not both, found "
                f"{' and '.join(sorted(searched))} in one mixed recipe: take one of them"
            )

    def describe(self) -> dict[str, Any]:
        """JSON-able, for the file header and for `read`."""
        layers: dict[str, list[str]] = {}
        for name, index in self.assignment.items():
            layers.setdefault(str(index), []).append(name)
        return {
            "format": "mixed",
            "algorithm": "auto",
            "choices": [_described(choice) for choice in self.choices],
            "assignment": layers,
            "goal": dict(self.goal),
        }


def _described(choice: Recipe) -> dict[str, Any]:
    return {name: x for name, x in choice.describe().items() if name not in OF_ALL_LAYERS}


def used(recipe: Recipe | Mixed) -> list[Recipe]:
    """The recipes that quantize layers."""
    if isinstance(recipe, Recipe):
        return [recipe]
    return [recipe.choices[index] for index in sorted(set(recipe.assignment.values()))]


def write(recipe: Recipe | Mixed) -> str:
    """The recipe as JSON text."""
    head = {"kind": KIND, "format_version": FORMAT_VERSION}
    return json.dumps(head | recipe.describe(), indent=1) + "\n"


def read(text: str, where: str = "the recipe") -> Recipe | Mixed:
    """JSON text of `write` -> the recipe. Raises ValueError for anything else."""
    if not isinstance(text, str):
        raise ValueError(f"a recipe must be JSON text, {where} is {brief_repr(text)}: {REMEDY}")
    if not text.strip():
        raise ValueError(f"a recipe must be JSON, {where} is empty: {REMEDY}")
    try:
        given = read_json(text)
    except ValueError as error:
        raise ValueError(f"a recipe must be JSON, {where} is not ({error}): {REMEDY}") from error
    if not isinstance(given, dict) or given.get("kind") != KIND:
        raise ValueError(f"a recipe must be of the kind {KIND!r}, {where} is not: {REMEDY}")
    version = given.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"this pack reads recipes of format version {FORMAT_VERSION}, {where} has {brief_repr(version)}: "
            "update the pack, or make the recipe again"
        )
    if given.get("format", "mixed") != "mixed":
        return _whole(given, where)
    choices = given.get("choices")
    if not isinstance(choices, list):
        _fail("choices must be a list", choices, where)
    goal = given.get("goal")
    if not isinstance(goal, dict):
        _fail("goal must be a table", goal, where)
    made = tuple(_choice(choice, where) for choice in choices)
    assignment = _assignment(given.get("assignment"), where)
    with _named(where):
        return Mixed(made, assignment, goal)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Says where a recipe came from that breaks a rule of recipes."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where} breaks a rule of recipes: {error}") from error


def _whole(given: Mapping[str, Any], where: str) -> Recipe:
    """One recipe for all layers."""
    layers, skip = given.get("layers"), given.get("skip")
    if layers not in MODES:
        _fail(f"layers must be {' or '.join(MODES)}", layers, where)
    if not isinstance(skip, list) or not all(isinstance(one, str) for one in skip):
        _fail("skip must be a list of patterns of layer names", skip, where)
    beside = ("kind", "format_version", *OF_ALL_LAYERS)
    choice = _choice({name: x for name, x in given.items() if name not in beside}, where)
    with _named(where):
        return replace(choice, layers=layers, skip=tuple(skip))


def _choice(given: Any, where: str) -> Recipe:
    kinds = {"str": str, "float": (int, float), "int": int}
    known = {f.name: kinds[f.type] for f in fields(Recipe) if f.name not in OF_ALL_LAYERS}
    if not isinstance(given, dict) or "format" not in given:
        _fail("a choice must be a table with a format", given, where)
    for name, value in given.items():
        if name not in known or not isinstance(value, known[name]) or isinstance(value, bool):
            _fail(f"a choice's options must be those of a recipe ({', '.join(known)})", name, where)
    with _named(where):
        return Recipe(**given)


def _assignment(given: Any, where: str) -> dict[str, int]:
    if not isinstance(given, dict):
        _fail("assignment must be a table of layer names", given, where)
    found: dict[str, int] = {}
    for index, names in given.items():
        listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not (index.isascii() and index.isdigit()) or len(index) > 6 or not listed:
            _fail("assignment must be lists of layer names by number of choice", index, where)
        for name in names:
            if name in found:
                _fail("a layer must be assigned once", f"{name} twice", where)
            found[name] = int(index)
    return found


def _fail(rule: str, found: Any, where: str) -> None:
    raise ValueError(f"{rule}, found {brief_repr(found)} in {where}: {REMEDY}")


def plan_mixed(
    unet: torch.nn.Module,
    recipe: Mixed,
    shaping: Callable[[Recipe, Mapping[str, str]], set[str]],
) -> tuple[dict[str, LayerPlan], list[str]]:
    """Layer name -> its plan, in the UNet's order, and sentences, as `recipe.plan` gives them.

    shaping: see `engine.shaping`. Raises ValueError for a layer that this UNet does not have.
    """
    kinds = {name: kind for name, m in unet.named_modules() if (kind := kind_of(m)) is not None}
    strange = [name for name in recipe.assignment if name not in kinds]
    if strange:
        raise ValueError(
            f"a recipe's layers must be layers of the model, it names {len(strange)} that this one "
            f"has not, the first {brief(strange[0])}: use it with models of the architecture that it was "
            "made for"
        )
    plans: dict[str, LayerPlan] = {}
    notes: list[str] = []
    for index, choice in enumerate(recipe.choices):
        layers = {n: kinds[n] for n, i in recipe.assignment.items() if i == index}
        if not layers:
            continue
        found, moved = plan(unet, choice, layers, shaping(choice, layers))
        plans |= found
        notes += moved
    return {name: plans[name] for name in kinds if name in plans}, notes
