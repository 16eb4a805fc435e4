"""What quantizing will give and take, for the nodes that show it before they start."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..formats import FORMATS, files
from ..formats.checkpoint import QuantizedCheckpoint
from ..loaders import device as devices
from ..loaders import expected, trial
from ..quantize import calling, engine, modelopt, needs, prediction, trying, whose
from ..quantize.bridge.unet import unet_of
from ..quantize.layers import LINEAR_AND_CONV
from ..quantize.mixed import Mixed
from ..quantize.recipe import Recipe
from ..utils import out_of_memory, plan_report
from ..utils.memory import COUNTED
from ..utils.progress import progress


@dataclass(frozen=True)
class Sizes:
    """file: bytes of what Save writes; held: bytes of the weights once loaded here; made: the
    checkpoint they follow from, without values."""

    file: int
    held: int
    made: QuantizedCheckpoint
    notes: list[str]

    def line(self) -> str:
        """Both in words, before the run."""
        return plan_report.size_line(self.file, self.held)

    def kept(self, file: int, held: int) -> str:
        """Both in words beside what they came to."""
        return plan_report.kept_line((self.file, self.held), (file, held))


def sizes(model, recipe, calibration=None) -> Sizes:
    """Well under a second: no weight is read. Raises as quantizing does."""
    source = unet_of(model)
    recipe, plans, notes = engine.prepared(source, recipe)
    made = prediction.checkpoint(model, recipe, plans, calibration)
    return Sizes(files.size(made), expected.held_bytes(made, model), made, notes)


def others(model, recipe: Recipe | Mixed, calibration) -> dict[str, int]:
    """Format -> bytes of the file, with the same layers and the format's default algorithm; formats
    that a layer's shape does not fit are left out, and all of them beside a mix."""
    if isinstance(recipe, Mixed):
        return {}
    found = {}
    for name in FORMATS:
        try:
            other = Recipe(name, layers=recipe.layers, skip=recipe.skip)
            found[name] = sizes(model, other, calibration).file
        except ValueError:
            continue
    return found


@out_of_memory.explained("planning", out_of_memory.RECORD_SMALLER)
def plan(model, recipe: Recipe | Mixed, calibration=None) -> tuple[str, dict]:
    """The plan in words, and its figures (JSON-able). The MODEL is not changed; with a calibration
    one of its calls is made, and one layer of each kind is packed, to measure memory and time."""
    source = unet_of(model)
    settled, plans, _ = engine.prepared(source, recipe)
    found = sizes(model, recipe, calibration)
    records = len(calibration) if calibration is not None else 0
    missing = not records and any(one.calibrates for one in plans.values())
    step = progress(len(set(trying.keys(source, plans).values())) + 3)
    trials = trying.layers(source, plans, model.load_device, step)
    record = calling.largest(calibration) if records else None
    call = calling.try_call(model, record, step) if records else None
    step()
    chosen = expected.kernels(found.made, model)
    running = None
    if call is not None:
        dense = expected.in_floating_point(chosen, found.made.layers)
        working, laid_out = None, call
        if model.load_device.type == "cpu":
            tried = trial.calls(found.made, model, chosen, call.inputs)
            working, laid_out = tried.working, calling.laid_out(model, record, call, tried.last)
        running = needs.call_peak(source, plans, trials, laid_out, dense, working)
    to_quantize = needs.memory(model, found.made, plans, trials, call)
    ordinary = call and replace(call, seconds=call.seconds * calling.share(calibration, record))
    seconds = needs.seconds(source, plans, trials, ordinary, records)
    step()
    facts = plan_report.Facts(
        recipe=settled.describe(),
        layers=found.made.layers,
        kernels=list(chosen.values()),
        opens_in_stock=found.made.opens_in_stock,
        file=found.file,
        before=sum(2 * parameter.numel() for parameter in source.parameters()),
        held=found.held,
        device=str(model.load_device),
        gpu=devices.current(),
        missing=missing,
        records=records,
        shape=call.shape if call is not None else None,
        call_seconds=call.seconds if call is not None else None,
        running=running,
        reserved=round(model.model.memory_required(list(call.shape))) if call else None,
        to_quantize=to_quantize if model.load_device.type in COUNTED else None,
        seconds=None if missing else seconds,
        compiles=modelopt.compiles(whose.kernels_needed(plans, model.load_device)),
        calls=needs.calls(plans, records),
        others=others(model, recipe, calibration),
        convolutions=_share_of_convolutions(source, recipe),
        notes=found.notes,
    )
    return plan_report.text(facts), plan_report.figures(facts)


def _share_of_convolutions(source: torch.nn.Module, recipe: Recipe | Mixed) -> float:
    """How much of the weights is in convolutions that `linear + conv` would quantize beside those
    of `linear only`; 0 where they are quantized already, or left alone layer by layer."""
    if isinstance(recipe, Mixed) or recipe.layers == LINEAR_AND_CONV:
        return 0.0
    convolutions = [
        module.weight.numel() for module in source.modules() if isinstance(module, torch.nn.Conv2d)
    ]
    return sum(convolutions) / sum(parameter.numel() for parameter in source.parameters())
