"""What loading a quantized checkpoint on this device gives, before it is there: kernels and bytes."""

from __future__ import annotations

import json

import comfy.model_management as management
import torch

from ..formats.checkpoint import Layer, QuantizedCheckpoint
from ..utils.capability import EMULATED
from . import device as devices
from . import dispatch
from .eight_bit import handed_over, smoothed_alike


def kernels(checkpoint: QuantizedCheckpoint, model) -> dict[str, dispatch.Kernel]:
    """Quantized layer name -> the kernel that will run it. Arguments as in `held_bytes`."""
    gpu, as_stock = devices.current(), checkpoint.opens_in_stock
    alike = smoothed_alike(checkpoint)
    compute, source = compute_dtype(model), model.model.diffusion_model
    return {
        name: dispatch.choose(
            layer,
            gpu,
            as_stock,
            shape=tuple(source.get_submodule(name).weight.shape),
            dtype=compute,
            handed=handed_over(name, layer, name in alike),
        )
        for name, layer in checkpoint.layers.items()
    }


def in_floating_point(chosen: dict[str, dispatch.Kernel], layers: dict[str, Layer]) -> list[str]:
    """Names of the layers whose weight is dequantized whole for each call."""
    return [
        name
        for name, kernel in chosen.items()
        if kernel.dequantizes or (kernel.level == EMULATED and layers[name].format != "int8")
    ]


def compute_dtype(model) -> torch.dtype:
    """What activations of a quantized MODEL of this architecture are computed in here."""
    supported = model.model.model_config.supported_inference_dtypes
    return management.unet_manual_cast(None, management.get_torch_device(), supported)


def held_bytes(checkpoint: QuantizedCheckpoint, model) -> int:
    """What `info.weight_bytes` will say of the loaded MODEL. The tensors may be meta ones.

    model: the MODEL it is made from, or one of the same architecture. What is not quantized is held
    in the dtype that ComfyUI chooses for this device: 16 bits on a CPU, and on a GPU unless it must
    compute in 32. Not seen: what an architecture makes in 32 bits whatever its dtype, as Wan its patch
    embeddings.
    """
    device, compute = management.get_torch_device(), compute_dtype(model)
    supported = model.model.model_config.supported_inference_dtypes
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    plain = management.unet_dtype(model_params=parameters, supported_dtypes=supported)
    if device.type == "cpu":
        plain = torch.float16  # of the file, or bfloat16 (see `unet.load`)
    modules = dict(model.model.diffusion_model.named_modules())
    own = model.model.diffusion_model.state_dict().keys()
    total = 0
    for name, tensor in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        layer = checkpoint.layers.get(module)
        if layer is not None:
            total += _of(tensor, compute) if part == "bias" else tensor.nbytes
        elif name not in own:
            continue  # markers of v-prediction and EDM are no weights
        elif getattr(modules[module], "in_features", None) is None:
            total += _of(tensor, plain)
        elif part == "weight" and compute == torch.float32:
            total += tensor.nbytes
        else:
            total += _of(tensor, compute)
    return total + sum(_marker(layer) for layer in checkpoint.layers.values())


def _of(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    return tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize


def _marker(layer: Layer) -> int:
    """Bytes of the `comfy_quant` that ComfyUI makes of a loaded layer."""
    return len(json.dumps({"format": layer.comfy_format}))
