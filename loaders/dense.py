"""The 16-bit twin of a quantized MODEL, to compare speed with: same architecture, same patches."""

from __future__ import annotations

import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from comfy_kitchen.tensor import QuantizedTensor

from . import graphs, unet

SIXTEEN = (torch.float16, torch.bfloat16)
BACKEND = "inductor"


def is_quantized(model) -> bool:
    """Whether a MODEL's UNet holds weights in fewer than 16 bits, by whatever node."""
    return any(
        isinstance(p, QuantizedTensor) or p.dtype.itemsize < 2
        for p in model.model.diffusion_model.parameters()
    )


def state_dict(model) -> dict[str, torch.Tensor]:
    """Name -> weight in 16 bits on the CPU, dequantized layer by layer; patches are not in it."""
    inner, dtype = model.model, model.model.get_dtype_inference()
    dtype = dtype if dtype in SIXTEEN else torch.float16
    tensors = {}
    for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
        if not name.startswith(unet.UNET):
            continue
        backup = model.backup.get(name)
        value = tensor if backup is None else backup.weight
        value = getattr(value, "data", value)
        if isinstance(value, QuantizedTensor):
            value = value.to(dtype=dtype).dequantize()
        if value.is_floating_point():
            value = value.to("cpu", value.dtype if value.dtype in SIXTEEN else dtype)
        tensors[name.removeprefix(unet.UNET)] = value.contiguous()
    kept = set(inner.diffusion_model.state_dict())
    scales = (".input_scale", ".weight_scale", ".comfy_quant")
    return {name: t for name, t in tensors.items() if name in kept and not name.endswith(scales)}


def twin(model):
    """A MODEL of the same weights in 16 bits, through ComfyUI's detection, with the LoRAs, patches
    and options of `model`, which is not changed. Raises ValueError where ComfyUI finds no model."""
    tensors = state_dict(model)
    found = model.get_attachment(unet.ATTACHMENT)
    tensors |= found.markers if found is not None else {}
    made = comfy.sd.load_diffusion_model_state_dict(tensors)
    if made is None:
        raise ValueError(
            "a comparison in 16 bits needs a UNet that ComfyUI's detection knows, found a "
            f"{type(model.model).__name__} in model: switch the comparison off"
        )
    source = model.clone()
    made.patches, made.patches_uuid = source.patches, source.patches_uuid
    made.model_options, made.wrappers = source.model_options, source.wrappers
    kept = {n: p for n, p in source.object_patches.items() if not n.startswith("manual_cast")}
    made.object_patches = kept
    made.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)  # holds the quantized UNet
    made.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, graphs.KEY)  # and so does this
    return made


def compiled(model):
    """A clone of a MODEL with stock TorchCompileModel's wrapper (Inductor)."""
    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend=BACKEND)
    return clone
