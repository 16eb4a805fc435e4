"""ModelOpt's unified export: packed weights and their scales beside them, under diffusers' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ...formats import FORMATS
from ...formats.checkpoint import KINDS, PER_TOKEN, SIXTEEN, STATIC, Layer, QuantizedCheckpoint
from ...utils.text import brief
from . import names
from . import stored as convert
from .assemble import checked, damage_named, header, unquantized

BESIDE = (
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "pre_quant_scale",
    "svdquant_lora_a",
    "svdquant_lora_b",
)
DAMAGED = "the export is damaged or of a ModelOpt that this pack does not know"


class Exported:
    """ModelOpt's unified export, checked: `steps` layers to convert, then a call converts them."""

    def __init__(self, quantization: Mapping, tensors: Mapping[str, torch.Tensor], where: str):
        self.quantization, self.where = quantization, where
        self.plain, self.beside = split(tensors)
        self.modules = names.modules(self.plain, where)
        alone = [module for module in self.beside if f"{module}.weight" not in self.plain]
        if alone:
            raise ValueError(
                f"scales must belong to a weight, {brief(alone[0])} in {where} has none: {DAMAGED}"
            )
        self.steps = len(self.beside)

    def __call__(self, step: Callable[[], None]) -> QuantizedCheckpoint:
        made, layers, unsaid = unquantized(self.plain, self.modules, self.where), {}, []
        for module, extra in self.beside.items():
            name, weight = self.modules[module], self.plain[f"{module}.weight"]
            with damage_named(module, self.where):
                dynamic, rounds = _activations(self.quantization, module)
                stored, layers[name] = layer(name, weight, extra, dynamic, rounds, self.where)
            if layers[name].format == "fp8" and layers[name].activations == SIXTEEN and rounds:
                unsaid.append(name)
            made |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
            step()
        algorithm = str(self.quantization.get("quant_algo"))
        notes = []
        if unsaid:
            notes.append(
                f"{len(unsaid)} layers in fp8 keep activations in 16 bits: ModelOpt's export has no "
                f"scale for them, and does not say whether they were scaled per token: {', '.join(unsaid)}."
            )
        described = header(layers, "ModelOpt's unified export", algorithm, notes)
        return checked(made, layers, described, {}, _version(self.quantization), self.where)


def _activations(quantization: Mapping, module: str) -> tuple[bool, bool]:
    """What the config says of one layer's activations: whether they are scaled while the model runs,
    and whether they are quantized at all. An export of one format names no layers."""
    groups = quantization.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    groups = [group for group in groups if isinstance(group, Mapping)]
    own = [group for group in groups if module in _names(group.get("targets"))] or groups
    inputs = [group.get("input_activations") for group in own]
    inputs = [one for one in inputs if isinstance(one, Mapping)]
    layers = quantization.get("quantized_layers")
    said = layers.get(module) if isinstance(layers, Mapping) else None
    algorithm = (said if isinstance(said, Mapping) else quantization).get("quant_algo")
    # written of static scales and of those per token: the former have an input_scale
    integer = algorithm == "W8A8_SQ_PER_CHANNEL"
    dynamic = bool(inputs) and all(one.get("dynamic") is True for one in inputs)
    return dynamic or integer, bool(inputs) or integer


def _names(targets: object) -> list:
    return targets if isinstance(targets, list) else []


def _version(quantization: Mapping) -> object:
    producer = quantization.get("producer")
    return producer.get("version") if isinstance(producer, Mapping) else None


