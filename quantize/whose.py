"""Whose code takes or searches a layer's scales, and whose packs its weight: in words for the report.

ModelOpt calibrates with its own fake quantization, which on NVIDIA GPUs calls extensions that it
compiles at the first use; where a weight lies on the CPU it never asks for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from ..utils.report import KINDS
from . import modelopt
from .recipe import AWQ, AWQ_FULL, MSE, PERCENTILE, SMOOTHQUANT, SVDQUANT, LayerPlan

INTEGER, FP8 = "get_cuda_ext", "get_cuda_ext_fp8"
THEIRS = "ModelOpt's PyTorch code"
OURS = "this pack's code"
# what AWQ's algorithms search
SEARCHED = {AWQ_FULL: "smoothing and clipping"}


def extension(plan: LayerPlan) -> str | None:
    """ModelOpt's CUDA extension that the search for a layer's scales calls on a GPU, by the name of
    the function of modelopt.torch.quantization.extensions that builds it."""
    if plan.algorithm == MSE:
        return {"int8": INTEGER, "int4": INTEGER, "fp8": FP8}[plan.format]
    return INTEGER if plan.algorithm in AWQ and plan.format in ("int4", "w4a8") else None


def _of_inputs(plan: LayerPlan) -> str | None:
    """The same for the fake quantization of a layer's input, once it is calibrated."""
    config = modelopt.input_config(plan)
    if config is None:
        return None
    return FP8 if config["num_bits"] == (4, 3) else INTEGER


def kernels_needed(plans: Mapping[str, LayerPlan], weights: torch.device) -> list[str]:
    """The extensions that quantizing would build. weights: where the UNet's weights lie."""
    if weights.type != "cuda" or torch.version.cuda is None:
        return []
    found = {extension(plan) for plan in plans.values()}
    if modelopt.searches(plans):  # its second pass rounds the input of what is not searched
        found |= {_of_inputs(plan) for plan in plans.values() if plan.algorithm not in AWQ}
    return sorted(name for name in found if name is not None)


def scales(plan: LayerPlan, weights: torch.device, calls: torch.device, built) -> str:
    """Who found a layer's scales, and where. Arguments as in `lines`."""
    theirs, name = f"{THEIRS} on {weights}", extension(plan)
    if plan.algorithm == SMOOTHQUANT:
        return f"smoothing and scales by {THEIRS} on {calls}"
    if plan.algorithm == PERCENTILE:
        return f"activation scales by {OURS} on {calls}, weight scales by {theirs}"
    if name is not None:
        if name in built and built[name]:
            theirs = f"ModelOpt's CUDA kernels on {weights}"
        elif name in built:
            theirs += ", as its CUDA kernels could not be built"
        what = "scales" if plan.algorithm == MSE else SEARCHED.get(plan.algorithm, "smoothing")
        found = f"{what} searched by {theirs}"
    elif plan.algorithm in AWQ:
        found = f"smoothing searched by {theirs}, around NVFP4 rounding by {OURS}"
    elif plan.format == "mxfp8":
        found = f"scales by {OURS} on {weights}"
    else:
        found = f"largest values by {theirs}"
    return f"{found}; branches by {THEIRS}" if plan.algorithm == SVDQUANT else found


def packed_on(plan: LayerPlan, weights: torch.device, calls: torch.device) -> str:
    """The device on which a layer's weight is packed."""
    if plan.algorithm == SMOOTHQUANT:
        return str(calls)  # where its smoothed weight was made
    if plan.algorithm == SVDQUANT and weights.type == "mps":
        return "cpu"  # has no float64, see modelopt.svd
    return str(weights)


def lines(
    plans: Mapping[str, LayerPlan],
    weights: torch.device,
    calls: torch.device,
    built: Mapping[str, bool],
) -> list[str]:
    """Sentences for the report. weights: where the UNet's weights lie (the CPU, where they are
    streamed to the GPU); calls: where its calls are computed; built: what `modelopt.build_kernels`
    gave."""
    found: dict[tuple[str, str], Counter] = {}
    for one in plans.values():
        who = scales(one, weights, calls, built)
        found.setdefault((f"{one.format} ({one.algorithm})", who), Counter())[one.kind] += 1
    said = [
        f"Scales of {_counted(kinds)} in {what}: {who}." for (what, who), kinds in found.items()
    ]
    places = sorted({packed_on(one, weights, calls) for one in plans.values()})
    packed = f"Weights packed by {OURS} on {' and '.join(places)}"
    in_blocks = sorted({one.format for one in plans.values()} & {"nvfp4", "mxfp8"})
    rule = f", {' and '.join(in_blocks)} as ModelOpt's tensors of that name" if in_blocks else ""
    return [*said, f"{packed}{rule}."]


def _counted(kinds: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {KINDS[kind]} layers" for kind, count in sorted(kinds.items()))
