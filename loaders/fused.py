"""The blocks of a UNet whose layers hand each other 8-bit activations: norms, GEGLU and attention
quantize what they write, products add biases, time embeddings and residuals.

A block's class is replaced by one of these when its MODEL is loaded. Layer by layer, a call falls
back to the ordinary way where a layer has a LoRA's branch, a patch on its weight, a replaced `forward`
or another kernel; blocks as a whole where attention patches, other packs' replacements of ComfyUI's
functions or a gradient need them. Both ways round at the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import comfy.ops
import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import (
    GEGLU,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
)
from comfy.ldm.modules.diffusionmodules import openaimodel
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch.nn import functional as F

from .attending import attend
from .ops import QuantizedOp, resident, untouched

NHWC = torch.channels_last
# patches of a transformer block, by their names in `transformer_options["patches"]`
PATCHES = ("attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")
CONTEXT = "modelopt_context"


def fuse(unet: torch.nn.Module) -> None:
    """Gives the blocks of a loaded UNet their fused classes."""
    for module in unet.modules():
        if type(module) is ResBlock and _plain_resblock(module):
            module.__class__ = FusedResBlock
        elif type(module) is BasicTransformerBlock and _plain_transformer(module):
            module.__class__ = FusedTransformerBlock
            module.find_groups()
        elif type(module) is SpatialTransformer:
            module.__class__ = FusedSpatialTransformer


def _plain_resblock(block: ResBlock) -> bool:
    odd = block.updown or block.use_scale_shift_norm or block.exchange_temb_dims or block.skip_t_emb
    return not odd and isinstance(block.in_layers[2], torch.nn.Conv2d)


def _plain_transformer(block: BasicTransformerBlock) -> bool:
    odd = block.ff_in or block.disable_self_attn or block.switch_temporal_ca_to_sa
    return not odd and block.is_res and block.attn2 is not None and type(block.ff.net[0]) is GEGLU


# ---- layers


def _fusable(layer: torch.nn.Module) -> bool:
    return isinstance(layer, QuantizedOp) and layer.fusable()


def _stock(function: Callable, module: ModuleType) -> bool:
    """Whether a function is ComfyUI's own: other packs put theirs into its classes."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == module.__file__


def _group(layers: Sequence[torch.nn.Module]) -> tuple | None:
    """What one quantized input of several layers is made with, or None where each needs its own.

    Layers that were calibrated on the same input have the same scale, and SmoothQuant's the same
    smoothing.
    """
    quantized = [layer for layer in layers if isinstance(layer, QuantizedOp)]
    if len(quantized) < len(layers) or any(layer.kernel is None for layer in quantized):
        return None
    if any(layer.kernel.eight_bit is None for layer in quantized):
        return None
    smoothing = [layer.weight._params.pre_quant_scale for layer in layers]
    if not all(_alike(smoothing[0], other) for other in smoothing[1:]):
        return None
    found = {(layer.kernel.eight_bit.format, layer.input_key) for layer in quantized}
    return found.pop() if len(found) == 1 else None


def _alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _producer(layer: QuantizedOp, device: torch.device) -> tuple:
    """Backend, and the arguments `kind`, `scale` and `pre_quant_scale` of its producers."""
    eight_bit = layer.kernel.eight_bit
    smoothing = getattr(layer.weight._params, "pre_quant_scale", None)
    if smoothing is not None:
        smoothing = smoothing.to(device)
    return eight_bit.backend.current(), eight_bit.kind, layer.input_scale_on(device), smoothing


def _norm_weights(norm: torch.nn.Module, x: torch.Tensor) -> tuple:
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    if weight is not None and weight.dtype == x.dtype and resident(norm, x.device, x.dtype):
        return weight, bias, None
    return comfy.ops.cast_bias_weight(norm, x, offloadable=True)


