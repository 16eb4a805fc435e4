"""What quantizing takes on this device, in memory and time: one layer of each kind is packed, one
recorded UNet call is made, and both are scaled to the whole."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ..formats import FORMATS, blocks
from ..formats.checkpoint import QuantizedCheckpoint
from ..utils import finite
from ..utils.memory import Watched, peak_of, watched
from ..utils.progress import detail
from ..utils.timing import synchronize
from . import clipping, engine, modelopt, quality, whose
from .layers import kind_of
from .recipe import AWQ, AWQ_FULL, AWQ_LITE, MSE, SMOOTHQUANT, SVDQUANT, LayerPlan

# weights of the layer that is tried, of those with the largest kernel: the largest of at most so many,
# or where packing takes long (SLOW) the smallest of at least so many
LARGEST, SMALLEST = 2**22, 2**17
SLOW = (MSE, SVDQUANT)
# bytes a weight of `pack.sixteen_bits`, beside its result: torch's isfinite
FINITE = 5
# scales that ModelOpt's AWQ tries for a layer: alpha from 0 to 1 in steps of 0.1
AWQ_TRIALS = 11


@dataclass(frozen=True)
class Trial:
    """A layer that was packed. seconds: for each unit of its `work`; rounding: for each weight, to
    round it alone. packing, searching, reading: bytes of memory a weight while it is packed, while
    one of AWQ's scales is tried, and while its values are used dequantized; 0 where torch does not
    count them."""

    seconds: float
    rounding: float
    packing: float
    searching: float
    reading: float


@dataclass(frozen=True)
class Call:
    """One recorded UNet call of the MODEL in 16 or 32 bits. memory: of it and each of its layers.
    shape: of the latent; inputs: shapes of what each layer was given; itemsize: bytes of a number
    they were given."""

    seconds: float
    memory: Watched
    shape: tuple[int, ...]
    inputs: Mapping[str, tuple[int, ...]]
    itemsize: int

    @property
    def peak(self) -> int | None:
        """Bytes at the highest, None where torch does not count them."""
        return self.memory.peak


def key(one: LayerPlan) -> tuple[str, str, str]:
    """Layers of one key are packed alike."""
    return one.format, one.algorithm, one.kind


def work(shape: tuple[int, ...], one: LayerPlan) -> float:
    """What the time to pack a weight grows with: its size; of SVDQuant, the flops of the SVD."""
    return math.prod(shape) * (min(shape[:2]) if one.algorithm == SVDQUANT else 1)


def try_layers(
    source: torch.nn.Module,
    plans: Mapping[str, LayerPlan],
    device: torch.device,
    step: Callable[[], None] = lambda: None,
) -> dict[tuple[str, str, str], Trial]:
    """Packs a small layer of each key, without its patches; the model is not changed."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, one in plans.items():
        groups.setdefault(key(one), []).append(name)
    found = {}
    # AWQ's search is not tried
    trying = {name: one for name, one in plans.items() if one.algorithm == MSE}
    if asked := whose.kernels_needed(trying, device):
        modelopt.build_kernels(asked)
        detail("Packing a layer of each kind")
    with torch.inference_mode(False), torch.no_grad():
        for which, names in groups.items():
            weights = {name: source.get_submodule(name).weight for name in names}
            name = _chosen(weights, plans[names[0]].algorithm in SLOW)
            weight = source.get_submodule(name).weight.data.to(device, copy=True)
            found[which] = _try(weight, plans[name], device)
            step()
    return found


def _chosen(weights: Mapping[str, torch.Tensor], slow: bool) -> str:
    """The layer to try. A convolution of one position is packed without a copy in another order."""
    kernel = max(weight.shape[2:].numel() for weight in weights.values())
    sizes = {
        name: weight.numel()
        for name, weight in weights.items()
        if weight.shape[2:].numel() == kernel
    }
    if slow:
        fitting = [name for name in sizes if sizes[name] >= SMALLEST]
        return min(fitting, key=sizes.get) if fitting else max(sizes, key=sizes.get)
    fitting = [name for name in sizes if sizes[name] <= LARGEST]
    return max(fitting, key=sizes.get) if fitting else min(sizes, key=sizes.get)


def _try(weight: torch.Tensor, one: LayerPlan, device: torch.device) -> Trial:
    shape = tuple(weight.shape)
    (stored, _), packing = peak_of(lambda: _pack(weight, one), device)
    started = time.perf_counter()
    _, (rest, amax) = _pack(weight, one)
    synchronize(device)
    seconds = time.perf_counter() - started
    numerics = FORMATS[one.format]
    started = time.perf_counter()
    numerics.quantize(rest, amax)
    synchronize(device)
    rounding = time.perf_counter() - started
    _, reading = peak_of(lambda: numerics.dequantize(stored, shape).to(weight.dtype), device)
    searching = packing
    if one.algorithm == SVDQUANT:  # its SVD comes after the search
        _, searching = peak_of(lambda: _pack(weight, replace(one, algorithm=AWQ_LITE)), device)
    count = weight.numel()
    return Trial(
        seconds / work(shape, one),
        rounding / count,
        (packing or 0) / count,
        (searching or 0) / count,
        (reading or 0) / count,
    )


