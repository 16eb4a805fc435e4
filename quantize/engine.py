"""MODEL and CALIBRATION -> quantized checkpoint: copy, calibrate with ModelOpt, pack layer by layer."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..formats import FORMATS
from ..formats.checkpoint import Layer, QuantizedCheckpoint
from ..utils import sha256
from ..utils.progress import progress
from . import modelopt, quality
from .layers import select
from .recipe import Recipe

log = logging.getLogger(__name__)
# UNet calls on which the result is compared with the original
EVALUATION_RECORDS = 8
# progress of one UNet call, where copying or packing one layer is 1
CALL = 20


@dataclass
class Quantized:
    """checkpoint: the result. records, references: UNet calls and the original's outputs for them.

    bytes_before: the UNet in 16 bits. notes: sentences for the report. figures: SQNR, once measured.
    """

    checkpoint: QuantizedCheckpoint
    records: list
    references: list[torch.Tensor]
    bytes_before: int
    seconds: float
    step: Callable[[int], None]
    notes: list[str] = field(default_factory=list)
    figures: dict | None = None


def quantize_model(model, recipe: Recipe, calibration=None) -> Quantized:
    """Quantizes the UNet of a ComfyUI MODEL, patches included; the MODEL itself is not changed.

    calibration: a Calibration recorded from the same architecture; needed where the recipe has
    static activation scales or smoothing. Progress is shown on the node that runs, once a UNet
    call and a layer. Raises ValueError (rule, value, where, remedy) and ComfyUI's
    InterruptProcessingException on cancel.
    """
    from .bridge import sampling
    from .bridge import unet as bridge

    started = time.monotonic()
    modelopt.require()
    source = bridge.unet_of(model)
    layers = select(source, recipe.layers, list(recipe.skip))
    records = _records(model, calibration, recipe, set(layers.values()), sampling)
    notes = [f"Not part of the quantized UNet: {what}." for what in bridge.left_behind(model)]
    try:
        with torch.inference_mode(False), torch.no_grad():
            device, dtype = model.load_device, model.model.get_dtype_inference()
            chosen = quality.pick(records, EVALUATION_RECORDS)
            runs = len(records) if recipe.needs_calibration(set(layers.values())) else 0
            modules = sum(1 for _ in source.modules())
            file = bridge.source_file(model)
            calls = CALL * (2 * len(chosen) + runs)
            step = progress(modules + calls + 2 * len(layers) + sha256.pieces(file))
            unet = bridge.copy_unet(model, step)
            _check_finite(unet, layers, step)
            references = quality.outputs(unet, chosen, device, dtype, lambda: step(CALL))

            def replay(twin: torch.nn.Module) -> None:
                for record in records:
                    args, kwargs = record.arguments(device, dtype)
                    twin(*args, **kwargs)
                    step(CALL)

            modelopt.calibrate(unet, recipe, layers, replay if runs else None)
            bytes_before = sum(p.numel() * 2 for p in unet.parameters())
            tensors, table = _pack(unet, recipe, layers, step)
    finally:
        unet = None
        bridge.release_memory()
    tensors |= bridge.prediction_markers(model)
    header = _header(model, recipe, calibration, bridge)
    if file is not None:
        header["source"] = {"name": file.name, "sha256": sha256.of(file, step)}
    checkpoint = QuantizedCheckpoint(tensors, table, header)
    seconds = time.monotonic() - started
    return Quantized(checkpoint, chosen, references, bytes_before, seconds, step, notes)


def measure(quantized: Quantized, model) -> None:
    """Runs the quantized MODEL on the evaluation records; its SQNR goes into figures and header."""
    from .bridge import unet as bridge

    if not quantized.records:
        return
    with torch.inference_mode(False), torch.no_grad():
        step = quantized.step
        outputs = bridge.run_loaded(model, quantized.records, lambda: step(CALL))
    quantized.figures = quality.summary(quantized.references, outputs)
    quantized.checkpoint.header["quality"] = quantized.figures


def _records(model, calibration, recipe: Recipe, kinds: set[str], sampling) -> list:
    if calibration is None:
        if recipe.needs_calibration(kinds):
            raise ValueError(
                f"{recipe.format} with algorithm {recipe.algorithm} and layers {recipe.layers} "
                "needs recorded activations, no CALIBRATION is connected: connect "
                '"Record Calibration (ModelOpt)" or "Calibration from Prompts (ModelOpt)"'
            )
        return []
    calibration.check_matches(sampling.signature(model))
    return [record for run in calibration.runs for record in run.records]


def _check_finite(unet: torch.nn.Module, layers: dict[str, str], step: Callable[[], None]) -> None:
    for name in layers:
        step()
        weight = unet.get_submodule(name).weight
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"weights must be finite, {name} holds NaN or infinity: "
                f"the checkpoint is damaged, or skip that layer with the pattern {name}"
            )


def _pack(
    unet: torch.nn.Module, recipe: Recipe, layers: dict[str, str], step: Callable[[], None]
) -> tuple[dict[str, torch.Tensor], dict[str, Layer]]:
    """Calibrated UNet -> its tensors on the CPU, quantized layers packed, and their table.

    Each layer's weight is given up as soon as it is packed, so that patched or moved weights and
    their packed form never exist all at once.
    """
    module_of = FORMATS[recipe.format]
    tensors: dict[str, torch.Tensor] = {}
    table: dict[str, Layer] = {}
    for name, kind in layers.items():
        module = unet.get_submodule(name)
        smoothed = recipe.smooths(kind)
        if smoothed:
            modelopt.smooth(module, recipe.alpha)
        stored = module_of.quantize(module._parameters["weight"].data, module.weight_quantizer.amax)
        amax = None
        if module_of.needs_input_scale(kind):
            amax = module.input_quantizer.amax.float().item()
            stored["input_scale"] = module_of.input_scale(module.input_quantizer.amax)
        if smoothed:
            stored["pre_quant_scale"] = module.input_quantizer.pre_quant_scale.float().reshape(-1)
        if module.bias is not None:
            stored["bias"] = sixteen_bits(module.bias.data)
        exceptions = module_of.amax_exceptions(stored["weight_scale"], module.weight_quantizer.amax)
        tensors |= {f"{name}.{key}": value.cpu() for key, value in stored.items()}
        table[name] = Layer(recipe.format, kind, smoothed, amax, exceptions)
        module._parameters["weight"] = None
        step()
    taken = set(layers)
    for name, parameter in [*unet.named_parameters(), *unet.named_buffers()]:
        parts = name.split(".")
        if any(".".join(parts[:i]) in taken for i in range(len(parts))):
            continue
        if any(part.endswith("_quantizer") for part in parts):
            continue
        tensors[name] = sixteen_bits(parameter.data).cpu()
    return tensors, table


def sixteen_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Float tensors in 16 bits: float16, or bfloat16 where the source is or float16 overflows."""
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    half = tensor.to(torch.float16)
    return half if bool(torch.isfinite(half).all()) else tensor.to(torch.bfloat16)


def _header(model, recipe: Recipe, calibration, bridge) -> dict:
    config = model.model.model_config
    return {
        "recipe": recipe.describe(),
        "source": None,
        "calibration": calibration.summary() if calibration is not None else None,
        "model": type(config).__name__,
        "unet_config": {
            k: v
            for k, v in config.unet_config.items()
            if isinstance(v, (bool, int, float, str, list, tuple, type(None)))
        },
        "baked_patches": sum(1 for key in model.patches if key.startswith(bridge.UNET)),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what made the file."""
    from .bridge.unet import comfyui_version

    return {
        "comfyui": comfyui_version(),
        "modelopt": modelopt.version(),
        "torch": torch.__version__,
        "safetensors": importlib.metadata.version("safetensors"),
    }
