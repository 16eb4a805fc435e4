"""A copy of a MODEL's UNet to calibrate: patches baked in, memory shared where nothing is written."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...utils import out_of_memory
from ..quality import outputs

UNET = "diffusion_model."
# what ComfyUI's loading leaves on a module, none of which belongs to a copy: a second owner of
# pinned memory, for one, would free it under the first
LOADING_STATE = (
    "_v",
    "_v_signature",
    "_v_weight",
    "_v_bias",
    "_prefetch",
    "_pins",
    "_pin_state",
    "comfy_patched_weights",
    "prev_comfy_cast_weights",
    "weight_function",
    "bias_function",
    "weight_lowvram_function",
    "bias_lowvram_function",
)
CONTAINERS = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


def unet_of(model) -> torch.nn.Module:
    """The diffusion model of a MODEL. Raises ValueError if it is quantized already."""
    found = quantized_parameter(model)
    if found is not None:
        name, parameter = found
        raise ValueError(
            f"the MODEL must be in 16 or 32 bits, {name} is already quantized "
            f"({getattr(parameter, '_layout_cls', parameter.dtype)}): "
            "connect the MODEL it was made from"
        )
    return model.model.diffusion_model


def quantized_parameter(model) -> tuple[str, torch.Tensor] | None:
    """The first parameter of a MODEL's UNet that is held in fewer than 16 bits, with its name."""
    for name, parameter in model.model.diffusion_model.named_parameters():
        if isinstance(parameter, QuantizedTensor) or parameter.dtype.itemsize < 2:
            return name, parameter
    return None


def patched(model) -> set[str]:
    """Names of the UNet's parameters that patches on the MODEL (LoRAs) change."""
    return {key.removeprefix(UNET) for key in model.patches if key.startswith(UNET)}


def copy_unet(model, step: Callable[[], None] = lambda: None) -> torch.nn.Module:
    """The MODEL's UNet, its weight patches (LoRA) baked in, on the MODEL's load device.

    `step` is called once a module (`modules` says how many) and may raise.

    Parameters share memory with the MODEL's where they are neither patched nor moved. The MODEL is
    unloaded first, as ComfyUI does when memory is short: its tensors and patches stay as they are.
    """
    unet = unet_of(model)
    comfy.model_management.unload_model_and_clones(model, all_devices=True)
    device = model.load_device
    size = comfy.model_management.module_size(unet)
    comfy.model_management.free_memory(size, device)
    home = torch.device("cpu") if too_large(size, device) else device
    twin = _twin(unet, {})
    for prefix, module in twin.named_modules():
        step()
        if hasattr(module, "comfy_cast_weights"):
            # weights on another device or in another dtype than the input are cast per call
            module.comfy_cast_weights = True
        for name, parameter in module.named_parameters(recurse=False):
            key = UNET + ".".join(part for part in (prefix, name) if part)
            backup = model.backup.get(key)
            weight = parameter.data if backup is None else backup.weight
            value = _baked(model, key, weight, device).to(home)
            module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return twin.eval()


def _twin(module: torch.nn.Module, seen: dict[int, torch.nn.Module]) -> torch.nn.Module:
    """The same modules anew, with the same Parameters, without what loading left on them."""
    if id(module) in seen:
        return seen[id(module)]
    twin = copy.copy(module)
    seen[id(module)] = twin
    for name in LOADING_STATE:
        twin.__dict__.pop(name, None)
    for name in CONTAINERS:
        if name in twin.__dict__:
            twin.__dict__[name] = copy.copy(twin.__dict__[name])
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _twin(child, seen)
    return twin


def too_large(size: int, device: torch.device) -> bool:
    """Whether the weights leave no room on the device: they then stay on the CPU and are streamed."""
    if comfy.model_management.is_device_cpu(device):
        return False
    reserve = comfy.model_management.minimum_inference_memory()
    return comfy.model_management.get_free_memory(device) < size + reserve


def home(unet: torch.nn.Module) -> torch.device:
    """Where the weights of a copy lie: the CPU where they are streamed."""
    return next(unet.parameters()).device


