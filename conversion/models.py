"""The part of the conversion that knows ComfyUI: checkpoint and LoRAs as the loader nodes load them,
its progress bars, and what it holds in memory."""

from __future__ import annotations

import contextlib
import gc
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.samplers import KSampler
from safetensors import SafetensorError, safe_open

from ..formats.files import HEADER
from ..quantize.bridge.unet import quantized_parameter
from ..utils import out_of_memory
from ..utils.text import brief
from ..utils.unreadable import raise_unless_damage
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
    try:
        if file.suffix.lower() in (".safetensors", ".sft"):
            with safe_open(file, framework="pt") as opened:  # its errors, before ComfyUI's of them
                ours = HEADER in (opened.metadata() or {})
            if ours:  # with layers of our own ComfyUI does not know it
                raise _quantized(file)
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
            str(file),
            output_vae=False,
            output_clip=with_clip,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
        )
    except (SafetensorError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise_unless_damage(file, error)
        raise _damaged(file, error) from error
    except (RuntimeError, TypeError) as error:
        raise_unless_damage(file, error)
        if "PytorchStreamReader" in str(error):
            raise _damaged(file, error) from error
        if "Could not detect model type" not in str(error):
            raise
        raise ValueError(
            f"a checkpoint must hold a diffusion model that ComfyUI knows, {file} does not: name "
            "an SDXL or SD1.5 checkpoint"
        ) from error
    if quantized_parameter(model) is not None:
        raise _quantized(file)
    if with_clip and clip is None:
        raise ValueError(
            f"prompts need a text encoder, {file} has none: record a model of its kind in ComfyUI "
            "and give that with --calibration"
        )
    return model, clip


def _quantized(file: Path) -> ValueError:
    return ValueError(
        f"a checkpoint must be in 16 or 32 bits, {file} is already quantized: name the original"
    )


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"a checkpoint must be a whole file of weights, {file} is not "
        f"({' '.join(str(error).split())}): it is damaged or incomplete, get it again"
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
    try:
        return comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except Exception as error:  # pickle raises anything
        raise_unless_damage(path, error)
        raise ValueError(
            f"a LoRA must be a whole file of weights, {path} is not ({brief(_line(error))}): it is "
            "damaged or incomplete, get it again"
        ) from error


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