def _pack(weight: torch.Tensor, one: LayerPlan):
    """The operations of `pack` on a weight whose recording is not there: smoothing by ones. What is
    stored, and what the format's `quantize` took."""
    if one.algorithm in AWQ or one.algorithm == SMOOTHQUANT:
        ones = torch.ones(weight.shape[1], device=weight.device)
        weight = (weight * ones[None, :]).to(weight.dtype)
    if one.algorithm == SVDQUANT:
        *_, weight = modelopt.svd(weight, one.rank)
    plain = LayerPlan(one.kind, one.format, "max") if one.algorithm == AWQ_FULL else one
    amax = modelopt.weight_amax(blocks.flatten(weight), plain)
    return FORMATS[one.format].quantize(weight, amax), (weight, amax)


def try_call(model, record, step: Callable[[], None] = lambda: None) -> Call:
    """Two calls of the MODEL's UNet with a recorded input, loaded as a sampler does, patches and all:
    the first one's memory, the second one's time."""
    from .bridge import unet as bridge

    with torch.inference_mode(False), torch.no_grad():
        unet, device, dtype = bridge.load(model, [record])

        def call() -> None:
            quality.outputs(unet, [record], device, dtype, lambda: None)

        layers = {name: m for name, m in unet.named_modules() if kind_of(m) is not None}
        inputs: dict[str, tuple[int, ...]] = {}
        with _noted(layers, inputs):
            _, memory = watched(call, device, layers)
        step()
        started = time.perf_counter()
        call()
        synchronize(device)
    seconds, shape = time.perf_counter() - started, tuple(record.x.shape)
    return Call(seconds, memory, shape, inputs, dtype.itemsize)


@contextlib.contextmanager
def _noted(
    layers: Mapping[str, torch.nn.Module], inputs: dict[str, tuple[int, ...]]
) -> Iterator[None]:
    """While it lasts, `inputs` gets the shape of the largest that each layer is given."""

    def note(name: str, x: torch.Tensor) -> None:
        inputs[name] = max(inputs.get(name, (0,)), tuple(x.shape), key=math.prod)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def call_peak(
    source: torch.nn.Module,
    plans: Mapping[str, LayerPlan],
    trials: Mapping[tuple[str, str, str], Trial],
    call: Call,
    dequantized: Collection[str],
    working: Mapping[str, int] | None,
) -> int | None:
    """Bytes that a call of the quantized UNet takes beside its weights, at its highest. None where
    memory is not counted.

    working: on a CPU, what each quantized layer takes (`loaders.trial`); all else is as in `call`, but
    that weights held in 32 bits there stay in 16 here, and are cast for each call. Elsewhere None: as
    `call`, or what is there when the weight of a layer of `dequantized` is used so, and that.
    """
    if call.peak is None:
        return None
    highest = call.peak if working is None else call.memory.outside
    for name, live in call.memory.live.items():
        module = source.get_submodule(name)
        if working is None:
            if name in dequantized:
                plain = trials[key(plans[name])].reading * module.weight.numel()
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
    trials: Mapping[tuple[str, str, str], Trial],
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
    weights = {name: source.get_submodule(name).weight.numel() for name in plans}
    working = {name: trials[key(one)].packing * weights[name] for name, one in plans.items()}
    searched = {
        name: trials[key(one)].searching * weights[name]
        for name, one in plans.items()
        if one.algorithm in AWQ
    }
    calling = max(
        _searching(source, searched, call), _clipping(source, plans, working, call), calling
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


def _searching(
    source: torch.nn.Module, searched: Mapping[str, float], call: Call | None
) -> float:
    """Bytes of a call in which AWQ tries its scales, at its highest: what a layer's weight takes to
    round, beside what the layer was given and has answered; a weight that the call cast is not yet,
    or no longer, there. Where layers are not told apart, beside the call's peak."""
    if call is None or not call.memory.inside:
        peak = (call.peak or 0) if call is not None else 0
        return peak + max(searched.values(), default=0)
    highest = 0.0
    for name, size in searched.items():
        narrow = [p for p in source.get_submodule(name).parameters() if p.itemsize < call.itemsize]
        cast = call.itemsize * sum(p.numel() for p in narrow)
        highest = max(highest, call.memory.inside.get(name, cast) - cast + size)
    return highest


def _clipping(
    source: torch.nn.Module,
    plans: Mapping[str, LayerPlan],
    working: Mapping[str, float],
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
            found = clipping.searching(weight, tokens, call.itemsize, working[name])
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
    trials: Mapping[tuple[str, str, str], Trial],
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
        took = trials[key(one)].seconds * work(shape, one)
        packing += took
        if one.algorithm in AWQ:
            rounding += trials[key(one)].rounding * math.prod(shape)
            searched += math.prod(shape)
    if not records:
        return packing
    whole = sum(parameter.numel() for parameter in source.parameters())
    trial = rounding + call.seconds * searched / whole
    return packing + calls(plans, records) * call.seconds + records * AWQ_TRIALS * trial