def split(tensors: Mapping[str, torch.Tensor]) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """An export's tensors -> the plain ones, and for each quantized module what stands beside it."""
    plain, beside = {}, {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf in BESIDE:
            beside.setdefault(module, {})[leaf] = tensor
        else:
            plain[key] = tensor
    return plain, beside


def layer(
    name: str,
    weight: torch.Tensor,
    beside: Mapping[str, torch.Tensor],
    dynamic: bool,
    rounds: bool,
    where: str,
) -> tuple[dict[str, torch.Tensor], Layer]:
    """One exported layer -> its tensors and what the file says of it.

    dynamic: the export's config says that activations are scaled while the model runs; rounds: that
    they are quantized at all. Raises ValueError in house form.
    """
    found, tensors, shape = _stored(name, weight, beside, where)
    kind = KINDS.get(len(shape))
    numerics = FORMATS[found]
    scale = beside.get("input_scale")
    if found == "w4a8":
        way = "" if scale is not None else SIXTEEN
    elif found in ("fp8", "int8"):
        way = STATIC if scale is not None else PER_TOKEN if dynamic else SIXTEEN
        own = {"fp8": STATIC, "int8": PER_TOKEN if kind == "linear" else STATIC}
        way = "" if way == own[found] else way
    else:
        way = ""
        if found == "nvfp4" and not rounds:
            way = SIXTEEN
    amax = None
    made = Layer(found, kind, activations=way)
    if scale is not None and (made.static or found == "nvfp4"):
        tensors["input_scale"] = scale.float().reshape(())
        factor = {"int8": 127.0, "nvfp4": 6.0 * 448.0}.get(found, 448.0)
        amax = tensors["input_scale"].item() * factor
    smoothing = beside.get("pre_quant_scale")
    if smoothing is not None:
        tensors["pre_quant_scale"] = smoothing.reshape(-1)
    up, down = beside.get("svdquant_lora_b"), beside.get("svdquant_lora_a")
    if (up is None) != (down is None):
        raise ValueError(
            f"SVDQuant's branch must have two sides, {name} in {where} has one: {DAMAGED}"
        )
    if up is not None:
        tensors["svd_up"], tensors["svd_down"] = up, down
    layer = Layer(
        found,
        kind,
        smoothed=smoothing is not None,
        shape=shape if numerics.BLOCK is not None else None,
        rank=0 if up is None else up.shape[1],
        activations=way,
        input_amax=amax,
    )
    return tensors, layer


def _stored(name: str, weight: torch.Tensor, beside: Mapping[str, torch.Tensor], where: str):
    """Format, tensors of the format, shape of the weight."""
    scale, scale_2 = beside.get("weight_scale"), beside.get("weight_scale_2")
    found = (weight.dtype, None if scale is None else scale.dtype, scale_2 is not None)
    shape = tuple(weight.shape)
    size = 0 if scale is None else scale.numel()
    f32 = found[1] in (torch.float32, torch.float16, torch.bfloat16)
    if found[0] == torch.float8_e4m3fn and f32 and size == 1:
        return "fp8", convert.fp8(weight, scale), shape
    if found[:2] == (torch.float8_e4m3fn, torch.uint8) and tuple(scale.shape) == (
        shape[0],
        shape[-1] // 32,
    ):
        return "mxfp8", convert.mxfp8_blocks(weight, scale), shape
    if found[0] == torch.int8 and f32 and size in (1, shape[0]):
        return "int8", convert.int8(weight, scale), shape
    if found[0] == torch.uint8 and found[1] == torch.float8_e4m3fn and scale_2 is not None:
        shape = (shape[0], 2 * shape[1])
        if tuple(scale.shape) == (shape[0], shape[1] // 16):
            return "nvfp4", convert.nvfp4_pairs(weight, scale, scale_2), shape
    if found[0] == torch.uint8 and f32 and len(shape) == 2:
        shape = (2 * shape[0], shape[1])
        if tuple(scale.shape) == (shape[0], -(-shape[1] // 128)):
            if scale_2 is None:
                return "int4", convert.int4_rows(weight, scale), shape
            return "w4a8", convert.w4a8(weight, scale, scale_2), shape
    raise ValueError(
        f"a quantized layer must be in a format of {', '.join(FORMATS)}, {name} in {where} has a "
        f"{weight.dtype} weight {tuple(weight.shape)} with "
        f"{'no scale' if scale is None else f'a {scale.dtype} scale {tuple(scale.shape)}'}: {DAMAGED}"
    )
