"""The quantized checkpoint: a UNet's state dict in ComfyUI's key names plus a header.

The one representation between quantizing, saving, loading and importing. Tensors are named as
modules are in ComfyUI's UNet (`input_blocks.1.1.proj_in.weight`), without any prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..utils.finite import PIECE
from ..utils.text import brief
from . import FORMATS, get

FORMAT_VERSION = 1
SCALE_SUFFIXES = (
    "weight_scale",
    "weight_scale_2",
    "weight_amax",
    "weight_amax_2",
    "input_scale",
    "pre_quant_scale",
    "svd_up",
    "svd_down",
)
CHANNEL = re.compile(r"0|[1-9][0-9]{0,8}")  # a key of `amax_exceptions`
CONTEXT_WIDTH = re.compile(r"input_blocks\.(\d+)\.1\.transformer_blocks\.0\.attn2\.to_k")
STATIC, PER_TOKEN, SIXTEEN = "static", "per token", "16 bits"
# (format, kind) -> ways to quantize activations beside the format's own
ACTIVATIONS = {
    ("fp8", "linear"): (PER_TOKEN, SIXTEEN),
    ("fp8", "conv2d"): (SIXTEEN,),
    ("int8", "linear"): (STATIC, SIXTEEN),
    ("int8", "conv2d"): (SIXTEEN,),
    ("mxfp8", "linear"): (SIXTEEN,),
    ("mxfp8", "conv2d"): (SIXTEEN,),
    ("nvfp4", "linear"): (SIXTEEN,),
    ("nvfp4", "conv2d"): (SIXTEEN,),
    ("w4a8", "linear"): (SIXTEEN,),
    ("w4a8", "conv2d"): (SIXTEEN,),
}
INPUTS = ("int8", "fp8", "nvfp4", "mxfp8")
KINDS = {2: "linear", 4: "conv2d"}
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layer:
    """format: a name of FORMATS; kind: "linear" or "conv2d"; smoothed: has a pre_quant_scale.

    shape: of the original weight, where the stored one is packed or padded. rank: of the low-rank
    branch `svd_up` [out, rank] @ `svd_down` [rank, in] that SVDQuant took out of the weight, 0 for
    none. activations: how they are quantized, where that is not the format's own way: STATIC
    (a calibrated scale), PER_TOKEN (scaled while the model runs) or SIXTEEN (not at all).
    input_amax: the calibrated largest activation, where the layer has an `input_scale`;
    amax_exceptions: output channel -> weight amax. Both are kept because a scale alone does not
    give its amax back to the last bit, which running ModelOpt's own arithmetic needs.
    """

    format: str
    kind: str
    smoothed: bool = False
    shape: tuple[int, ...] | None = None
    rank: int = 0
    activations: str = ""
    input_amax: float | None = None
    amax_exceptions: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def comfy_format(self) -> str:
        """The format's name in ComfyUI's `comfy_quant` markers."""
        return FORMATS[self.format].COMFY_FORMAT

    @property
    def opens_in_stock(self) -> bool:
        """Whether stock ComfyUI computes such a layer as this pack does.

        It knows smoothing for NVFP4 only, no low-rank branch, and of other ways to quantize
        activations only that of not doing it.
        """
        smoothing = not self.smoothed or self.format == "nvfp4"
        plain = smoothing and not self.rank and self.activations in ("", SIXTEEN)
        return self.kind == "linear" and FORMATS[self.format].STOCK and plain

    @property
    def weight_only(self) -> bool:
        """Whether activations stay in 16 bits."""
        return self.activations == SIXTEEN or not FORMATS[self.format].ACTIVATIONS

    @property
    def static(self) -> bool:
        """Whether activations have a calibrated scale that the layer cannot do without."""
        own = FORMATS[self.format].needs_input_scale(self.kind) and not self.activations
        return own or self.activations == STATIC

    @property
    def scales(self) -> tuple[str, ...]:
        """Names of the tensors that stand beside `weight`."""
        module = FORMATS[self.format]
        names = list(module.SCALES)
        if self.static or (self.format == "nvfp4" and self.input_amax):
            names.append("input_scale")
        if self.smoothed:
            names.append("pre_quant_scale")
        if self.rank:
            names += ["svd_up", "svd_down"]
        return tuple(names)


@dataclass(frozen=True)
class Input:
    """A module whose weight is not quantized and whose input is, along its last axis: rounded to
    `format`, one of INPUTS. ModelOpt's presets do so to LayerNorms.

    amax: the calibrated largest value; None for one that is taken while the model runs, of each row
    (int8, fp8) or of the whole input (nvfp4). mxfp8 needs none.
    """

    format: str
    amax: float | None = None


@dataclass
class QuantizedCheckpoint:
    """tensors: name -> tensor, quantized layers as `weight` and their scales.

    layers: module name -> Layer. header: what is known of its making (recipe, calibration,
    versions, quality), JSON-able, shown by the info node. inputs: name of an unquantized LayerNorm,
    Linear or Conv2d -> Input; in imported checkpoints only.
    """

    tensors: dict[str, torch.Tensor]
    layers: dict[str, Layer]
    header: dict = field(default_factory=dict)
    inputs: dict[str, Input] = field(default_factory=dict)

    @property
    def opens_in_stock(self) -> bool:
        """Whether stock ComfyUI recognises the UNet and computes every layer as this pack does."""
        modules = (name.removesuffix(".weight") for name in self.tensors)
        shaping = shaping_layers(modules)
        return not self.inputs and all(
            layer.opens_in_stock and not (name in shaping and FORMATS[layer.format].BITS == 4)
            for name, layer in self.layers.items()
        )

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def validate(self, where: str) -> None:
        """Raises ValueError (rule, value, where, remedy) for the first layer that cannot be run."""
        if not self.layers:
            raise ValueError(
                f"a quantized checkpoint must name its quantized layers, {where} has none: {REMEDY}"
            )
        for name, layer in self.layers.items():
            _validate_layer(name, layer, self.tensors, where)
        known = {f"{n}.{t}" for n, x in self.layers.items() for t in ("weight", *x.scales)}
        for name, tensor in self.tensors.items():
            stored = any(tensor.dtype == module.STORAGE for module in FORMATS.values())
            if name not in known and (stored or name.rpartition(".")[2] in SCALE_SUFFIXES):
                _fail("a quantized tensor must belong to a layer of the header", name, where)


REMEDY = "the file is damaged or was edited by hand: get it again or quantize again"


def _fail(rule: str, found, where: str) -> None:
    raise ValueError(f"{brief(rule)}, found {brief(found)} in {where}: {REMEDY}")


def shaping_layers(names: Iterable[str]) -> set[str]:
    """Those of a UNet's module names from whose weights' widths ComfyUI's detection reads the
    architecture; packing two values into a byte would halve them.

    They are the label embedding, and the first to_k of cross-attention on the way down
    (`comfy.model_detection.detect_unet_config`).
    """
    found, first = set(), None
    for name in names:
        if name == "label_emb.0.0":
            found.add(name)
        elif match := CONTEXT_WIDTH.fullmatch(name):
            first = min(first or (1 << 32, ""), (int(match[1]), name))
    return found | ({first[1]} if first else set())


def _validate_layer(name: str, layer: Layer, tensors: dict[str, torch.Tensor], where: str) -> None:
    module = get(layer.format)
    weight = tensors.get(f"{name}.weight")
    if weight is None:
        _fail(f"layer {name} must have a weight", "none", where)
    if module.BLOCK is not None and layer.shape is None:
        _fail(f"layer {name} in {layer.format} must state its shape", "none", where)
    shape = layer.shape or tuple(weight.shape)
    if KINDS.get(len(shape)) != layer.kind:
        _fail(
            f"weight of {name} must have 2 dimensions for a linear and 4 for a conv2d",
            f"a {layer.kind} with shape {shape}",
            where,
        )
    if layer.kind != "linear" and (layer.smoothed or layer.rank):
        _fail(f"smoothing and branches are for linear layers, {name} must have none", "one", where)
    ways = ("", *ACTIVATIONS.get((layer.format, layer.kind), ()))
    if layer.activations not in ways:
        rule = f"activations of {name} must be one of {', '.join(map(repr, ways))}"
        _fail(rule, repr(layer.activations), where)
    if reason := module.why_not(shape):
        _fail(f"weight of {name} must fit its format", reason, where)
    channels = [int(index) for index in layer.amax_exceptions]
    if channels and max(channels) >= shape[0]:
        _fail(f"amax_exceptions of {name} must be below {shape[0]}", max(channels), where)
    wanted = module.stored(shape)
    if "input_scale" in layer.scales:
        wanted["input_scale"] = ((), (torch.float32,))
    if layer.smoothed:
        wanted["pre_quant_scale"] = ((shape[1],), (torch.float32, *SIXTEEN_BITS))
    if layer.rank:
        wanted["svd_up"] = ((shape[0], layer.rank), (torch.float32, *SIXTEEN_BITS))
        wanted["svd_down"] = ((layer.rank, shape[1]), (torch.float32, *SIXTEEN_BITS))
    for key in ("weight", *SCALE_SUFFIXES):
        value = tensors.get(f"{name}.{key}")
        if key not in wanted:
            if value is not None:
                _fail(f"layer {name} in {layer.format} must have no {key}", "one", where)
            continue
        if value is None:
            _fail(f"layer {name} in {layer.format} must have a {key}", "none", where)
        size, dtypes = wanted[key]
        if tuple(value.shape) != size:
            _fail(f"{key} of {name} must have shape {size}", tuple(value.shape), where)
        if value.dtype not in dtypes:
            kinds = " or ".join(str(dtype) for dtype in dtypes)
            _fail(f"{key} of {name} must be stored as {kinds}", value.dtype, where)
        if key != "weight":
            _validate_values(name, key, value, where)
        if key == "input_scale" and layer.input_amax is not None:
            made = module.input_scale(torch.tensor(float(layer.input_amax))).item()
            if abs(made - value.item()) > 1e-5 * made:
                rule = f"input_scale of {name} must be that of its input_amax {layer.input_amax}"
                _fail(rule, value.item(), where)


def _validate_values(name: str, key: str, value: torch.Tensor, where: str) -> None:
    """In pieces, as a stranger's scales may be larger than any weight."""
    for piece in value.reshape(-1).split(PIECE):
        _validate_piece(name, key, piece, where)


def _validate_piece(name: str, key: str, value: torch.Tensor, where: str) -> None:
    if value.dtype == torch.uint8:  # biased exponents, 255 is NaN
        if bool((value == 255).any()):
            _fail(f"{key} of {name} must be finite", "an exponent of 255", where)
        return
    values = value.float()
    good = torch.isfinite(values)
    if key.startswith("svd"):
        rule = "finite"
    elif key != "weight_amax" and (value.dtype == torch.float32 or key == "pre_quant_scale"):
        good &= values > 0
        rule = "positive and finite"
    else:
        good &= values >= 0
        rule = "finite and not negative"
    if not bool(good.all()):
        _fail(f"{key} of {name} must be {rule}", _summary(values), where)


def _summary(value: torch.Tensor) -> str:
    return f"values from {value.min().item():.3g} to {value.max().item():.3g}"
