"""The quantized checkpoint: a UNet's state dict in ComfyUI's key names plus a header.

The one representation between quantizing, saving, loading and importing. Tensors are named as
modules are in ComfyUI's UNet (`input_blocks.1.1.proj_in.weight`), without any prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from . import FORMATS, get

FORMAT_VERSION = 1
SCALES = ("weight_scale", "input_scale", "pre_quant_scale")
KINDS = {2: "linear", 4: "conv2d"}


@dataclass(frozen=True)
class Layer:
    """format: a name of FORMATS; kind: "linear" or "conv2d"; smoothed: has a pre_quant_scale.

    input_amax: the calibrated largest activation, where the layer has an `input_scale`;
    amax_exceptions: output channel -> weight amax. Both are kept because a scale alone does not
    give its amax back to the last bit, which running ModelOpt's own arithmetic needs.
    """

    format: str
    kind: str
    smoothed: bool = False
    input_amax: float | None = None
    amax_exceptions: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def comfy_format(self) -> str:
        """The format's name in ComfyUI's `comfy_quant` markers."""
        return FORMATS[self.format].COMFY_FORMAT

    @property
    def scales(self) -> tuple[str, ...]:
        """Names of the tensors that stand beside `weight`."""
        names = ["weight_scale"]
        if FORMATS[self.format].needs_input_scale(self.kind):
            names.append("input_scale")
        if self.smoothed:
            names.append("pre_quant_scale")
        return tuple(names)


@dataclass
class QuantizedCheckpoint:
    """tensors: name -> tensor, quantized layers as `weight` and their scales.

    layers: module name -> Layer. header: what is known of its making (recipe, calibration,
    versions, quality), JSON-able, shown by the info node.
    """

    tensors: dict[str, torch.Tensor]
    layers: dict[str, Layer]
    header: dict = field(default_factory=dict)

    @property
    def opens_in_stock(self) -> bool:
        """Whether stock ComfyUI computes every layer as this pack does: Linears without smoothing."""
        return all(layer.kind == "linear" and not layer.smoothed for layer in self.layers.values())

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def validate(self, where: str) -> None:
        """Raises ValueError (rule, value, where, remedy) for the first layer that cannot be run."""
        if not self.layers:
            raise ValueError(
                f"a quantized checkpoint must name its quantized layers, {where} has none"
            )
        for name, layer in self.layers.items():
            _validate_layer(name, layer, self.tensors, where)
        known = {f"{n}.{t}" for n, x in self.layers.items() for t in ("weight", *x.scales)}
        for name, tensor in self.tensors.items():
            stored = any(tensor.dtype == module.STORAGE for module in FORMATS.values())
            if name not in known and (stored or name.rpartition(".")[2] in SCALES):
                _fail("a quantized tensor must belong to a layer of the header", name, where)


REMEDY = "the file is damaged or was edited by hand: get it again or quantize again"


def _fail(rule: str, found, where: str) -> None:
    raise ValueError(f"{rule}, found {found} in {where}: {REMEDY}")


def _validate_layer(name: str, layer: Layer, tensors: dict[str, torch.Tensor], where: str) -> None:
    module = get(layer.format)
    weight = tensors.get(f"{name}.weight")
    if weight is None:
        _fail(f"layer {name} must have a weight", "none", where)
    if weight.dtype != module.STORAGE:
        _fail(f"weight of {name} must be stored as {module.STORAGE}", weight.dtype, where)
    if KINDS.get(weight.ndim) != layer.kind:
        _fail(
            f"weight of {name} must have 2 dimensions for a linear and 4 for a conv2d",
            f"a {layer.kind} with shape {tuple(weight.shape)}",
            where,
        )
    shapes = {
        "weight_scale": module.scale_shape(tuple(weight.shape)),
        "input_scale": (),
        "pre_quant_scale": (weight.shape[1],),
    }
    for scale, shape in shapes.items():
        value = tensors.get(f"{name}.{scale}")
        if scale not in layer.scales:
            if value is not None:
                _fail(f"layer {name} in {layer.format} must have no {scale}", "one", where)
            continue
        if value is None:
            _fail(f"layer {name} in {layer.format} must have a {scale}", "none", where)
        if tuple(value.shape) != shape:
            _fail(f"{scale} of {name} must have shape {shape}", tuple(value.shape), where)
        if value.dtype != torch.float32:
            _fail(f"{scale} of {name} must be float32", value.dtype, where)
        if not bool(((value > 0) & torch.isfinite(value)).all()):
            _fail(f"{scale} of {name} must be positive and finite", _summary(value), where)


def _summary(value: torch.Tensor) -> str:
    return f"values from {value.min().item():.3g} to {value.max().item():.3g}"
