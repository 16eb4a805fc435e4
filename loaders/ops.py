"""The comfy.ops class of a quantized UNet: stock mixed-precision ops with our Linear and Conv2d.

Each layer's kernel is chosen once, when its weights are loaded, and kept in `kernel`. While a
patch function is attached (--lowvram LoRA, hooks) ComfyUI needs the weight in floating point:
the layer then runs dequantized, as stock quantized layers do.
"""

from __future__ import annotations

import comfy.ops
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ..formats.checkpoint import Input, Layer
from . import layouts, patching
from .dispatch import DEQUANTIZED, Kernel
from .rounding import rounded


class QuantizedOp:
    """What Linear and Conv2d share. `weight` is a QuantizedTensor once a quantized layer is loaded."""

    kernel: Kernel | None = None
    rounding: Input | None = None
    # the calibrated activation scale as a number: layers that share an input share it
    input_key: float | None = None
    KIND = ""

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        layer = self.LAYERS.get(prefix.removesuffix("."))
        self.rounding = self.INPUTS.get(prefix.removesuffix("."))
        if layer is None:
            weight = state_dict.get(prefix + "weight")
            if weight is not None and self._wrong_shape(prefix, weight, errors):
                return
            if weight is not None and torch.float32 == self.COMPUTE_DTYPE:
                # stock would hold an unquantized Linear in 32 bits; the cast per call is the same
                self.factory_kwargs = {"device": None, "dtype": weight.dtype}
            if self._taken_as_it_is(state_dict, prefix):
                metadata = {**metadata, "assign_to_params_buffers": True}
            super()._load_from_state_dict(
                state_dict, prefix, metadata, strict, missing, unexpected, errors
            )
            return
        tensors = {
            name: state_dict.pop(prefix + name)
            for name in ("weight", *layer.scales)
            if prefix + name in state_dict
        }
        state_dict.pop(prefix + "comfy_quant", None)
        given = tensors["weight"]
        weight = given if isinstance(given, QuantizedTensor) else None
        if weight is None:
            weight = layouts.wrap(layer, tensors, self.COMPUTE_DTYPE)
        if self._wrong_shape(prefix, weight, errors):
            return
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.layout_type = weight._layout_cls
        self.quant_format = layer.comfy_format
        if "input_scale" in tensors:
            self.input_scale = torch.nn.Parameter(tensors["input_scale"], requires_grad=False)
            self.input_key = tensors["input_scale"].item()
        self.kernel = self.CHOOSE(layer, self.expected_shape(), prefix.removesuffix("."))
        if self.kernel.eight_bit is not None and weight._qdata.ndim == 4:
            weight = layouts.channels_last(weight)
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
        bias = prefix + "bias"
        if self.bias is not None and bias in state_dict:
            value = state_dict.pop(bias).to(self.COMPUTE_DTYPE)
            if tuple(value.shape) != self.expected_shape()[:1]:
                rule = f"{bias} must have shape {self.expected_shape()[:1]}"
                errors.append(f"{rule}, found {tuple(value.shape)}")
                return
            self.bias = torch.nn.Parameter(value, requires_grad=False)

    def _taken_as_it_is(self, state_dict, prefix: str) -> bool:
        """Whether the file's memory-mapped tensors can be the parameters: a copy would be theirs
        again in memory. Not of a checkpoint that shares tensors with another MODEL."""
        given = [state_dict.get(prefix + name) for name in ("weight", "bias")]
        own = getattr(self, "weight", None)  # a Linear has none yet
        return (
            self.TAKES and own is not None and all(t is None or t.dtype == own.dtype for t in given)
        )

    def _wrong_shape(self, prefix: str, weight: torch.Tensor, errors: list[str]) -> bool:
        expected = self.expected_shape()
        if tuple(weight.shape) == expected:
            return False
        errors.append(f"{prefix}weight must have shape {expected}, found {tuple(weight.shape)}")
        return True

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        if not isinstance(self.weight, QuantizedTensor):
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        out = destination if destination is not None else {}
        comfy.ops._quantized_weight_state_dict(
            self, out, prefix, extra_quant_params=("input_scale",)
        )
        for name in layouts.AROUND:
            tensor = getattr(self.weight._params, name)
            if tensor is not None:
                out[prefix + name] = tensor
        return out

    def convert_weight(self, weight, inplace=False, **kwargs):
        """The weight in floating point, in the basis that patches are written for."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Takes a patched floating-point weight back (or returns it) in the layer's own format."""
        if isinstance(self.weight, QuantizedTensor):
            assert not inplace_update  # QuantizedPatcher puts hooked weights in place
            weight = patching.patched(self.weight, weight, seed)
        else:
            # a copy: ComfyUI keeps what it gave, and writes into the weight at the next step
            weight = weight.to(self.weight.dtype, copy=True)
        if return_weight:
            return weight
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        return None

    def _apply(self, fn, recurse=True):
        """Moves the layer. A quantized tensor made outside of inference mode cannot become a Parameter
        inside of it, where ComfyUI's nodes run; "Unload Models" moves outside."""
        weight = self._parameters.get("weight")
        if isinstance(weight, QuantizedTensor) and torch.is_inference_mode_enabled():
            self.weight = torch.nn.Parameter(layouts.rewrapped(weight), requires_grad=False)
        return self.MOVE(fn, recurse)

    def _needs_float_weight(self, input: torch.Tensor) -> bool:
        return (
            self.kernel.run is None
            or len(self.weight_function) > 0
            or len(self.bias_function) > 0
            or getattr(self, "comfy_force_cast_weights", False)
            or input.requires_grad
        )

    def running(self) -> Kernel | None:
        """What runs the layer as it is now: `kernel`, or floating point where patches need that."""
        patched = self.weight_function or self.bias_function
        if self.kernel is None or not (patched or getattr(self, "comfy_force_cast_weights", False)):
            return self.kernel
        if self.kernel.dequantizes:
            return self.kernel
        what = self.kernel.name.partition(":")[0]
        why = "a patch waits for its weight at each call (a LoRA under --lowvram, a hook)"
        return Kernel(f"{what}: dequantized", DEQUANTIZED, why)

    def fusable(self) -> bool:
        """Whether what comes before this layer may quantize its input: nothing here needs it whole."""
        if self.kernel is None or self.kernel.eight_bit is None:
            return False
        if self.weight_function or self.bias_function or not untouched(self):
            return False
        params = self.weight._params
        return (
            params.up is None
            and params.svd_up is None
            and not getattr(self, "comfy_force_cast_weights", False)
        )

    def cast(self, device: torch.device, dtype: torch.dtype):
        """The quantized weight and the bias on `device`, and what `uncast` takes besides."""
        if resident(self, device, dtype):
            return self._parameters["weight"], self._parameters["bias"], None
        return comfy.ops.cast_bias_weight(
            self,
            device=device,
            dtype=self.weight.dtype,
            bias_dtype=dtype,
            offloadable=True,
            compute_dtype=dtype,
            want_requant=True,
        )

    def uncast(self, weight, bias, stream) -> None:
        """After the last use of what `cast` gave."""
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    def forward(self, input, *args, **kwargs):
        if not isinstance(self.weight, QuantizedTensor):
            return super().forward(rounded(input, self.rounding), *args, **kwargs)
        comfy.ops.run_every_op()
        dense = self._needs_float_weight(input)
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self,
            device=input.device,
            dtype=input.dtype if dense else self.weight.dtype,
            bias_dtype=input.dtype,
            offloadable=True,
            compute_dtype=input.dtype,
            want_requant=not dense,
        )
        if not dense and isinstance(weight, QuantizedTensor):
            output = self._run_quantized(input, weight, bias)
        else:
            if isinstance(weight, QuantizedTensor):
                weight = weight.to(dtype=input.dtype).dequantize()
            output = self._run_dense(input, weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return output

    def input_scale_on(self, device: torch.device) -> torch.Tensor | None:
        """The calibrated activation scale; None where each token has its own."""
        scale = getattr(self, "input_scale", None)
        return scale if scale is None or scale.device == device else scale.to(device)


def resident(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ComfyUI's `cast_bias_weight` would give weight and bias as they are, which it takes its
    time to find out: they lie on `device`, the bias in `dtype`, and no patch waits for either."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if module.weight_function or module.bias_function or weight.device != device:
        return False
    return bias is None or (bias.device == device and bias.dtype == dtype)


def untouched(module: torch.nn.Module) -> bool:
    """Whether calling `module` runs its class's own `forward` and nothing else: ComfyUI's bypass LoRAs
    and other packs replace it. One that was taken back may have left the class's own in the module."""
    own = getattr(module.forward, "__func__", None) is type(module).forward
    return own and not module._forward_hooks and not module._forward_pre_hooks


def _branch(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x [..., in] through down [r, in] and up [out, r]."""
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def quantized_ops(
    compute_dtype: torch.dtype,
    layers: dict[str, Layer],
    inputs: dict[str, Input],
    choose,
    takes: bool = False,
) -> type:
    """The ops class for one model.

    compute_dtype: what activations and unquantized weights are computed in.
    layers: module name -> what the file says of it; inputs: of unquantized ones, the same;
    `choose(layer, shape, name)` answers a layer's kernel; takes: tensors are the model's alone and
    become its parameters without a copy.
    """
    base = comfy.ops.mixed_precision_ops({}, compute_dtype)

    class Shared(QuantizedOp):
        LAYERS = layers
        INPUTS = inputs
        TAKES = takes
        COMPUTE_DTYPE = compute_dtype
        CHOOSE = staticmethod(choose)
        MOVE = base.Linear._apply

    class Ops(base):
        class Linear(Shared, base.Linear):
            def expected_shape(self):
                return (self.out_features, self.in_features)

            def _run_quantized(self, input, weight, bias):
                params = weight._params
                x = input
                if params.pre_quant_scale is not None:
                    x = x * params.pre_quant_scale.to(x.dtype)
                output = self.kernel.run(x, self.input_scale_on(input.device), weight, bias)
                if params.svd_up is not None:
                    output = output + _branch(x, params.svd_up, params.svd_down)
                if params.up is not None:
                    output = output + _branch(input, params.up, params.down)
                return output

            def _run_dense(self, input, weight, bias):
                return F.linear(input, weight, bias)

        class Conv2d(Shared, base.Conv2d):
            def expected_shape(self):
                return (self.out_channels, self.in_channels, *self.kernel_size)

            def _run_quantized(self, input, weight, bias):
                params = weight._params
                geometry = (self.stride, self.padding, self.dilation)
                scale = self.input_scale_on(input.device)
                output = self.kernel.run(input, scale, weight, bias, *geometry)
                if params.up is not None:
                    down = params.down.to(input.dtype).reshape(-1, *weight.shape[1:])
                    up = params.up.to(input.dtype)[:, :, None, None]
                    output = output + F.conv2d(F.conv2d(input, down, None, *geometry), up)
                return output

            def _run_dense(self, input, weight, bias):
                return self._conv_forward(input, weight, bias)

        class LayerNorm(base.LayerNorm):
            rounding: Input | None = None

            def _load_from_state_dict(self, state_dict, prefix, *args):
                self.rounding = inputs.get(prefix.removesuffix("."))
                super()._load_from_state_dict(state_dict, prefix, *args)

            def forward(self, input):
                return super().forward(rounded(input, self.rounding))

    return Ops
