"""One layer to measure: random activations and weights, quantized in each way, and exact results."""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F

from ...formats import FORMATS
from ...formats.checkpoint import SIXTEEN, STATIC, Layer
from ...kernels import fp8, int8
from ...loaders import layouts
from .shapes import Shape

# one channel in 64 is far above the rest, as after a norm with outlier gains
OUTLIERS, OUTLIER = 64, 6.0


class Problem:
    """x, weight and bias in `dtype` on `device`; what candidates need of them is made on demand."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0):
        self.shape, self.device, self.dtype = shape, device, dtype
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device)

        if shape.kind == "linear":
            x, weight = normal(shape.m, shape.k), normal(shape.n, shape.k)
            x[:, ::OUTLIERS] *= OUTLIER
            outputs = shape.n
        else:
            x = normal(shape.batch, shape.c, shape.h, shape.w)
            x[:, ::OUTLIERS] *= OUTLIER
            weight, outputs = normal(shape.k, shape.c, shape.r, shape.r), shape.k
        self.x = x.to(dtype)
        self.weight = (weight / math.sqrt(math.prod(weight.shape[1:]))).to(dtype)
        self.bias = (0.05 * normal(outputs)).to(dtype)

    @property
    def geometry(self) -> tuple:
        """stride, padding, dilation of a convolution."""
        return (self.shape.stride,) * 2, (self.shape.padding,) * 2, (1, 1)

    @cached_property
    def stored(self) -> dict[str, dict[str, torch.Tensor]]:
        """Format -> weight and weight_scale as the file format has them."""
        return {
            name: FORMATS[name].quantize(self.weight, FORMATS[name].weight_amax(self.weight))
            for name in ("int8", "fp8")
        }

    def held(self, form: str, channels_last: bool = False):
        """The weight as a loaded layer holds it, a QuantizedTensor."""
        weight = layouts.wrap(Layer(form, self.shape.kind), self.stored[form], self.dtype)
        return layouts.channels_last(weight) if channels_last else weight

    def static_scale(self, form: str) -> torch.Tensor:
        """The calibrated scale of x: float32, 0-dim."""
        return FORMATS[form].input_scale(self.x.abs().amax())

    def quantized(self, form: str, activations: str) -> tuple[torch.Tensor, torch.Tensor]:
        """x in a format: its values in float32, and its scale, 0-dim or [M, 1]."""
        if activations == STATIC:
            scale = self.static_scale(form)
            return {"int8": int8, "fp8": fp8}[form].quantize(self.x, scale), scale
        if form == "int8":
            return int8.quantize_per_token(self.x)
        scale = fp8.token_scale(self.x)
        return fp8.quantize(self.x, scale), scale

    def exact(self, form: str, activations: str) -> torch.Tensor:
        """What a layer of this format must give, in float64, products and sums without rounding
        (integers exactly). `form` SIXTEEN: of x and weight as they are; `activations` SIXTEEN: of x
        as it is."""
        if form == SIXTEEN:
            return self._product(self.x.double(), self.weight.double()) + self._channel(self.bias)
        stored = self.stored[form]
        if activations == SIXTEEN:
            weight = FORMATS[form].dequantize(stored, tuple(self.weight.shape)).double()
            return self._product(self.x.double(), weight) + self._channel(self.bias)
        q, scale = self.quantized(form, activations)
        out = self._product(q.double(), stored["weight"].float().double())
        out = out * scale.double() * self._channel(stored["weight_scale"])
        return out + self._channel(self.bias)

    def accumulators(self, activations: str) -> torch.Tensor:
        """int8's exact sums, int64 [M, N] or [N, K, P, Q]."""
        q, _ = self.quantized("int8", activations)
        return self._product(q.double(), self.stored["int8"]["weight"].double()).round().long()

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.shape.kind == "linear":
            return x @ weight.t()
        return F.conv2d(x, weight, None, *self.geometry)

    def _channel(self, values: torch.Tensor) -> torch.Tensor:
        flat = values.double().reshape(-1)
        return flat if self.shape.kind == "linear" else flat.reshape(1, -1, 1, 1)