def check_resident(unet: torch.nn.Module, device: torch.device, what: str, remedy: str) -> None:
    """Raises ValueError where weights are streamed and `what` needs them on the device."""
    if home(unet).type == device.type:
        return
    size = comfy.model_management.module_size(unet)
    free = comfy.model_management.get_free_memory(device)
    raise ValueError(
        f"{what} needs the whole UNet ({size / 1e9:.1f} GB) in the memory of {device}, which has "
        f"{free / 1e9:.1f} GB free: {remedy}, or start ComfyUI with --cpu"
    )


def _baked(model, key: str, weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    patches = model.patches.get(key)
    if not patches:
        return weight
    dtype = comfy.model_management.lora_compute_dtype(device)
    # the computation works in place on what it is given
    working = weight.to(device=device, dtype=dtype, copy=True)
    with out_of_memory.not_swallowed():
        return comfy.lora.calculate_weight(patches, working, key).to(weight.dtype)


def left_behind(model) -> list[str]:
    """What is attached to the MODEL and does not become part of a quantized UNet, in words."""
    found = []
    options = model.model_options.get("transformer_options", {})
    if options.get("patches") or options.get("patches_replace"):
        found.append("attention patches")
    if any(not key.startswith("manual_cast_dtype") for key in model.object_patches):
        found.append(f"object patches ({', '.join(sorted(model.object_patches))})")
    if model.hook_patches:
        found.append("scheduled LoRA hooks")
    if model.weight_wrapper_patches:
        found.append("weight wrappers")
    return found


def source_file(model) -> Path | None:
    """The file a MODEL was loaded from, or None where ComfyUI does not say."""
    made_by = model.cached_patcher_init
    arguments = made_by[1] if made_by else ()
    if arguments and isinstance(arguments[0], str) and os.path.isfile(arguments[0]):
        return Path(arguments[0])
    return None


def prediction_markers(model) -> dict[str, torch.Tensor]:
    """State dict entries by which ComfyUI recognises v-prediction and EDM models of SDXL kind."""
    from comfy.model_base import ModelType

    kind = model.model.model_type
    settings = model.model.model_config.sampling_settings
    if kind == ModelType.V_PREDICTION and "adm_in_channels" in model.model.model_config.unet_config:
        markers = {"v_pred": torch.zeros(1)}
        if settings.get("zsnr"):
            markers["ztsnr"] = torch.zeros(1)
        return markers
    if kind == ModelType.V_PREDICTION_EDM:
        return {
            f"edm_vpred.{name}": torch.tensor(float(settings[name]))
            for name in ("sigma_max", "sigma_min")
            if name in settings
        }
    if kind == ModelType.EDM:
        return {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}
    return {}


def run_loaded(model, records: Sequence, step: Callable[[], None]) -> list[torch.Tensor]:
    """Outputs of a MODEL's UNet for the records, float32 on the CPU, loaded as a sampler does.

    In inference mode if its weights were made in it: loaded outside, they could not be moved inside.
    """
    made_in_it = any(p.is_inference() for p in model.model.diffusion_model.parameters())
    with torch.inference_mode(made_in_it), torch.no_grad():
        comfy.model_management.load_models_gpu([model])
        unet, dtype = model.model.diffusion_model, model.model.get_dtype_inference()
        return outputs(unet, records, model.load_device, dtype, step)


def load(model, records: Sequence) -> tuple[torch.nn.Module, torch.device, torch.dtype]:
    """A MODEL's UNet on its device with its patches in place, as before sampling calls as large as
    the records, its device and its compute dtype. ComfyUI unloads other MODELs where it must."""
    largest = max((record.x.shape for record in records), key=lambda shape: shape.numel())
    needed = model.model.memory_required(list(largest))
    comfy.model_management.load_models_gpu([model], memory_required=needed)
    return model.model.diffusion_model, model.load_device, model.model.get_dtype_inference()


def release_memory() -> None:
    """Frees what a copy left behind: ModelOpt's modules refer to each other in cycles."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def comfyui_version() -> str:
    """ComfyUI's version, for the file header."""
    import comfyui_version

    return comfyui_version.__version__


def differentiable_attention() -> dict:
    """Transformer options by which a UNet attends with PyTorch's own function, which has a gradient:
    ComfyUI's others write in place or are forward only."""
    from comfy.ldm.modules.attention import attention_pytorch

    def own(attention: Callable, *args, **kwargs) -> torch.Tensor:
        return attention_pytorch(*args, **kwargs)

    return {"optimized_attention_override": own}
