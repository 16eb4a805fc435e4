"""The part of the conversion that knows ComfyUI: checkpoint and LoRAs as the loader nodes load them,
its progress bars, and what it holds in memory."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.samplers import KSampler
from safetensors import safe_open

from ..formats.files import HEADER
from ..quantize.bridge.unet import quantized_parameter
from ..utils import float8, out_of_memory
from ..utils.text import brief
from ..utils.unreadable import found, holds_code, raise_unless_damage
from .options import Lora, UsageError

log = logging.getLogger(__name__)


def check_sampler(sampler_name: str, scheduler: str) -> None:
    """Raises UsageError for one that this ComfyUI has not."""
    for flag, value, known in (
        ("--sampler-name", sampler_name, KSampler.SAMPLERS),
        ("--scheduler", scheduler, KSampler.SCHEDULERS),
    ):
        if value not in known:
            raise UsageError(f"{flag} must be one of {', '.join(known)}, got {value!r}: correct it")


def load(file: Path, with_clip: bool):
    """MODEL and CLIP as Load Checkpoint gives them, of a file of a diffusion model the MODEL alone.
    CLIP is None where it is not asked for or not there. Raises ValueError."""
    _check(file)
    try:
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
            str(file),
            output_vae=False,
            output_clip=with_clip,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
        )
    except (RuntimeError, OSError, TypeError) as error:
        raise_unless_damage(file, error)
        if "Could not detect model type" not in str(error):
            raise
        raise _unknown(file) from error
    if quantized_parameter(model) is not None:
        raise _quantized(file)
    if with_clip and clip is None:
        raise ValueError(
            f"prompts need a text encoder, {file} has none: record a model of its kind in ComfyUI "
            "and give that with --calibration"
        )
    return model, clip


def _check(file: Path) -> None:
    """Raises ValueError for what is no whole file of weights, or quantized: a file of ours, of whose
    layers ComfyUI knows nothing, or a UNet in float8, which ComfyUI may widen.

    A file of torch.save is read whole, and by ComfyUI again: what reading raises can be of any kind,
    and must not be taken for an error of the code.
    """
    quantized, weights = False, True
    with _while_reading(file, "a checkpoint"):
        if file.suffix.lower() in float8.SUFFIXES:
            with safe_open(file, framework="pt") as opened:
                quantized = HEADER in (opened.metadata() or {})
            quantized = quantized or float8.weight_of(file) is not None
        else:
            weights = _are_weights(comfy.utils.load_torch_file(str(file)))
    if quantized:
        raise _quantized(file)
    if not weights:
        raise _unknown(file)


def _are_weights(held: object) -> bool:
    return (
        isinstance(held, dict)
        and all(isinstance(name, str) for name in held)
        and any(isinstance(one, torch.Tensor) for one in held.values())
    )


@contextlib.contextmanager
def _while_reading(file: Path, what: str) -> Iterator[None]:
    """Tells any error of a reader as what is wrong with the file, as ValueError: pickle raises anything."""
    try:
        yield
    except Exception as error:
        raise_unless_damage(file, error)
        if holds_code(error):
            raise ValueError(
                f"{what} must hold data only, {file} holds something else and was not opened "
                f"({found(error)}): get it as .safetensors"
            ) from error
        raise ValueError(
            f"{what} must be a whole file of weights, {file} is not ({found(error)}): it is damaged "
            "or incomplete, get it again, or of another kind, name a file of weights"
        ) from error


def _unknown(file: Path) -> ValueError:
    return ValueError(
        f"a checkpoint must hold a diffusion model that ComfyUI knows, {file} does not: name "
        "an SDXL or SD1.5 checkpoint"
    )


def _quantized(file: Path) -> ValueError:
    return ValueError(
        f"a checkpoint must be in 16 or 32 bits, {file} is already quantized: name the original"
    )


def check_loras(loras: Sequence[Lora]) -> None:
    """Raises UsageError for a file that no checkpoint could be given."""
    for path in dict.fromkeys(lora.path for lora in loras):
        try:
            _read_lora(path)
        except Exception as error:
            if why := short_of_memory(error):
                raise UsageError(why) from error
            if isinstance(error, ValueError):
                raise UsageError(str(error)) from error
            raise


def _read_lora(path: Path):
    """Tensors and metadata. Raises ValueError for what is no whole file of weights."""
    with _while_reading(path, "a LoRA"):
        return comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)


def with_loras(model, clip, loras: Sequence[Lora]):
    """MODEL and CLIP as Load LoRA gives them. Raises ValueError for one that cannot be read or changes
    nothing."""
    for lora in loras:
        tensors, metadata = _read_lora(lora.path)
        before = _patches(model)
        changed, clip = comfy.sd.load_lora_for_models(
            model, clip, tensors, lora.strength, lora.strength, lora_metadata=metadata
        )
        if _patches(changed) == before:
            raise ValueError(
                f"a LoRA must change layers of the checkpoint, {lora.path} changes none: it is for "
                "another kind of model, leave it out"
            )
        model = changed
    return model, clip


def _patches(model) -> int:
    return sum(map(len, model.patches.values()))


@contextlib.contextmanager
def followed(told: Callable[[int, int], None]) -> Iterator[None]:
    """ComfyUI's progress bars call `told` with done and total, and print nothing themselves."""
    shown, hook = comfy.utils.PROGRESS_BAR_ENABLED, comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_enabled(False)
    comfy.utils.set_progress_bar_global_hook(
        lambda done, total, preview=None, node_id=None: told(done, total)
    )
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_enabled(shown)
        comfy.utils.set_progress_bar_global_hook(hook)


def free() -> None:
    """Gives back all that ComfyUI holds of models. A device that no longer answers refuses, which the
    log tells: whether it is lost, `lost_device` says."""
    try:
        comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.soft_empty_cache()
    except RuntimeError as error:
        log.warning("ModelOpt: memory could not be given back: %s", _line(error))


def short_of_memory(error: BaseException) -> str | None:
    """What to do where memory ran out and this error came of it, else None. Said once: the nodes' own
    advice, which it may carry, is about ComfyUI's flags."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    found = [one for one in chain if out_of_memory.ran_out(one)]
    if not found:
        return None
    first = found[-1]
    # takes off the device what an AcceleratorError reported late
    comfy.model_management.is_oom(first)
    remedies = ["close other programs", "sample smaller pictures (--width, --height), or record "
                "smaller ones for --calibration"]  # fmt: skip
    if not out_of_memory.of_cpu(first):
        remedies.append("use --device cpu")
    return (
        "a conversion needs the model and its UNet calls in memory, it ran out of it "
        f"({brief(_line(first))}): {', or '.join(remedies)}"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def lost_device() -> str | None:
    """Why the device computes nothing any more, or None: after some errors only a new process helps."""
    device = "the device"
    try:
        device = comfy.model_management.get_torch_device()
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        if out_of_memory.ran_out(error):  # of another process: it may end
            return None
        return f"{device} no longer answers ({str(error).splitlines()[0]})"
    return None