def _layer_norm(norm, x: torch.Tensor, layer: QuantizedOp) -> tuple:
    """The quantized input of `layer` behind a LayerNorm: values and scale."""
    backend, *target = _producer(layer, x.device)
    weight, bias, stream = _norm_weights(norm, x)
    found = backend.layer_norm_quantize(x, weight, bias, norm.eps, *target)
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return found


def _group_norm(norm, x: torch.Tensor, silu: bool, layer: QuantizedOp) -> tuple:
    """The same behind a GroupNorm, channels-last."""
    backend, *target = _producer(layer, x.device)
    weight, bias, stream = _norm_weights(norm, x)
    found = backend.group_norm_quantize(x, norm.num_groups, weight, bias, norm.eps, silu, *target)
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return found


def _product(layer: QuantizedOp, q, scale, dtype, residual=None) -> torch.Tensor:
    """q [..., K] in 8 bits -> [..., N] in `dtype`, plus a residual of that shape."""
    eight_bit = layer.kernel.eight_bit
    weight, bias, stream = layer.cast(q.device, dtype)
    values, weight_scale = eight_bit.operand(weight)
    rows = len(values)
    if residual is not None:
        residual = residual.reshape(-1, rows)
    out = eight_bit.backend.current().scaled_mm(
        q.reshape(-1, q.shape[-1]),
        values.reshape(rows, -1),
        scale,
        weight_scale,
        bias,
        residual,
        dtype,
    )
    layer.uncast(weight, bias, stream)
    return out.reshape(*q.shape[:-1], rows)


def _products(layers: Sequence[QuantizedOp], q, scale, dtype) -> Sequence[torch.Tensor]:
    """One `_product` for each of several layers without a residual, in one launch.

    Not of weights that are brought for the call: ComfyUI's buffers hold no more than two at once.
    """
    if any(layer.weight.device != q.device for layer in layers):
        return [_product(layer, q, scale, dtype) for layer in layers]
    eight_bit = layers[0].kernel.eight_bit
    casts = [layer.cast(q.device, dtype) for layer in layers]
    operands = [eight_bit.operand(weight) for weight, _, _ in casts]
    biases = [bias for _, bias, _ in casts]
    out = eight_bit.backend.current().grouped_scaled_mm(
        q.reshape(-1, q.shape[-1]),
        [values for values, _ in operands],
        scale,
        [weight_scale for _, weight_scale in operands],
        None if biases[0] is None else biases,
        dtype,
    )
    for layer, cast in zip(layers, casts, strict=True):
        layer.uncast(*cast)
    return out.reshape(len(layers), *q.shape[:-1], -1).unbind(0)


