"""The only place that runs ModelOpt: calibration of ComfyUI's own UNet modules, in place."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import itertools
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..utils import out_of_memory, packages
from ..utils.progress import detail
from ..utils.text import brief
from . import backend, percentile
from .recipe import AWQ, AWQ_FULL, MAX, MSE, PERCENTILE, SMOOTHQUANT, LayerPlan

COMPILING = (
    "ModelOpt compiles its CUDA kernels where it has not before on this machine: minutes, once "
    "(python dev.py precompile does it ahead of time)"
)
# where what is raised is in words of ours
OWN = ("formats", "quantize", "utils")
# through which errors of others go
BELOW = ("torch", "pydantic", "pydantic_core")
log = logging.getLogger(__name__)
_number = itertools.count(1)
OFF = {"quantizer_name": "*", "enable": False}
PER_TENSOR = {"num_bits": 8, "axis": None}
# the largest magnitude of each input channel, which SmoothQuant balances against the weight's
PER_CHANNEL = {"num_bits": 8, "axis": -1}
INT4_BLOCKS = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
E4M3 = {"num_bits": (4, 3), "axis": None}
WEIGHTS = {
    "int8": {"num_bits": 8, "axis": 0},
    "fp8": E4M3,
    "fp8_e5m2": E4M3,  # for its largest magnitude only
    "nvfp4": PER_TENSOR,  # for its largest magnitude only
    "int4": INT4_BLOCKS,
    "w4a8": [INT4_BLOCKS, E4M3],
}
# candidates of the search for the amax of least squared error: the largest magnitude itself (1.0)
# is the last one, so that the search is never worse than it
MSE_SEARCH = {"method": "mse", "start_multiplier": 0.5, "stop_multiplier": 1.0, "step_size": 0.025}


def require():
    """The module `modelopt.torch.quantization`. Raises ValueError naming what to install."""
    packages.require(packages.MODELOPT)
    import modelopt.torch.quantization as mtq

    return mtq


@contextlib.contextmanager
def failure_explained(doing: str) -> Iterator[None]:
    """Says of an error inside ModelOpt what it was doing, and what to do. ValueErrors of ours, errors
    of a UNet call itself, and memory that runs out, pass through."""
    try:
        yield
    except Exception as error:
        if out_of_memory.ran_out(error) or _says_itself(error):
            raise
        raise ValueError(
            f"ModelOpt {version()} must be able to go on, it failed with {type(error).__name__}: "
            f"{brief(' '.join(str(error).split()))} while {doing}: choose another algorithm or format, or install another version "
            "of nvidia-modelopt; nothing was changed"
        ) from error


def _says_itself(error: Exception) -> bool:
    """Whether an error is a ValueError of ours, or of a UNet call and not of what ModelOpt does in it."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    pack, last = Path(__file__).parents[1], Path(frames[-1].f_code.co_filename)
    if isinstance(error, ValueError) and any(last.is_relative_to(pack / room) for room in OWN):
        return True
    if not any(frame.f_code is _replay.__code__ for frame in frames):
        return False
    # the place where ModelOpt's wrapped layers call its quantizers, and what it does around layers
    if any(isinstance(frame.f_locals.get("self"), TensorQuantizer) for frame in frames):
        return False
    packages_of = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    return next(name for name in reversed(packages_of) if name not in BELOW) != "modelopt"


def _replay(forward_loop: Callable[[torch.nn.Module], None], unet: torch.nn.Module) -> None:
    """Calls of the UNet, as ModelOpt asks for them; by this frame errors in them are told apart."""
    forward_loop(unet)


def version() -> str:
    """ModelOpt's version, for the file header."""
    return importlib.metadata.version("nvidia-modelopt")


def register(unet: torch.nn.Module, layers: Mapping[str, object]) -> list[str]:
    """Tells ModelOpt of the UNet's layer classes; returns the names of all layers it will convert.

    ModelOpt matches exact types: ComfyUI's `comfy.ops.*.Linear` and `Conv2d` would get no
    quantizer otherwise. The layers' modules get classes of their own, see `_own_class`.
    """
    require()
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.nn.modules.quant_conv import _QuantConv2d
    from modelopt.torch.quantization.nn.modules.quant_linear import _QuantLinear

    modules = dict(unet.named_modules())
    for name in layers:
        if type(modules[name]) in QuantModuleRegistry:
            continue
        modules[name].__class__ = cls = _own_class(type(modules[name]))
        if cls not in QuantModuleRegistry:
            wrapper = _QuantConv2d if issubclass(cls, torch.nn.Conv2d) else _QuantLinear
            QuantModuleRegistry.register({cls: f"{cls.__module__}.{cls.__name__}"})(wrapper)
    return [name for name, module in modules.items() if type(module) in QuantModuleRegistry]


