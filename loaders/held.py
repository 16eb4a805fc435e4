"""Bytes of a quantized UNet's weights as `load` will hold them here, before it is loaded."""

from __future__ import annotations

import json

import comfy.model_management as management
import torch

from ..formats.checkpoint import Layer, QuantizedCheckpoint


def held_bytes(checkpoint: QuantizedCheckpoint, model) -> int:
    """What `info.weight_bytes` will say of the loaded MODEL. The tensors may be meta ones.

    model: the MODEL it is made from, or one of the same architecture. What is not quantized is held
    in the dtype that ComfyUI chooses for this device: 16 bits on a CPU, and on a GPU unless it must
    compute in 32.
    """
    device = management.get_torch_device()
    supported = model.model.model_config.supported_inference_dtypes
    compute = management.unet_manual_cast(None, device, supported)
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
