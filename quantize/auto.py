"""Automatic mixed precision: the format of each layer, from measured sensitivity, under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..formats import files
from ..utils import out_of_memory
from ..utils.progress import progress
from ..utils.progress import tell as on_node
from ..utils.report import megabytes
from . import assign, candidates, engine, modelopt, quality
from .mixed import Mixed
from .recipe import Recipe
from .space import Space

SIZE, BITS, QUALITY = "size", "bits", "quality"
# how often a target of quality is corrected by what was measured
ROUNDS = 4
# dB above a target of quality that are not worth another round
NEAR = 0.5
# dB that a target not reached is raised by beside what it missed
MARGIN = 0.1


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
    recipe: Recipe | Mixed
    predicted: float
    measured: float
    uniform: list[tuple[Recipe, int, float]]
    all_layers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@out_of_memory.explained("quantizing", out_of_memory.RECORD_SMALLER)
def auto_quantize(
    model,
    calibration,
    formats: Sequence[str],
    goal: Goal,
    layers: str,
    skip: tuple[str, ...],
    load: Callable,
    sixteen: bool = True,
    tell: Callable[[str], None] = on_node,
) -> Auto:
    """Quantizes a MODEL with the best mix of `formats` for the goal; the MODEL is not changed.

    formats: keys of candidates.CANDIDATES; sixteen: layers may also stay in 16 bits. load: quantized
    checkpoint -> MODEL that runs it in low-precision arithmetic. tell: is given a sentence on what
    is being done, from time to time. What was measured of a recipe is kept while the calibration
    lives, so that another goal costs one quantization, or the few that a quality takes. Raises ValueError
    (rule, value, where, remedy) where the goal cannot be met, and ComfyUI's
    InterruptProcessingException on cancel.
    """
    from .bridge import sampling
    from .bridge import unet as bridge

    modelopt.require()
    bridge.unet_of(model)
    calibration.check_matches(sampling.signature(model))
    names, recipes = candidates.candidates(model, formats, layers, skip)
    ahead = tell
    if sized := candidates.unmeasured(model, names, recipes):  # before all the work
        search = _search(model, calibration, Space(model, names, sized, sixteen), goal, load, tell)
        search.check()
        within_reach = search.within_reach()

        def ahead(text: str) -> None:
            tell(f"{within_reach}\n{text}")

    measured = candidates.measure(model, calibration, names, recipes, load, ahead)
    search = _search(model, calibration, Space(model, names, measured, sixteen), goal, load, tell)
    found = search.for_quality() if goal.kind == QUALITY else search.for_budget()
    found.uniform = [
        (one.recipe, size, one.sqnr) for one, size in zip(measured, search.sizes, strict=True)
    ]
    found.all_layers = list(names)
    if silent := [name for name in names if not any(name in one.costs for one in measured)]:
        found.notes.append(
            f"Kept in 16 bits, as none of the calls looked at reaches them: {', '.join(silent)}."
        )
    return found


def _to_the_byte(count: float) -> str:
    """Bytes in MB."""
    return f"{count / 1e6:.6f}".rstrip("0").rstrip(".")


def _search(model, calibration, space: Space, goal: Goal, load: Callable, tell) -> _Search:
    sizes = [
        space.file_size(space.uniform(i, goal), calibration) for i in range(len(space.measured))
    ]
    return _Search(model, calibration, space, goal, sizes, load, tell)


@dataclass
class _Search:
    """What the search for a goal goes by. sizes: bytes of each uniform recipe's file."""

    model: object
    calibration: object
    space: Space
    goal: Goal
    sizes: list[int]
    load: Callable
    tell: Callable[[str], None]

    def quantize(self, recipe: Recipe | Mixed, predicted: float) -> Auto:
        """By a recipe, measured in low-precision arithmetic."""
        from .bridge import unet as bridge

        size = self.space.file_size(recipe, self.calibration)
        self.tell(f"Quantizing: a file of {megabytes(size)}, {predicted:.1f} dB predicted")
        made = engine.quantize_model(self.model, recipe, self.calibration)
        step = progress(len(made.records))
        with torch.inference_mode(False), torch.no_grad():
            outputs = bridge.run_loaded(self.load(made.checkpoint), made.records, step)
        return Auto(made, recipe, predicted, quality.decibel(made.references, outputs), [])

    def mix(self, chosen: list[int]) -> Auto:
        """By a choice of options."""
        noise = assign.total(self.space.options, chosen).noise
        return self.quantize(self.space.recipe(chosen, self.goal), self.space.decibel(noise))

    def uniform(self, index: int, why: str) -> Auto:
        """By one recipe for all layers."""
        one = self.space.measured[index]
        found = self.quantize(
            self.space.uniform(index, self.goal), self.space.decibel(sum(one.costs.values()))
        )
        found.notes.append(f"One recipe for all layers, {candidates.words(one.recipe)}: {why}.")
        return found

    def for_budget(self) -> Auto:
        """The choice of least noise; one recipe alone where it fits and measured better, or where no
        mix fits."""
        space, goal = self.space, self.goal
        self.check()  # again: layers that no call reaches stay in 16 bits
        if goal.kind == BITS:
            chosen = self.within_bits()
            fits = [i for i in range(len(self.sizes)) if space.bits(i) <= goal.value]
        else:
            chosen = self.within_size()
            fits = [i for i, size in enumerate(self.sizes) if size <= goal.value]
        best = max(fits, key=lambda i: space.measured[i].sqnr, default=None)
        if chosen is None:
            return self.uniform(best, "a mix would be larger, as its file names each layer")
        found = self.mix(chosen)
        if best is None or space.measured[best].sqnr <= found.measured:
            return found
        return self.uniform(best, f"the mix measured {found.measured:.2f} dB")

    def check(self) -> None:
        """Raises ValueError where the smallest file is over the budget. That follows from shapes."""
        space, goal = self.space, self.goal
        if goal.kind == BITS:
            least = 8 * assign.total(space.options, space.smallest()).size / space.weights
            if least > goal.value:
                raise ValueError(
                    f"{goal.value:g} bits a weight cannot be reached, the allowed formats need "
                    f"{math.ceil(least * 1000) / 1000:.3f} or more: raise it or allow a smaller format"
                )
        if goal.kind == SIZE:
            least = self.least()
            if least > goal.value:
                raise ValueError(
                    f"a file of {_to_the_byte(goal.value)} MB cannot be reached, the allowed formats need "
                    f"{_to_the_byte(least)} MB or more: raise it or allow a smaller format"
                )

    def least(self) -> int:
        """Bytes of the smallest file."""
        return min(self.beside(self.space.smallest())[0], *self.sizes)

    def within_reach(self) -> str:
        """What can be reached, from shapes alone, as a sentence."""
        return (
            f"Files from {megabytes(self.least())} can be made; one recipe for all layers gives "
            f"{megabytes(min(self.sizes))} to {megabytes(max(self.sizes))}"
        )

    def beside(self, chosen: list[int]) -> tuple[int, float]:
        """The file's size, and what of it is not in the layers: the header names the choice."""
        size = self.space.file_size(self.space.recipe(chosen, self.goal), self.calibration)
        return size, size - assign.total(self.space.options, chosen).size

    def within_bits(self) -> list[int]:
        space, goal = self.space, self.goal
        chosen = assign.least_noise(space.options, goal.value * space.weights / 8)
        return space.smallest() if chosen is None else chosen

    def within_size(self) -> list[int] | None:
        """None where the smallest mix is over the size, which one recipe alone may be within."""
        space, goal = self.space, self.goal
        smallest = space.smallest()
        least, rest = self.beside(smallest)
        if least > goal.value:
            return None
        allowed = goal.value - rest
        while (chosen := assign.least_noise(space.options, allowed)) is not None:
            size, _ = self.beside(chosen)
            if size <= goal.value:
                return chosen
            allowed -= size - goal.value
        return smallest

    def for_quality(self) -> Auto:
        """The smallest mix that measures the SQNR, corrected by what earlier ones measured; one
        recipe alone where it does and is smaller."""
        space, goal = self.space, self.goal
        correction, best, size = 0.0, None, math.inf
        seen: dict[tuple[int, ...], float] = {}
        for _ in range(ROUNDS):
            noise = space.signal * 10 ** (-(goal.value + correction) / 10)
            chosen = assign.least_size(space.options, noise)
            if chosen is None:
                break
            if not space.quantizes(chosen):  # predicted noise is too high where little is quantized
                chosen = space.gentlest(chosen)
            if tuple(chosen) in seen:
                break
            found = self.mix(chosen)
            seen[tuple(chosen)] = found.measured
            met = found.measured >= goal.value
            if met and (own := files.size(found.made.checkpoint)) < size:
                best, size = found, own
            if met and found.measured <= goal.value + NEAR:
                break
            correction += goal.value - found.measured + (0.0 if met else MARGIN)
        alone = [i for i, one in enumerate(space.measured) if one.sqnr >= goal.value]
        smaller = min(alone, key=lambda i: self.sizes[i], default=None)
        if smaller is not None and self.sizes[smaller] < size:
            return self.uniform(smaller, "no mix that was tried is smaller and keeps the quality")
        if best is None:
            raise ValueError(
                f"an SQNR of {goal.value:g} dB was not reached with the allowed formats (measured: "
                f"{', '.join(f'{one:.2f} dB' for one in seen.values()) or 'none, no mix is predicted to'}"
                "): lower it, or allow formats "
                "of more bits"
            )
        return best
