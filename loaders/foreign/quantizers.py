"""ModelOpt's quantizers (their saved state and tensors) -> tensors and Layer of our checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...formats import FORMATS
from ...formats.checkpoint import KINDS, PER_TOKEN, SIXTEEN, SIXTEEN_BITS, STATIC, Input, Layer
from ..rounding import rounded
from . import compressed

INT8, E4M3, INT4, NVFP4, MXFP8 = "int8", "e4m3", "int4", "nvfp4", "mxfp8"
OFF, TOKEN = "off", "per token"
# (weights, activations) -> format
KNOWN = {
    ((INT8,), INT8): "int8",
    ((INT8,), TOKEN + INT8): "int8",
    ((INT8,), OFF): "int8",
    ((E4M3,), E4M3): "fp8",
    ((E4M3,), TOKEN + E4M3): "fp8",
    ((E4M3,), OFF): "fp8",
    ((INT4,), OFF): "int4",
    ((INT4, E4M3), E4M3): "w4a8",
    ((INT4, E4M3), OFF): "w4a8",
    ((NVFP4,), NVFP4): "nvfp4",
    ((NVFP4,), OFF): "nvfp4",
    ((MXFP8,), MXFP8): "mxfp8",
    ((MXFP8,), OFF): "mxfp8",
}
# numerics of an input that is rounded and not multiplied -> format, whether it needs no amax
INPUTS_KNOWN = {
    (INT8,): ("int8", False),
    (E4M3,): ("fp8", False),
    (TOKEN + INT8,): ("int8", True),
    (TOKEN + E4M3,): ("fp8", True),
    (NVFP4,): ("nvfp4", True),
    (MXFP8,): ("mxfp8", True),
}
# what a quantizer may do that no format of ours does
BEYOND = ("_rotate", "_bias", "_unsigned", "_narrow_range", "_use_constant_amax")


@dataclass
class Quantizer:
    """states: of one quantizer, or of the members of a sequential one. tensors: by the name within
    the quantizer (`_amax`, `0._amax`, `_pre_quant_scale`, `svdquant_lora_a`, …)."""

    states: list[dict] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def enabled(self) -> bool:
        return any(not state.get("_disabled", False) for state in self.states)

    def numerics(self) -> tuple[str, ...]:
        """The numerics of the members, in words of this module or the file's own."""
        return tuple(_numerics(state) for state in self.states)

    def amax(self, member: int = 0) -> torch.Tensor | None:
        name = "_amax" if len(self.states) < 2 else f"{member}._amax"
        return self.tensors.get(name)


def _numerics(state: Mapping) -> str:
    if state.get("_disabled"):
        return OFF
    bits = state.get("_num_bits")
    bits = tuple(bits) if isinstance(bits, list) else bits
    sizes = state.get("_block_sizes") or {}
    sizes = dict(sizes) if isinstance(sizes, Mapping) else {"?": sizes}
    scale = sizes.pop("scale_bits", None)
    scale = tuple(scale) if isinstance(scale, (list, tuple)) else scale
    kind = sizes.pop("type", None)
    beyond = [name for name in BEYOND if state.get(name) not in (None, False)]
    axis = state.get("_axis")
    if not beyond and scale is None and sizes in ({}, {-1: None}):
        plain = {8: INT8, (4, 3): E4M3}.get(bits)
        rows = sizes == {-1: None} or axis in (0, (0,), [0])
        if plain and state.get("_dynamic"):
            # once it has run, ModelOpt has turned "blocks" of a whole row into the axes before it
            leading = isinstance(axis, tuple) and axis == tuple(range(len(axis)))
            per_token = sizes == {-1: None} or (leading and axis)
            return TOKEN + plain if per_token else f"{plain}, dynamic per tensor"
        if plain and (axis is None or rows):
            return plain if plain == INT8 or not rows else f"{plain} per channel"
    if not beyond and (bits, sizes, scale) == (4, {-1: 128}, None):
        return INT4
    if not beyond and (bits, sizes, scale) == ((2, 1), {-1: 16}, (4, 3)) and kind == "dynamic":
        return NVFP4  # static ones have calibrated block scales
    if not beyond and (bits, sizes, scale) == ((4, 3), {-1: 32}, (8, 0)):
        return MXFP8
    return f"num_bits {bits}, blocks {sizes}, axis {axis}" + "".join(f", {b[1:]}" for b in beyond)


