"""The part of the conversion that knows ComfyUI: checkpoint and LoRAs as the loader nodes load them,
its progress bars, and what it holds in memory."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.samplers import KSampler
from safetensors import safe_open

from ..formats.files import HEADER
from ..loaders import bounds
from ..quantize.bridge.unet import quantized_parameter
from ..utils import float8, out_of_memory
from ..utils.finite import JUDGED, all_finite
from ..utils.text import brief
from ..utils.unreadable import found, holds_code, raise_unless_damage
from . import weighing
from .options import Lora, UsageError

log = logging.getLogger(__name__)
# how much larger one may make a weight, as control LoRAs of Flux do
MOST_WIDER = 16
# of errors that PyTorch makes of weights of other shapes
OF_SHAPES = ("size mismatch", "state_dict", "shape", "dimension")
# kinds of LoRA that look at values while they are computed, and multiply the weight alone
ROTATIONS = ("oft", "boft")


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
    except (ImportError, NotImplementedError):
        raise
    except Exception as error:  # names and shapes of no UNet meet nearly any kind of error
        raise_unless_damage(file, error)
        if "Could not detect model type" in str(error):
            raise _unknown(file) from error
        if (
            type(error) is not RecursionError
            and isinstance(error, RuntimeError)
            and not any(words in str(error) for words in OF_SHAPES)
        ):  # of a device, not of a file
            raise
        raise _damaged(file, "a checkpoint", found(error)) from error
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
    weighing.check(file)
    with _while_reading(file, "a checkpoint"):
        if file.suffix.lower() in float8.SUFFIXES:
            with safe_open(file, framework="pt") as opened:
                quantized = HEADER in (opened.metadata() or {})
                shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            quantized = quantized or float8.weight_of(file) is not None
        else:
            held = comfy.utils.load_torch_file(str(file))
            weights = _are_weights(held)
            shapes = (
                {name: one.shape for name, one in held.items() if torch.is_tensor(one)}
                if weights
                else {}
            )
    if quantized:
        raise _quantized(file)
    if not weights:
        raise _unknown(file)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(shapes)
    own = {name: tuple(shape) for name, shape in shapes.items() if name.startswith(prefix)}
    own = own or {name: tuple(shape) for name, shape in shapes.items()}
    bounds.check(own, file)
    bounds.check_sizes(own.items(), file)


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
        raise _damaged(file, what, found(error)) from error


def _damaged(file: Path, what: str, why: str) -> ValueError:
    return ValueError(
        f"{what} must be a whole file of weights, {file} is not ({why}): it is damaged "
        "or incomplete, get it again, or of another kind, name a file of weights"
    )


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
    weighing.check(path)
    with _while_reading(path, "a LoRA"):
        held, metadata = comfy.utils.load_torch_file(
            str(path), safe_load=True, return_metadata=True
        )
        why = _why_no_lora(held, path.stat().st_size)
    if why:
        raise _damaged(path, "a LoRA", why)
    return held, metadata


def _why_no_lora(held: object, size: int) -> str | None:
    """size: of the file in bytes. A pickle can call one number a tensor of any shape."""
    if not _are_weights(held):
        return "it holds no tensors by name"
    whole = sum(x.numel() * x.element_size() for x in held.values() if torch.is_tensor(x))
    return f"it holds tensors of {whole} bytes in {size}" if whole > 2 * size else None


def _finite(patch: Sequence) -> bool:
    """Whether the numbers of a patch are, whatever kind it is of. What a LoRA holds beside is not used."""
    held = getattr(patch[1], "weights", patch[1])
    held = [*held, *(held[1] if len(held) == 2 and isinstance(held[1], tuple) else ())]
    return all(all_finite(one) for one in held if torch.is_tensor(one) and one.dtype in JUDGED)


def _widens(patch: Sequence) -> bool:
    """Whether ComfyUI makes the weight larger for it, as for control LoRAs of Flux."""
    kind, held = getattr(patch[1], "name", None), getattr(patch[1], "weights", patch[1])
    if kind == "lora":
        return len(held) > 5 and held[5] is not None
    return kind is None and len(held) == 2 and any(isinstance(one, dict) for one in held[1])


def with_loras(model, clip, loras: Sequence[Lora]):
    """MODEL and CLIP as Load LoRA gives them. Raises ValueError for one that cannot be read,
    changes nothing, or does not fit."""
    for lora in loras:
        tensors, metadata = _read_lora(lora.path)
        try:
            changed, clip = comfy.sd.load_lora_for_models(
                model, clip, tensors, lora.strength, lora.strength, lora_metadata=metadata
            )
        except Exception as error:  # of tensors that others go with, or of odd shapes
            raise_unless_damage(lora.path, error)
            raise _damaged(lora.path, "a LoRA", found(error)) from error
        if _patches(changed) == _patches(model):
            raise ValueError(
                f"a LoRA must change layers of the checkpoint, {lora.path} changes none: it is for "
                "another kind of model, leave it out"
            )
        _check_fits(changed, model.patches, lora.path)
        model = changed
    return model, clip


def _check_fits(model, before: Mapping[str, Sequence], path: Path) -> None:
    """Raises ValueError where ComfyUI could not add what is new to a weight, tried on tensors
    without values: with them it multiplies first, whatever comes of it. And for NaN in it."""
    for name, patches in model.patches.items():
        new = patches[len(before.get(name, ())) :]
        if not all(map(_finite, new)):
            raise ValueError(
                f"a LoRA must hold finite numbers, {path} holds NaN or infinity for {name}: it is damaged, "
                "get it again or leave it out"
            )
        new = [one for one in new if getattr(one[1], "name", None) not in ROTATIONS]
        weight = comfy.utils.get_attr(model.model, name)
        try:
            with out_of_memory.not_swallowed():
                made = comfy.lora.calculate_weight(
                    new, torch.empty_like(weight, device="meta"), name
                )
            wider = MOST_WIDER if any(map(_widens, new)) else 1
            same = made.shape == weight.shape
            fits, cause = same or weight.numel() < made.numel() <= wider * weight.numel(), None
        except Exception as error:
            raise_unless_damage(path, error)
            fits, cause = False, error
        if not fits:
            raise ValueError(
                f"a LoRA must become part of the weights it is for, {path} does not fit {name} of "
                f"the shape {list(weight.shape)}: take it out, or get one made for this model"
            ) from cause


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