@functools.cache
def _own_class(cls: type) -> type:
    """A subclass whose name no other class has: ModelOpt names the classes it makes after module and
    name alone, and ComfyUI has several `Linear` in one module."""
    name = f"{cls.__qualname__.rpartition('>.')[2].replace('.', '_')}_{next(_number)}"
    return type(name, (cls,), {"__module__": cls.__module__})


def input_config(plan: LayerPlan) -> dict | None:
    """ModelOpt's attributes of a layer's input quantizer while activations are collected."""
    if plan.algorithm == SMOOTHQUANT:
        return PER_CHANNEL
    if plan.algorithm == PERCENTILE and plan.static:
        calibrator = percentile.calibrator()
        return {**PER_TENSOR, "calibrator": (calibrator, (), {"percentile": plan.percentile})}
    if plan.static and plan.format in ("fp8", "w4a8"):
        return E4M3
    return PER_TENSOR if plan.static or plan.format == "nvfp4" else None


def activations_config(plans: Mapping[str, LayerPlan], everything: list[str]) -> dict:
    """The `config` of `mtq.quantize` that collects activations, and searches AWQ's scales.

    plans: of the layers to quantize; everything: names of all modules ModelOpt converts. ModelOpt's
    presets are not used as they stand: they disable `*proj_out.*` (a language model's head), which
    in ComfyUI's names is the last layer of every SpatialTransformer. Weights are calibrated
    afterwards, layer by layer; here only AWQ needs their quantizers.
    """
    entries: list[dict] = [OFF]
    algorithms = set()
    for name, plan in plans.items():
        config = input_config(plan)
        if config is not None:
            entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": config})
        if plan.algorithm in AWQ:
            weight = _searched_config(plan.format)
            entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight})
            algorithms.add(AWQ_FULL if plan.algorithm == AWQ_FULL else "awq_lite")
    entries += [
        {"quantizer_name": f"{name}.*", "enable": False} for name in everything if name not in plans
    ]
    algorithm = {"method": algorithms.pop(), "debug": True} if algorithms else MAX
    return {"quant_cfg": entries, "algorithm": algorithm}


def _searched_config(format: str) -> dict:
    """ModelOpt's attributes of a layer's weight quantizer while AWQ searches."""
    return backend.NVFP4 if format == "nvfp4" else INT4_BLOCKS


def searching(weight: torch.Tensor, format: str) -> Callable[[], torch.Tensor]:
    """What AWQ does to a weight [N, K] for each scale it tries: smoothed, and rounded as `calibrate`
    has it done. On the CPU: elsewhere ModelOpt may have to compile first, and then takes no more."""
    require()
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    backend.register()
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**_searched_config(format)))
    quantizer.pre_quant_scale = torch.ones(weight.shape[1], dtype=weight.dtype)
    weight = weight.cpu()
    return lambda: quantizer(weight)


def calibrate(
    unet: torch.nn.Module,
    plans: Mapping[str, LayerPlan],
    forward_loop: Callable[[torch.nn.Module], None] | None,
) -> None:
    """Puts quantizers into `unet` (in place) and collects activations.

    No weight is written to, so that weights may be shared with the user's MODEL; only AWQ_FULL
    writes, into weights of its own.
    """
    mtq = require()
    everything = register(unet, plans)
    full = [name for name, plan in plans.items() if plan.algorithm == AWQ_FULL]
    for name in full:
        module = unet.get_submodule(name)
        own = module._parameters["weight"].data.clone()
        module._parameters["weight"] = torch.nn.Parameter(own, requires_grad=False)
    backend.register()
    config = activations_config(plans, everything)
    with (
        contextlib.nullcontext() if full else _weights_left_alone(),
        failure_explained(f"it calibrated {len(plans)} layers"),
    ):
        mtq.quantize(unet, config, forward_loop and functools.partial(_replay, forward_loop))
    for name in plans:
        _forget_search(unet.get_submodule(name))


