"""comfy-kitchen layouts for what stock ComfyUI has none: smoothed INT8 Linears, INT8 convolutions,
and the low-rank branch that carries a LoRA on top of 8-bit weights.

A layout's `dequantize` always answers in the basis of the original weight, smoothing undone and
branch added, so that every ComfyUI path that patches a weight (in place, --lowvram, dynamic VRAM)
adds its delta in the right basis without knowing about either.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from comfy.quant_ops import TensorCoreFP8E4M3Layout
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams

from ..formats import fp8, int8


@dataclass(frozen=True)
class Params(BaseLayoutParams):
    """Scale, optional smoothing scale [in] and optional low-rank branch up [out, r] @ down [r, K]."""

    pre_quant_scale: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None

    def _tensor_fields(self) -> list[str]:
        names = ("scale", "pre_quant_scale", "up", "down")
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


class _ModelOptLayout(QuantizedLayout):
    """Shared by both formats; FORMAT is the module of formats/ that owns the numerics."""

    FORMAT = None
    Params = Params

    @classmethod
    def quantize(
        cls, tensor, scale=None, stochastic_rounding=0, inplace_ops=False, pre_quant_scale=None, **_
    ):
        """Float weight [out, in, ...] in the original basis -> stored values and Params.

        Called by ComfyUI when it requantizes a patched weight. `stochastic_rounding` is a seed:
        above 0, values are rounded up or down at random in proportion, as ComfyUI does.
        """
        weight = tensor.float()
        if pre_quant_scale is not None:
            weight = weight / pre_quant_scale.to(weight.device, torch.float32)
        stored = cls.FORMAT.quantize(weight, cls.FORMAT.weight_amax(weight))
        if stochastic_rounding:
            stored["weight"] = cls._round_randomly(
                weight, stored["weight_scale"], stochastic_rounding
            )
        params = Params(
            scale=stored["weight_scale"],
            orig_dtype=tensor.dtype,
            orig_shape=tuple(tensor.shape),
            pre_quant_scale=pre_quant_scale,
        )
        return stored["weight"], params

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """Stored values -> weight in the original basis, branch included, in params.orig_dtype."""
        weight = cls.FORMAT.dequantize(qdata, params.scale)
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
        return {"": qdata, "_scale": params.scale}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, object]:
        return {"pre_quant_scale": qtensor._params.pre_quant_scale}

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        return False  # the layers of loaders/ops.py choose their kernel themselves


class ModelOptInt8Layout(_ModelOptLayout):
    """INT8 per output channel, for Linear [out, in] and Conv2d [out, in, kh, kw] weights."""

    FORMAT = int8

    @staticmethod
    def _round_randomly(weight, scale, seed):
        noise = torch.rand(
            weight.shape, generator=_generator(weight.device, seed), device=weight.device
        )
        return (weight / scale + noise).floor_().clamp_(-int8.QMAX, int8.QMAX).to(torch.int8)


class ModelOptFP8Layout(_ModelOptLayout):
    """FP8 E4M3 per tensor, for Linear and Conv2d weights."""

    FORMAT = fp8

    @staticmethod
    def _round_randomly(weight, scale, seed):
        qdata, _ = TensorCoreFP8E4M3Layout.quantize(weight, scale=scale, stochastic_rounding=seed)
        return qdata


LAYOUTS = {int8.NAME: ModelOptInt8Layout, fp8.NAME: ModelOptFP8Layout}
for _layout in LAYOUTS.values():
    register_layout_class(_layout.__name__, _layout)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def wrap(
    format_name: str,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    pre_quant_scale: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Stored values and scales -> a QuantizedTensor that reads as `dtype` with qdata's shape."""
    params = Params(scale, dtype, tuple(qdata.shape), pre_quant_scale)
    return QuantizedTensor(qdata, LAYOUTS[format_name].__name__, params)


def without_branch(weight: QuantizedTensor) -> QuantizedTensor:
    """The same quantized weight with its low-rank branch taken off."""
    params = dataclasses.replace(weight._params, up=None, down=None)
    return QuantizedTensor(weight._qdata, weight._layout_cls, params)


def with_branch(weight: QuantizedTensor, up: torch.Tensor, down: torch.Tensor) -> QuantizedTensor:
    """The same quantized weight with a low-rank branch: up [out, r], down [r, in * kh * kw]."""
    params = dataclasses.replace(weight._params, up=up, down=down)
    return QuantizedTensor(weight._qdata, weight._layout_cls, params)