def convert(
    name: str, weight: torch.Tensor, weights: Quantizer, activations: Quantizer, where: str
) -> tuple[dict[str, torch.Tensor], Layer | None, str | None]:
    """One layer -> its tensors, what the file says of it, and why it is not quantized if it is not.

    weight: as ModelOpt keeps it, smoothed and with SVDQuant's branch taken out, or as mtq.compress
    has packed it. A layer whose
    numerics no format has keeps ModelOpt's fake-quantized weight in floating point, and its input
    is rounded where `input_of` says how.
    """
    smoothing = activations.tensors.get("_pre_quant_scale")
    smoothing = None if smoothing is None else smoothing.reshape(-1)
    up, down = (weights.tensors.get(f"svdquant_lora_{side}") for side in "ba")
    if (up is None) != (down is None):
        raise ValueError(f"SVDQuant's branch must have two sides, {name} in {where} has one")
    packed = compressed.is_packed(weight)
    if packed and not weights.enabled:
        raise ValueError(
            f"a compressed weight must have an enabled weight quantizer, that of {name} in {where} "
            "is disabled: the file is damaged, or save the UNet before mtq.compress"
        )
    if not weights.enabled and not activations.enabled:
        dense = weight if up is None else (weight.float() + up.float() @ down.float())
        return {"weight": _unsmoothed(dense, smoothing).to(weight.dtype)}, None, None
    kind = KINDS.get(weight.ndim)
    inputs = activations.numerics() if activations.enabled else (OFF,)
    found = KNOWN.get((weights.numerics(), inputs[0])) if len(inputs) == 1 else None
    form = KNOWN.get((weights.numerics(), OFF))
    shape = compressed.shape(weight, form) if packed else tuple(weight.shape)
    reason = _why_not(found, kind, shape, weights.numerics(), inputs)
    dtype = weight.dtype
    if reason is not None:
        if packed:
            dense = compressed.dense(form, weight, weights.tensors, name, where)
            scale = weights.tensors["_scale"].dtype
            dtype = scale if scale in SIXTEEN_BITS else torch.float32
        else:
            dense = _fake_quantized(name, weight, weights, where)
        if up is not None:
            dense = dense + up.float() @ down.float()
        return {"weight": _unsmoothed(dense, smoothing).to(dtype)}, None, reason
    numerics = FORMATS[found]
    if packed:
        stored = compressed.tensors(found, weight, weights.tensors, name, where)
    else:
        weight_amax = _weight_amax(found, weight, weights, name, where)
        exact = {"exact": True} if found in ("int4", "w4a8") else {}
        stored = numerics.quantize(weight, weight_amax, **exact)
    way = _way(found, kind, inputs[0])
    layer = Layer(found, kind, activations=way)
    amax = activations.amax()
    if layer.static and amax is None:
        raise ValueError(
            f"a calibrated layer must have an amax for its activations, {name} in {where} has none: "
            "calibrate it with ModelOpt before saving"
        )
    if amax is not None and activations.enabled and (layer.static or found == "nvfp4"):
        amax = amax.float().amax()
        stored["input_scale"] = numerics.input_scale(amax)
    else:
        amax = None
    if smoothing is not None:
        stored["pre_quant_scale"] = _kept(smoothing)
    if up is not None:
        stored["svd_up"], stored["svd_down"] = up, down
    exceptions = {}
    if found == "int8" and not packed:
        exceptions = numerics.amax_exceptions(stored["weight_scale"], weight_amax)
    layer = Layer(
        found,
        kind,
        smoothed=smoothing is not None,
        shape=shape if numerics.BLOCK is not None else None,
        rank=0 if up is None else up.shape[1],
        activations=way,
        input_amax=None if amax is None else amax.item(),
        amax_exceptions=exceptions,
    )
    return stored, layer, None


