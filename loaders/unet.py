"""Quantized checkpoint -> ComfyUI MODEL, and back. The only place that turns weights into a MODEL."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable

import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch

from ..formats import files
from ..formats.checkpoint import REMEDY, QuantizedCheckpoint
from ..kernels.backends import Backend
from ..utils import out_of_memory, unreadable
from ..utils.capability import GPU, PRODUCTS
from ..utils.progress import progress
from ..utils.text import brief
from . import bounds, compiling, dispatch, fused, graphs, layouts, ops, reading, simulation
from .device import describe
from .eight_bit import handed_over, smoothed_alike
from .patcher import QuantizedPatcher

log = logging.getLogger(__name__)
ATTACHMENT = "modelopt"
UNET = "diffusion_model."
# characters of PyTorch's about shapes
MOST_WORDS = 1000


def read(path: str, step: Callable[[int], None] = reading.unless_cancelled) -> QuantizedCheckpoint:
    """Reads a file memory-mapped, through ComfyUI's own reader. step: as of `checksums.check`. Raises
    ValueError in house form."""
    tensors, metadata = reading.tensors_of(path, step)
    return files.parse(tensors, metadata, path)


@out_of_memory.explained("loading", out_of_memory.FREE)
def load_file(
    path: str, compiled: bool = False, cuda_graphs: bool = False, disable_dynamic: bool = False
):
    """File -> ModelPatcher, never the dynamic one (the argument is how ComfyUI reloads a MODEL).

    compiled: its blocks go through torch.compile at the first call. cuda_graphs: calls that come again
    are replayed, see graphs.py. Raises ValueError for a file that is damaged, foreign or too new.
    """
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    step, checked = progress(2 * size), 0

    def check(amount: int) -> None:
        nonlocal checked
        checked += amount
        step(amount)

    checkpoint = read(path, check)
    step(size - checked)  # all of it where its check is remembered
    model = load(checkpoint, where=path, takes=True)
    if compiled:
        compiling.compile_blocks(model)
    if cuda_graphs:
        graphs.use(model)
    step(size)
    model.cached_patcher_init = (load_file, (path, compiled, cuda_graphs))
    return model


@out_of_memory.explained("loading", out_of_memory.FREE)
def load(
    checkpoint: QuantizedCheckpoint,
    where: str = "the quantized checkpoint",
    arithmetic: str = dispatch.AUTO,
    takes: bool = False,
    backend: Backend | None = None,
    fuse: bool = True,
):
    """Checkpoint -> ModelPatcher, through ComfyUI's detection. The checkpoint is not changed.

    arithmetic, backend: see `dispatch.choose`. takes: the checkpoint is given up, its tensors become
    the MODEL's without a copy. fuse: blocks hand 8-bit activations from layer to layer, where their
    kernels can. Raises ValueError (rule, value, where, remedy).
    """
    checkpoint.validate(where)
    device = comfy.model_management.get_torch_device()
    config = architecture(checkpoint, where)
    compute_dtype = comfy.model_management.unet_manual_cast(
        None, device, config.supported_inference_dtypes
    )
    tensors = _seen_by_detection(checkpoint, compute_dtype)
    as_stock = checkpoint.opens_in_stock
    gpu = describe(
        device, {PRODUCTS[x.format] for x in checkpoint.layers.values() if x.format in PRODUCTS}
    )
    if arithmetic == dispatch.AUTO and device.type == "cpu" and checkpoint.header.get("imported"):
        arithmetic = dispatch.FAKE  # there is no kernel to win, and this is what ModelOpt computes
    alike = smoothed_alike(checkpoint)

    def kernel(layer, shape, name) -> dispatch.Kernel:
        handed = fuse and handed_over(name, layer, name in alike)
        try:
            return dispatch.choose(
                layer, gpu, as_stock, arithmetic, shape, compute_dtype, backend, handed
            )
        except ValueError as error:
            raise ValueError(f"{name} of {where} cannot run here: {error}") from error

    operations = ops.quantized_ops(
        compute_dtype, checkpoint.layers, checkpoint.inputs, kernel, takes
    )
    options = {"custom_operations": operations}
    if device.type == "cpu":
        # unquantized weights stay in the file's 16 bits and are cast per call: ComfyUI would hold
        # them in 32
        options["dtype"] = _stored_dtype(checkpoint)
    expected = set(tensors)
    try:
        # not the dynamic patcher: it requantizes patched weights, which loses what a LoRA changes
        # by less than an 8-bit step (see patching.py)
        model = comfy.sd.load_diffusion_model_state_dict(
            dict(tensors), model_options=options, disable_dynamic=True
        )
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "must have shape" not in str(error):
            raise
        raise ValueError(
            f"the tensors must have the shapes of their architecture, {where} differs "
            f"({brief(' '.join(str(error).split()), MOST_WORDS)}): {REMEDY}"
        ) from error
    if model is None:
        raise ValueError(f"ComfyUI could not build a UNet from {where}: {REMEDY}")
    if arithmetic == dispatch.FAKE and checkpoint.header.get("imported"):
        simulation.attend_as_diffusers(model.model.diffusion_model)
    model.__class__ = QuantizedPatcher
    _check_complete(model, checkpoint, expected, where)
    header = {"model": type(model.model.model_config).__name__, **checkpoint.header}
    header["opens_in_stock"] = checkpoint.opens_in_stock
    found = Loaded(header, checkpoint)
    own = set(model.model.diffusion_model.state_dict())
    # what tells ComfyUI of v-prediction and EDM is no weight of the UNet
    found.markers = {name: t for name, t in checkpoint.tensors.items() if name not in own}
    model.set_attachments(ATTACHMENT, found)
    if fuse and any(kernel.eight_bit is not None for kernel in kernels(model).values()):
        fused.fuse(model.model.diffusion_model)
    _log_kernels(model, where, gpu)
    return model


def architecture(checkpoint: QuantizedCheckpoint, where: str):
    """ComfyUI's model configuration for these weights. Raises ValueError where it knows none."""
    bounds.check(checkpoint.tensors, where)
    bounds.check_sizes(((name, tuple(t.shape)) for name, t in checkpoint.tensors.items()), where)
    tensors = _seen_by_detection(checkpoint, torch.float32)
    # without markers: with them ComfyUI fails on an unknown architecture instead of saying so
    plain = {key: t for key, t in tensors.items() if not key.endswith(".comfy_quant")}
    try:
        config = comfy.model_detection.model_config_from_unet(plain, "")
    except LookupError as error:  # it looks for names without asking whether they are there
        raise ValueError(
            f"the UNet must have all weights of its architecture, {brief(error.args[0])} is missing in "
            f"{where}: {REMEDY}"
        ) from error
    except ImportError:
        raise
    except Exception as error:  # and computes with shapes of any kind
        if out_of_memory.ran_out(error):
            raise
        raise ValueError(
            f"the UNet must be of an architecture that ComfyUI knows, it finds none in {where} "
            f"({unreadable.found(error)}): {REMEDY}"
        ) from error
    if config is None:
        raise ValueError(
            f"the UNet must be of an architecture that ComfyUI knows, {where} is of none: {REMEDY}"
        )
    return config