def _forget_search(module: torch.nn.Module) -> None:
    """Of what AWQ's searches keep of a layer only their result stays (the errors of all clippings are
    a fifth of a 16-bit weight's bytes), and the largest mean magnitude of an input channel."""
    module.__dict__.pop("awq_clip", None)
    if hasattr(module, "awq_lite"):
        lite = module.awq_lite
        lite.largest_input = lite.act_scale.max().item() if lite.num_cache_steps else 0.0
        lite.act_scale = lite.weight_scale = None


def give_up(module: torch.nn.Module) -> None:
    """Frees what a packed layer holds: its weight, and ModelOpt's quantizers and search."""
    module._parameters["weight"] = None
    module._modules.clear()
    module.__dict__.pop("awq_lite", None)


def found_nan(error: AssertionError) -> bool:
    """Whether ModelOpt's calibrators gave up because activations are NaN or infinity."""
    return str(error).startswith(("detected nan values", "detected inf values"))


def never_called(unet: torch.nn.Module, plans: Mapping[str, LayerPlan]) -> list[str]:
    """Names of the layers that need an activation of the calibration, and got none."""

    def called(module: torch.nn.Module, plan: LayerPlan) -> bool:
        if plan.algorithm in AWQ:  # ModelOpt gives a layer it never saw a smoothing of ones
            return module.awq_lite.num_cache_steps > 0
        return module.input_quantizer.amax is not None

    return [
        name
        for name, plan in plans.items()
        if plan.calibrates and not called(unet.get_submodule(name), plan)
    ]


def searches(plans: Mapping[str, LayerPlan]) -> str:
    """The algorithm for which ModelOpt fake-quantizes while it calibrates, "" for none: AWQ's."""
    return next((plan.algorithm for plan in plans.values() if plan.algorithm in AWQ), "")


def waiting(names: Iterable[str]) -> list[str]:
    """Those of ModelOpt's CUDA extensions that this process has not tried to build or load yet."""
    from modelopt.torch.quantization import extensions

    return [name for name in names if not hasattr(getattr(extensions, name), "extension")]


def compiles(names: Iterable[str]) -> bool:
    """Whether `build_kernels` would go to a CUDA compiler (or load what it once made)."""
    from torch.utils import cpp_extension

    return bool(waiting(names)) and cpp_extension.CUDA_HOME is not None


def build_kernels(names: Sequence[str], step: Callable[[], None] = lambda: None) -> dict[str, bool]:
    """Builds or loads ModelOpt's CUDA extensions -> whether each is there.

    The first time on a machine this takes minutes and needs a CUDA compiler, which is said before it
    begins; without one ModelOpt does the same in plain PyTorch. `step` is called after each.
    """
    from modelopt.torch.quantization import extensions

    if compiles(names):
        log.info("ModelOpt: %s", COMPILING)
        detail(COMPILING)
    elif waiting(names):
        log.info("ModelOpt: no CUDA compiler was found, its PyTorch code runs for its CUDA kernels")
    built = {}
    for name in names:
        built[name] = getattr(extensions, name)(raise_if_failed=False) is not None
        step()
    return built


@contextlib.contextmanager
def _weights_left_alone() -> Iterator[None]:
    """AWQ keeps its smoothing apart from the weights, as ModelOpt's own AutoQuantize has it."""
    from modelopt.torch.quantization import model_calib

    before = model_calib._ENABLE_FOLDING_PQS_TO_WEIGHTS
    model_calib._ENABLE_FOLDING_PQS_TO_WEIGHTS = False
    try:
        yield
    finally:
        model_calib._ENABLE_FOLDING_PQS_TO_WEIGHTS = before


# ModelOpt's own bound, of activations that count as zero when it smooths
DEAD = 2.0**-31


