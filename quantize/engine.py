"""MODEL and CALIBRATION -> quantized checkpoint: copy, calibrate with ModelOpt, pack layer by layer."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..formats import FORMATS
from ..formats.checkpoint import QuantizedCheckpoint
from ..utils import float8, out_of_memory, packages, sha256
from ..utils.finite import all_finite
from ..utils.progress import detail, progress
from . import families, modelopt, pack, percentile, quality, whose
from .layers import select
from .mixed import Mixed, plan_mixed
from .recipe import AWQ_FULL, AWQ_LITE, SVDQUANT, LayerPlan, Recipe, plan, without_effect

log = logging.getLogger(__name__)
# UNet calls on which the result is compared with the original
EVALUATION_RECORDS = 8
# how often ModelOpt replays the records: AWQ looks at them once and searches once, or twice
PASSES = {AWQ_LITE: 2, SVDQUANT: 2, AWQ_FULL: 3}
# UNet calls that AWQ_FULL's search for clipping looks at: it quantizes every weight anew for each
CLIP_RECORDS = 4
# progress of one UNet call, where copying or packing one layer is 1
CALL = 20
# of a UNet that gives NaN or infinity: the rule and what was found, what to do
ORIGINAL_GIVES_NAN = (
    "the UNet must give finite numbers on the recorded calls, it gives NaN or infinity",
    "try another precision (--force-fp32 or bf16), or record with other settings; if KSampler alone "
    "gives a black picture whatever the settings, get another copy of the checkpoint",
)
QUANTIZED_GIVES_NAN = (
    "the quantized UNet must give finite numbers on the recorded calls, it gives NaN or infinity",
    "the original does not; choose another format or algorithm, skip more layers, or start ComfyUI "
    "with --force-fp32",
)


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


def prepared(
    source: torch.nn.Module, recipe: Recipe | Mixed
) -> tuple[Recipe | Mixed, dict[str, LayerPlan], list[str]]:
    """The recipe as it applies to this model, what is done to each layer, and sentences for the
    report. Raises ValueError (rule, value, where, remedy)."""
    if isinstance(recipe, Mixed):
        plans, notes = plan_mixed(
            source, recipe, lambda choice, layers: shaping(source, choice, layers)
        )
        return recipe, plans, notes
    recipe, notes = families.settle(source, recipe)
    known = families.family_of(source)
    layers = select(source, recipe.layers, recipe.skip, known.skip if known else ())
    plans, moved = plan(source, recipe, layers, shaping(source, recipe, layers))
    return recipe, plans, notes + moved + without_effect(recipe, plans)


@out_of_memory.explained("quantizing", out_of_memory.RECORD_SMALLER)
def quantize_model(model, recipe: Recipe | Mixed, calibration=None) -> Quantized:
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
    recipe, plans, notes = prepared(source, recipe)
    runs = _runs(model, calibration, plans, sampling)
    records = [record for run in runs for record in run.records]
    notes += [f"Not part of the quantized UNet: {what}." for what in bridge.left_behind(model)]
    try:
        with torch.inference_mode(False), torch.no_grad():
            device, dtype = model.load_device, model.model.get_dtype_inference()
            chosen = quality.pick(records, EVALUATION_RECORDS)
            collects = any(_collects(one) for one in plans.values()) and bool(records)
            passes = max((PASSES.get(one.algorithm, 1) for one in plans.values()), default=1)
            file = bridge.source_file(model)
            replayed = [records] * min(passes, 2) + [quality.pick(records, CLIP_RECORDS)]
            replayed = replayed[:passes] if collects else []
            calls = 2 * len(chosen) + sum(len(one) for one in replayed)
            modules = sum(1 for _ in source.modules())
            builds = whose.kernels_needed(plans, device)
            total = modules + CALL * (calls + len(builds)) + 2 * len(plans) + sha256.pieces(file)
            step = progress(total)
            unet = bridge.copy_unet(model, step)
            home = bridge.home(unet)
            _check_finite(unet, plans, step, bridge.patched(model))
            if modelopt.searches(plans):
                search = f"{modelopt.searches(plans)}'s search"
                bridge.check_resident(unet, device, search, "choose the algorithm max")
            asked = whose.kernels_needed(plans, home)  # none where weights are streamed
            built = modelopt.build_kernels(asked, lambda: step(CALL)) if asked else {}
            step(CALL * (len(builds) - len(asked)))
            detail(f"The original: {len(chosen)} UNet calls")
            references = quality.outputs(unet, chosen, device, dtype, lambda: step(CALL))
            _check_outputs(references, ORIGINAL_GIVES_NAN)

            places = {id(record): _place(run, record) for run in runs for record in run.records}
            waiting = enumerate(replayed)

            def replay(twin: torch.nn.Module) -> None:
                turn, records = next(waiting, (0, None))
                if records is None:
                    raise ValueError(
                        f"ModelOpt must ask for the recorded calls {len(replayed)} times here, "
                        f"{modelopt.version()} asked once more: choose another algorithm, or install "
                        "another version of nvidia-modelopt"
                    )
                for number, record in enumerate(records, start=1):
                    percentile.set_place(places[id(record)])
                    args, kwargs = record.arguments(device, dtype)
                    if turn == 0:
                        _collect(
                            twin, args, kwargs, f"call {number} of the {len(records)} recorded"
                        )
                    else:
                        twin(*args, **kwargs)
                    step(CALL)

            algorithms = ", ".join(sorted({one.algorithm for one in plans.values()}))
            detail(f"Calibrating ({algorithms}): {sum(map(len, replayed))} UNet calls")
            modelopt.calibrate(unet, plans, replay if collects else None)
            if silent := modelopt.never_called(unet, plans):
                plans = {name: one for name, one in plans.items() if name not in silent}
                notes.append(_left_in_16_bits(silent, len(plans)))
            notes += whose.lines(plans, home, device, built)
            bytes_before = sum(p.numel() * 2 for p in unet.parameters())
            detail(f"Packing {len(plans)} layers")
            tensors, table = pack.pack(unet, plans, step)
    finally:
        unet = None
        bridge.release_memory()
    tensors |= bridge.prediction_markers(model)
    header = described(model, recipe, calibration, bridge)
    if file is not None:
        header["source"] = {"name": file.name, "sha256": sha256.of(file, step)}
        if (name := float8.weight_of(file)) is not None:
            notes.append(
                f"{file.name} holds its UNet in float8 ({name}): it was rounded to 8 bits before, and "
                "the figures are against that. Quantize the 16-bit original."
            )
    checkpoint = QuantizedCheckpoint(tensors, table, header)
    seconds = time.monotonic() - started
    return Quantized(checkpoint, chosen, references, bytes_before, seconds, step, notes)


def shaping(model: torch.nn.Module, recipe: Recipe, layers: Iterable[str]) -> set[str]:
    """Those of the layers that must not be packed two values a byte, as ComfyUI's detection reads
    the architecture from their widths. None where the file is not for stock ComfyUI anyway."""
    from .bridge import detection

    numerics = FORMATS[recipe.format]
    if numerics.BITS != 4 or not numerics.STOCK:
        return set()
    return detection.shaping(model, layers)


@out_of_memory.explained("measuring", out_of_memory.RECORD_SMALLER)
def measure(quantized: Quantized, model) -> None:
    """Runs the quantized MODEL on the evaluation records; its SQNR goes into figures and header.

    Raises ValueError (rule, value, where, remedy) where it gives NaN or infinity."""
    from .bridge import unet as bridge

    if not quantized.records:
        return
    with torch.inference_mode(False), torch.no_grad():
        step = quantized.step
        detail(f"The quantized model: {len(quantized.records)} UNet calls")
        outputs = bridge.run_loaded(model, quantized.records, lambda: step(CALL))
    _check_outputs(outputs, QUANTIZED_GIVES_NAN)
    quantized.figures = quality.summary(quantized.references, outputs)
    quantized.checkpoint.header["quality"] = quantized.figures


def _runs(model, calibration, plans: Mapping[str, LayerPlan], sampling) -> tuple:
    if calibration is None:
        needs = next((one for one in plans.values() if one.calibrates), None)
        if needs is not None:
            raise ValueError(
                f"{needs.format} with algorithm {needs.algorithm} in {needs.kind} layers "
                "needs recorded activations, no CALIBRATION is connected: connect "
                '"Record Calibration (ModelOpt)" or "Calibration from Prompts (ModelOpt)"'
            )
        return ()
    calibration.check_matches(sampling.signature(model))
    return calibration.runs


def _collects(one: LayerPlan) -> bool:
    """Whether recorded activations are of use to a layer."""
    return one.calibrates or modelopt.input_config(one) is not None


def _left_in_16_bits(silent: list[str], left: int) -> str:
    """What the report says of layers without a recorded activation. Raises where none is left."""
    names = ", ".join(silent)
    if not left:
        raise ValueError(
            f"a layer to quantize must be called in the recording, none was of {names}: record "
            "what uses them"
        )
    return (
        f"Kept in 16 bits, as the recording never called them: {names}. Record what uses them to "
        "quantize them too."
    )


def _place(run, record) -> float:
    """Which step of its run a UNet call belongs to, as a share of the run."""
    steps = run.steps or run.calls
    return int(record.index * steps / max(run.calls, 1)) / max(steps, 1)


def _check_outputs(outputs: list[torch.Tensor], words: tuple[str, str]) -> None:
    for number, output in enumerate(outputs, start=1):
        _check_output(output, words, f"call {number} of the {len(outputs)} looked at")


def _check_output(output: torch.Tensor, words: tuple[str, str], call: str) -> None:
    rule, remedy = words
    if not bool(torch.isfinite(output).all()):
        raise ValueError(f"{rule} on {call}: {remedy}")


def _collect(twin: torch.nn.Module, args: tuple, kwargs: dict, call: str) -> None:
    """Calls the UNet whose activations are collected, before anything in it is rounded. Raises
    ValueError where NaN or infinity comes up."""
    try:
        output = twin(*args, **kwargs)
    except AssertionError as error:
        if not modelopt.found_nan(error):
            raise
        rule, remedy = ORIGINAL_GIVES_NAN
        raise ValueError(f"{rule}, or has them inside, on {call}: {remedy}") from error
    _check_output(output, ORIGINAL_GIVES_NAN, call)


def _check_finite(
    unet: torch.nn.Module,
    layers: Container[str],
    step: Callable[[], None],
    patched: Container[str],
) -> None:
    """Of every parameter; `step` is called once a layer of `layers`. patched: names of the parameters
    that a LoRA changed."""
    for name, tensor in unet.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in layers:
            step()
        if tensor.is_floating_point() and not all_finite(tensor):
            what = "the checkpoint is damaged, get another copy of it"
            if name in patched:
                what = (
                    "the LoRAs on the MODEL or the checkpoint are damaged, leave out the LoRAs, or get "
                    "another copy of the checkpoint"
                )
            raise ValueError(f"weights must be finite, {name} holds NaN or infinity: {what}")


def described(model, recipe: Recipe | Mixed, calibration, bridge) -> dict:
    """The file's header, but for the hash of its source and the quality, which take time to find."""
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
        "baked_patches": len(bridge.patched(model)),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what made the file."""
    from .bridge.unet import comfyui_version

    return {
        "comfyui": comfyui_version(),
        "comfyui-modelopt": packages.own_version(),
        "modelopt": modelopt.version(),
        "torch": torch.__version__,
        "safetensors": importlib.metadata.version("safetensors"),
    }