def _seen_by_detection(
    checkpoint: QuantizedCheckpoint, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The state dict for ComfyUI: packed weights show the shape of the weight they stand for."""
    tensors = files.marked(checkpoint)
    for name, layer in checkpoint.layers.items():
        if layer.shape is not None:
            own = {key: tensors.get(f"{name}.{key}") for key in ("weight", *layer.scales)}
            tensors[f"{name}.weight"] = layouts.wrap(layer, own, dtype)
    return tensors


def _stored_dtype(checkpoint: QuantizedCheckpoint) -> torch.dtype:
    """The 16-bit dtype that most unquantized weights have."""
    found = Counter(
        t.dtype for t in checkpoint.tensors.values() if t.dtype in (torch.float16, torch.bfloat16)
    )
    return found.most_common(1)[0][0] if found else torch.float32


class Loaded:
    """What a MODEL of ours carries along through clones: header, layers, stored dtypes, and tensors
    that are not the UNet's."""

    def __init__(self, header: dict, checkpoint: QuantizedCheckpoint):
        self.header = header
        self.layers = dict(checkpoint.layers)
        self.inputs = dict(checkpoint.inputs)
        self.markers: dict[str, torch.Tensor] = {}
        self.dtypes = {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}


def loaded(model) -> Loaded:
    """What `load` attached to this MODEL. Raises ValueError if the MODEL is not quantized by us."""
    found = model.get_attachment(ATTACHMENT)
    if found is None:
        raise ValueError(
            "this node needs a MODEL quantized by this pack, this one is not: put "
            '"Quantize UNet (ModelOpt)" or "Load Quantized UNet (ModelOpt)" before it'
        )
    return found


@out_of_memory.explained("saving", out_of_memory.FREE)
def to_checkpoint(model) -> QuantizedCheckpoint:
    """MODEL -> checkpoint, bit for bit what it was loaded from; attached LoRA patches are baked in.

    The MODEL is not changed. A patched quantized layer is quantized anew in its own format.
    """
    info = loaded(model)
    state = model.model_state_dict(UNET)
    tensors = dict(info.markers)
    for key, value in state.items():
        name = key.removeprefix(UNET)
        if name.endswith(".comfy_quant"):
            continue
        tensors[name] = value.to(info.dtypes.get(name, value.dtype))
    # a MODEL that is loaded has its patches in place: the state dict then holds patched weights
    for key in model.patches | model.backup:
        if key.startswith(UNET):
            _store_patched(model, key, tensors, info)
    header = dict(info.header)
    baked = sum(1 for key in model.patches if key.startswith(UNET))
    if baked:
        header["baked_patches"] = (header.get("baked_patches") or 0) + baked
    layers = dict(info.layers)
    for key in model.patches:  # quantized anew, with another largest magnitude
        name = key.removeprefix(UNET).rpartition(".")[0]
        if name in layers:
            layers[name] = dataclasses.replace(layers[name], amax_exceptions={})
    return QuantizedCheckpoint(tensors, layers, header, dict(info.inputs))


def _store_patched(model, key: str, tensors: dict[str, torch.Tensor], info: Loaded) -> None:
    """The original weight of `key`, with its patches if it has any, into `tensors`."""
    import comfy.lora

    name = key.removeprefix(UNET)
    module_name = name.rpartition(".")[0]
    backup = model.backup.get(key)
    weight = backup.weight if backup is not None else comfy.utils.get_attr(model.model, key)
    quantized = module_name in info.layers and name.endswith(".weight")
    if key in model.patches:
        dense = weight.to(dtype=torch.float32)
        dense = dense.dequantize() if quantized else dense.clone()
        with out_of_memory.not_swallowed():
            dense = comfy.lora.calculate_weight(model.patches[key], dense, key)
        weight = weight.requantize_from_float(dense) if quantized else dense
    if quantized:
        tensors |= {f"{module_name}.{key}": t for key, t in layouts.unwrap(weight).items()}
    else:
        tensors[name] = weight.to(info.dtypes.get(name, weight.dtype))


def kernels(model) -> dict[str, dispatch.Kernel]:
    """Quantized layer name -> the kernel that runs it as the MODEL is now, patches included."""
    return {
        name: module.running()
        for name, module in model.model.diffusion_model.named_modules()
        if getattr(module, "kernel", None) is not None
    }


def _log_kernels(model, where: str, gpu: GPU) -> None:
    """Once a load, by name; a warning where a GPU of any maker does not compute what the format is
    for. On a CPU nobody expects it."""
    chosen = Counter(kernels(model).values())
    text = "; ".join(
        f"{count} layers {kernel.name}" + (f" ({kernel.why})" if kernel.why else "")
        for kernel, count in chosen.items()
    )
    falls = gpu.device != "cpu" and any(
        kernel.level in ("dequantized", "emulated") for kernel in chosen
    )
    log.log(logging.WARNING if falls else logging.INFO, "ModelOpt: loaded %s: %s", where, text)


def _check_complete(model, checkpoint: QuantizedCheckpoint, expected: set[str], where: str) -> None:
    have = {
        name
        for name in model.model.diffusion_model.state_dict()
        if not name.endswith(".comfy_quant")
    }
    modules = dict(model.model.diffusion_model.named_modules())
    unloaded = {  # a Linear has no weight before it is loaded
        f"{name}.weight"
        for name, module in modules.items()
        if isinstance(module, ops.QuantizedOp) and module.weight is None
    }
    missing = sorted((have - expected) | unloaded)
    if missing:
        raise ValueError(
            f"the file must hold every tensor of the UNet, {where} lacks {len(missing)}, "
            f"the first {brief(missing[0])}: {REMEDY}"
        )
    stray = [
        name for name in checkpoint.layers if getattr(modules.get(name), "kernel", None) is None
    ]
    stray += [
        name for name in checkpoint.inputs if getattr(modules.get(name), "rounding", None) is None
    ]
    if stray:
        raise ValueError(
            f"every quantized layer must be a layer of the UNet, {where} names {brief(stray[0])}: "
            f"{REMEDY}"
        )