def smooth(module: torch.nn.Module, alpha: float, beside: torch.Tensor | None = None) -> None:
    """SmoothQuant on one calibrated Linear, by ModelOpt itself. Gives it a weight of its own.

    beside [n, in]: the largest magnitudes, by input channel, of n weights that multiply the same
    input; each gets the smoothing of all of them, as in one Linear with their rows together.
    Afterwards `module.weight` is rescaled and `module.input_quantizer.pre_quant_scale` [in] set.
    ModelOpt collects activation maxima in a forward loop; the ones collected by `calibrate` are
    given to it as one token, [1, …, in] as collected. A channel that was zero in every call is smoothed
    as the quietest of the others: ModelOpt would multiply it by 10000, and whatever it carries later
    would overflow 16 bits.
    """
    mtq = require()
    amax = module.input_quantizer.amax.detach().clone()
    live = amax > DEAD
    if bool(live.any()):
        amax = torch.where(live, amax, amax[live].min())
    weight = module._parameters["weight"].data
    if weight.device != amax.device:  # a UNet too large for the device, streamed
        module.weight_quantizer.to(amax.device)
    module.weight_quantizer.set_from_attribute_config({**WEIGHTS["int8"], "enable": True})
    more = 0 if beside is None else len(beside)
    own = weight.new_empty((len(weight) + more, weight.shape[1]), device=amax.device)
    own[: len(weight)].copy_(weight)
    if beside is not None:
        own[len(weight) :].copy_(beside)
    module._parameters["weight"] = torch.nn.Parameter(own, requires_grad=False)
    holder = torch.nn.ModuleDict({"layer": module})
    with quiet():  # "Smoothed 1 modules", once a layer
        mtq.calibrate(
            holder,
            {"method": SMOOTHQUANT, "alpha": alpha},
            forward_loop=lambda _: module.input_quantizer(amax),
        )
    if more:
        own = module._parameters["weight"].data[: len(weight)]
        module._parameters["weight"] = torch.nn.Parameter(own, requires_grad=False)


def awq_weight(module: torch.nn.Module, plan: LayerPlan) -> torch.Tensor:
    """The weight of a Linear that AWQ was searched for, with its smoothing folded in as ModelOpt
    folds it: multiplied in float32, rounded to the weight's own dtype."""
    weight = module._parameters["weight"].data
    if plan.algorithm == AWQ_FULL:
        return weight
    # the reciprocal is ModelOpt's own, and taken twice there
    inverse = 1.0 / (1.0 / module.awq_lite.best_scale).to(torch.float32)
    return (weight * inverse.to(weight.device).squeeze()[None, :]).to(weight.dtype)


def input_amax(module: torch.nn.Module, plan: LayerPlan) -> torch.Tensor | None:
    """A layer's largest activation, as calibrated.

    AWQ_FULL's last pass forgets what the whole recording gave; what awq_lite kept of it, for every
    input channel before smoothing, still has it.
    """
    quantizer = module.input_quantizer
    kept = getattr(quantizer, "_amax_for_smoothing", None)
    if plan.algorithm != AWQ_FULL or kept is None:
        return quantizer.amax
    scale = quantizer.pre_quant_scale.float().reshape(-1)
    return (kept.to(scale.device).float().reshape(-1) * scale).amax()


def svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVDQuant's split by ModelOpt: up [out, r], down [r, in], and the rest of the weight."""
    from modelopt.torch.quantization.model_calib import svd as modelopt_svd

    if weight.device.type == "mps":  # has no float64
        weight = weight.cpu()
    up, down = modelopt_svd(weight, min(rank, *weight.shape))
    return up, down, weight - up @ down


def weight_amax(weight: torch.Tensor, plan: LayerPlan):
    """ModelOpt's calibration of a weight [N, K] -> the amax its format's `quantize` takes."""
    mtq = require()
    config = WEIGHTS.get(plan.format)
    if config is None:  # scales follow from the weight alone
        return None
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    # in float32, or the search for the least error would round its candidates to 16 bits
    layer.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    holder = torch.nn.ModuleDict({"layer": layer})
    entries = [OFF, {"quantizer_name": "*weight_quantizer", "cfg": config}]
    algorithm = MSE_SEARCH if plan.algorithm == MSE else MAX
    with quiet():
        mtq.quantize(holder, {"quant_cfg": entries, "algorithm": algorithm}, None)
    quantizer = holder["layer"].weight_quantizer
    if isinstance(config, list):
        return tuple(one.amax for one in quantizer)
    quantizer._calibrator = None  # that of MSE refers back to it: neither would be freed at once
    return quantizer.amax


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what ModelOpt prints once a call: it is called once a layer."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