def input_of(quantizer: Quantizer) -> Input | None:
    """How a module's input is rounded, where that is one of our ways; None else."""
    form, taken = INPUTS_KNOWN.get(quantizer.numerics(), (None, False))
    if form is None or "_pre_quant_scale" in quantizer.tensors:
        return None
    amax = quantizer.amax()
    if taken and (amax is None or form != "nvfp4"):
        return Input(form)
    if amax is None or amax.numel() != 1 or not bool(amax > 0):
        return None
    return Input(form, amax.float().item())


def _fake_quantized(
    name: str, weight: torch.Tensor, quantizer: Quantizer, where: str
) -> torch.Tensor:
    """float32, as the ModelOpt layer multiplies with it. ModelOpt's kernels for NVFP4 and MXFP8 run
    on CUDA only; ours give the same values."""
    if quantizer.numerics() in ((NVFP4,), (MXFP8,)) and quantizer.enabled:
        amax = quantizer.amax()
        amax = None if amax is None else amax.float().amax().item()
        return rounded(weight.float(), Input(quantizer.numerics()[0], amax or None))
    from .dense import fake_quantized

    return fake_quantized(name, weight, quantizer, where)


def _why_not(found, kind, shape, numerics, inputs) -> str | None:
    """Why no format of ours holds the layer, or None."""
    said = f"weights {' then '.join(numerics) or OFF}, activations {' then '.join(inputs)}"
    if found is None or kind is None:
        return f"no format has {said}"
    if kind == "conv2d" and FORMATS[found].BLOCK is not None:
        return f"its blocks run over the kernel's last axis ({said})"
    if kind == "conv2d" and inputs[0].startswith(TOKEN):
        return f"no convolution scales activations per token ({said})"
    return FORMATS[found].why_not(shape)


def _way(found: str, kind: str, inputs: str) -> str:
    """`Layer.activations` for a layer of this format."""
    if inputs == OFF:
        return "" if found == "int4" else SIXTEEN
    if found == "int8" and kind == "linear":
        return "" if inputs.startswith(TOKEN) else STATIC
    return PER_TOKEN if inputs.startswith(TOKEN) else ""


def _weight_amax(found: str, weight: torch.Tensor, quantizer: Quantizer, name: str, where: str):
    """What the format's `quantize` takes, from ModelOpt's own amax."""
    if found == "mxfp8":
        return None
    members = [quantizer.amax(i) for i in range(2 if found == "w4a8" else 1)]
    if found == "nvfp4" and "_global_amax" in quantizer.tensors:
        members = [quantizer.tensors["_global_amax"]]
    if any(amax is None for amax in members):
        raise ValueError(
            f"a calibrated layer must have an amax for its weights, {name} in {where} has none: "
            "calibrate it with ModelOpt before saving"
        )
    rows = weight.shape[0]
    count = members[0].numel()
    wanted = {
        "int8": (rows, 1),
        "int4": (rows * -(-weight[0].numel() // 128),),
        "w4a8": (rows * -(-weight[0].numel() // 128),),
    }.get(found, (1,))
    if count not in wanted:
        raise ValueError(
            f"the amax of {name}'s weights must have {wanted[0]} values, got {count} in {where}: "
            "the file is damaged, or of a ModelOpt that this pack does not know"
        )
    members = [amax.float() for amax in members]
    if found == "int8":
        return members[0].reshape(-1).expand(rows)
    if found == "int4":
        return members[0].reshape(rows, -1)
    if found == "w4a8":
        return members[0].reshape(rows, -1), members[1].amax()
    return members[0].reshape(())


def _unsmoothed(weight: torch.Tensor, smoothing: torch.Tensor | None) -> torch.Tensor:
    """A weight that multiplies x * smoothing -> the one that multiplies x."""
    return weight if smoothing is None else (weight.float() * smoothing.float()).to(weight.dtype)


def _kept(scale: torch.Tensor) -> torch.Tensor:
    return scale if scale.dtype in SIXTEEN_BITS else scale.float()
