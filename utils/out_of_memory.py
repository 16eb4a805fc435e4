"""Memory that runs out: recognised on every device, and told in words that help."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator

import torch
from safetensors import SafetensorError

from .text import brief

# of the CPU: torch's own words on every system, numpy's, the system's own
OF_CPU = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Unable to allocate",
    "Cannot allocate memory",
    "paging file",
    "os error 1455",
    "error code: <1455>",
    "bad allocation",
    "bad_alloc",
)
# of a GPU whose library found no room for itself
OF_LIBRARIES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
WORDS = ("out of memory", *OF_CPU, *OF_LIBRARIES)
# Windows: no memory, and a paging file that cannot grow
WINDOWS = (8, 1455)
FREE = ""
SMALLER = "choose a smaller width, height or batch size, "
RECORD_SMALLER = "record a smaller width, height or batch size, "
OTHERWISE = "close other programs, or start ComfyUI with --lowvram or --cpu"
OTHERWISE_ON_CPU = "close other programs, or add memory or swap space (a larger page file)"
# where ComfyUI logs that a patch could not be computed, and goes on without it
PATCHES = (os.path.join("comfy", "weight_adapter", ""), os.path.join("comfy", "lora.py"))


class OutOfMemory(torch.OutOfMemoryError):
    """Of the kind that ComfyUI answers by unloading all models; its text is for the user."""


class OutOfCpuMemory(MemoryError):
    """The CPU's memory ran out: ComfyUI must not answer it by moving the GPU's models there."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, that of the CPU too."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, FileExistsError):  # ours has no number, and its text names a file
        return False
    if isinstance(error, OSError) and error.errno is not None:  # other texts name files
        return error.errno == errno.ENOMEM or getattr(error, "winerror", None) in WINDOWS
    return isinstance(error, RuntimeError | OSError | SafetensorError) and any(
        word in str(error) for word in WORDS
    )


def of_cpu(error: BaseException) -> bool:
    """Whether it is the CPU's memory that an error of `ran_out` is about."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, MemoryError | OSError) or any(word in str(error) for word in OF_CPU)


def explained(doing: str, remedy: str) -> Callable[[Callable], Callable]:
    """Decorates a piece of work: where memory runs out in it, OutOfMemory or OutOfCpuMemory says what
    to do.

    The size of a MODEL among its arguments is told. remedy: what else helps, before what always does.
    """

    def decorate(work: Callable) -> Callable:
        @functools.wraps(work)
        def instead(*args, **kwargs):
            try:
                return work(*args, **kwargs)
            except Exception as error:
                if isinstance(error, OutOfMemory | OutOfCpuMemory) or not ran_out(error):
                    raise
                _settle(error)
                given = (*args, *kwargs.values())
                model = next((one for one in given if hasattr(one, "model_size")), None)
                kind = OutOfCpuMemory if of_cpu(error) else OutOfMemory
                raise kind(_text(doing, remedy, model, of_cpu(error))) from error

        return instead

    return decorate


def _settle(error: Exception) -> None:
    """What ComfyUI does for such an error of an accelerator, and not for ours: it takes what was
    reported late off the device, or the next call would meet it again."""
    import comfy.model_management as management

    management.is_oom(error)


def _text(doing: str, remedy: str, model: object, on_cpu: bool) -> str:
    import comfy.model_management as management

    size = "more memory than there is"
    if model is not None:
        weights, call = model.model_size() / 1e9, management.minimum_inference_memory() / 1e9
        size = (
            f"the UNet ({weights:.1f} GB) and what is made of it"
            if on_cpu
            else f"the UNet ({weights:.1f} GB) and room for its calls ({call:.1f} GB or more)"
        )
    if on_cpu:
        where, otherwise = f"the computer's memory{_free(torch.device('cpu'))}", OTHERWISE_ON_CPU
    else:
        device = management.get_torch_device()
        where, otherwise = f"{device}{_free(device)}", OTHERWISE
    return f"{doing} needs {size}, {where} ran out: {remedy}{otherwise}; nothing was changed"


def _free(device: torch.device) -> str:
    """How much is free, "" where a device that ran out does not answer."""
    import comfy.model_management as management

    try:
        return f" has {management.get_free_memory(device) / 1e9:.1f} GB free and"
    except RuntimeError as error:
        logging.getLogger(__name__).debug("ModelOpt: %s tells no free memory: %s", device, error)
        return ""


class _Heard(logging.Handler):
    """Errors that ComfyUI's patches log in the thread that made this."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread and any(place in record.pathname for place in PATCHES):
            self.texts.append(record.getMessage())


@contextlib.contextmanager
def not_swallowed() -> Iterator[None]:
    """Raises for a LoRA that failed inside, and of which ComfyUI told the log alone: MemoryError of
    torch or Python where memory ran out, else ValueError.

    It logs the error and returns the weight without the patch, which would then be missing in a file
    for ever.
    """
    heard, root = _Heard(), logging.getLogger()
    level = root.level
    root.addHandler(heard)
    root.setLevel(min(level, logging.ERROR))  # ComfyUI's --verbose CRITICAL drops errors
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(heard)
    for text in heard.texts:
        error = RuntimeError(text)
        if ran_out(error):
            raise MemoryError(text) if of_cpu(error) else torch.OutOfMemoryError(text)
    if heard.texts:
        raise ValueError(
            "a LoRA must become part of the weights it is for, ComfyUI could not compute it "
            f"({brief(' '.join(heard.texts[0].split()))}): take that LoRA out, or get one made for "
            "this model; nothing was changed"
        )
