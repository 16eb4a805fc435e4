"""What quantizing takes on this device, in memory and time: what packing a layer of each kind (`trying`)
and a recorded UNet call (`calling`) took is scaled to the whole."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from ..formats.checkpoint import QuantizedCheckpoint
from ..utils import finite
from . import clipping, engine, modelopt
from .calling import Call
from .recipe import AWQ, AWQ_FULL, LayerPlan
from .trying import Key, Trial, factors, key, keys, work

# bytes a weight of `pack.sixteen_bits`, beside its result: torch's isfinite
FINITE = 5
# scales that ModelOpt's AWQ tries for a layer: alpha from 0 to 1 in steps of 0.1
AWQ_TRIALS = 11


def call_peak(
    source: torch.nn.Module,
    plans: Mapping[str, LayerPlan],
    trials: Mapping[Key, Trial],
    call: Call,
    dequantized: Collection[str],
    working: Mapping[str, int] | None,
) -> int | None:
    """Bytes that a call of the quantized UNet takes beside its weights, at its highest. None where
    memory is not counted.

    working: on a CPU, what each quantized layer takes (`loaders.trial`); all else is as in `call`
    (`calling.laid_out`), but that weights held in 32 bits there stay in 16 here, and are cast for each
    call. Elsewhere None: as `call`, or what is there when the weight of a layer of `dequantized` is used
    so, and that.
    """
    if call.peak is None:
        return None
    highest = call.peak if working is None else call.memory.outside
    for name, live in call.memory.live.items():
        module = source.get_submodule(name)
        if working is None:
            if name in dequantized:
                shape = tuple(module.weight.shape)
                plain = trials[key(plans[name], shape)].reading * math.prod(shape)
                highest = max(highest, live + round(plain))
        elif name in plans:
            highest = max(highest, live + working[name])
        else:
            cast = _cast(module) if call.itemsize == 4 else 0
            highest = max(highest, call.memory.inside[name] + cast)
    return highest


def _cast(module: torch.nn.Module) -> int:
    """Bytes in 32 bits of a layer's parameters that are held so; the others were cast in the call."""
    return sum(p.nbytes for p in module.parameters(recurse=False) if p.dtype.itemsize == 4)


def memory(
    model,
    made: QuantizedCheckpoint,
    plans: Mapping[str, LayerPlan],
    trials: Mapping[Key, Trial],
    call: Call | None,
) -> tuple[int, int]:
    """Peak bytes of tensors that quantizing adds: on the device, and in RAM beside it (0 where the
    device is the CPU).

    made: what `prediction.checkpoint` gives. Without a call, its memory is not in it.
    """
    from .bridge import unet as bridge

    source = bridge.unet_of(model)
    own = _own(model, plans)
    calling = (call.peak or 0) if call is not None else 0
    shapes = {name: tuple(source.get_submodule(name).weight.shape) for name in plans}
    tried = {name: trials[which] for name, which in keys(source, plans).items()}
    working = {
        name: one.packing * math.prod(shapes[name]) + factors(shapes[name], plans[name])
        for name, one in tried.items()
    }
    searched = {
        name: one.searching * math.prod(shapes[name])
        for name, one in tried.items()
        if plans[name].algorithm in AWQ
    }
    calling = max(
        _searching(source, searched, call), _clipping(source, plans, searched, call), calling
    )
    if model.load_device.type != "cpu":
        whole = sum(tensor.nbytes for tensor in source.state_dict().values())
        # what the MODEL itself takes there now is given back first
        if bridge.too_large(whole - model.loaded_size(), model.load_device):
            whole = 0  # streamed from RAM
        return round(whole + max(calling, *working.values())), made.nbytes()
    held = sum(own.values())
    highest = max(held + calling, sum(_own(model, {}).values()) + _checking(source))
    packed = dict.fromkeys(plans, 0)
    for name, tensor in made.tensors.items():
        if (module := name.rpartition(".")[0]) in packed:
            packed[module] += tensor.nbytes
    for name in plans:
        highest = max(highest, held + working[name])
        held += packed[name] - own.get(name, 0)
    for name, parameter in [*source.named_parameters(), *source.named_buffers()]:
        if name.rpartition(".")[0] in plans or name not in made.tensors:
            continue
        if parameter.dtype not in (torch.float32, torch.float64):
            continue
        held += made.tensors[name].nbytes
        highest = max(highest, held + FINITE * parameter.numel())
    return round(max(highest, held)), 0


def _checking(source: torch.nn.Module) -> int:
    """Bytes that looking for NaN takes, at its highest, before anything else is done."""
    return max((finite.working(x) for x in source.parameters() if x.is_floating_point()), default=0)


