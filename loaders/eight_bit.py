"""An 8-bit layer on one of kernels/backends.py: its input is quantized, then multiplied.

`EightBit.linear` and `.conv2d` do both; fused.py, whose producers quantize, calls the product alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from ..formats import FORMATS
from ..formats.checkpoint import Layer, QuantizedCheckpoint
from ..formats.groups import sharing, with_its_input
from ..kernels.backends import Backend
from ..kernels.producers import DTYPES
from ..utils.capability import PRODUCTS

KINDS = PRODUCTS
NHWC = torch.channels_last
# modules whose input a fused block has in 8 bits already, beside those that share one
ALONE = ("*.attn2.to_q", "*.ff.net.0.proj", "*.proj_in", "*.in_layers.2", "*.out_layers.3")
# the same where its scale is known before it is computed
STATIC = ("*.ff.net.2",)


def handed_over(name: str, layer: Layer, alike: bool = False) -> bool:
    """Whether fused.py hands the module `name` an input in 8 bits, so that no pass of its own
    quantizes it. (Keys and values share one pass of the context with all other blocks.)

    alike: whether the layers that have one input are smoothed alike, see `smoothed_alike`.
    """
    if layer.format not in KINDS or layer.rank:
        return False
    if len(with_its_input(name)) > 1:
        return alike or not layer.smoothed
    patterns = ALONE
    if layer.static and not layer.smoothed:
        patterns += STATIC
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def smoothed_alike(checkpoint: QuantizedCheckpoint) -> set[str]:
    """Names of the layers that share an input and whose whole group is smoothed, each as the others. Of
    tensors on the meta device what `quantize.pack` will make: SmoothQuant's are alike, AWQ's are not."""
    smoothed = [name for name, layer in checkpoint.layers.items() if layer.smoothed]
    found: set[str] = set()
    for names in sharing(smoothed):
        if len(names) == 1 or len(names) < len(with_its_input(names[0])):
            continue
        first, *others = (checkpoint.tensors[f"{name}.pre_quant_scale"] for name in names)
        if first.is_meta:
            alike = all(checkpoint.layers[name].format == "int8" for name in names)
        else:
            alike = all(torch.equal(first, other) for other in others)
        if alike:
            found |= set(names)
    return found


@dataclass(frozen=True)
class EightBit:
    """format: a key of KINDS. backend: who computes."""

    format: str
    backend: Backend

    @property
    def kind(self) -> str:
        """What activations are quantized to: "int8" or "fp8"."""
        return KINDS[self.format]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of quantized activations."""
        return DTYPES[self.kind]

    def operand(self, weight) -> tuple[torch.Tensor, torch.Tensor]:
        """A quantized weight -> its 8-bit values in the weight's shape and their scale."""
        if self.format != "w4a8":
            return weight._qdata, weight._params.scale
        stored = weight.layout_cls.stored(weight._qdata, weight._params)
        return FORMATS["w4a8"].to_fp8(stored, weight._params.orig_shape)

    def linear(self, x, input_scale, weight, bias):
        """x [..., K] float -> [..., N] in x's dtype; a scale for each token where there is none."""
        backend = self.backend.current()
        q, scale = backend.quantize_rows(x.reshape(-1, x.shape[-1]), self.kind, input_scale)
        values, weight_scale = self.operand(weight)
        out = backend.scaled_mm(q, values, scale, weight_scale, bias, dtype=x.dtype)
        return out.reshape(*x.shape[:-1], -1)

    def conv2d(self, x, input_scale, weight, bias, stride, padding, dilation):
        """x [N, C, H, W] float -> [N, K, P, Q] in x's dtype, channels-last."""
        backend = self.backend.current()
        pixels = x.contiguous(memory_format=NHWC).permute(0, 2, 3, 1)
        q, scale = backend.quantize_rows(pixels, self.kind, input_scale)
        values, weight_scale = self.operand(weight)
        return backend.conv2d(
            q.permute(0, 3, 1, 2),
            values,
            scale,
            weight_scale,
            bias,
            stride,
            padding,
            dilation,
            dtype=x.dtype,
        )
