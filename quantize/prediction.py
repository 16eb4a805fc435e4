"""What quantizing would give, from the shapes of weights alone: a checkpoint of meta tensors, whose
file has the size of the real one to the byte."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..formats import FORMATS
from ..formats.checkpoint import SIXTEEN_BITS, Layer, QuantizedCheckpoint
from ..utils import sha256
from . import engine, modelopt, quality
from .recipe import SVDQUANT, LayerPlan, Recipe


def checkpoint(
    model, recipe: Recipe, plans: Mapping[str, LayerPlan], calibration=None
) -> QuantizedCheckpoint:
    """What `engine.quantize_model` and `engine.measure` would make of a MODEL, on the meta device.

    recipe, plans: as `engine.prepared` gives them. No weight is read. Its size in a file
    (`formats.files.size`) is exact where the recording calls every layer of the plans (those that it
    does not call stay in 16 bits), and no patch changes the shape of a weight. Raises ValueError
    without ModelOpt, and for a calibration of another architecture.
    """
    from .bridge import sampling
    from .bridge import unet as bridge

    modelopt.require()
    if calibration is not None:
        calibration.check_matches(sampling.signature(model))
    source = bridge.unet_of(model)
    records = len(calibration) if calibration is not None else 0
    tensors: dict[str, torch.Tensor] = {}
    table: dict[str, Layer] = {}
    for name, one in plans.items():
        stored, table[name] = layer(source.get_submodule(name), one, calibrated=records > 0)
        tensors |= {f"{name}.{key}": value for key, value in stored.items()}
    tensors |= left_alone(source, plans)
    tensors |= bridge.prediction_markers(model)
    header = engine.described(model, recipe, calibration, bridge)
    if (file := bridge.source_file(model)) is not None:
        header["source"] = {"name": file.name, "sha256": sha256.NONE}
    if records:
        chosen = min(records, engine.EVALUATION_RECORDS)
        header["quality"] = quality.summary(*[[torch.ones(1)] * chosen] * 2)
    return QuantizedCheckpoint(tensors, table, header)


def layer(
    module: torch.nn.Module, one: LayerPlan, calibrated: bool
) -> tuple[dict[str, torch.Tensor], Layer]:
    """One layer's tensors by their names in the file, on the meta device, and its entry.

    calibrated: whether recorded calls are there.
    """
    weight, numerics = module.weight, FORMATS[one.format]
    shape = tuple(weight.shape)
    rank = min(one.rank, *shape) if one.algorithm == SVDQUANT else 0
    entry = Layer(
        one.format,
        one.kind,
        smoothed=one.smooths,
        shape=shape if numerics.BLOCK is not None else None,
        rank=rank,
        activations=one.activations,
        input_amax=1.0 if one.static or (one.format == "nvfp4" and calibrated) else None,
    )
    wanted = {name: (size, dtypes[0]) for name, (size, dtypes) in numerics.stored(shape).items()}
    if "input_scale" in entry.scales:
        wanted["input_scale"] = ((), torch.float32)
    if entry.smoothed:  # ModelOpt gives it the dtype of the weight
        kept = weight.dtype if weight.dtype in SIXTEEN_BITS else torch.float32
        wanted["pre_quant_scale"] = ((shape[1],), kept)
    if rank:
        wanted["svd_up"] = ((shape[0], rank), in_sixteen(weight.dtype))
        wanted["svd_down"] = ((rank, shape[1]), in_sixteen(weight.dtype))
    if module.bias is not None:
        wanted["bias"] = (tuple(module.bias.shape), in_sixteen(module.bias.dtype))
    return {name: _empty(*found) for name, found in wanted.items()}, entry


def left_alone(source: torch.nn.Module, plans: Mapping[str, LayerPlan]) -> dict[str, torch.Tensor]:
    """The tensors of everything that is not in the plans, on the meta device."""
    kept = source.state_dict().keys()
    found = {}
    for name, tensor in [*source.named_parameters(), *source.named_buffers()]:
        parts = name.split(".")
        if name in kept and not any(".".join(parts[:i]) in plans for i in range(len(parts))):
            found[name] = _empty(tuple(tensor.shape), in_sixteen(tensor.dtype))
    return found


def in_sixteen(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a kept tensor; where this says float16 it can be bfloat16 (see `pack`)."""
    return torch.float16 if dtype in (torch.float32, torch.float64) else dtype


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