def _searching(source: torch.nn.Module, searched: Mapping[str, float], call: Call | None) -> float:
    """Bytes of a call in which AWQ tries its scales, at its highest. searched: what a layer's weight
    takes to round. Where layers are not told apart, beside the call's peak.

    ModelOpt's `awq_lite` keeps of a layer the answer in 16 or 32 bits and that of the scale before. To
    it come the input, smoothed, and the weight while it is rounded, or the rounded weight and the next
    answer; or, after that, the difference of the answers and its square, in 32 bits. What is smoothed
    by a scale in the weight's dtype, and all that follows from it, is in 32 bits where the weight is
    in another dtype than the call.
    """
    if call is None or not call.memory.live:
        peak = (call.peak or 0) if call is not None else 0
        return peak + max(searched.values(), default=0)
    highest = 0.0
    for name, rounding in searched.items():
        if name not in call.inputs:
            continue
        weight, given = source.get_submodule(name).weight, math.prod(call.inputs[name])
        answer = given // weight.shape[1] * weight.shape[0]
        wide = torch.promote_types(call.dtype, weight.dtype)
        plain, smooth = call.itemsize * answer, wide.itemsize * answer
        found = wide.itemsize * given + plain + smooth + rounding
        cast = 0 if weight.dtype == wide else weight.nbytes  # ComfyUI casts what was rounded
        rounded = wide.itemsize * (given + weight.numel()) + cast
        found = max(found, rounded + plain + 2 * smooth, plain + smooth + 2 * 4 * answer)
        highest = max(highest, call.memory.live[name] + found)
    return highest


def _clipping(
    source: torch.nn.Module,
    plans: Mapping[str, LayerPlan],
    searched: Mapping[str, float],
    call: Call | None,
) -> float:
    """Bytes that AWQ_FULL's search for clipping takes beside the weights, at its highest; 0 where
    nothing is clipped, or without a call."""
    if call is None:
        return 0.0
    kept, highest = 0, 0.0
    for name, one in plans.items():
        if one.algorithm == AWQ_FULL and name in call.inputs:
            weight = source.get_submodule(name).weight
            kept += clipping.kept(weight)
            tokens = math.prod(call.inputs[name][:-1])
            found = clipping.searching(weight, tokens, call.itemsize, searched[name])
            highest = max(highest, call.memory.live.get(name, 0) + found)
    return kept + highest


def _own(model, plans: Mapping[str, LayerPlan]) -> dict[str, int]:
    """Bytes of the copies that quantizing makes of weights: patched ones, and what AWQ_FULL writes
    into. By the layer they belong to."""
    from .bridge.unet import UNET

    found: dict[str, int] = {}
    state = model.model.diffusion_model.state_dict()
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        full = part == "weight" and module in plans and plans[module].algorithm == AWQ_FULL
        if UNET + name in model.patches or full:
            found[module] = found.get(module, 0) + tensor.nbytes
    return found


def calls(plans: Mapping[str, LayerPlan], records: int) -> int:
    """UNet calls that `engine.quantize_model` and `engine.measure` make."""
    chosen = min(records, engine.EVALUATION_RECORDS)
    passes = max((engine.PASSES.get(one.algorithm, 1) for one in plans.values()), default=1)
    if not any(x.calibrates or modelopt.input_config(x) is not None for x in plans.values()):
        return 2 * chosen
    clipping = min(records, engine.CLIP_RECORDS) if passes > 2 else 0
    return 2 * chosen + records * min(passes, 2) + clipping


def seconds(
    source: torch.nn.Module,
    plans: Mapping[str, LayerPlan],
    trials: Mapping[Key, Trial],
    call: Call | None,
    records: int,
) -> float | None:
    """About how long it takes; None where it is not known: records without a measured call, or a
    search for clipping, which AWQ_FULL makes."""
    if (records and call is None) or any(one.algorithm == AWQ_FULL for one in plans.values()):
        return None
    packing, rounding, searched = 0.0, 0.0, 0
    for name, one in plans.items():
        shape = tuple(source.get_submodule(name).weight.shape)
        tried = trials[key(one, shape)]
        took = tried.seconds * work(shape, one)
        packing += took
        if one.algorithm in AWQ:
            rounding += tried.rounding * math.prod(shape)
            searched += math.prod(shape)
    if not records:
        return packing
    whole = sum(parameter.numel() for parameter in source.parameters())
    trial = rounding + call.seconds * searched / whole
    return packing + calls(plans, records) * call.seconds + records * AWQ_TRIALS * trial
