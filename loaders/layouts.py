"""comfy-kitchen layouts for our formats: stock ones have no convolutions, smoothing or branches.

A layout's `dequantize` always answers in the basis of the original weight, smoothing undone and
branches added, so that every ComfyUI path that patches a weight (in place, --lowvram, dynamic VRAM)
adds its delta in the right basis without knowing about either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from comfy.quant_ops import TensorCoreFP8E4M3Layout
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams

from ..formats import FORMATS
from ..formats.checkpoint import Layer


@dataclass(frozen=True)
class Params(BaseLayoutParams):
    """The format's scales, and what stands around the quantized weight.

    pre_quant_scale [in]: smoothing. svd_up [out, r] @ svd_down [r, in]: SVDQuant's branch, in the
    smoothed basis. up [out, r] @ down [r, K]: a LoRA's branch, in the original basis.
    """

    scale_2: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None
    svd_up: torch.Tensor | None = None
    svd_down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None

    def _tensor_fields(self) -> list[str]:
        names = ("scale", "scale_2", *AROUND, "up", "down")
        return [name for name in names if getattr(self, name) is not None]

    def _validate_tensor_fields(self) -> None:
        pass

    def copy_from(self, src: Params, non_blocking: bool = False) -> None:
        """In place where both have a tensor; the branch comes and goes with the source."""
        for field in dataclasses.fields(self):
            mine, value = getattr(self, field.name), getattr(src, field.name)
            if isinstance(mine, torch.Tensor) and isinstance(value, torch.Tensor):
                if mine.shape == value.shape:
                    mine.copy_(value, non_blocking=non_blocking)
                    continue
                value = value.to(mine.device)
            object.__setattr__(self, field.name, value)


AROUND = ("pre_quant_scale", "svd_up", "svd_down")


class ModelOptLayout(QuantizedLayout):
    """Shared by all formats; FORMAT is the module of formats/ that owns the numerics."""

    FORMAT = None
    Params = Params

    @classmethod
    def quantize(
        cls,
        tensor,
        scale=None,
        stochastic_rounding=0,
        inplace_ops=False,
        pre_quant_scale=None,
        svd_up=None,
        svd_down=None,
    ):
        """Float weight [out, in, ...] in the original basis -> stored values and Params.

        Called by ComfyUI when it requantizes a patched weight. `stochastic_rounding` is a seed:
        above 0, 8-bit values are rounded up or down at random in proportion, as ComfyUI does.
        """
        weight = tensor.float()
        if pre_quant_scale is not None:
            weight = weight / pre_quant_scale.to(weight.device, torch.float32)
        if svd_up is not None:
            weight = weight - svd_up.float() @ svd_down.float()
        stored = cls.FORMAT.quantize(weight, cls.FORMAT.weight_amax(weight))
        if stochastic_rounding and cls.FORMAT.NAME in ROUND_RANDOMLY:
            stored["weight"] = ROUND_RANDOMLY[cls.FORMAT.NAME](
                weight, stored["weight_scale"], stochastic_rounding
            )
        around = {"pre_quant_scale": pre_quant_scale, "svd_up": svd_up, "svd_down": svd_down}
        params = cls.params(stored, tensor.dtype, tuple(tensor.shape), **around)
        return stored["weight"], params

    @classmethod
    def params(cls, stored: Mapping[str, torch.Tensor], dtype, shape, **around) -> Params:
        """Params of what the format stored, by its own names."""
        scales = [stored.get(name) for name in cls.FORMAT.SCALES]
        first, second = scales if len(scales) == 2 else (scales[0], None)
        return Params(scale=first, scale_2=second, orig_dtype=dtype, orig_shape=shape, **around)

    @classmethod
    def stored(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """Stored values and scales by the format's own names."""
        scales = (params.scale, params.scale_2)[: len(cls.FORMAT.SCALES)]
        return {"weight": qdata, **dict(zip(cls.FORMAT.SCALES, scales, strict=True))}

    @classmethod
    def plain(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """Stored values -> float32 weight as the layer multiplies with it: smoothed, no branches."""
        return cls.FORMAT.dequantize(cls.stored(qdata, params), params.orig_shape)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """Stored values -> weight in the original basis, branches included, in params.orig_dtype."""
        weight = cls.plain(qdata, params)
        if params.svd_up is not None:
            weight = weight + params.svd_up.float() @ params.svd_down.float()
        if params.pre_quant_scale is not None:
            weight = weight * params.pre_quant_scale.float()
        if params.up is not None:
            weight = weight + (params.up.float() @ params.down.float()).reshape(weight.shape)
        return weight.to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor):
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        return {n.removeprefix("weight"): t for n, t in cls.stored(qdata, params).items()}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, object]:
        return {name: getattr(qtensor._params, name) for name in AROUND}

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        return False  # the layers of loaders/ops.py choose their kernel themselves


