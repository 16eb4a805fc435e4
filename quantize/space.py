"""What mixed precision chooses from: groups of layers, the size and the noise of each of their ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..formats import files
from ..formats.groups import sharing
from . import assign, engine, prediction
from .mixed import Mixed
from .recipe import LayerPlan, Recipe


@dataclass(frozen=True)
class Measured:
    """One recipe on all the layers that it fits. costs: layer -> what it adds to the sum of squared
    errors; signal: the sum of squares of the outputs; sqnr: measured, in dB, of the whole."""

    recipe: Recipe
    costs: Mapping[str, float]
    signal: float
    sqnr: float


class Space:
    """Groups of layers and their options, sizes from shapes alone."""

    def __init__(self, model, names: Mapping[str, str], measured: list[Measured], sixteen: bool):
        self.model, self.names, self.measured = model, names, measured
        self.choices = tuple(one.recipe for one in measured)
        self.signal = measured[0].signal
        # those that a fused kernel runs at once must have one format
        self.groups = sharing(names)
        self.weights = sum(math.prod(self.weight(n).shape) for n in names)
        sizes = [self.sizes(one) for one in measured]
        self.indices: list[list[int | None]] = []
        self.options: list[list[assign.Option]] = []
        for group in self.groups:
            indices: list[int | None] = [
                i for i, one in enumerate(measured) if all(name in one.costs for name in group)
            ]
            options = [
                assign.Option(
                    sum(sizes[i][name] for name in group),
                    sum(measured[i].costs[name] for name in group),
                )
                for i in indices
            ]
            if sixteen or not indices:
                indices.append(None)
                options.append(assign.Option(sum(2 * self.weight(n).numel() for n in group), 0.0))
            self.indices.append(indices)
            self.options.append(options)

    def weight(self, name: str) -> torch.Tensor:
        return self.model.model.diffusion_model.get_submodule(name).weight

    def smallest(self) -> list[int]:
        """Of each group the option of least size."""
        return [min(range(len(o)), key=lambda i: o[i].size) for o in self.options]

    def uniform(self, index: int, goal) -> Recipe | Mixed:
        """One recipe for all layers that it fits; where it fits all, the one that Quantize would take,
        as its file is smaller: the header does not name each layer."""
        one = self.measured[index]
        if one.costs.keys() == self.names.keys():
            return one.recipe
        return Mixed((one.recipe,), dict.fromkeys(one.costs, 0), goal.describe())

    def bits(self, index: int) -> float:
        """Bits a weight of one recipe for all layers; those it does not fit have 16."""
        one = self.measured[index]
        rest = [name for group in self.groups for name in group if name not in one.costs]
        sixteen = sum(2 * self.weight(name).numel() for name in rest)
        return 8 * (sum(self.sizes(one).values()) + sixteen) / self.weights

    def sizes(self, one: Measured) -> dict[str, float]:
        """Bytes of each layer's weight and scales."""
        whole = Mixed((one.recipe,), dict.fromkeys(one.costs, 0))
        unet = self.model.model.diffusion_model
        _, plans, _ = engine.prepared(unet, whole)
        return {name: _bytes(unet.get_submodule(name), plan) for name, plan in plans.items()}

    def quantizes(self, chosen: list[int]) -> bool:
        """Whether a choice leaves not all layers in 16 bits."""
        return any(
            indices[taken] is not None for indices, taken in zip(self.indices, chosen, strict=True)
        )

    def gentlest(self, chosen: list[int]) -> list[int]:
        """A choice that leaves all layers in 16 bits, with that group quantized which adds least."""
        ways = [
            (options[i].noise, number, i)
            for number, (options, indices) in enumerate(
                zip(self.options, self.indices, strict=True)
            )
            for i, index in enumerate(indices)
            if index is not None
        ]
        _, number, i = min(ways)
        return [*chosen[:number], i, *chosen[number + 1 :]]

    def recipe(self, chosen: list[int], goal) -> Recipe | Mixed:
        """The recipe of a choice, mixed where it is not one for all layers."""
        assignment = {}
        for group, indices, taken in zip(self.groups, self.indices, chosen, strict=True):
            if indices[taken] is not None:
                assignment |= dict.fromkeys(group, indices[taken])
        if not assignment:
            raise ValueError(
                f"a quantized MODEL must have a quantized layer, the target {goal.kind} "
                f"{goal.value:g} leaves all in 16 bits: choose a smaller size or a lower SQNR"
            )
        used = sorted(set(assignment.values()))
        if len(used) == 1 and len(assignment) == len(self.names):
            return self.choices[used[0]]
        choices = tuple(self.choices[i] for i in used)
        order = {i: number for number, i in enumerate(used)}
        numbered = {name: order[i] for name, i in assignment.items()}
        return Mixed(choices, numbered, goal.describe())

    def file_size(self, recipe: Recipe | Mixed, calibration) -> int:
        """Bytes of the file, exactly."""
        _, plans, _ = engine.prepared(self.model.model.diffusion_model, recipe)
        return files.size(prediction.checkpoint(self.model, recipe, plans, calibration))

    def decibel(self, noise: float) -> float:
        return 10 * math.log10(self.signal / noise) if noise > 0 else math.inf


def _bytes(module: torch.nn.Module, plan: LayerPlan) -> float:
    tensors, _ = prediction.layer(module, plan, calibrated=True)
    return float(sum(t.nbytes for key, t in tensors.items() if key != "bias"))