def _linear(layer: torch.nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """x [..., K] float -> layer(x) + residual."""
    if not _fusable(layer):
        return layer(x) + residual
    backend, *target = _producer(layer, x.device)
    q, scale = backend.quantize_rows(x, *target)
    return _product(layer, q, scale, x.dtype, residual)


def _conv(layer: QuantizedOp, q, scale, dtype, row_bias=None, residual=None) -> torch.Tensor:
    eight_bit = layer.kernel.eight_bit
    weight, bias, stream = layer.cast(q.device, dtype)
    values, weight_scale = eight_bit.operand(weight)
    out = eight_bit.backend.current().conv2d(
        q,
        values,
        scale,
        weight_scale,
        bias,
        layer.stride,
        layer.padding,
        layer.dilation,
        row_bias,
        residual,
        dtype,
    )
    layer.uncast(weight, bias, stream)
    return out


def _several(
    norm, x: torch.Tensor, layers: Sequence[torch.nn.Module], shared: bool
) -> Sequence[torch.Tensor]:
    """layer(norm(x)) of each layer."""
    if shared and untouched(norm) and all(_fusable(layer) for layer in layers):
        q, scale = _layer_norm(norm, x, layers[0])
        if len(layers) == 1:
            return [_product(layers[0], q, scale, x.dtype)]
        return _products(layers, q, scale, x.dtype)
    normal = norm(x)
    return [layer(normal) for layer in layers]


def _context(block, context: torch.Tensor, options: dict) -> Sequence[torch.Tensor]:
    """Keys and values of a context. It is quantized once a UNet call where all blocks' scales agree
    and nothing smooths it."""
    layers = (block.attn2.to_k, block.attn2.to_v)
    if not (block.context_shared and all(_fusable(layer) for layer in layers)):
        return [layer(context) for layer in layers]
    if block.context_smoothed or torch.compiler.is_compiling():
        q, scale = _quantized_context(layers[0], context)
        return _products(layers, q, scale, context.dtype)
    kept = options.get(CONTEXT)
    if kept is None or kept[0] is not context or kept[1] != block.context_group:
        kept = (context, block.context_group, *_quantized_context(layers[0], context))
        options[CONTEXT] = kept
    return _products(layers, *kept[2:], context.dtype)


def _quantized_context(layer: QuantizedOp, context: torch.Tensor) -> tuple:
    backend, *target = _producer(layer, context.device)
    return backend.quantize_rows(context, *target)


# ---- blocks


class FusedTransformerBlock(BasicTransformerBlock):
    runner = None  # `run` compiled, see compiling.py

    def find_groups(self) -> None:
        """Asked once, as the answer is the same at every call: which layers share an input.

        Yes or no: torch.compile would compile each block anew for values of its own.
        """
        one, two = self.attn1, self.attn2
        norms = (self.norm1, self.norm2, self.norm3)
        plain = [getattr(norm, "rounding", None) is None for norm in norms]
        self.shared = (
            plain[0] and _group((one.to_q, one.to_k, one.to_v)) is not None,
            plain[1] and _group((two.to_q,)) is not None,
            plain[2] and _group((self.ff.net[0].proj,)) is not None,
        )
        self.context_group = _group((two.to_k, two.to_v))
        self.context_shared = self.context_group is not None
        smoothing = two.to_k.weight._params.pre_quant_scale if self.context_shared else None
        self.context_smoothed = smoothing is not None  # for this block alone

    def forward(self, x, context=None, transformer_options={}):  # noqa: B006  ComfyUI's signature
        if context is None or self._patched(transformer_options) or not self._stock_inside():
            return super().forward(x, context, transformer_options)
        if x.requires_grad or context.requires_grad:
            return super().forward(x, context, transformer_options)
        return (self.runner or FusedTransformerBlock.run)(self, x, context, transformer_options)

    def run(self, x, context, transformer_options):
        """The block without a patch on it; torch.compile compiles this."""
        one, two = self.attn1, self.attn2
        q, k, v = _several(self.norm1, x, (one.to_q, one.to_k, one.to_v), self.shared[0])
        x = _linear(one.to_out[0], attend(q, k, v, one, transformer_options), x)
        (q,) = _several(self.norm2, x, (two.to_q,), self.shared[1])
        k, v = _context(self, context, transformer_options)
        x = _linear(two.to_out[0], attend(q, k, v, two, transformer_options), x)
        return self._feed_forward(x)

    def _stock_inside(self) -> bool:
        """Whether what `run` takes apart is ComfyUI's, called in ComfyUI's way."""
        parts = ((self.attn1, CrossAttention), (self.attn2, CrossAttention), (self.ff, FeedForward))
        return all(type(m) is kind and untouched(m) for m, kind in parts) and all(
            _stock(kind.forward, attention)
            for kind in (BasicTransformerBlock, CrossAttention, FeedForward, GEGLU)
        )

    def _patched(self, options: Mapping) -> bool:
        patches = options.get("patches", {})
        if any(patches.get(name) for name in PATCHES):
            return True
        block = options.get("block")
        here = (block, (*block, options.get("block_index", 0)) if block is not None else None)
        replaced = options.get("patches_replace", {})
        return any(b in replaced.get(name, {}) for name in ("attn1", "attn2") for b in here)

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        first, last = self.ff.net[0].proj, self.ff.net[2]
        whole = untouched(self.norm3) and untouched(self.ff.net[0])
        if not (self.shared[2] and whole and _fusable(first)):
            return self.ff(self.norm3(x)) + x
        q, scale = _layer_norm(self.norm3, x, first)
        eight_bit = first.kernel.eight_bit
        weight, bias, stream = first.cast(x.device, x.dtype)
        values, weight_scale = eight_bit.operand(weight)
        kind, out_scale = None, None
        if _fusable(last) and last.weight._params.pre_quant_scale is None:
            out_scale = last.input_scale_on(x.device)
            kind = None if out_scale is None else last.kernel.eight_bit.dtype
        gated = (
            eight_bit.backend.current()
            .scaled_mm_geglu(
                q.reshape(-1, q.shape[-1]),
                values,
                scale,
                weight_scale,
                bias,
                x.dtype,
                kind,
                out_scale,
            )
            .reshape(*x.shape[:-1], -1)
        )
        first.uncast(weight, bias, stream)
        if kind is None:
            return _linear(last, gated, x)
        return _product(last, gated, out_scale, x.dtype, x)


class FusedResBlock(ResBlock):
    runner = None

    def _forward(self, x, emb):
        if x.requires_grad or emb.requires_grad or not _stock(ResBlock._forward, openaimodel):
            return super()._forward(x, emb)
        return (self.runner or FusedResBlock.run)(self, x.contiguous(memory_format=NHWC), emb)

    def run(self, x, emb):
        """The block on channels-last pixels."""
        first, last = self.in_layers[2], self.out_layers[3]
        time = self.emb_layers(emb).to(x.dtype).expand(len(x), -1)
        h = self._half(self.in_layers[0], first, x, row_bias=time)
        return self._half(self.out_layers[0], last, h, residual=self.skip_connection(x))

    def _half(self, norm, conv, x, row_bias=None, residual=None) -> torch.Tensor:
        """conv(silu(norm(x))) plus a time embedding [N, K] or a residual [N, K, H, W]."""
        if _fusable(conv) and untouched(norm):
            q, scale = _group_norm(norm, x, True, conv)
            return _conv(conv, q, scale, x.dtype, row_bias, residual)
        out = conv(F.silu(norm(x)))
        return out + (row_bias[:, :, None, None] if row_bias is not None else residual)


class FusedSpatialTransformer(SpatialTransformer):
    def forward(self, x, context=None, transformer_options={}):  # noqa: B006  ComfyUI's signature
        if x.requires_grad or not _stock(SpatialTransformer.forward, attention):
            return super().forward(x, context, transformer_options)
        if not isinstance(context, list):
            context = [context] * len(self.transformer_blocks)
        transformer_options["activations_shape"] = list(x.shape)
        n, _, height, width = x.shape
        x = x.contiguous(memory_format=NHWC)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [N, H * W, C], no copy
        h = self._project_in(x, pixels)
        for index, block in enumerate(self.transformer_blocks):
            transformer_options["block_index"] = index
            h = block(h, context=context[index], transformer_options=transformer_options)
        h = self._project_out(h, pixels, height, width)
        return h.reshape(n, height, width, -1).permute(0, 3, 1, 2)

    def _project_in(self, x: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        layer = self.proj_in
        if _fusable(layer) and untouched(self.norm):
            q, scale = _group_norm(self.norm, x, False, layer)
            return _product(layer, q.permute(0, 2, 3, 1).flatten(1, 2), scale, x.dtype)
        normal = self.norm(x)
        if not self.use_linear:
            return layer(normal).permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        return layer(normal.permute(0, 2, 3, 1).flatten(1, 2).contiguous())

    def _project_out(self, h, pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[N, H * W, inner] -> [N, H * W, C], with what came into the transformer added."""
        layer = self.proj_out
        if self.use_linear or _fusable(layer):
            return _linear(layer, h, pixels)
        image = h.reshape(len(h), height, width, -1).permute(0, 3, 1, 2)
        return layer(image).permute(0, 2, 3, 1).flatten(1, 2) + pixels