def _round_int8_randomly(weight, scale, seed):
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    noise = torch.rand(weight.shape, generator=generator, device=weight.device)
    return (weight / scale + noise).floor_().clamp_(-127, 127).to(torch.int8)


def _round_fp8_randomly(weight, scale, seed):
    return TensorCoreFP8E4M3Layout.quantize(weight, scale=scale, stochastic_rounding=seed)[0]


ROUND_RANDOMLY = {"int8": _round_int8_randomly, "fp8": _round_fp8_randomly}


def _layout(module) -> type[ModelOptLayout]:
    """A layout class of one format, registered under its name with comfy-kitchen."""
    name = f"ModelOpt{module.NAME.upper()}Layout"
    found = type(name, (ModelOptLayout,), {"FORMAT": module, "__doc__": module.TITLE})
    register_layout_class(name, found)
    return found


LAYOUTS = {name: _layout(module) for name, module in FORMATS.items()}


def wrap(layer: Layer, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> QuantizedTensor:
    """A layer's tensors by their names in the file -> a QuantizedTensor that reads as `dtype`."""
    layout = LAYOUTS[layer.format]
    around = {name: tensors.get(name) for name in AROUND}
    shape = layer.shape or tuple(tensors["weight"].shape)
    params = layout.params(tensors, dtype, shape, **around)
    return QuantizedTensor(tensors["weight"], layout.__name__, params)


def unwrap(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The inverse of `wrap`, without a LoRA's branch."""
    params = weight._params
    around = {name: getattr(params, name) for name in AROUND}
    found = weight.layout_cls.stored(weight._qdata, params) | around
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def nbytes(weight: QuantizedTensor) -> int:
    """Bytes of a quantized weight, scales and branches included; also of stock ComfyUI's."""
    layout = weight.layout_cls
    ours = issubclass(layout, ModelOptLayout)
    stored = unwrap(weight) if ours else layout.state_dict_tensors(weight._qdata, weight._params)
    return sum(tensor.nbytes for tensor in stored.values())


def rewrapped(weight: QuantizedTensor) -> QuantizedTensor:
    """The same quantized weight as a new tensor of the inference mode that is on, or off, now."""
    return QuantizedTensor(weight._qdata, weight._layout_cls, weight._params)


def channels_last(weight: QuantizedTensor) -> QuantizedTensor:
    """A convolution's quantized weight with its values in the order that NHWC kernels read."""
    values = weight._qdata.contiguous(memory_format=torch.channels_last)
    return QuantizedTensor(values, weight._layout_cls, weight._params)


def without_branch(weight: QuantizedTensor) -> QuantizedTensor:
    """The same quantized weight with its low-rank branch taken off."""
    params = dataclasses.replace(weight._params, up=None, down=None)
    return QuantizedTensor(weight._qdata, weight._layout_cls, params)


def with_branch(weight: QuantizedTensor, up: torch.Tensor, down: torch.Tensor) -> QuantizedTensor:
    """The same quantized weight with a low-rank branch: up [out, r], down [r, in * kh * kw]."""
    params = dataclasses.replace(weight._params, up=up, down=down)
    return QuantizedTensor(weight._qdata, weight._layout_cls, params)
